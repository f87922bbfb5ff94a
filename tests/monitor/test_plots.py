"""The pictures: right data in the right place (checked on the drawn objects), and a PNG of the expected size."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from flowrl_mega.monitor import plots
from flowrl_mega.monitor.run_folder import METRICS, RunFolder

pytestmark = pytest.mark.slow

TABLE = {
    "start": {"pass_rate": 0.5, "distinct": 9.0},
    "grpo": {"pass_rate": 0.95, "distinct": 4.7, "distinct_std": 0.4},
    "grpo_kl 0.1": {"pass_rate": 0.7, "distinct": 12.0},
    "grpo_kl 0.2": {"pass_rate": 0.6, "distinct": 11.0},
    "flowrl": {"pass_rate": 0.92, "distinct": 14.8, "distinct_std": 0.6},
}
CURVES = {
    "grpo": [{"step": s, "pass_rate": s / 9, "distinct": 9 - s} for s in range(9)],
    "flowrl": [{"step": s, "pass_rate": s / 8} for s in range(9)],
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def assert_picture(path):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02  # not blank


def assert_no_overlaps(figure):
    """Titles, axis names, tick labels and legends of a picture for the README must not cover each other."""
    figure.canvas.draw()
    parts = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for axes in figure.axes:
        parts += [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            parts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [part.get_window_extent() for part in parts if getattr(part, "get_text", lambda: "legend")()]
    clashes = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not clashes
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_running_mean_is_the_mean():
    """Against hand-counted windows; both ends use what there is."""
    assert plots._running_mean([1.0, 2.0, 6.0, 3.0], 1) == [1.5, 3.0, 11 / 3, 4.5]
    assert plots._running_mean([1.0, 2.0], 0) == [1.0, 2.0]


def test_reward_against_diversity_places_and_names_each_method(drawn, tmp_path):
    """Distinct answers to the right, pass rate up; error bars where given; a sweep shares its colour and a line."""
    plots.reward_against_diversity(TABLE, tmp_path / "scatter.png")
    (figure,) = drawn
    (axes,) = figure.axes
    points = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    assert list(points) == ["start", "GRPO", "GRPO + KL 0.1", "GRPO + KL 0.2", "FlowRL"]
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in points.values()] == [
        (row["distinct"], row["pass_rate"]) for row in TABLE.values()
    ]
    assert [bars.has_xerr for bars in axes.containers] == [False, True, False, False, True]
    assert points["GRPO + KL 0.1"].get_color() == points["GRPO + KL 0.2"].get_color() != points["GRPO"].get_color()
    assert len({p.get_marker() for p in points.values()}) == 5  # told apart without colours
    assert [12.0, 11.0] in [list(line.get_xdata()) for line in axes.lines]
    assert_no_overlaps(figure)
    assert_picture(tmp_path / "scatter.png")


def test_variants_share_a_colour_but_are_no_sweep(drawn, tmp_path):
    """A line between methods says that a setting goes from one to the other. With many methods, too, every one has a
    look of its own, and the list of names leaves the axes half of the picture."""
    names = ["flowrl", "flowrl, no w", "grpo", "grpo, token mean", "grpo_kl 0.1", "grpo_kl 0.2", "grpo_kl, k2", "ppo"]
    names += ["ppo, KL 0.1", "reinforce_pp", "reinforce_pp, KL 0.1, a very long name indeed", "gspo"]
    plots.reward_against_diversity(
        {n: {"pass_rate": i, "distinct": i} for i, n in enumerate(names)}, tmp_path / "a.png"
    )
    (figure,) = drawn
    (axes,) = figure.axes
    points = [bars.lines[0] for bars in axes.containers]
    assert points[2].get_color() == points[3].get_color() and points[4].get_color() == points[6].get_color()
    assert len({(p.get_color(), p.get_marker()) for p in points}) == len(names)
    drawn_through = [
        list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata())
    ]
    assert drawn_through == [[4, 5]]
    assert "REINFORCE++, KL 0.1, a very long name indeed" in [text.get_text() for text in axes.get_legend().texts]
    assert_no_overlaps(figure)
    assert axes.get_window_extent().width > 0.4 * figure.bbox.width


def test_quickstart_figure_shows_bars_start_and_curves(drawn, tmp_path):
    """The README's picture: bars at the summary's numbers, the start as a dashed line, equal colours left and right."""
    plots.quickstart_figure({"methods": TABLE, "seeds": [0]}, CURVES, tmp_path / "quickstart.png")
    (figure,) = drawn
    pass_bars, pass_curves, distinct_bars, _ = figure.axes
    assert [bar.get_height() for bar in pass_bars.patches] == [0.95, 0.7, 0.6, 0.92]
    assert [bar.get_height() for bar in distinct_bars.patches] == [4.7, 12.0, 11.0, 14.8]
    for axes, start in ((pass_bars, 0.5), (distinct_bars, 9.0)):
        assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [start]
        assert axes.get_ylim()[0] == 0
    grpo, flowrl = pass_curves.lines[:2]
    assert list(flowrl.get_ydata()) == [s / 8 for s in range(9)]
    assert matplotlib.colors.same_color(grpo.get_color(), pass_bars.patches[0].get_facecolor())
    assert_no_overlaps(figure)
    assert_picture(tmp_path / "quickstart.png")


def test_log_z_figure_has_a_panel_a_setting(drawn, tmp_path):
    """Learned, estimated and exact are told apart, each at its own steps; a target without a log Z has no line."""
    curves = {"step": [1, 2, 3], "logged": [0.0, 0.5, 1.0], "group": [0.6, 0.9, 1.1], "watched": [0, 2], "best": [1, 2]}
    panels = {"one way": curves | {"limit": 1.2}, "another": curves | {"limit": None}}
    plots.log_z_figure(panels, tmp_path / "log_z.png")
    (figure,) = drawn
    one, another = figure.axes
    assert [list(line.get_ydata()) for line in one.lines] == [[0.6, 0.9, 1.1], [0.0, 0.5, 1.0], [1, 2], [1.2, 1.2]]
    assert list(one.lines[2].get_xdata()) == [0, 2] and len(another.lines) == 3
    assert_no_overlaps(figure)
    assert_picture(tmp_path / "log_z.png")


def ablation(seeds, cells, name_length, figures=("reward", "pass_rate", "distinct")):
    """Cells with names of this length, and [cells, seeds, 11 steps] of random numbers for each of their figures."""
    draw = np.random.default_rng(0).uniform(size=(len(figures), cells, seeds, 11))
    names = [f"weight={'x' * name_length}"[: name_length - 2] + f"{cell:02}" for cell in range(cells)]
    return draw, {
        name: [
            (
                [{"step": s + 1, "reward/mean": r, "policy/entropy": 2.0} for s, r in enumerate(draw[0, cell, seed])],
                [{"step": 20 * s, **dict(zip(figures, draw[:, cell, seed, s], strict=True))} for s in range(11)],
            )
            for seed in range(seeds)
        ]
        for cell, name in enumerate(names)
    }


def test_ablation_figure_draws_mean_and_deviation(drawn, tmp_path):
    """Against NumPy, over seeds; a null is left out of the mean of its step."""
    numbers, cells = ablation(seeds=3, cells=2, name_length=20)
    first = next(iter(cells))
    cells[first][0][1][4]["pass_rate"] = None
    plots.ablation_figure(cells, tmp_path / "ablation.png")
    (figure,) = drawn
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["reward", "entropy", "held-out reward", "held-out pass rate", "held-out distinct right answers"]
    for axes, steps, values in (
        (figure.axes[0], range(1, 12), numbers[0]),
        (figure.axes[4], range(0, 201, 20), numbers[2]),
    ):
        mean, std = values.mean(1), values.std(1, ddof=1)
        for cell, (line, band) in enumerate(zip(axes.lines, axes.collections, strict=True)):
            assert list(line.get_xdata()) == list(steps)
            np.testing.assert_allclose(line.get_ydata(), mean[cell])
            edge = {round(float(y), 9) for _, y in band.get_paths()[0].vertices}
            for sign in (-1, 1):
                assert edge >= {round(float(y), 9) for y in mean[cell] + sign * std[cell]}
    assert figure.axes[3].lines[0].get_ydata()[4] == pytest.approx(numbers[1, 0, 1:, 4].mean())
    assert not figure.axes[1].collections, "no spread, no band"
    assert_no_overlaps(figure)


def test_run_folders_of_old_names_are_drawn_alike(drawn, tmp_path):
    """A run from before metrics had groups has the same picture as one of today."""
    for name, folder in (("reward", RunFolder(tmp_path / "old")), ("reward/mean", RunFolder(tmp_path / "new"))):
        for step in range(1, 12):
            folder.log(step, {name: step / 9, "entropy": 2.0})
        plots.ablation_figure({"cell": [(folder.read(METRICS), [])]}, tmp_path / f"{folder.path.name}.png")
    old, new = ([list(axes.lines[0].get_ydata()) for axes in figure.axes] for figure in drawn)
    assert old == new and old[0] == [step / 9 for step in range(1, 12)] and old[1] == [2.0] * 11


@pytest.mark.parametrize(("cells", "name_length"), [(1, 12), (6, 60), (13, 12), (2, 129)])
def test_ablation_figure_can_be_read(cells, name_length, drawn, tmp_path):
    """Many cells look different and long names stay on the picture; without an evaluation it has two panels."""
    _, curves = ablation(seeds=1, cells=cells, name_length=name_length)
    if cells == 2:
        curves = {name: [(steps, []) for steps, _ in seeds] for name, seeds in curves.items()}
    plots.ablation_figure(curves, tmp_path / "ablation.png")
    (figure,) = drawn
    assert len(figure.axes) == (2 if cells == 2 else 5)
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == cells
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(curves)
    assert_no_overlaps(figure)
    assert_picture(tmp_path / "ablation.png")


def test_unknown_methods_get_colours_of_their_own():
    """A user's objective must not look like FlowRL."""
    colours = plots._colours(["flowrl", "mine", "yours 1", "yours 2"])
    assert len({colours[name] for name in ("flowrl", "grpo", "grpo_kl", "mine", "yours")}) == 5
