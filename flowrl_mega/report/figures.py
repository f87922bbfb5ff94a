"""Pictures for the page: SVG whose colours the page chooses, with a text in its place for those who cannot see it.

No text of a run is drawn, as names may hold what matplotlib reads as mathematics: they stand beside the picture.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from flowrl_mega.monitor.plots import LINE_STYLES, MARKERS, PALETTE
from flowrl_mega.report.curves import Curve
from flowrl_mega.report.distributions import QUANTILES, Histogram, LogZ
from flowrl_mega.report.records import Floats
from flowrl_mega.report.text import number, visible

INK = "#010203"  # stands for the page's colour of text
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.13,
    "axes.formatter.limits": (-4, 5),
    "legend.frameon": False,
    "legend.fontsize": 10,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
WIDTH, HEIGHT = 4.6, 2.7  # inches
LOG_FROM = 100.0  # times the median: a curve with such a peak is drawn on a logarithmic axis
STEPS = [1, 2, 2.5, 5, 10]  # between ticks
FEW = 12  # points that are marked one by one


@dataclass
class Plot:
    title: str
    svg: Markup
    note: str = ""


@dataclass
class Line:
    """How the curve of one method looks: apart from the others without colour, too."""

    label: str
    swatch: Markup
    look: dict[str, Any]


class Painter:
    """Draws one page's pictures, so that no two of them share an id."""

    def __init__(self) -> None:
        self._drawn = 0

    def lines(self, labels: Sequence[str]) -> list[Line]:
        looks = [
            {
                "color": PALETTE[at % len(PALETTE)],
                "linestyle": LINE_STYLES[at % len(LINE_STYLES)],
                "marker": MARKERS[at % len(MARKERS)] if len(labels) > 1 else "",
                "markersize": 5,
            }
            for at in range(len(labels))
        ]
        return [Line(label, self._swatch(look), look) for label, look in zip(labels, looks, strict=True)]

    def curves(self, title: str, curves: Sequence[tuple[Line, Curve]], note: str = "") -> Plot:
        """A line a method in its band."""
        is_log = any(_has_peak(curve) for _, curve in curves) and all(curve.low.min() > 0 for _, curve in curves)

        def draw(axes: Axes) -> None:
            if is_log:
                axes.set_yscale("log")
            for line, curve in curves:
                _curve(axes, line.look, curve)
            _step_axis(axes)

        alt = f"{title} against the step. " + " ".join(_in_words(line.label, curve) for line, curve in curves)
        return Plot(title, self._svg(draw, alt), "; ".join(filter(None, [note, "logarithmic" if is_log else ""])))

    def histograms(self, title: str, of: Sequence[Histogram]) -> Plot:
        def draw(axes: Axes) -> None:
            for at, (step, edges, density) in enumerate(of):
                axes.stairs(
                    density, edges, color=PALETTE[at], linestyle=LINE_STYLES[at], label=f"step {step}", linewidth=1.8
                )
            axes.legend()
            axes.set(xlabel="residual", ylabel="density")

        return Plot(title, self._svg(draw, f"{title}, at the steps {', '.join(str(each.step) for each in of)}."))

    def bands(self, title: str, steps: Floats, quantiles: dict[str, Floats]) -> Plot:
        """The median, and between which values half and nine tenths of all lie."""
        low, lower, middle, upper, high = (quantiles[name] for name in QUANTILES)

        def draw(axes: Axes) -> None:
            axes.fill_between(steps, low, high, color=PALETTE[0], alpha=0.15, linewidth=0, label="5% to 95%")
            axes.fill_between(steps, lower, upper, color=PALETTE[0], alpha=0.3, linewidth=0, label="25% to 75%")
            marker = "o" if len(steps) <= FEW else ""
            axes.plot(steps, middle, color=PALETTE[5], linewidth=1.8, marker=marker, markersize=4, label="median")
            axes.legend()
            _step_axis(axes)

        ends = f"5%, median, 95%: {number(low[0])}, {number(middle[0])}, {number(high[0])} at step {steps[0]:.0f}; "
        ends += f"{number(low[-1])}, {number(middle[-1])}, {number(high[-1])} at step {steps[-1]:.0f}."
        return Plot(title, self._svg(draw, f"{title}. {ends}"))

    def calibration(self, title: str, of: Sequence[LogZ]) -> Plot:
        """A point a prompt: right where the line is, log Z is what the answers say."""
        group, logged, exact = (
            np.concatenate([getattr(each, name) for each in of]) for name in ("group", "logged", "exact")
        )

        def draw(axes: Axes) -> None:
            axes.axline((float(np.nanmean(group)),) * 2, slope=1, color=INK, linewidth=1, linestyle="--")
            axes.plot(group, logged, "o", color=PALETTE[0], markersize=4, alpha=0.6, label="the group's estimate")
            if not np.isnan(exact).all():
                axes.plot(exact, logged, "+", color=PALETTE[5], markersize=7, label="exact")
            axes.legend()
            axes.set(xlabel="log Z estimated or exact", ylabel="log Z as logged")

        told = f"{title}: {np.count_nonzero(~np.isnan(group - logged))} points of steps {of[0].step} to {of[-1].step}; "
        off = number(float(np.nanmean(np.abs(logged - group)))) if not np.isnan(logged - group).all() else "–"
        return Plot(title, self._svg(draw, f"{told}mean distance to the group's estimate {off}."))

    def log_z(self, title: str, of: Sequence[LogZ]) -> Plot:
        """Means over the prompts of each step."""
        looks = {"logged": ("-", PALETTE[0]), "group": ("--", PALETTE[1]), "exact": (":", PALETTE[5])}
        means = {name: [_mean(getattr(each, name)) for each in of] for name in looks}

        def draw(axes: Axes) -> None:
            for name, (style, colour) in looks.items():
                if not np.isnan(means[name]).all():
                    words = {"logged": "as logged", "group": "the group's estimate"}.get(name, name)
                    axes.plot([each.step for each in of], means[name], style, color=colour, linewidth=1.8, label=words)
            axes.legend()
            _step_axis(axes)

        told = ", ".join(f"{name} {number(values[0])} then {number(values[-1])}" for name, values in means.items())
        return Plot(title, self._svg(draw, f"{title}, steps {of[0].step} and {of[-1].step}: {told}."))

    def _swatch(self, look: dict[str, Any]) -> Markup:
        def draw(axes: Axes) -> None:
            axes.set_axis_off()
            axes.plot([0, 1, 2], [0, 0, 0], linewidth=1.8, markevery=[1], **look)

        return self._svg(draw, "", 0.6, 0.2, (0.0, 0.0, 1.0, 1.0))

    def _svg(
        self,
        draw: Callable[[Axes], None],
        alt: str,
        width: float = WIDTH,
        height: float = HEIGHT,
        place: tuple[float, float, float, float] = (0.135, 0.17, 0.845, 0.75),
    ) -> Markup:
        self._drawn += 1
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": str(self._drawn)}):
            figure = Figure(figsize=(width, height))
            FigureCanvasSVG(figure)
            draw(figure.add_axes(place))
            file = io.StringIO()
            figure.savefig(file, format="svg")
        return _for_page(file.getvalue(), alt)


