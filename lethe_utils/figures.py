"""Figures of measured results, at the size they are written: whiskers and bands are 95 % Wilson
intervals, seeds are pooled. Tables are checked as pooled.py does it.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lethe_utils import prediction
from lethe_utils.errors import LetheError
from lethe_utils.paper import number
from lethe_utils.plots import COLOURS, METRICS, WIDTH, curve, finished, new_figure, say_tiny, style
from lethe_utils.pooled import (
    CONTROLS,
    MERGES,
    SETUP,
    by_full_name,
    in_order,
    on_test,
    pool,
    select,
)

EVIDENCE = {
    0: {"label": "without evidence", "facecolor": COLOURS[7], "edgecolor": "white"},
    1: {"label": "with evidence", "facecolor": COLOURS[2], "edgecolor": "white", "hatch": "////"},
}
BEFORE_AFTER = {
    "backdoored": {"color": COLOURS[3], "marker": "X"},
    "base": {"color": COLOURS[7], "marker": "v"},
    "clean": {"color": "black", "marker": "s"},
    "slerp": {"color": COLOURS[0], "marker": "o"},
    "slerp + evidence": {"color": COLOURS[2], "marker": "D"},
}
GROUPS = {"control": "black", "Lethe": COLOURS[2], "other defense": "0.45"}
SWEEPS = {
    "strength": "merge strength (0: backdoored model, 1: clean model)",
    "keywords": "keywords of evidence",
    "clean_ratio": "clean data the defender has (share of train)",
    "wrong_labels": "share of the clean data that is mislabelled",
}


def _count(seeds: pd.Series) -> str:
    fewest, most = seeds.min(), seeds.max()
    return f"{most if fewest == most else f'{fewest} to {most}'} seed{'' if most == 1 else 's'}"


def _facets(scored: pd.DataFrame, by: list[str]) -> tuple[str, dict[str, pd.DataFrame]]:
    """What all rows of pooled results share, as a title, and the rows of each panel by a title
    that says the rest."""
    seeds = scored.groupby(by, sort=False)["seeds"].transform(_count)
    scored = scored.assign(seeds=seeds)
    keys = [*by, "seeds"]
    own = [k for k in keys if scored[k].nunique() > 1]
    shared = ", ".join(str(scored[k].iloc[0]) for k in keys if k not in own)
    panels = {
        ", ".join(str(group[k].iloc[0]) for k in own): group
        for _, group in scored.groupby(by, sort=False)
    }
    return say_tiny(shared), {say_tiny(title): group for title, group in panels.items()}


def _grid(panels: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per facet; size: of one, in inches. The axes are shared: what is set on
    the first holds for all."""
    columns = min(columns, panels)
    lines = -(-panels // columns)
    figure = new_figure(0.6 + size[1] * lines, max(WIDTH, size[0] * columns))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[panels:]:
        ax.set_visible(False)
    for ax in grid.flat[max(0, panels - columns) : panels]:
        ax.tick_params(labelbottom=True)  # the lowest of its column, whatever is hidden below
    return figure, list(grid.flat[:panels])


def _whiskers(scored: pd.DataFrame) -> np.ndarray:
    """Distances to the interval's ends, (2, rows); a bound off by rounding is no distance."""
    ends = [scored["value"] - scored["ci_low"], scored["ci_high"] - scored["value"]]
    return np.clip(ends, 0, None)


def bars(table: pd.DataFrame) -> Figure:
    """ASR and CDA of every defense on the test split: a panel per metric and setup. Raises
    LetheError: see pooled.select, or there is no ASR or CDA."""
    rows = on_test(table)
    rows = rows[rows["metric"].isin(list(METRICS))]
    if rows.empty:
        raise LetheError("results table: no asr or cda rows to plot")
    scored = pool(rows, SETUP)
    names = in_order(scored["defense"])
    shared, panels = _facets(scored, SETUP)
    columns = max(2, len(panels))  # one setup: ASR beside CDA; else CDA below ASR
    with style():
        size = (max(1.4, 4.5 / columns), 0.5 + 0.26 * len(names))
        figure, axes = _grid(2 * len(panels), columns, size)
        figure.suptitle(shared)
        drawn = [(m, t, group) for m in METRICS for t, group in panels.items()]
        for ax, (metric, title, group) in zip(axes, drawn, strict=True):
            _bar_panel(ax, group[group["metric"] == metric], names)
            ax.set(title=title, xlabel=METRICS[metric]["label"])
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", ".5", "1"])
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        evidence = sorted(rows["evidence"].unique())
        return finished(figure, [Patch(lw=0.3, **EVIDENCE[e]) for e in evidence])


def _bar_panel(ax: Axes, scored: pd.DataFrame, names: list[str]) -> None:
    """Bars of one metric; numbers stand in a column at the right, clear of the whiskers."""
    thick = 0.8 / max(1, scored["evidence"].nunique())
    for evidence, group in scored.groupby("evidence"):
        shift = 0 if thick > 0.5 else (evidence - 0.5) * thick
        y = group["defense"].map(names.index).to_numpy() + shift
        error = {"elinewidth": 0.7, "capsize": 1.2, "capthick": 0.7}
        look = EVIDENCE[evidence] | {"lw": 0.3, "error_kw": error}
        ax.barh(y, group["value"], thick * 0.92, xerr=_whiskers(group), **look)
        _numbers(ax, y, group["value"].map(number))
    ax.grid(False, axis="y")


def _numbers(ax: Axes, y: np.ndarray, texts: pd.Series) -> None:
    for place, text in zip(y, texts, strict=True):
        ax.text(1.03, place, text, transform=ax.get_yaxis_transform(), va="center", size=6)


def sweep(sweeps: pd.DataFrame, kind: str) -> Figure:
    """ASR and CDA along one sweep (a key of SWEEPS), a panel per setup and merge method. Raises
    LetheError: another kind, no rows of it, or see pooled.select."""
    if kind not in SWEEPS:
        raise LetheError(f"sweep {kind!r}: choose one of {', '.join(SWEEPS)}")
    if "sweep" not in sweeps:
        raise LetheError("sweep: no column sweep; pass sweeps.csv, not results.csv")
    rows = sweeps[(sweeps["sweep"] == kind) & sweeps["metric"].isin(list(METRICS))]
    if rows.empty:
        raise LetheError(f"sweep {kind!r}: no rows; list its points in the ..._sweep parameter")
    scored = pool(select(rows), [*SETUP, "x"])
    shared, panels = _facets(scored, [*SETUP, "defense"])
    methods = scored["defense"].nunique()
    with style():
        figure, axes = _grid(len(panels), methods if methods > 1 else 3, (1.75, 1.35))
        figure.suptitle(shared)
        for ax, (title, group) in zip(axes, panels.items(), strict=True):
            for metric, look in METRICS.items():
                curve(ax, group[group["metric"] == metric].sort_values("x"), "x", look)
            ax.set_title(title)
        axes[0].set_xticks(sorted(scored["x"].unique()))
        axes[0].xaxis.set_major_formatter("{x:g}")
        axes[0].set(ylim=(-0.05, 1.05), yticks=[0, 0.25, 0.5, 0.75, 1])
        return finished(figure, axes[0].get_lines(), title=f"x: {SWEEPS[kind]}")


def attacks(table: pd.DataFrame) -> Figure:
    """ASR of every attack before and after Lethe beside the controls (`base` is the floor), a panel
    per model. Raises LetheError: see pooled.select, or there is no ASR."""
    scored = by_full_name(on_test(table), SETUP)
    scored = scored[(scored["metric"] == "asr") & scored["defense"].isin(list(BEFORE_AFTER))]
    if scored.empty:
        raise LetheError("results table: no asr rows to plot")
    kinds = list(scored["attack"].unique())
    shared, panels = _facets(scored, ["model", "dataset"])
    with style():
        figure, axes = _grid(len(panels), 3, (2.3, 0.4 + 0.36 * len(kinds)))
        figure.suptitle(f"{shared}: ASR (lower is better)")
        for ax, (title, group) in zip(axes, panels.items(), strict=True):
            for i, (name, look) in enumerate(BEFORE_AFTER.items()):
                points = group[group["defense"] == name]
                y = [kinds.index(attack) + (i - 2) * 0.15 for attack in points["attack"]]
                spread = {"xerr": _whiskers(points), "elinewidth": 0.8, "ms": 3}
                ax.errorbar(points["value"], y, **spread, **look, ls="", label=name)
            ax.set_title(title)
        axes[0].set_yticks(range(len(kinds)), kinds)
        axes[0].set(xlim=(-0.03, 1.03), ylim=(len(kinds) - 0.5, -0.5))
        return finished(figure, axes[0].get_legend_handles_labels()[0], 5)


def predictions(sweeps: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """`canary` of each model and data set that was swept with one, by their names."""
    with_one = sweeps.loc[sweeps["sweep"] == prediction.SWEEP, ["model", "dataset"]]
    for names in with_one.drop_duplicates().itertuples(index=False):
        rows = sweeps[(sweeps[["model", "dataset"]] == list(names)).all(axis=1)]
        yield "-".join(names), canary(prediction.pairs(rows))


def canary(found: pd.DataFrame) -> Figure:
    """ASR of the backdoor against that of the canary after the same merge, a mark per merge and a
    colour per attack; on the diagonal the canary is right.

    Args:
        found: see prediction.pairs; of one model and data set.
    """
    rho = prediction.correlation(found)
    with style():
        figure = new_figure(3.4)
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], color="0.75", lw=0.8, zorder=1)
        looks = {"data": found, "x": "canary", "y": "backdoor", "ax": ax, "s": 18}
        sns.scatterplot(**looks, hue="attack", style="defense", palette="colorblind")
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        ax.set(xlabel="ASR of the canary", ylabel="ASR of the backdoor")
        ax.get_legend().remove()
        figure.suptitle(say_tiny(", ".join(found[["model", "dataset"]].iloc[0])))
        ax.set_title(
            f"rank correlation {rho.value:.2f}"
            + (f" [{rho.low:.2f}, {rho.high:.2f}]" if rho.runs > 1 else "")
            + f", "
            f"{rho.pairs} merges of {rho.runs} run{'s' if rho.runs > 1 else ''}"
        )
        return finished(figure, ax.get_legend_handles_labels()[0], 3)


