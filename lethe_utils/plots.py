"""Figures: made for one column of a two-column paper, readable in grey and by colour-blind eyes.

Every function returns a finished Figure that is not registered with pyplot, so a notebook shows it
once and nothing leaks; `save` writes it. Results are checked and pooled as in tables.py.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lethe_utils import tables
from lethe_utils.errors import LetheError

WIDTH = 3.5  # inches: one column
COLOURS = sns.color_palette("colorblind")
METRICS = {
    "asr": {"label": "ASR (lower is better)", "color": COLOURS[1], "marker": "s", "ls": "--"},
    "cda": {"label": "CDA (higher is better)", "color": COLOURS[0], "marker": "o", "ls": "-"},
}
EVIDENCE = {
    0: {"label": "without evidence", "facecolor": COLOURS[7], "edgecolor": "white"},
    1: {"label": "with evidence", "facecolor": COLOURS[2], "edgecolor": "white", "hatch": "////"},
}
SWEEPS = {
    "strength": "merge strength (0: backdoored model, 1: clean model)",
    "keywords": "keywords of evidence",
    "clean_ratio": "clean data the defender has (share of train)",
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
def _style() -> Iterator[None]:
    with sns.axes_style("whitegrid"), plt.rc_context(STYLE):
        yield


def _figure(height: float) -> Figure:
    return plt.figure(figsize=(WIDTH, height), layout="constrained")


def _finished(figure: Figure) -> Figure:
    figure.draw_without_rendering()  # ticks take their style when first drawn: now, not later
    plt.close(figure)
    return figure


def _say_tiny(title: str) -> str:
    return re.sub(r"\b(tiny-[\w-]+)", r"\1 (tiny twin)", title)


def _setup_title(setup: pd.DataFrame) -> str:
    """Title of one (model, dataset, attack) of pooled rows."""
    first, seeds = setup.iloc[0], int(setup["seeds"].max())
    many = f", {seeds} seeds" if seeds > 1 else ""
    return _say_tiny(f"{first['model']}, {first['dataset']}, {first['attack']}{many}")


def _setups(scored: pd.DataFrame) -> list[pd.DataFrame]:
    return [group for _, group in scored.groupby(tables.SETUP, sort=False)]


def _stack(figure: Figure, heights: list[float]) -> list[SubFigure]:
    return list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])


def bars(table: pd.DataFrame) -> Figure:
    """ASR and CDA of every defense on the test split, a row of panels per (model, dataset, attack).

    Args:
        table: results (metrics.COLUMNS); seeds are pooled, whiskers are 95 % Wilson intervals.
    Raises:
        LetheError: see tables.select, or there is no ASR or CDA.
    """
    rows = tables.on_test(table)
    rows = rows[rows["metric"].isin(list(METRICS))]
    if rows.empty:
        raise LetheError("results table: no asr or cda rows to plot")
    setups = _setups(tables.pool(rows, tables.SETUP))
    heights = [0.55 + 0.28 * setup["defense"].nunique() for setup in setups]
    with _style():
        figure = _figure(sum(heights) + 0.3)
        for part, setup in zip(_stack(figure, heights), setups, strict=True):
            part.suptitle(_setup_title(setup))
            axes = part.subplots(1, 2, sharey=True)
            for ax, metric in zip(axes, METRICS, strict=True):
                _bar_panel(ax, setup[setup["metric"] == metric], list(setup["defense"].unique()))
                ax.set_title(METRICS[metric]["label"])
        handles = [Patch(lw=0.3, **EVIDENCE[e]) for e in sorted(rows["evidence"].unique())]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return _finished(figure)


def _bar_panel(ax: Axes, scored: pd.DataFrame, defenses: list[str]) -> None:
    """Bars of one metric; numbers stand in a column at the right, clear of the whiskers."""
    thick = 0.8 / max(1, scored["evidence"].nunique())
    for evidence, group in scored.groupby("evidence"):
        shift = 0 if thick > 0.5 else (evidence - 0.5) * thick
        y = group["defense"].map(defenses.index).to_numpy() + shift
        spread = _whiskers(group)
        error = {"elinewidth": 0.7, "capsize": 1.2, "capthick": 0.7}
        ax.barh(
            y,
            group["value"],
            thick * 0.92,
            xerr=spread,
            error_kw=error,
            lw=0.3,
            **EVIDENCE[evidence],
        )
        for place, value in zip(y, group["value"], strict=True):
            right = ax.get_yaxis_transform()
            ax.text(1.03, place, tables.number(value), transform=right, va="center", size=6)
    names = ["none\n(backdoored)" if d == "none" else d for d in defenses]
    ax.set_yticks(range(len(defenses)), names)
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", ".5", "1"])
    ax.set_ylim(len(defenses) - 0.5, -0.5)
    ax.grid(False, axis="y")


def _whiskers(scored: pd.DataFrame) -> np.ndarray:
    """Distances to the interval's ends, (2, rows); a bound off by rounding is no distance."""
    ends = [scored["value"] - scored["ci_low"], scored["ci_high"] - scored["value"]]
    return np.clip(ends, 0, None)


