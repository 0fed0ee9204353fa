"""Tables: from tidy results to the paper's layouts, as text, CSV, Markdown and LaTeX.

The paper's numbers are always in columns of their own, `paper: ...`; ours never share one with
them. All cells are text: "value [low, high]", blank where not measured. Every builder starts from
`pooled.select`, which refuses mixed runs (LetheError).
"""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lethe_utils import defenses, paper
from lethe_utils.errors import LetheError
from lethe_utils.metrics import AMOUNTS
from lethe_utils.paper import PAPER, number
from lethe_utils.pooled import (
    CONTROLS,
    MERGES,
    SETUP,
    by_full_name,
    in_order,
    on_test,
    pool,
)
from lethe_utils.stages import write_text

HEADLINE = ["backdoored", "clean", "finetune", "slerp", "slerp + evidence"]
COSTS = {  # column of the costs -> as it is called in a table, decimals
    "trainings": ("trainings", 0),
    "optimizer_steps": ("steps", 0),
    "seconds": ("seconds", 1),
    "peak_memory_gib": ("GiB", 2),
    "ms_per_query": ("ms per query", 2),
    "query_ratio": ("x backdoored", 2),
}
TABLE_2_CAPTION = (
    "Attack success rate (ASR, lower is better) and clean data accuracy (CDA, higher is better) "
    "on the test split, with 95 % Wilson intervals; several seeds are pooled item by item. "
    "backdoored is the attacked model as it stands. Columns that start with 'paper:' are "
    "the paper's own Table 2, measured on its full-size model ('paper: model'); all others are "
    "measured here."
)
DROPS_CAPTION = (
    "ASR and CDA of the backdoored model and after SLERP + evidence, with 95 % Wilson intervals "
    "over the test items of all seeds. Columns that start with 'paper:' are the paper's own."
)
COSTS_CAPTION = (
    "What each defense takes, medians over seeds: trainings of its own, optimizer steps, seconds "
    "and peak memory (GiB) of making it, milliseconds per query and their ratio to the backdoored "
    "model's in the same run. Those that use the clean model need its line as well."
)


def signed(value: float) -> str:
    """A difference of two shares: -.959, +.012."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def interval(value: float, low: float, high: float, said: Callable[[float], str] = number) -> str:
    """A value with its interval, a share unless `said` is another way to say it:
    .987 [.970, .995]."""
    return f"{said(value)} [{said(low)}, {said(high)}]"


def cells(scored: pd.DataFrame) -> list[str]:
    """value, ci_low and ci_high of each row as one text."""
    return [
        interval(r.value, r.ci_low, r.ci_high, "{:.2f}".format if r.metric in AMOUNTS else number)
        for r in scored.itertuples()
    ]


def wide(scored: pd.DataFrame, rows: list[str], column: str, order: list[str]) -> pd.DataFrame:
    """Pooled rows as text cells: `rows` down, in the order met, and `column` across."""
    index = pd.MultiIndex.from_frame(scored[rows].drop_duplicates())
    table = scored.assign(cell=cells(scored)).pivot(index=rows, columns=column, values="cell")
    out = table.reindex(index=index, columns=order).fillna("").reset_index()
    out.columns.name = None
    return out


def scores(table: pd.DataFrame, wanted: list[str], row: list[str]) -> pd.DataFrame:
    """Metrics of the test split by full name; `seeds` is the most of what stands in one row."""
    scored = by_full_name(on_test(table), SETUP)
    scored = scored[scored["metric"].isin(wanted)]
    return scored.assign(seeds=scored.groupby(row)["seeds"].transform("max").astype(str))


def table2(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 2: model, dataset, attack, metric (ASR or CDA), a column per defense, then
    each with evidence; then `paper: model` and the paper's nine columns, blank where it has no
    such row. A tiny twin gets the paper's row of the full model it stands for.

    Raises:
        LetheError: there is no ASR or CDA.
    """
    rows = on_test(table)
    rows = rows[rows["metric"].isin(["asr", "cda"])]
    if rows.empty:
        raise LetheError("results table: no asr or cda rows")
    scored = pool(rows, SETUP)
    place = scored.groupby(SETUP, sort=False).ngroup()
    by_metric = scored.assign(place=place).sort_values(["place", "metric"], kind="stable")
    by_metric["metric"] = by_metric["metric"].str.upper()
    plain, dilute = (scored.loc[scored["evidence"] == e, "defense"] for e in (0, 1))
    order = in_order(plain) + [f"{d} + evidence" for d in in_order(dilute)]
    return paper.beside(wide(by_metric, [*SETUP, "metric"], "name", order))


