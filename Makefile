# Settings are given on the command line (make setup PYTHON=python3.12); the empty values here keep the environment out.
PYTHON =#  the interpreter that .venv is made with: Python 3.11 or 3.12
TORCH =#   auto (CUDA build where there is an NVIDIA GPU, else CPU), cpu, cuda, or system: the torch that PYTHON has
SEEDS =#   quickstart, exact-table: how many seeds
DATA =#    test*, reproduce-smoke: folder with the benchmark data
ARGS =#    test*: more arguments for pytest

PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q

# The first suitable interpreter runs tools/setup.py; that of a finished .venv comes first, so a choice once made stays.
CANDIDATES = $(or $(PYTHON),$(if $(wildcard .venv/setup.json),$(PY)) python3.11 python3.12 python3)
define SETUP
@for p in $(CANDIDATES); do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null || continue; \
	exec "$$p" tools/setup.py $(if $(TORCH),--torch "$(TORCH)") $(EXTRA); \
done; \
echo 'setup: no Python 3.11 or 3.12 found (tried: $(CANDIDATES)).' >&2; \
echo 'Install one, or name it: make setup PYTHON=/path/to/python3.12' >&2; exit 1
endef

.PHONY: help setup setup-example setup-reproduce setup-integration setup-tests setup-sglang setup-slurm setup-chromium setup-te setup-te-emulation build build-cuda-check quickstart compare example-smollm2 reproduce-smoke
.PHONY: rehearse-gpu test test-fast test-tools test-integration verify-exact exact-table lint format

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile
	@printf '\nSettings, as in make setup PYTHON=python3.12:\n'
	@awk -F ' =# *' '/^[A-Z]+ =# / {printf "  %-23s %s\n", $$1, $$2}' Makefile

setup:  ## .venv with the pinned dependencies and flowrl-mega; does nothing when all is in place
	$(SETUP)

setup-example: EXTRA := --extra example
setup-example:
	$(SETUP)

setup-integration: EXTRA := --extra example --extra data --extra dali --extra trl --extra embeddings --extra tensorboard --extra trackio --extra docs
setup-integration:
	$(SETUP)

setup-tests: EXTRA := --extra oracles --extra eval --extra linters
setup-tests:
	$(SETUP)

setup-sglang: setup  ## SGLang in an environment of its own, .venv-sglang, kept in a cache outside the clone
	@$(PY) tools/setup_sglang.py $(if $(filter-out system,$(TORCH)),--torch "$(TORCH)")

setup-te: setup  ## Transformer Engine in .venv, for GPUs; its torch part is compiled once. On a login node: TORCH=cuda
	@$(PY) tools/setup_te.py

setup-slurm:  ## SLURM's packages for the tests, where apt-get has them; does nothing when they are there
	@tools/setup_debian.sh slurm

setup-chromium:  ## Chromium's package for the tests of reports, where apt-get has it; does nothing when it is there
	@tools/setup_debian.sh chromium

setup-te-emulation: setup  ## Transformer Engine's Python, 1 MB in a cache outside the clone, for tests that emulate the rest
	@$(PY) tools/setup_te_emulation.py

build: setup  ## csrc compiled ahead of first use, for the CPU and, where torch and nvcc have it, for CUDA
	@$(PY) -m flowrl_mega.ops

build-cuda-check: setup  ## csrc/cuda compiled for sm_80 and sm_90a, its instructions counted; needs nvcc, but no GPU
	@$(PY) -m flowrl_mega.ops --check-cuda build/cuda && $(PY) tools/sass.py build/cuda

quickstart: setup  ## the main job: GRPO and FlowRL from one warm start, a table and a picture (SEEDS=3: the spread)
	@.venv/bin/flowrl-mega quickstart $(if $(SEEDS),--seeds $(SEEDS))

compare: setup  ## the fair comparison: equal tuning trials for each method, three seeds
	@$(PY) -m examples.compare

exact-table: setup  ## docs/results/exact.md: every objective where the right end is known exactly (SEEDS=3: the spread)
	@$(PY) -m examples.exact.run $(if $(SEEDS),--seeds $(SEEDS))

setup-docs: EXTRA := --extra docs
setup-docs:
	$(SETUP)

docs: setup-docs  ## docs/ as a site, in build/docs
	@$(PY) -m mkdocs build --quiet

setup-reproduce: EXTRA := --extra example --extra data
setup-reproduce:
	$(SETUP)

reproduce-smoke: setup-reproduce  ## a study from its base model to its report, small: SmolLM2-135M, two methods (DATA=DIR)
	@$(PY) -m flowrl_mega.cli reproduce examples/studies/smoke.yaml $(if $(DATA),--data $(DATA))

example-smollm2: setup-example  ## train a real pretrained model, SmolLM2-135M-Instruct, on reasoning-gym tasks
	@$(PY) -m examples.smollm2.run

test: setup-tests setup-te-emulation  ## every test of the package that needs no real model or service, in two runs side by side
	@OMP_NUM_THREADS=1 $(PY) tests/side_by_side.py $(if $(DATA),--data $(DATA)) $(ARGS)

test-fast: setup-tests  ## those without ranks, and without what waits or computes for seconds: an inner loop
	@$(PYTEST) tests -m "not integration and not exact and not tools and not ranks and not slow" $(ARGS)

test-tools: setup-tests setup-te-emulation  ## tests of tools/: benchmarks, releases, setup
	@$(PYTEST) tests -m "tools and not integration" $(if $(DATA),--data $(DATA)) $(ARGS)

test-integration: setup-integration setup-sglang setup-slurm setup-chromium setup-te-emulation  ## tests with a real model, SGLang, SLURM, DALI
	@$(PYTEST) tests -m integration $(if $(DATA),--data $(DATA)) $(ARGS)

rehearse-gpu: setup setup-te-emulation  ## tools/gpu_check.sh, small and emulated, in less than 10 minutes
	@tools/gpu_check.sh --rehearse --budget 580

verify-exact: setup  ## the trainer against exact answers on a space small enough to enumerate
	@$(PYTEST) tests -m exact $(ARGS)

lint: setup  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup  ## rewrite the sources as lint wants them
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