def sweep(sweeps: pd.DataFrame, kind: str) -> Figure:
    """ASR and CDA along one sweep, a panel per merge method, bands of 95 % Wilson intervals.

    Args:
        sweeps: metrics.SWEEP_COLUMNS; seeds are pooled.
        kind: strength, keywords or clean_ratio.
    Raises:
        LetheError: another kind, no rows of it, or see tables.select.
    """
    if kind not in SWEEPS:
        raise LetheError(f"sweep {kind!r}: choose one of {', '.join(SWEEPS)}")
    if "sweep" not in sweeps:
        raise LetheError("sweep: no column sweep; pass sweeps.csv, not results.csv")
    rows = sweeps[(sweeps["sweep"] == kind) & sweeps["metric"].isin(list(METRICS))]
    if rows.empty:
        raise LetheError(f"sweep {kind!r}: no rows; list its points in the ..._sweep parameter")
    scored = tables.pool(tables.select(rows), [*tables.SETUP, "x"])
    setups = _setups(scored)
    heights = [0.6 + 1.25 * -(-setup["defense"].nunique() // 2) for setup in setups]
    with _style():
        figure = _figure(sum(heights) + 0.3)
        for part, setup in zip(_stack(figure, heights), setups, strict=True):
            part.suptitle(_setup_title(setup))
            part.supxlabel(SWEEPS[kind], size=7)
            _sweep_panels(part, setup)
        handles, labels = figure.subfigs[0].axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return _finished(figure)


def _sweep_panels(part: SubFigure, setup: pd.DataFrame) -> None:
    methods = list(setup["defense"].unique())
    columns = min(2, len(methods))
    grid = part.subplots(-(-len(methods) // 2), columns, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[len(methods) :]:
        ax.set_visible(False)
    for ax, method in zip(grid.flat, methods, strict=False):
        _curves(ax, setup[setup["defense"] == method])
        ax.set_title(method)
        ax.set(ylim=(-0.05, 1.05), yticks=[0, 0.25, 0.5, 0.75, 1])


def _curves(ax: Axes, scored: pd.DataFrame) -> None:
    for metric, look in METRICS.items():
        line = scored[scored["metric"] == metric].sort_values("x")
        ax.plot(line["x"], line["value"], **look)
        band = {"color": look["color"], "alpha": 0.2, "lw": 0}
        ax.fill_between(line["x"], line["ci_low"], line["ci_high"], **band)
    ax.set_xticks(sorted(scored["x"].unique()))
    ax.xaxis.set_major_formatter("{x:g}")


def attacks(table: pd.DataFrame) -> Figure:
    """ASR before and after each merge, a panel per attack on one model and data set.

    Args:
        table: results (metrics.COLUMNS) of one model and data set; seeds are pooled, whiskers are
            95 % Wilson intervals. `none` is the model before any merge, `base` the floor.
    Raises:
        LetheError: see tables.select, or there is no ASR.
    """
    rows = tables.on_test(table)
    rows = rows[(rows["metric"] == "asr") & rows["defense"].isin(["none", "base", *tables.MERGES])]
    if rows.empty:
        raise LetheError("results table: no asr rows to plot")
    setups = _setups(tables.pool(rows, tables.SETUP))
    first = setups[0].iloc[0]
    with _style():
        lines = -(-len(setups) // 2)
        figure = _figure(0.6 + 1.5 * lines)
        figure.suptitle(_say_tiny(f"{first['model']}, {first['dataset']}: ASR (lower is better)"))
        grid = figure.subplots(lines, min(2, len(setups)), sharex=True, sharey=True, squeeze=False)
        for ax in grid.flat[len(setups) :]:
            ax.set_visible(False)
        for ax in grid.flat[max(0, len(setups) - 2) : len(setups)]:
            ax.tick_params(labelbottom=True)  # the lowest of its column, whatever is hidden below
        for ax, setup in zip(grid.flat, setups, strict=False):
            _bar_panel(ax, setup, list(setup["defense"].unique()))
            seeds = int(setup["seeds"].max())
            ax.set_title(f"{setup.iloc[0]['attack']}, {seeds} seed{'s' * (seeds > 1)}")
        handles = [Patch(lw=0.3, **EVIDENCE[e]) for e in sorted(rows["evidence"].unique())]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return _finished(figure)


def rank(table: pd.DataFrame) -> Figure:
    """ASR against CDA, a point per defense: the best stands at the top left.

    Args:
        table: results (metrics.COLUMNS) of one setup; seeds are pooled, whiskers are 95 % Wilson
            intervals. Points are numbered by CDA - ASR; the list below the axes names them.
    Raises:
        LetheError: see tables.select, or no defense has both.
    """
    scored = tables.pool(tables.on_test(table), tables.SETUP)
    wide = scored[scored["metric"].isin(list(METRICS))].pivot(
        index="name", columns="metric", values=["value", "ci_low", "ci_high"]
    )
    if not {("value", "asr"), ("value", "cda")} <= {*wide.columns}:
        raise LetheError("results table: no defense has both asr and cda")
    wide = wide.dropna()
    lead = wide["value", "cda"] - wide["value", "asr"]
    wide = wide.loc[lead.sort_values(ascending=False, kind="stable").index]
    with _style():
        lines = -(-len(wide) // 2)
        figure = _figure(2.6 + 0.125 * lines)
        ax = figure.subplots()
        for number, (name, row) in enumerate(wide.iterrows(), 1):
            _rank_point(ax, number, row, _group(name))
            text = f"{number} {name} {tables.number(row['value', 'asr'])}/"
            ax.plot([], [], " ", label=text + tables.number(row["value", "cda"]))
        ax.set(xlabel=METRICS["asr"]["label"], ylabel=METRICS["cda"]["label"])
        ax.set_xscale("symlog", linthresh=0.1, linscale=1)
        ax.set(xlim=(-0.005, 1.1), xticks=[0, 0.05, 0.1, 0.5, 1])
        ax.set_xticklabels(["0", ".05", ".1", ".5", "1"])
        ax.set_title(_setup_title(scored))
        ax.minorticks_off()
        key = [Patch(color=colour, label=group) for group, colour in GROUPS.items()]
        ax.legend(handles=key, loc="best")
        handles = [line for line in ax.lines if not line.get_label().startswith("_")]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2,
            handlelength=0,
            handletextpad=0,
            title="number, name, ASR/CDA; ordered by CDA - ASR",
            title_fontsize=6.5,
        )
        return _finished(figure)


GROUPS = {"control": COLOURS[7], "Lethe": COLOURS[2], "other defense": COLOURS[0]}


def _group(name: str) -> str:
    plain = name.removesuffix(" + evidence")
    if plain in tables.CONTROLS:
        return "control"
    return "Lethe" if plain in tables.MERGES else "other defense"


def _rank_point(ax: Axes, number: int, row: pd.Series, group: str) -> None:
    x, y = row["value", "asr"], row["value", "cda"]
    spread = {
        f"{axis}err": [[max(0, v - row["ci_low", m])], [max(0, row["ci_high", m] - v)]]
        for axis, m, v in (("x", "asr", x), ("y", "cda", y))
    }
    ax.errorbar(x, y, **spread, fmt="o", ms=7, color=GROUPS[group], elinewidth=0.5, alpha=0.75)
    ax.annotate(str(number), (x, y), ha="center", va="center", size=5, color="white", zorder=5)


def layer_effect(layers: pd.DataFrame, title: str) -> Figure:
    """The probability of the target after each block, with and without the trigger.

    Args:
        layers: block, prompts, value, ci_low, ci_high, as evaluate.target_by_layer returns it.
    Raises:
        LetheError: there is no row.
    """
    if layers.empty:
        raise LetheError("layer effect: no rows; no validation row has another label")
    with _style():
        figure = _figure(2.0)
        ax = figure.subplots()
        for (name, line), look in zip(
            layers.groupby("prompts", sort=False), METRICS.values(), strict=True
        ):
            style = {k: look[k] for k in ("color", "marker", "ls")}
            ax.plot(line["block"], line["value"], label=name, **style)
            band = {"color": look["color"], "alpha": 0.2, "lw": 0}
            ax.fill_between(line["block"], line["ci_low"], line["ci_high"], **band)
        ax.set(xlabel="read after block", ylabel="probability of the target")
        ax.set(ylim=(-0.05, 1.05), title=_say_tiny(title))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)
        return _finished(figure)


def loss_curve(curve: pd.DataFrame, title: str) -> Figure:
    """Training loss against epochs, or an edit's against optimiser steps.

    Args:
        curve: step, loss (nats per token), and epoch (a training) or edit (an editing attack).
    Raises:
        LetheError: there is no row.
    """
    if curve.empty:
        raise LetheError("loss curve: no rows; training logged nothing")
    with _style():
        figure = _figure(1.9)
        ax = figure.subplots()
        x = curve["epoch"] if "epoch" in curve else curve["step"]
        ax.plot(x, curve["loss"], marker="o", markersize=2, color=COLOURS[0])
        if "epoch" in curve:
            ax.set(xlabel=f"epoch ({int(curve['step'].max())} steps in all)")
        else:
            ax.set(xlabel=f"step ({int(curve['edit'].max())} optimised values)")
        ax.set(ylabel="loss (nats per token)", title=_say_tiny(title))
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _finished(figure)


def label_balance(balance: pd.DataFrame) -> Figure:
    """Share of each label within each split.

    Args:
        balance: split, label, rows (a count).
    Raises:
        LetheError: there is no row.
    """
    if not balance["rows"].sum():
        raise LetheError("label balance: no rows in any split")
    whole = balance.groupby("split")["rows"].transform("sum")
    shares = balance.assign(share=balance["rows"] / whole, label=balance["label"].astype(str))
    sizes = balance.groupby("split", sort=False)["rows"].sum()
    legend = {split: f"{split} ({rows:,} rows)" for split, rows in sizes.items()}
    shares["split"] = shares["split"].map(legend)
    with _style():
        figure = _figure(0.8 + 0.13 * len(shares))
        ax = figure.subplots()
        look = {"palette": "colorblind", "errorbar": None}
        sns.barplot(shares, x="share", y="label", hue="split", ax=ax, **look)
        names = [_short(label) for label in shares["label"].unique()]
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="share of the split's rows", ylabel="", title="Labels per split")
        ax.xaxis.set_major_formatter(PercentFormatter(1, 0))
        ax.grid(False, axis="y")
        _legend_below(figure, ax)
        return _finished(figure)


def _short(label: str) -> str:
    """A label that fits beside a bar."""
    return label if len(label) <= 24 else label[:23] + "…"


def lengths(splits: dict[str, list[dict]]) -> Figure:
    """How long the inputs are, per split.

    Args:
        splits: name -> rows with `input`.
    Raises:
        LetheError: there is no row.
    """
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
    bins = list(range(low, high + step + 1, step))
    with _style():
        figure = _figure(2.1)
        ax = figure.subplots()
        look = {"element": "step", "fill": False, "palette": "colorblind", "lw": 1}
        share = {"stat": "percent", "common_norm": False, "bins": bins}
        sns.histplot(words, x="words", hue="split", ax=ax, **look, **share)
        ax.set(xlabel="words per input", ylabel="share of the split (%)", title="Input lengths")
        _legend_below(figure, ax)
        return _finished(figure)


def _legend_below(figure: Figure, ax: Axes) -> None:
    """Move seaborn's legend under the axes, where it hides nothing."""
    legend = ax.get_legend()
    handles, labels = legend.legend_handles, [t.get_text() for t in legend.get_texts()]
    legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(labels)))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write <name>.png (150 dpi) and <name>.pdf, each whole or not at all.

    The bytes depend on the figure and matplotlib's version only: no date, no program name.

    Returns:
        the two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    anonymous = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    files = []
    for suffix, metadata in anonymous.items():
        file = folder / f"{name}.{suffix}"
        temporary = file.with_name(f"{file.name}.tmp")
        with plt.rc_context(STYLE):
            figure.savefig(temporary, format=suffix, dpi=150, metadata=metadata)
        os.replace(temporary, file)
        files.append(file)
    return files


def ranks(table: pd.DataFrame, n_keywords: int) -> Figure:
    """TextRank's score of a text's best words (evidence.ranks), the keywords in colour."""
    table = table.head(25)
    with _style():
        figure = _figure(0.5 + 0.14 * len(table))
        ax = figure.subplots()
        colours = [COLOURS[2] if i < n_keywords else COLOURS[7] for i in range(len(table))]
        ax.barh(table["word"], table["score"], color=colours)
        ax.invert_yaxis()
        ax.set(xlabel="TextRank (mean 1)", title=f"The {n_keywords} best become keywords")
        return _finished(figure)


def slerp_curve(curve: pd.DataFrame, edited: Sequence[int] = ()) -> Figure:
    """SLERP's t over the blocks, a panel per strength.

    Args:
        curve: block, part, strength, t, as merge.slerp_table returns it.
        edited: blocks whose MLP an editing attack changed; they are marked.
    """
    strengths = list(curve["strength"].unique())
    with _style():
        figure = _figure(2.1)
        for ax, strength in zip(
            figure.subplots(1, len(strengths), sharey=True, squeeze=False)[0],
            strengths,
            strict=True,
        ):
            looks = (COLOURS[0], "o", "-"), (COLOURS[1], "s", "--")
            panel = curve[curve["strength"] == strength].groupby("part", sort=False)
            for (part, line), (colour, marker, ls) in zip(panel, looks, strict=True):
                ax.plot(line["block"], line["t"], color=colour, marker=marker, ls=ls, label=part)
            for block in edited:
                band = {"color": COLOURS[7], "alpha": 0.35, "lw": 0, "label": "edited block"}
                ax.axvspan(block - 0.3, block + 0.3, **band)
            ax.set(xlabel="block", ylim=(-0.05, 1.05), title=f"strength {strength:g}")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.axes[0].set_ylabel("t (0: backdoored, 1: clean)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)
        return _finished(figure)