def in_paper(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of results that the paper's Table 2 has a column for, and the controls."""
    name = table["defense"] + table["evidence"].map({0: "", 1: " + evidence"})
    return table[name.isin([*CONTROLS, *paper.COLUMNS])]


def drop_table(table: pd.DataFrame) -> pd.DataFrame:
    """What Lethe (SLERP + evidence) takes from ASR and CDA, beside what the paper's takes: model,
    dataset, attack, seeds, metric, the controls, `slerp + evidence`, change, then the same of the
    paper's. Setups without both models are left out."""
    keys, measured = [*SETUP, "metric"], [*CONTROLS, "slerp + evidence"]
    scored = scores(table, ["asr", "cda"], keys)
    out = wide(scored, [*SETUP, "seeds", "metric"], "defense", measured)
    out = out[(out["backdoored"] != "") & (out["slerp + evidence"] != "")].reset_index(drop=True)
    value = scored.set_index([*keys, "defense"])["value"].unstack().reindex(columns=measured)
    change = (value["slerp + evidence"] - value["backdoored"]).map(signed)
    out["change"] = change.loc[pd.MultiIndex.from_frame(out[keys])].to_list()
    out[["base", "clean"]] = out[["base", "clean"]].map(_leading)
    out["metric"] = out["metric"].str.upper()
    shown = paper.beside(out)
    after, before = (pd.to_numeric(shown[PAPER + c]) for c in ("LETHE", "Backdoored"))
    shown[f"{PAPER}change"] = (after - before).map(signed, na_action="ignore").fillna("")
    return shown[[*out, *(PAPER + c for c in ("model", "Backdoored", "LETHE", "change"))]]


def defense_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Every model, seeds pooled: model, dataset, attack, seeds, defense, asr, cda, ftr."""
    wanted = ["asr", "cda", "ftr"]
    scored = scores(table, wanted, [*SETUP, "defense"])
    return wide(scored, [*SETUP, "seeds", "defense"], "metric", wanted)


def defense_table(table: pd.DataFrame) -> pd.DataFrame:
    """Table 2 turned, one row per defense: model, dataset, attack, seeds, defense, asr, cda, change
    (of CDA against backdoored), then `paper: column`, `paper: asr`, `paper: cda`, `paper: model`,
    blank where the paper has no such cell."""
    keys = [*SETUP, "defense"]
    scored = scores(table, ["asr", "cda"], keys)
    out = wide(scored, [*SETUP, "seeds", "defense"], "metric", ["asr", "cda"])
    cda = scored.loc[scored["metric"] == "cda", [*keys, "value"]]
    plain = cda[cda["defense"] == "backdoored"].drop(columns="defense")
    both = cda.merge(plain, on=SETUP, suffixes=("", "_before")).query("defense != 'backdoored'")
    both["change"] = (both["value"] - both["value_before"]).map(signed)
    out = out.merge(both[[*keys, "change"]], how="left")
    out[f"{PAPER}model"] = paper.papers_model(out["model"])
    out[f"{PAPER}column"] = out["defense"].map(paper.COLUMNS)
    out = out.merge(paper.cells(), how="left", validate="m:1")
    theirs = [PAPER + c for c in ("column", "asr", "cda", "model")]
    out[theirs] = out[theirs].where(out[f"{PAPER}asr"].notna())
    return out[[*SETUP, "seeds", "defense", "asr", "cda", "change", *theirs]].fillna("")


def best_in_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a `defense_table` are the best of their setup: the lowest asr and the highest
    cda of any defense (controls are none), a boolean frame of the same shape."""
    best = pd.DataFrame(False, frame.index, frame.columns)
    compared = ~frame["defense"].str.removesuffix(" + evidence").isin(CONTROLS)
    for column, pick in (("asr", "min"), ("cda", "max")):
        shown = _as_printed(frame[column].where(compared))
        best[column] = shown == shown.groupby([frame[c] for c in SETUP]).transform(pick)
    return best


def best_in_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a `table2` are the best of their row, as `best_in_columns` says."""
    theirs = [*SETUP, "metric", *(c for c in frame if c.startswith(PAPER))]
    controls = [f"{c}{ending}" for c in CONTROLS for ending in ("", " + evidence")]
    shown = frame.drop(columns=[*theirs, *controls], errors="ignore").apply(_as_printed)
    wanted = shown.min(axis=1).where(frame["metric"] == "ASR", shown.max(axis=1))
    return shown.eq(wanted, axis=0).reindex(columns=frame.columns, fill_value=False)


def _as_printed(texts: pd.Series) -> pd.Series:
    """The values of cells as they are printed: those that look alike are equally good."""
    return pd.to_numeric(texts.map(_leading, na_action="ignore"))


def _leading(cell: str) -> str:
    return cell.split(" ")[0]


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """What each defense takes (see measure.costs): the median over a setup's seeds, for a machine
    may be busy with one. The columns are named in COSTS; `x backdoored` is the same run's."""
    grouped = costs.groupby([*SETUP, "defense", "acts"], sort=False)
    out = grouped[list(COSTS)].median().reset_index()
    out.insert(3, "seeds", grouped["seed"].nunique().astype(str).to_numpy())
    for column, (_, decimals) in COSTS.items():
        out[column] = out[column].map(f"{{:.{decimals}f}}".format)
    return out.rename(columns={column: name for column, (name, _) in COSTS.items()})


def every_defense(table: pd.DataFrame) -> pd.DataFrame:
    """Every defense of one setup: what it needs and gives, beside the paper's cells of that setup,
    or its means over 30 settings where it has none."""
    scored = defense_table(table)[["defense", "asr", "cda"]]
    out = scored.assign(**{f"{PAPER}column": scored["defense"].map(paper.COLUMNS)})
    out.insert(1, "needs", scored["defense"].map(_needs))
    return out.join(_papers_scores(table), on=f"{PAPER}column").fillna("")


def _papers_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's ASR and CDA of one setup, or its means, by the paper's columns."""
    setup = table.iloc[0]
    (name,) = paper.papers_model(pd.Series([setup["model"]]))
    cells = paper.cells().set_index([f"{PAPER}model", "dataset", "attack"])
    if (name, setup["dataset"], setup["attack"]) in cells.index:
        known = cells.loc[[(name, setup["dataset"], setup["attack"])]].set_index(f"{PAPER}column")
        return known.rename(columns={f"{PAPER}{m}": f"{PAPER}{name}, {m}" for m in ("asr", "cda")})
    means = paper.means().set_index("metric").map(number).T
    means.index = means.index.str.removeprefix(PAPER)
    return means.rename(columns={m: f"{PAPER}mean {m.lower()}" for m in means})


def _needs(defense: str) -> str:
    name = defense.removesuffix(" + evidence")
    kind = "lethe" if name in MERGES else defenses.registered(name)
    return defenses.needs(kind, name) if kind else ""


def ftr_table(table: pd.DataFrame) -> pd.DataFrame:
    """False trigger rates of the backdoored and the SLERP model, with and without evidence: `ftr`
    (over all kinds), then one `ftr_<kind>` per kind of incomplete trigger, and `asr_<kind>` of the
    other ways to trigger, where an attack has some.

    Raises:
        LetheError: no FTR was measured (negative_items).
    """
    rows = on_test(table)
    kinds = rows["metric"].str.startswith(("ftr", "asr_"))
    chosen = rows["defense"].isin(["backdoored", "slerp"]) & kinds
    if not chosen.any():
        raise LetheError("results table: no ftr of backdoored or slerp; rerun with negative_items")
    scored = by_full_name(rows[chosen], SETUP)
    kinds = [m for m in scored["metric"].unique() if m != "ftr"]
    return wide(scored, [*SETUP, "defense"], "metric", ["ftr", *kinds])


def controls_table(table: pd.DataFrame) -> pd.DataFrame:
    """Every model of a run beside its controls, seed by seed: asr, cda, ftr."""
    scored = by_full_name(on_test(table), [*SETUP, "seed"])
    out = wide(scored, [*SETUP, "seed", "defense"], "metric", ["asr", "cda", "ftr"])
    return out.astype({"seed": str})


def headline_table(table: pd.DataFrame) -> pd.DataFrame:
    """What to read first of `defense_scores`, see HEADLINE."""
    return defense_scores(table).query("defense in @HEADLINE").reset_index(drop=True)


def tiny_note(frame: pd.DataFrame) -> str:
    """What must be said wherever a tiny twin's numbers are shown; "" when there is none."""
    models = frame["model"].unique() if "model" in frame else []
    tiny = [str(m) for m in models if str(m).startswith("tiny-")]
    stands = ", ".join(f"{m} for {paper.FULL_MODELS[m]}" for m in tiny if m in paper.FULL_MODELS)
    note = (
        "Models named tiny-... are tiny twins, pretrained here, that stand in for full models"
        f"{f' ({stands})' if stands else ''}; their numbers are not the full models' numbers."
    )
    return note if tiny else ""


def text(frame: pd.DataFrame) -> str:
    """A table as fixed-width text, with the note on tiny twins below. What all rows share is said
    once, above it, so that one run's controls fit a terminal; columns of the paper's without a
    cell are left out."""
    shared = [c for c in [*SETUP, "seed"] if c in frame and frame[c].nunique() == 1]
    said = ", ".join(f"{c} {frame[c].iloc[0]}" for c in shared)
    body = _laid_out(_without_blanks(frame).drop(columns=shared), "simple")
    note = textwrap.fill(tiny_note(frame), 80)
    return "\n\n".join(part for part in (said, body, note) if part)


def shown(frame: pd.DataFrame, rows: list[str]) -> pd.DataFrame:
    """A table as a notebook shows it: what names its rows stands before them, once; no cell breaks
    over lines; columns of the paper's without a cell are left out."""
    return (
        _without_blanks(frame)
        .astype(str)
        .map(lambda cell: cell.replace(" ", "\N{NO-BREAK SPACE}"))
        .set_index(rows)
    )


def _without_blanks(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[c for c in frame if not c.startswith(PAPER) or frame[c].astype(bool).any()]]


def markdown(frame: pd.DataFrame, bold: pd.DataFrame | None = None) -> str:
    """A Markdown table; `bold`: which cells stand out, a boolean frame of the same shape."""
    escaped = frame.astype(str).map(lambda cell: cell.replace("|", "\\|"))
    return _laid_out(escaped if bold is None else escaped.mask(bold, "**" + escaped + "**"), "pipe")


def _laid_out(frame: pd.DataFrame, style: str) -> str:
    return frame.astype(str).to_markdown(index=False, tablefmt=style, disable_numparse=True)


def write(
    frame: pd.DataFrame, folder: Path, name: str, caption: str, bold: pd.DataFrame | None = None
) -> list[Path]:
    """Write <name>.csv and <name>.md, each whole or not at all; the second says tiny and `bold`."""
    folder.mkdir(parents=True, exist_ok=True)
    said = f"{caption} {tiny_note(frame)}".strip()
    files = [folder / f"{name}.csv", folder / f"{name}.md"]
    write_text(files[0], frame.to_csv(index=False))
    write_text(files[1], f"{said}\n\n{markdown(frame, bold)}\n")
    return files


def write_latex(
    frame: pd.DataFrame, folder: Path, name: str, caption: str, bold: pd.DataFrame | None = None
) -> Path:
    """Write <name>.tex, a booktabs `table` with \\label{tab:<name>}; see `write`."""
    style = frame.astype(str).style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    if bold is not None:
        style = style.apply(lambda _: bold.replace({True: "textbf:--rwrap;", False: ""}), axis=None)
    # Styler escapes cells, not the caption.
    said = re.sub(r"([&%$#_{}])", r"\\\1", f"{caption} {tiny_note(frame)}".strip())
    body = style.to_latex(
        hrules=True, caption=said, label=f"tab:{name}", position_float="centering"
    )
    write_text(folder / f"{name}.tex", f"% needs \\usepackage{{booktabs}}\n{body}")
    return folder / f"{name}.tex"
