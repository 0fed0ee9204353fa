"""The report's two figures, as SVG elements in the colours of the page that shows them."""

import io
import re
from collections.abc import Callable
from itertools import cycle
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lethe_utils.paper import number

Record = dict[str, Any]
# What is drawn with -> the page's variable, so that one figure serves its light and its dark look.
INK, FAINT, GRID, PERFORMANCE, CANARY = "#222222", "#767676", "#dddddd", "#0173b2", "#b34700"
VARIABLES = {INK: "ink", FAINT: "faint", GRID: "grid", PERFORMANCE: "performance", CANARY: "canary"}
INKS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(INKS, INK) | {
    "font.family": "sans-serif",
    # The first comes with matplotlib and is measured here; Verdana is as wide.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.parse_math": False,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched and copied
    "svg.hashsalt": "lethe",  # the same figure has the same bytes
}
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
DASHES = [(4, 1), (1, 1), (4, 1, 1, 1), (8, 3), (1, 4)]  # one a kind
LOOKS = [{"ls": "-", "marker": "o"}, {"ls": "--", "marker": "s"}, {"ls": ":", "marker": "^"}]


def draw(record: Record, kinds: list[str], chosen: Record) -> dict[str, Markup]:
    """The figures `curve` (with a line for each of the canary's kinds) and `losses`."""
    with matplotlib.rc_context(STYLE):
        drawn = {"curve": _curve(record, kinds, chosen), "losses": _losses(record)}
        return {name: _svg(name, figure) for name, figure in drawn.items()}


def brief(value: float) -> str:
    """A share in as few digits as it takes: .75, 0, 1."""
    return f"{round(value, 3):g}".removeprefix("0") or "0"


def _svg(name: str, figure: Figure) -> Markup:
    """An element of a page, its ids apart from those of the other figure."""
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    element = buffer.getvalue().partition("<svg")
    svg = re.sub(r'(\bid="|\burl\(#|href="#)', rf"\g<1>{name}-", "".join(element[1:]))
    colours = "|".join(VARIABLES)
    found = rf"(?<=fill: )(?:{colours})|(?<=stroke: )(?:{colours})"
    return Markup(re.sub(found, lambda colour: f"var(--{VARIABLES[colour[0]]})", svg))


def _series(record: Record) -> dict[str, list[Record]]:
    """Each method's points, between the suspect and the clean model, which all share."""
    suspect, *merged, clean = record["points"]
    methods = dict.fromkeys(point["model"] for point in merged)
    return {m: [suspect, *(at for at in merged if at["model"] == m), clean] for m in methods}


def _curve(record: Record, kinds: list[str], chosen: Record) -> Figure:
    """Performance above, the canary's ASR below, against merge strength, a line per method."""
    series = _series(record)
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)

    def level(ax: Axes, y: float, name: str, dash: str = "--") -> None:
        ax.axhline(y, ls=dash, lw=1.1, color=INK, label=f"{name} ({number(y)})")

    def lines(ax: Axes, share: Callable[[Record], Record], what: str, color: str) -> None:
        for (method, points), look in zip(series.items(), cycle(LOOKS), strict=False):
            x, shares = [at["strength"] for at in points], [share(at) for at in points]
            y = [s["value"] for s in shares]
            # A bound that is off by a rounding error is no distance.
            spread = [[max(0, s["value"] - s["low"]) for s in shares]]
            spread += [[max(0, s["high"] - s["value"]) for s in shares]]
            ax.errorbar(x, y, yerr=spread, capsize=2.5, elinewidth=1, color=color, **look)
            ax.plot([], [], color=color, label=f"{what}, {method}", **look)
        ring = {"marker": "o", "ms": 12, "mfc": "none", "mec": INK, "ls": ""}
        ax.plot([chosen["strength"]], [share(chosen)["value"]], **ring, label="chosen")

    lines(above, lambda at: at["performance"], record["metric"], PERFORMANCE)
    least = record["points"][0]["performance"]["value"] - record["max_cda_loss"]
    level(above, least, "loss allowed")
    lines(below, lambda at: at["canary"]["all"], "all kinds", CANARY)
    shown = series.get(chosen["model"]) or next(iter(series.values()))
    for kind, dashes in zip(kinds, cycle(DASHES), strict=False):
        x, y = [[at["strength"] for at in shown], [at["canary"][kind]["value"] for at in shown]]
        below.plot(x, y, lw=1, dashes=dashes, color=FAINT, label=kind)
    level(below, record["canary_limit"], "limit")
    level(below, record["base"]["canary"]["all"]["value"], "base", ":")
    above.set(ylabel=record["metric"])
    strengths = sorted({at["strength"] for at in record["points"]})
    below.set(ylabel="canary ASR", ylim=(-0.05, 1.05), xticks=strengths)
    below.set(xlabel="merge strength (0: suspect, 1: clean model)")
    for axis in (above.yaxis, below.yaxis, below.xaxis):
        axis.set_major_formatter(lambda value, _: brief(value))
    for ax in (above, below):
        ax.legend(**BESIDE)
    return figure


def _losses(record: Record) -> Figure:
    """Training loss against epochs, a line per training."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    ax = figure.subplots()
    looks = cycle([(PERFORMANCE, "-"), (CANARY, "--")])
    for (name, logs), (colour, dash) in zip(record["losses"].items(), looks, strict=False):
        x, y = [log["epoch"] for log in logs], [log["loss"] for log in logs]
        ax.plot(x, y, ls=dash, color=colour, label=name)
    ax.set(xlabel="epoch", ylabel="loss (nats per token)")
    ax.set_ylim(bottom=0)
    ax.legend(**BESIDE)
    return figure
