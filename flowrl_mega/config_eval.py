"""The settings of `flowrl-mega eval`. Where a training run has the same setting, it has the same name here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from flowrl_mega.config import ConfigError, DataSettings, ParallelSettings, RewardSettings
from flowrl_mega.config_rollout import RolloutSettings, SyncSettings, key_faults, server_faults
from flowrl_mega.settings import Needs, PathText, Settings, refuse_unread


class EvalModel(Settings):
    path: PathText | None = Field(
        None,
        description="Hugging Face folder, or Megatron checkpoint of any layout; `null` with engine `chat`, whose "
        "server has its own model.",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Data type of the weights; `auto` is bf16 on a GPU, else fp32."
    )
    name: str | None = Field(
        None, description="Name of the server's model, for engine `chat`; `null` takes the first that it lists."
    )


class EvalRollout(Settings):
    """How answers are written; the defaults are those of the paper's evaluation."""

    engine: Literal["embedded", "sglang", "chat"] = Field(
        "embedded",
        description="Generator of answers: these processes, SGLang servers, or any server of OpenAI's chat protocol.",
    )
    max_tokens: int = Field(8192, ge=1, description="Longest answer in tokens, including the end token.")
    temperature: float = Field(0.6, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Probability mass of nucleus sampling; 1 disables it.")
    top_k: int = Field(0, ge=0, description="Most likely tokens to sample from; 0 disables the limit.")
    servers: Annotated[int, Field(ge=1)] | list[str] = Field(
        1, description="Number of servers to start, or list of URLs of running ones."
    )
    python: PathText | None = Field(None, description="Python interpreter that has SGLang; `null` takes this one.")
    server_args: dict[str, Any] = Field(
        default_factory=dict, description="SGLang's own flags, passed on to the servers."
    )
    api_key_file: PathText | None = Field(None, description="File with the API key that the servers require.")
    concurrency: int = Field(512, ge=1, description="Most answers under way at one server.")
    request_timeout_s: float = Field(
        7200.0, gt=0, description="Time limit of one answer in seconds; exceeding it ends the evaluation."
    )
    hang_s: float = Field(60.0, gt=0, description="Silence of a busy server, in seconds, after which it is probed.")
    start_timeout_s: float = Field(900.0, gt=0, description="Time limit for servers to become ready, in seconds.")

    def of_servers(self) -> RolloutSettings:
        """The same for whoever starts servers and sends them prompts. They keep the weights that they start with."""
        shared = self.model_dump(exclude={"engine", "temperature"})
        return RolloutSettings(engine="sglang", sync=SyncSettings(transfer="disk"), **shared)


class JudgeSettings(Settings):
    """A language model that says how varied a problem's attempts are, by the paper's protocol."""

    url: str = Field(description="URL of a server of OpenAI's chat protocol.")
    model: str | None = Field(None, description="Name of the server's model; `null` takes the first that it lists.")
    api_key_file: PathText | None = Field(None, description="File with the API key that the server requires.")
    concurrency: int = Field(8, ge=1, description="Most problems under way at once.")
    max_tokens: int = Field(512, ge=1, description="Longest verdict in tokens, including its reasoning.")
    timeout_s: float = Field(300.0, gt=0, description="Time limit of one verdict in seconds.")


class EvalReward(RewardSettings):
    """As in training; by default each row's kind says what grades its answers."""

    function: PathText = Field(
        "flowrl_mega.rewards.by_kind:score",
        description="Reward as module:function or path/to/file.py:function, as in training; the default grades each "
        "row by its kind.",
    )


class EvalConfig(Settings):
    run_dir: PathText = Field(
        description="Results folder, which receives answers/, samples.jsonl, scores.json and scores.md; an evaluation "
        "is continued there."
    )
    benchmarks: list[str] = Field(
        min_length=1,
        description="Benchmarks: names from docs/evaluation.md, reasoning_gym:TASK, or JSON lines files as for "
        "`data.path` in training.",
    )
    data: PathText | None = Field(
        None, description="Folder with NAME.jsonl for each benchmark; `null` downloads them from the Hugging Face hub."
    )
    k: int = Field(16, ge=1, description="Answers per problem.")
    problems: int | None = Field(
        None, ge=1, description="Problems taken from each benchmark, counted from its start; `null` takes all."
    )
    seed: int = Field(0, ge=0, description="Random seed of sampling.")
    chat_template: bool | None = Field(
        None,
        description="Wrap prompts in the chat template of the model's tokenizer; `null` does so where there is one.",
    )
    template_date: date = Field(
        DataSettings.model_fields["template_date"].default,
        description="Date given to chat templates that insert the current date.",
    )
    model: EvalModel = Field(EvalModel(), description="Model that is evaluated.")
    parallel: ParallelSettings = Field(ParallelSettings(), description="Layout of the model, for engine `embedded`.")
    rollout: EvalRollout = Field(EvalRollout(), description="Generation of answers.")
    reward: EvalReward = Field(EvalReward(), description="Grading of answers, as in training.")
    diversity: Literal["fast", "all"] = Field(
        "fast",
        description="Measures of diversity; `all` adds the Vendi score and self-BLEU (needs flowrl-mega[eval]), which "
        "take minutes for long answers.",
    )
    embeddings: PathText | None = Field(
        None,
        description="Model of sentence-transformers, a folder or a name on the hub, that adds measures of difference "
        "in meaning (needs flowrl-mega[embeddings]).",
    )
    judge: JudgeSettings | None = Field(
        None, description="Language model that judges diversity, as {url: ..}; `null` has none."
    )


SERVERS = "rollout.servers rollout.concurrency rollout.request_timeout_s rollout.api_key_file"
OWN_SERVERS = "rollout.python rollout.server_args rollout.hang_s rollout.start_timeout_s"
NEEDS = (
    Needs(SERVERS, "rollout.engine=sglang or chat", lambda c: c.rollout.engine != "embedded"),
    Needs(OWN_SERVERS, "rollout.engine=sglang", lambda c: c.rollout.engine == "sglang"),
    Needs("parallel", "rollout.engine=embedded", lambda c: c.rollout.engine == "embedded"),
    Needs("model.name", "rollout.engine=chat", lambda c: c.rollout.engine == "chat"),
    Needs("model.path model.dtype", "rollout.engine=embedded or sglang", lambda c: c.rollout.engine != "chat"),
    Needs(
        "chat_template template_date",
        "rollout.engine=embedded or sglang (a chat server applies its own)",
        lambda c: c.rollout.engine != "chat",
    ),
)


def check_evaluation(config: EvalConfig) -> None:
    """Raises ConfigError for settings that contradict each other, or that nothing reads."""
    if faults := list(_faults(config)):
        raise ConfigError("\n".join(faults))
    refuse_unread(config, NEEDS)


def _faults(config: EvalConfig) -> Iterator[str]:
    rollout = config.rollout
    if config.model.path is None and rollout.engine != "chat":
        yield (
            "model.path: missing; give a Hugging Face folder or a Megatron checkpoint, also for servers that run "
            "already: prompts are made with its tokenizer"
        )
    if twice := [name for name in dict.fromkeys(config.benchmarks) if config.benchmarks.count(name) > 1]:
        yield f"benchmarks: {twice[0]!r} is there twice; give each once"
    if rollout.engine == "chat" and not isinstance(rollout.servers, list):
        yield f"rollout.servers = {rollout.servers}: chat servers are not started here; give their URLs"
    if rollout.engine == "chat" and rollout.top_k:
        yield f"rollout.top_k = {rollout.top_k}: is not in OpenAI's protocol; leave it out"
    yield from server_faults(rollout.servers, rollout.api_key_file)
    if config.judge is not None:
        yield from key_faults(config.judge.api_key_file, "judge.api_key_file")
        if not config.judge.url.startswith(("http://", "https://")):
            yield f"judge.url = {config.judge.url!r}: is no URL; write it as http://HOST:PORT"
        if config.k < 2:
            yield f"judge: k = {config.k}: what differs can only be judged of several attempts; take k of at least 2"
    if config.reward.overlong is not None:
        yield "reward.overlong: a penalty of training; leave it out"