def rank(table: pd.DataFrame) -> Figure:
    """Every defense of one setup, a row each, by CDA - ASR: the longer the line, the better. Raises
    LetheError: see pooled.select, or no defense has both."""
    scored = by_full_name(on_test(table), SETUP)
    scored = scored[scored["metric"].isin(list(METRICS))]
    value = scored.pivot(index="defense", columns="metric", values="value").dropna()
    if not {*METRICS} <= {*value}:
        raise LetheError("results table: no defense has both asr and cda")
    lead = (value["cda"] - value["asr"]).sort_values(ascending=False, kind="stable")
    value = value.loc[lead.index]
    y = np.arange(len(value))
    with style():
        figure = new_figure(0.9 + 0.155 * len(value), 5)
        ax = figure.subplots()
        ax.hlines(y, value["asr"], value["cda"], colors="0.75", lw=0.8, zorder=1)
        for metric, look in METRICS.items():
            rows = scored[scored["metric"] == metric].set_index("defense").loc[value.index]
            spread = {"xerr": _whiskers(rows), "elinewidth": 0.8, "ms": 3, "label": look["label"]}
            ax.errorbar(rows["value"], y, **spread, fmt=look["marker"], color=look["color"])
        _numbers(ax, y, value["asr"].map(number) + " / " + value["cda"].map(number))
        ax.set_yticks(y, [f"{i} {name}" for i, name in enumerate(value.index, 1)])
        for label, name in zip(ax.get_yticklabels(), value.index, strict=True):
            label.set_color(GROUPS[_group(name)])
        ax.set(xlim=(-0.02, 1.02), ylim=(len(value) - 0.4, -0.6))
        figure.suptitle(_facets(scored, SETUP)[0])
        ax.set_title("ordered by CDA - ASR; at the right: ASR / CDA")
        key = [Patch(color=colour, label=group) for group, colour in GROUPS.items()]
        return finished(figure, ax.get_legend_handles_labels()[0] + key, 3)


def _group(name: str) -> str:
    plain = name.removesuffix(" + evidence")
    if plain in CONTROLS:
        return "control"
    return "Lethe" if plain in MERGES else "other defense"
