"""The reports' pictures as SVG data URIs, legible in print and without colour vision (pure)."""

import base64
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

MAX_POINTS = 800
"""A longer curve is drawn as the means of this many stretches."""
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

Curve = tuple[list[float], list[float]]
Record = dict[str, Any]


def curve(records: Sequence[Record], key: str, max_points: int = MAX_POINTS) -> Curve:
    """(steps, values) of the records that have a value; a long curve as the means of equal stretches."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    size = max(1, math.ceil(len(points) / max_points))
    stretches = [points[first : first + size] for first in range(0, len(points), size)]
    mean = [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in stretches]
    return [step for step, _ in mean], [value for _, value in mean]


def mlm_figure(metrics: Sequence[Record], validations: Sequence[Record]) -> str | None:
    """Masked-LM loss: training, validation, and the unigram entropy that it has to get under."""
    reference = next((event["unigram_entropy"] for event in reversed(validations) if event.get("unigram_entropy") is not None), None)
    return _loss_figure("Masked-LM loss (nats per masked token)", "mlm_loss", metrics, validations, reference, "unigram entropy")


def nsp_figure(metrics: Sequence[Record], validations: Sequence[Record]) -> str | None:
    """Sentence loss: training, validation, and what guessing gives."""
    return _loss_figure("Next-sentence loss (nats per pair)", "nsp_loss", metrics, validations, math.log(2.0), "guessing")


def line_figure(title: str, key: str, metrics: Sequence[Record], attempts: Sequence[int] = ()) -> str | None:
    """One value over steps; a dotted line where each later attempt took over."""
    steps, values = curve(metrics, key)
    if not steps:
        return None
    figure, axes = _figure(title)
    axes.plot(steps, values, color=_BLUE, linewidth=1.3, marker="o" if len(steps) == 1 else None)
    for step in attempts:
        axes.axvline(step, color=_GREY, linestyle=":", linewidth=1.2)
    axes.set_ylim(bottom=min(0.0, *values))
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


def attempt_starts(metrics: Sequence[Record]) -> list[int]:
    """Steps at which an attempt took over from the one before."""
    return [record["step"] for before, record in pairwise(metrics) if record["attempt"] != before["attempt"]]


def _loss_figure(title: str, key: str, metrics: Sequence[Record], validations: Sequence[Record], reference: float | None, name: str) -> str | None:
    train, held_out = curve(metrics, key), curve(validations, key)
    if not train[0] and not held_out[0]:
        return None
    figure, axes = _figure(title)
    axes.plot(*train, color=_BLUE, linewidth=1.3, label="training")
    if held_out[0]:
        axes.plot(*held_out, color=_ORANGE, linestyle="--", marker="o", markersize=5, linewidth=1.3, label="validation")
    if reference is not None:
        axes.axhline(reference, color=_GREY, linestyle=":", linewidth=1.5, label=f"{name} {reference:.2f}")
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