def _curve(axes: Axes, look: dict[str, Any], curve: Curve) -> None:
    few = len(curve.steps) <= FEW
    marks = {"marker": look["marker"] or ("o" if few else ""), "markevery": 1 if few else max(len(curve.steps) // 6, 1)}
    if np.any(curve.high > curve.low):
        axes.fill_between(curve.steps, curve.low, curve.high, color=look["color"], alpha=0.2, linewidth=0)
    axes.plot(curve.steps, curve.mean, linewidth=1.8, **look | marks)


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))  # fewer than by itself: ticks take most of the time
    if axes.get_yscale() == "log":  # powers would be set as mathematics
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """1, 0.01, 1e5: what has room beside the axis."""
    return f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")


def _has_peak(curve: Curve) -> bool:
    return curve.largest > LOG_FROM * float(np.median(curve.mean)) > 0


def _in_words(label: str, curve: Curve) -> str:
    who = f"{label}, mean of {curve.seeds} runs" if curve.seeds > 1 else label
    return (
        f"{who}: {number(curve.first)} at step {curve.steps[0]:.0f}, in the end {number(curve.last)}; between "
        f"{number(curve.smallest)} and {number(curve.largest)}."
    )


def _mean(values: Floats) -> float:
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def _for_page(svg: str, alt: str) -> Markup:
    """The <svg> alone, in the page's font and colours, with no more digits than a screen shows."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\s*\n\s*|(\.\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"\s*font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    for at, colour in enumerate(PALETTE):
        svg = svg.replace(colour.lower(), f"var(--s{at})")
    svg = svg.replace(INK, "currentColor")
    seen = f'role="img" aria-label="{escape(visible(alt))}"' if alt else 'aria-hidden="true"'
    return Markup(re.sub(r'^<svg[^>]*? viewBox="([^"]*)"[^>]*>', lambda at: _head(at[1], seen), svg, count=1))


def _head(box: str, seen: str) -> str:
    return f'<svg viewBox="{box}" xmlns:xlink="http://www.w3.org/1999/xlink" {seen}>'
