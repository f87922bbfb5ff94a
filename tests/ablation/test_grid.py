"""The grid language: what `--vary` says, the cells' names and their settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jobs import write_config

from flowrl_mega.ablation.grid import cell_names, grid, read_axes, read_axis
from flowrl_mega.ablation.run import run_of
from flowrl_mega.config_file import load_config


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=paper,max10,none", ["paper", "max10", "none"]),
        ("a.b=1, 0.5,true,null,1e-6", [1, 0.5, True, None, "1e-6"]),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b=[[0.9, 0.95], [0.9, 0.99]]", [[0.9, 0.95], [0.9, 0.99]]),
        ("a.b=[0.9, 0.95],[0.9, 0.99]", [[0.9, 0.95], [0.9, 0.99]]),
        ("a.b=[{name: grpo}, {name: flowrl, beta: 6}]", [{"name": "grpo"}, {"name": "flowrl", "beta": 6}]),
        ("a.b=http://gpu7:30000,my_reward:score", ["http://gpu7:30000", "my_reward:score"]),
        ("a.b=only", ["only"]),
        ("a.b='',','", ["", ","]),
    ],
)
def test_values_are_read_as_yaml(text: str, values: list[object]) -> None:
    assert read_axis(text) == [{"a.b": value} for value in values]


def test_settings_that_change_together() -> None:
    """An objective that needs another section than the others cannot be one factor of a product."""
    axis = read_axis("objective.name+optimizer.lr=[[grpo, 1e-3], [flowrl, 5.0e-4]]")
    assert axis == [
        {"objective.name": "grpo", "optimizer.lr": "1e-3"},
        {"objective.name": "flowrl", "optimizer.lr": 5e-4},
    ]


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        ([{"objective.weight": "paper"}, {"objective.weight": "none"}], ["weight=paper", "weight=none"]),
        ([{"objective.beta": 6, "optimizer.lr": "1e-6"}], ["beta=6,lr=1e-6"]),
        ([{"optimizer.lr": 0.5, "critic.optimizer.lr": None}], ["optimizer.lr=0.5,critic.optimizer.lr=null"]),
        ([{"objective": {"name": "flowrl", "beta": 6, "z": None}}], ["objective=flowrl-beta=6-z=null"]),
        ([{"model.path": "../models/Qwen 2.5"}], ["path=..-models-Qwen-2.5"]),
        ([{"objective.name": "ppo", "critic": {}}], ["name=ppo,critic=default"]),
        ([{"optimizer.betas": [0.9, 0.95]}], ["betas=0.9-0.95"]),
    ],
)  # fmt: skip
def test_cells_have_readable_folders(choices: list[dict[str, object]], names: list[str]) -> None:
    assert cell_names(choices) == names


def test_names_that_are_no_good_for_folders_get_a_hash() -> None:
    """Two paths that differ in odd characters only; and what no file system takes. Both stay the same every time."""
    alike = cell_names([{"model.path": "a b"}, {"model.path": "a/b"}, {"model.path": "c"}])
    assert len(set(alike)) == 3 and alike[0].startswith("path=a-b-") and alike[2] == "path=c"
    long = cell_names([{"model.path": "x" * 300 + end} for end in "ab"])
    assert len(set(long)) == 2 and max(map(len, long)) < 200
    assert cell_names([{"model.path": "x" * 300 + "b"}]) == long[1:]


def test_a_grid_is_the_product_with_every_seed(tmp_path: Path) -> None:
    """Against settings written out by hand. The name, 'none', reaches the settings as the text that it is."""
    path = str(write_config(tmp_path, tmp_path))
    vary = ["optimizer.lr=1e-3,0.01", "objective=[{name: grpo}, {name: flowrl, reward_norm: none}]"]
    cells = grid(path, ["--seed=5"], read_axes(vary))
    assert [cell.name for cell in cells] == [
        "lr=1e-3,objective=grpo", "lr=1e-3,objective=flowrl-reward_norm=none",
        "lr=0.01,objective=grpo", "lr=0.01,objective=flowrl-reward_norm=none",
    ]  # fmt: skip
    run = run_of(cells[1], seed_index=2)
    assert run.folder == tmp_path / "run" / cells[1].name / "seed_7"
    wanted = yaml.safe_load(Path(path).read_text())
    wanted |= {"seed": 7, "run_dir": str(run.folder), "objective": {"name": "flowrl", "reward_norm": "none"}}
    wanted["optimizer"]["lr"] = 1e-3
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(wanted))
    assert run.config == load_config(tmp_path / "wanted.yaml")
