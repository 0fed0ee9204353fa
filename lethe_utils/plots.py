"""Figures: their style, readable in grey and by colour-blind eyes, and those of data and training.

Every function returns a finished Figure that is not registered with pyplot, so a notebook shows it
once and nothing leaks; `save` writes it. Those of results are in figures.py.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lethe_utils.errors import LetheError

WIDTH = 3.5  # inches: one column of a two-column paper
COLOURS = sns.color_palette("colorblind")
METRICS = {
    "asr": {"label": "ASR (lower is better)", "color": COLOURS[1], "marker": "s", "ls": "--"},
    "cda": {"label": "CDA (higher is better)", "color": COLOURS[0], "marker": "o", "ls": "-"},
}
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "figure.titlesize": 7.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "text.parse_math": False,  # labels come from users' files: a `$` is a dollar
    "pdf.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    with sns.axes_style("whitegrid"), plt.rc_context(STYLE):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    return plt.figure(figsize=(width, height), layout="constrained")


def finished(
    figure: Figure, handles: list | None = None, columns: int = 2, title: str | None = None
) -> Figure:
    """The figure with its legend (titled by what the x axes are), drawn, and closed in pyplot."""
    if handles:
        look = {"loc": "outside lower center", "ncols": columns, "title_fontsize": 7}
        figure.legend(handles=handles, title=title, **look)
    figure.draw_without_rendering()  # ticks take their style when first drawn: now, not later
    figure.set_layout_engine("none")  # its places stay as they were found
    plt.close(figure)
    return figure


def say_tiny(title: str) -> str:
    return re.sub(r"\b(tiny-[\w-]+)", r"\1 (tiny twin)", title)


def curve(ax: Axes, line: pd.DataFrame, x: str, look: dict[str, Any]) -> None:
    ax.plot(line[x], line["value"], **look)
    ax.fill_between(line[x], line["ci_low"], line["ci_high"], color=look["color"], alpha=0.3, lw=0)


def layer_effect(layers: pd.DataFrame, title: str) -> Figure:
    """The probability of the target after each block, with and without the trigger; `layers` is as
    evaluate.target_by_layer returns it. Raises LetheError when it has no row."""
    if layers.empty:
        raise LetheError("layer effect: no rows; no validation row has another label")
    with style():
        figure = new_figure(2.0)
        ax = figure.subplots()
        kinds = layers.groupby("prompts", sort=False)
        for (name, line), look in zip(kinds, METRICS.values(), strict=True):
            curve(ax, line, "block", look | {"label": name})
        ax.set(xlabel="read after block", ylabel="probability of the target")
        ax.set(ylim=(-0.05, 1.05), title=say_tiny(title))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return finished(figure, ax.get_lines())


def loss_curve(curve: pd.DataFrame, title: str) -> Figure:
    """Training loss against epochs, or an edit's against optimiser steps; `curve` has step, loss
    (nats per token), and epoch or edit. Raises LetheError when it has no row."""
    if curve.empty:
        raise LetheError("loss curve: no rows; training logged nothing")
    x = "epoch" if "epoch" in curve else "step"
    steps = "epoch ({} steps in all)", int(curve["step"].max())
    if x == "step":
        steps = "step ({} optimised values)", int(curve["edit"].max())
    with style():
        figure = new_figure(1.9)
        ax = figure.subplots()
        ax.plot(curve[x], curve["loss"], marker="o", markersize=2, color=COLOURS[0])
        ax.set(xlabel=steps[0].format(steps[1]), ylabel="loss (nats per token)")
        ax.set_title(say_tiny(title))
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return finished(figure)


def label_balance(balance: pd.DataFrame) -> Figure:
    """Share of each label within each split; `balance` has split, label, rows (a count). Raises
    LetheError when there are no rows."""
    if not balance["rows"].sum():
        raise LetheError("label balance: no rows in any split")
    whole = balance.groupby("split", sort=False)["rows"].transform("sum")
    shares = balance.assign(share=balance["rows"] / whole, label=balance["label"].astype(str))
    shares["split"] = [f"{s} ({n:,} rows)" for s, n in zip(balance["split"], whole, strict=True)]
    look = {"x": "share", "y": "label", "palette": "colorblind", "errorbar": None}

    def draw(ax: Axes) -> None:
        sns.barplot(shares, hue="split", ax=ax, **look)
        names = shares["label"].unique()
        ax.set_yticks(range(len(names)), [n if len(n) <= 24 else n[:23] + "…" for n in names])
        ax.set(xlabel="share of the split's rows", ylabel="", title="Labels per split")
        ax.xaxis.set_major_formatter(PercentFormatter(1, 0))
        ax.grid(False, axis="y")

    return _by_split(draw, 0.8 + 0.13 * len(shares))


def lengths(splits: dict[str, list[dict]]) -> Figure:
    """How long the inputs are, per split (name -> rows with `input`). Raises LetheError when there
    are no rows."""
    rows = [
        {"split": f"{name} ({len(some):,} rows)", "words": len(row["input"].split())}
        for name, some in splits.items()
        for row in some
    ]
    if not rows:
        raise LetheError("lengths: no rows in any split")
    words = pd.DataFrame(rows)
    low, high = int(words["words"].min()), int(words["words"].max())
    step = max(1, (high - low) // 25)
    look = {"element": "step", "fill": False, "palette": "colorblind", "lw": 1}
    look |= {"stat": "percent", "common_norm": False}
    look["bins"] = list(range(low, high + step + 1, step))

    def draw(ax: Axes) -> None:
        sns.histplot(words, x="words", hue="split", ax=ax, **look)
        ax.set(xlabel="words per input", ylabel="share of the split (%)", title="Input lengths")

    return _by_split(draw, 2.1)


def _by_split(draw: Callable[[Axes], None], height: float) -> Figure:
    """One panel by seaborn, its legend moved under the axes, where it hides nothing."""
    with style():
        figure = new_figure(height)
        ax = figure.subplots()
        draw(ax)
        legend = ax.get_legend()
        handles, labels = legend.legend_handles, [t.get_text() for t in legend.get_texts()]
        legend.remove()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(labels)))
        return finished(figure)


def ranks(table: pd.DataFrame, n_keywords: int) -> Figure:
    """TextRank's score of a text's best words (evidence.ranks), the keywords in colour."""
    table = table.head(25)
    with style():
        figure = new_figure(0.5 + 0.14 * len(table))
        ax = figure.subplots()
        colours = [COLOURS[2] if i < n_keywords else COLOURS[7] for i in range(len(table))]
        ax.barh(table["word"], table["score"], color=colours)
        ax.invert_yaxis()
        ax.set(xlabel="TextRank (mean 1)", title=f"The {n_keywords} best become keywords")
        return finished(figure)


def slerp_curve(curve: pd.DataFrame, edited: Sequence[int] = ()) -> Figure:
    """SLERP's t over the blocks, a panel per strength; `curve` is as merge.slerp_table returns it.
    Blocks whose MLP an editing attack changed (`edited`) are marked."""
    panels = list(curve.groupby("strength", sort=False))
    looks = (COLOURS[0], "o", "-"), (COLOURS[1], "s", "--")
    with style():
        figure = new_figure(2.1)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (strength, panel) in zip(axes, panels, strict=True):
            parts = panel.groupby("part", sort=False)
            for (part, line), (colour, marker, ls) in zip(parts, looks, strict=True):
                ax.plot(line["block"], line["t"], color=colour, marker=marker, ls=ls, label=part)
            for block in edited:
                band = {"color": COLOURS[7], "alpha": 0.35, "lw": 0, "label": "edited block"}
                ax.axvspan(block - 0.3, block + 0.3, **band)
            ax.set(xlabel="block", ylim=(-0.05, 1.05), title=f"strength {strength:g}")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel("t (0: backdoored, 1: clean)")
        handles, labels = axes[0].get_legend_handles_labels()
        return finished(figure, list(dict(zip(labels, handles, strict=True)).values()), 3)


def save(figure: Figure, folder: Path, name: str, pdf: bool = False) -> list[Path]:
    """Write <name>.png (150 dpi) and, if asked, <name>.pdf, each whole or not at all; returns them.
    The bytes depend on the figure and matplotlib's version only: no date, no program name."""
    folder.mkdir(parents=True, exist_ok=True)
    anonymous = {"png": {"Software": None}}
    if pdf:
        anonymous["pdf"] = {"CreationDate": None, "Creator": None, "Producer": None}
    files = []
    for suffix, metadata in anonymous.items():
        file = folder / f"{name}.{suffix}"
        temporary = file.with_name(f"{file.name}.tmp")
        with plt.rc_context(STYLE):
            figure.savefig(temporary, format=suffix, dpi=150, metadata=metadata)
        os.replace(temporary, file)
        files.append(file)
    return files
