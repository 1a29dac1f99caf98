"""The reports' pictures as SVG data URIs, legible in print and without colour vision (pure)."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 800
"""A longer curve is drawn as the means of this many stretches."""
_MOST_MARKS = 100
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"  # of Okabe and Ito: they differ in lightness too
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "maskwright",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
}

Values = NDArray[np.float64]
Curve = tuple[Values, Values]
"""Steps and what was there; NaN where there was nothing."""


def curve(steps: NDArray[np.number], values: Values, max_points: int = MAX_POINTS) -> Curve:
    """(steps, values) where there is a value; a long curve as the means of equal stretches."""
    there = ~np.isnan(values)
    steps, values = steps[there].astype(np.float64), values[there]
    size = max(1, math.ceil(len(steps) / max_points))
    firsts = np.arange(0, len(steps), size)
    if not len(firsts):
        return steps, values
    counts = np.diff(firsts, append=len(steps))
    return np.add.reduceat(steps, firsts) / counts, np.add.reduceat(values, firsts) / counts


_TOKEN_TITLES = {"mlm": "Masked-LM loss (nats per masked token)", "clm": "Causal-LM loss (nats per token)"}
"""By `objective.kind`."""


def token_figure(kind: str, train: Curve, held_out: Curve, unigram_entropy: float | None, attempts: Sequence[int] = ()) -> str | None:
    """Loss of predicting tokens: training, validation, and the unigram entropy that it has to get under."""
    return _loss_figure(_TOKEN_TITLES[kind], train, held_out, unigram_entropy, "unigram entropy", attempts)


def sentence_figure(train: Curve, held_out: Curve, attempts: Sequence[int] = ()) -> str | None:
    """Sentence loss: training, validation, and what guessing gives."""
    return _loss_figure("Sentence loss (nats per pair)", train, held_out, math.log(2.0), "guessing", attempts)


def line_figure(title: str, values: Curve, attempts: Sequence[int] = ()) -> str | None:
    """One value over steps; a dotted line where each later attempt took over."""
    steps, heights = curve(*values)
    if not len(steps):
        return None
    figure, axes = _figure(title)
    axes.plot(steps, heights, color=_BLUE, linewidth=1.3, marker="o" if len(steps) == 1 else None)
    _mark(axes, attempts)
    axes.set_ylim(bottom=min(0.0, float(heights.min())))
    return _data_uri(figure)


def histogram_figure(title: str, label: str, edges: Sequence[float], counts: Sequence[int], *, logarithmic: bool) -> str:
    """Shares of a whole that fall into the bins; bin i lies between edges i and i + 1."""
    figure, axes = _figure(title, label)
    total = max(1, sum(counts))
    axes.stairs([count / total for count in counts], edges, fill=True, color=_BLUE)
    axes.set_ylabel("share")
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return _data_uri(figure)


def bars_figure(title: str, label: str, groups: Sequence[str], series: dict[str, Sequence[float]]) -> str:
    """Groups of bars with their values written on them; values up to 1."""
    figure, axes = _figure(title, label)
    width = 0.8 / len(series)
    for nth, ((name, values), (color, hatch)) in enumerate(zip(series.items(), ((_GREY, ""), (_BLUE, ""), (_ORANGE, "//")), strict=False)):
        places = [place + (nth - (len(series) - 1) / 2) * width for place in range(len(groups))]
        axes.bar_label(axes.bar(places, values, width * 0.95, label=name, color=color, hatch=hatch), fmt="{:.2f}", fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0.0, 1.3)  # the legend is above the bars
    axes.legend(loc="upper center", ncols=len(series))
    return _data_uri(figure)


def attempt_starts(steps: NDArray[np.int64], attempts: NDArray[np.int64]) -> list[int]:
    """Steps at which an attempt took over from the one before."""
    return steps[np.flatnonzero(np.diff(attempts)) + 1].tolist()


def _mark(axes: Any, attempts: Sequence[int]) -> None:
    for step in attempts[-_MOST_MARKS:]:
        axes.axvline(step, color=_GREY, linestyle=":", linewidth=1.2)


def _loss_figure(title: str, train: Curve, held_out: Curve, reference: float | None, name: str, attempts: Sequence[int]) -> str | None:
    train, held_out = curve(*train), curve(*held_out)
    if not len(train[0]) and not len(held_out[0]):
        return None
    figure, axes = _figure(title)
    axes.plot(*train, color=_BLUE, linewidth=1.3, label="training")
    if len(held_out[0]):
        axes.plot(*held_out, color=_ORANGE, linestyle="--", marker="o", markersize=5, linewidth=1.3, label="validation")
    if reference is not None:
        axes.axhline(reference, color=_GREY, linestyle="-.", linewidth=1.2, label=f"{name} {reference:.2f}")
    _mark(axes, attempts)
    axes.legend(loc="best")
    return _data_uri(figure)


def _figure(title: str, label: str = "optimizer step") -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(label)
    return figure, axes


def _data_uri(figure: Any) -> str:
    import matplotlib as mpl

    written = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(written.getvalue().encode()).decode()
