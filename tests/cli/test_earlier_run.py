"""A run that commit cef29d0 began goes on: its config.yaml and its checkpoint, as that commit wrote them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from jobs import Job

# model/, prompts.jsonl, run/ after 2 steps at tp 1, and the samples that the same commit drew in steps 3 and 4
RUN = Path(__file__).parent / "run_of_cef29d0.tar.xz"


@pytest.mark.ranks
def test_it_goes_on_as_it_would_have(tmp_path: Path) -> None:

    with tarfile.open(RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    arguments = ["train", "run/config.yaml", "--steps=4"]
    said = Job(arguments, tmp_path / "log", world=1, cwd=tmp_path).run()
    assert "Traceback" not in said
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "samples_of_steps_3_and_4.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    # That commit did not say which answers are right; none of these is.
    assert samples[8:] == [sample | {"right": False} for sample in expected]
    assert (tmp_path / "run/checkpoints/step_4").is_dir()
