"""Tables: from tidy results to the paper's layouts, as text, CSV, Markdown and LaTeX.

The paper's numbers are always in columns of their own, `paper: ...`; ours never share one with
them. Every builder checks its input with `select` first, so mixed runs are refused everywhere.
"""

import re
import textwrap
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from lethe_utils import defenses, metrics, paths
from lethe_utils.errors import LetheError
from lethe_utils.groups import choices
from lethe_utils.metrics import COLUMNS
from lethe_utils.stages import write_text

SETUP = ["model", "dataset", "attack"]
NUMBERS = ["value", "n", "ci_low", "ci_high"]
CONTROLS = ["none", "base", "clean"]  # none is the backdoored model as it was handed to us
MERGES = ["linear", "slerp", "ties", "passthrough"]
PAPERS_STRENGTH = 0.5
HEADLINE = ["none", "clean", "slerp", "slerp + evidence"]
PAPER = "paper: "
PAPER_COLUMNS = {  # our name -> the paper's column in Table 2
    "none": "Backdoored",
    "edt": "EDT",
    "wanda": "WAN",
    "finetune": "FT",
    "fineprune": "FP",
    "speculative": "SPE",
    "nad": "NAD",
    "beear": "BEE",
    "slerp + evidence": "LETHE",
}
PAPER_MODELS = {"gpt2-xl": "GPT2-XL", "llama-2-7b": "Llama-2", "deepseek-r1-7b": "DeepSeek-R1"}
FULL_MODELS = {
    "tiny-gpt2": "gpt2-xl",
    "tiny-gptj": "gpt-j-6b",
    "tiny-llama": "llama-7b",
    "tiny-llama2": "llama-2-7b",
    "tiny-qwen2": "deepseek-r1-7b",
}
TABLE_2_CAPTION = (
    "Attack success rate (ASR, lower is better) and clean data accuracy (CDA, higher is better) "
    "on the test split, with 95 % Wilson intervals; several seeds are pooled item by item. "
    "The defense none is the backdoored model as it stands. Columns that start with 'paper:' are "
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


def select(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a results or sweeps table, checked.

    Args:
        table: the columns of `metrics.COLUMNS`; sweeps have `sweep` and `x` as well.
    Returns:
        a copy with those columns only and numbers as numbers.
    Raises:
        LetheError: a column or a key is missing, a share or its interval is impossible, or one
            measurement is there more than once (the runs are named).
    """
    missing = [c for c in COLUMNS if c not in table]
    if missing:
        raise LetheError(f"results table: no column {', '.join(missing)}; see metrics.COLUMNS")
    if table.empty:
        raise LetheError("results table: no rows; run 05_evidence_eval first")
    sweep_keys = [c for c in ("sweep", "x") if c in table]
    keys = sweep_keys + [c for c in COLUMNS if c not in [*NUMBERS, "run_id"]]
    out = table[sweep_keys + COLUMNS].reset_index(drop=True)
    out[NUMBERS] = out[NUMBERS].apply(pd.to_numeric, errors="coerce")
    _check_numbers(out, keys)
    out["evidence"] = out["evidence"].astype(int)
    _check_runs(out, keys)
    return out


def _check_numbers(table: pd.DataFrame, keys: list[str]) -> None:
    rounding = 1e-9  # a Wilson bound at 0 or 1 may miss it by a rounding error
    low, value, high = table["ci_low"], table["value"], table["ci_high"]
    checks = {
        "a key or run_id is empty": table[[*keys, "run_id"]].notna().all(axis=1),
        "evidence is not 0 or 1": table["evidence"].isin([0, 1]),
        "value is not within [0, 1]": value.between(0, 1),
        "value is not within its interval": value.between(low - rounding, high + rounding),
        "n is not a count above 0": (table["n"] > 0) & (table["n"] % 1 == 0),
    }
    for problem, passed in checks.items():
        if not passed.all():
            bad = table[~passed].iloc[0].to_dict()
            raise LetheError(f"results table: {problem} in {(~passed).sum()} rows, first {bad}")


def _check_runs(table: pd.DataFrame, keys: list[str]) -> None:
    repeated = table[table.duplicated(keys, keep=False)]
    twice = repeated[repeated.duplicated([*keys, "run_id"], keep=False)]
    if len(twice):
        runs = ", ".join(sorted(twice["run_id"].unique()))
        raise LetheError(f"results table: the same rows are there twice for {runs}; drop one copy")
    if len(repeated):
        runs = ", ".join(sorted(repeated["run_id"].unique()))
        example = ", ".join(str(repeated.iloc[0][k]) for k in keys)
        raise LetheError(
            f"results table: runs {runs} measured the same thing ({example}); keep one run"
        )


def pool(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row per (by, defense, evidence, metric): the rest (seeds) pooled over summed counts.

    Returns:
        columns by, defense, evidence, metric, name ("slerp + evidence"), value, n, ci_low,
        ci_high, seeds (how many); setups in the order met, then plain before evidence, then
        controls, merges, others. A measurement that stands alone keeps its own interval.
    """
    keys = [*by, "defense", "evidence", "metric"]
    groups = table.groupby(keys, sort=False)
    out = pd.DataFrame([dict(zip(keys, k, strict=True)) | _pooled(g) for k, g in groups])
    out["name"] = out["defense"] + out["evidence"].map({0: "", 1: " + evidence"})
    ranks = {
        "setup": out.groupby(by, sort=False).ngroup(),
        "evidence": out["evidence"],
        "defense": out["defense"].map(_in_order(out["defense"]).index),
    }
    sequence = pd.DataFrame(ranks).sort_values(list(ranks), kind="stable").index
    return out.loc[sequence].reset_index(drop=True)


def _by_full_name(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """`pool`, its `defense` being the full name ("slerp + evidence")."""
    return pool(table, by).drop(columns="defense").rename(columns={"name": "defense"})


def _in_order(names: pd.Series) -> list[str]:
    """The defenses present: controls, merges, the others as they are registered, each followed by
    its variants; what is not registered comes last. Else in the order met."""
    known = list(dict.fromkeys([*CONTROLS, *MERGES, *PAPER_COLUMNS, *choices("defenses")]))

    def place(name: str) -> int:
        kind = name if name in known else defenses.registered(name)
        return known.index(kind) if kind else len(known)

    return sorted(names.unique(), key=place)


def _pooled(group: pd.DataFrame) -> dict[str, float]:
    seeds = {"seeds": group["seed"].nunique()}
    if len(group) == 1:
        return group[NUMBERS].iloc[0].to_dict() | seeds
    hits, n = round((group["value"] * group["n"]).sum()), int(group["n"].sum())
    low, high = metrics.wilson(hits, n)
    return {"value": hits / n, "n": n, "ci_low": low, "ci_high": high} | seeds


def on_test(table: pd.DataFrame) -> pd.DataFrame:
    """`select`, test split only. Raises LetheError when that leaves nothing."""
    rows = select(table)
    rows = rows[rows["split"] == "test"]
    if rows.empty:
        raise LetheError("results table: no rows of the test split; sweeps go to plots.sweep")
    return rows


def number(value: float) -> str:
    """A share as the paper prints it: .987, 1.000."""
    return f"{value:.3f}".removeprefix("0")


def interval(value: float, low: float, high: float) -> str:
    """A share with its interval: .987 [.970, .995]."""
    return f"{number(value)} [{number(low)}, {number(high)}]"


def cells(scored: pd.DataFrame) -> list[str]:
    """value, ci_low and ci_high of each row as one text."""
    return [interval(r.value, r.ci_low, r.ci_high) for r in scored.itertuples()]


def _wide(scored: pd.DataFrame, rows: list[str], column: str, order: list[str]) -> pd.DataFrame:
    """Pooled rows as text cells: `rows` down, in the order met, and `column` across."""
    index = pd.MultiIndex.from_frame(scored[rows].drop_duplicates())
    wide = scored.assign(cell=cells(scored)).pivot(index=rows, columns=column, values="cell")
    out = wide.reindex(index=index, columns=order).fillna("").reset_index()
    out.columns.name = None
    return out


def table2(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 2: our cells, then the paper's in columns of their own.

    Returns:
        text columns model, dataset, attack, metric (ASR or CDA); one per defense present (none,
        base, clean, the merges, any other), then each with evidence, as "value [low, high]"; then
        `paper: model` and the paper's nine columns, blank where it has no such row. A tiny twin
        gets the paper's row of the full model it stands for.
    Raises:
        LetheError: see select, or there is no ASR or CDA.
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
    order = _in_order(plain) + [f"{d} + evidence" for d in _in_order(dilute)]
    return _beside_paper(_wide(by_metric, [*SETUP, "metric"], "name", order))


def _paper() -> pd.DataFrame:
    """The paper's Table 2: model, attack, dataset, metric, then `paper: ...` columns (floats)."""
    file = paths.paper_dir() / "table2.csv"
    if not file.exists():
        raise LetheError(f"{file}: missing; it is part of the checkout, restore it with git")
    table = pd.read_csv(file)
    keys = [*SETUP, "metric"]
    return table.rename(columns={c: PAPER + c for c in table if c not in keys})


def _beside_paper(ours: pd.DataFrame) -> pd.DataFrame:
    paper = _paper()
    values = [c for c in paper if c.startswith(PAPER)]
    paper[values] = paper[values].map(number)
    paper["attack"] = paper["attack"].str.lower()
    paper[f"{PAPER}model"] = paper["model"]
    full = ours["model"].replace(FULL_MODELS).map(PAPER_MODELS)
    keys = {"model": full.fillna(""), "metric": ours["metric"]}
    keys |= {"dataset": ours["dataset"], "attack": ours["attack"]}
    theirs = pd.DataFrame(keys).merge(paper, how="left", validate="m:1")
    return pd.concat([ours, theirs[[f"{PAPER}model", *values]].fillna("")], axis=1)


def paper_means() -> pd.DataFrame:
    """Means of the paper's Table 2 over its 30 settings: metric, `paper: ...` columns (floats)."""
    paper = _paper()
    values = [c for c in paper if c.startswith(PAPER)]
    return paper.groupby("metric")[values].mean().round(3).reset_index()


def drop_table(table: pd.DataFrame) -> pd.DataFrame:
    """What Lethe (SLERP + evidence) takes from ASR and CDA, beside what the paper's takes.

    Returns:
        text columns model, dataset, attack, seeds, metric, backdoored, the controls base and clean,
        `slerp + evidence`, change; then `paper: model`, `paper: Backdoored`, `paper: LETHE` and
        `paper: change`, blank where the
        paper has no such row. Setups without both are left out.
    Raises:
        LetheError: see select.
    """
    scored = pool(on_test(table), SETUP)
    scored = scored[scored["metric"].isin(["asr", "cda"])]
    lines = []
    for keys, group in scored.groupby([*SETUP, "metric"], sort=False):
        value = group.set_index("name")["value"]
        if not {"none", "slerp + evidence"} <= {*value.index}:
            continue
        texts = dict(zip(group["name"], cells(group), strict=True))
        line = dict(zip([*SETUP, "metric"], keys, strict=True)) | {
            "seeds": str(group["seeds"].max())
        }
        line |= {d: number(value[d]) if d in value else "" for d in ("base", "clean")}
        line |= {"backdoored": texts["none"], "slerp + evidence": texts["slerp + evidence"]}
        lines.append(line | {"change": signed(value["slerp + evidence"] - value["none"])})
    measured = ["backdoored", "base", "clean", "slerp + evidence", "change"]
    columns = [*SETUP, "seeds", "metric", *measured]
    ours = pd.DataFrame(lines, columns=columns)
    ours["metric"] = ours["metric"].str.upper()
    out = _beside_paper(ours)
    there = out[f"{PAPER}LETHE"] != ""
    theirs = out.loc[there, [f"{PAPER}Backdoored", f"{PAPER}LETHE"]].astype(float)
    change = (theirs[f"{PAPER}LETHE"] - theirs[f"{PAPER}Backdoored"]).map(signed)
    out[f"{PAPER}change"] = change.reindex(out.index).fillna("")
    return out[[*columns, *(PAPER + c for c in ("model", "Backdoored", "LETHE", "change"))]]


def defense_table(table: pd.DataFrame) -> pd.DataFrame:
    """Table 2 turned: one row per defense, so that ASR and CDA stand side by side.

    Returns:
        text columns model, dataset, attack, seeds, defense, asr, cda ("value [low, high]"), change
        (of CDA against none); then `paper: column`, `paper: asr`, `paper: cda`, `paper: model`,
        blank where the paper has no such cell.
    Raises:
        LetheError: see select.
    """
    scored = pool(on_test(table), SETUP)
    scored = scored[scored["metric"].isin(["asr", "cda"])]
    lines = []
    for keys, group in scored.groupby([*SETUP, "name"], sort=False):
        line = dict(zip([*SETUP, "defense"], keys, strict=True))
        line |= {"seeds": str(group["seeds"].max()), "asr": "", "cda": "", "change": ""}
        line |= dict(zip(group["metric"], cells(group), strict=True))
        plain = _value(scored, [*keys[:3], "none"], "cda")
        ours = _value(scored, keys, "cda")
        if plain is not None and ours is not None and keys[3] != "none":
            line["change"] = signed(ours - plain)
        lines.append(line)
    columns = [*SETUP, "seeds", "defense", "asr", "cda", "change"]
    out = pd.DataFrame(lines, columns=columns)
    paper = _beside_paper(out.assign(metric="ASR")), _beside_paper(out.assign(metric="CDA"))
    theirs = out["defense"].map(PAPER_COLUMNS).fillna("")
    for metric, beside in zip(("asr", "cda"), paper, strict=True):
        values = [
            beside.loc[i, f"{PAPER}{column}"] if column else "" for i, column in theirs.items()
        ]
        out[f"{PAPER}{metric}"] = values
    there = out[f"{PAPER}asr"] != ""
    out[f"{PAPER}column"] = theirs.where(there, "")
    out[f"{PAPER}model"] = paper[0][f"{PAPER}model"].where(there, "")
    return out[[*columns, *(PAPER + c for c in ("column", "asr", "cda", "model"))]]


def _value(scored: pd.DataFrame, keys: list[str], metric: str) -> float | None:
    """One pooled value: model, dataset, attack, name; None where not measured."""
    found = scored[(scored[[*SETUP, "name"]] == [*keys]).all(axis=1) & (scored["metric"] == metric)]
    return found["value"].iloc[0] if len(found) else None


def best_in_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a `defense_table` are the best of their setup: the lowest asr and the highest
    cda of any defense (controls are none), a boolean frame of the same shape."""
    best = pd.DataFrame(False, frame.index, frame.columns)
    plain = frame["defense"].str.removesuffix(" + evidence")
    for _, group in frame[~plain.isin(CONTROLS)].groupby(SETUP):
        for column, pick in (("asr", min), ("cda", max)):
            numbers = {i: number for i, c in group[column].items() if (number := _leading(c))}
            winners = [i for i, n in numbers.items() if n == pick(numbers.values())]
            best.loc[winners, column] = True
    return best


def best_in_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a `table2` are the best of their row, as `best_in_columns` says."""
    columns = [
        c
        for c in frame
        if c not in [*SETUP, "metric"]
        and not c.startswith(PAPER)
        and c.removesuffix(" + evidence") not in CONTROLS
    ]
    best = pd.DataFrame(False, frame.index, frame.columns)
    for i, row in frame.iterrows():
        numbers = {c: number for c in columns if (number := _leading(row[c]))}
        pick = min if row["metric"] == "ASR" else max
        winners = [c for c, n in numbers.items() if n == pick(numbers.values())]
        best.loc[i, winners] = True
    return best


def _leading(cell: str) -> str:
    """The value of a cell, as printed: cells that look alike are equally good. "" for none."""
    return cell.split(" ")[0]


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """What each defense takes: the median over a setup's seeds, for a machine may be busy with one.

    Args:
        costs: see measure.costs.
    Returns:
        text columns model, dataset, attack, seeds, defense, acts, trainings, steps (of the
        optimizer), seconds (to make it), GiB (peak memory), ms per query, x none (the same run's).
    """
    grouped = costs.groupby([*SETUP, "defense", "acts"], sort=False)
    numbers = ["trainings", "optimizer_steps", "seconds", "peak_memory_gib", "ms_per_query"]
    out = grouped[[*numbers, "query_ratio"]].median().reset_index()
    out["seeds"] = grouped["seed"].nunique().to_numpy()
    for column in ("seeds", "trainings", "optimizer_steps"):
        out[column] = out[column].map("{:.0f}".format)
    for column, style in (("seconds", "{:.1f}"), ("peak_memory_gib", "{:.2f}")):
        out[column] = out[column].map(style.format)
    for column in ("ms_per_query", "query_ratio"):
        out[column] = out[column].map("{:.2f}".format)
    names = {
        "optimizer_steps": "steps",
        "peak_memory_gib": "GiB",
        "ms_per_query": "ms per query",
        "query_ratio": "x none",
    }
    shown = [*SETUP, "seeds", "defense", "acts", *numbers, "query_ratio"]
    return out[shown].rename(columns=names)


def overview(table: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Every defense of one setup, as in docs/defenses.md: what it needs, costs and gives, and the
    paper's means over its 30 settings beside it.

    Args:
        table, costs: of one model, data set and attack; seeds are pooled, costs are medians.
    Returns:
        text columns defense, needs, trainings, steps, seconds (of its own, the clean model's not
        counted), x none (per query), asr, cda; then `paper: column`, `paper: mean asr`,
        `paper: mean cda`, blank where the paper has no such column.
    """
    scored = defense_table(table)
    taken = cost_table(costs).set_index("defense")
    means = paper_means().set_index("metric")
    lines = []
    for _, row in scored.iterrows():
        name = row["defense"].removesuffix(" + evidence")
        kind = defenses.registered(name) or ("lethe" if name in MERGES else None)
        needs = defenses.needs(kind, name) if kind else ""
        line = {"defense": row["defense"], "needs": needs}
        for column in ("trainings", "steps", "seconds", "x none"):
            known = name in taken.index and name == row["defense"]
            line[column] = taken.loc[name, column] if known else ""
        line |= {"asr": row["asr"], "cda": row["cda"]}
        column = PAPER_COLUMNS.get(row["defense"], "")
        line[f"{PAPER}column"] = column
        for metric in ("ASR", "CDA"):
            mean = number(means.loc[metric, PAPER + column]) if column else ""
            line[f"{PAPER}mean {metric.lower()}"] = mean
        lines.append(line)
    return pd.DataFrame(lines)


def signed(value: float) -> str:
    """A difference of two shares: -.959, +.012."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def ftr_table(table: pd.DataFrame) -> pd.DataFrame:
    """False trigger rates of the backdoored and the SLERP model, with and without evidence.

    Returns:
        text columns model, dataset, attack, defense, `ftr` (over all kinds), then one `ftr_<kind>`
        per kind of incomplete trigger; cells "value [low, high]".
    Raises:
        LetheError: see select, or no FTR was measured (negative_items).
    """
    rows = on_test(table)
    rows = rows[rows["defense"].isin(["none", "slerp"]) & rows["metric"].str.startswith("ftr")]
    if rows.empty:
        raise LetheError("results table: no ftr rows for none or slerp; rerun with negative_items")
    scored = _by_full_name(rows, SETUP)
    kinds = [m for m in scored["metric"].unique() if m != "ftr"]
    return _wide(scored, [*SETUP, "defense"], "metric", ["ftr", *kinds])


def controls_table(table: pd.DataFrame) -> pd.DataFrame:
    """Every model of a run beside its controls, seed by seed: what docs/results.md shows.

    Returns:
        text columns model, dataset, attack, seed, defense ("slerp + evidence"), asr, cda, ftr;
        cells "value [low, high]", blank where not measured.
    Raises:
        LetheError: see select.
    """
    scored = _by_full_name(on_test(table), [*SETUP, "seed"])
    out = _wide(scored, [*SETUP, "seed", "defense"], "metric", ["asr", "cda", "ftr"])
    return out.astype({"seed": str})


def headline_table(table: pd.DataFrame) -> pd.DataFrame:
    """What to read first, seeds pooled: the model handed to us, the clean model, the SLERP merge
    and Lethe (SLERP + evidence).

    Returns:
        text columns model, dataset, attack, seeds, defense ("slerp + evidence"), asr, cda, ftr;
        cells "value [low, high]", blank where not measured.
    Raises:
        LetheError: see select.
    """
    scored = _by_full_name(on_test(table), SETUP)
    scored = scored[scored["defense"].isin(HEADLINE)]
    seeds = scored.groupby([*SETUP, "defense"])["seeds"].transform("max").astype(str)
    keys = [*SETUP, "seeds", "defense"]
    return _wide(scored.assign(seeds=seeds), keys, "metric", ["asr", "cda", "ftr"])


def door_table(table: pd.DataFrame, sweeps: pd.DataFrame, strength: float) -> pd.DataFrame:
    """The five rows of the README, seeds pooled: backdoored, clean alone, SLERP at the paper's
    strength (which is measured in the sweep, on validation rows) and at `strength`, with evidence.

    Args:
        table, sweeps: of one model, data set and attack.
    Returns:
        text columns model, measured on, asr, cda; cells "value [low, high]".
    """
    used, published = (f"{s:g}".removeprefix("0") for s in (strength, PAPERS_STRENGTH))
    names = {
        "none": "backdoored, as it was handed over",
        "clean": "clean model alone",
        "slerp": f"SLERP, strength {used}",
        "slerp + evidence": f"SLERP, strength {used}, and evidence",
    }
    scored = _by_full_name(on_test(table), SETUP)
    out = _wide(scored[scored["defense"].isin(names)], ["defense"], "metric", ["asr", "cda"])
    rows = sweeps[(sweeps["sweep"] == "strength") & (sweeps["x"] == PAPERS_STRENGTH)]
    papers = _by_full_name(select(rows[rows["defense"] == "slerp"]), SETUP)
    papers = _wide(papers, ["defense"], "metric", ["asr", "cda"])
    parts = [
        out.assign(**{"measured on": "test rows"}).replace({"defense": names}),
        papers.assign(**{"measured on": "validation rows"}).replace(
            {"defense": {"slerp": f"SLERP, the paper's strength {published}"}}
        ),
    ]
    order = pd.concat([parts[0][:2], parts[1], parts[0][2:]], ignore_index=True)
    return order.rename(columns={"defense": "model"})[["model", "measured on", "asr", "cda"]]


def tiny_note(frame: pd.DataFrame) -> str:
    """What must be said wherever a tiny twin's numbers are shown; "" when there is none."""
    models = frame["model"].unique() if "model" in frame else []
    tiny = [str(m) for m in models if str(m).startswith("tiny-")]
    if not tiny:
        return ""
    stands = [f"{m} for {FULL_MODELS[m]}" for m in tiny if m in FULL_MODELS]
    what = f" ({', '.join(stands)})" if stands else ""
    return (
        "Models named tiny-... are tiny twins, pretrained here, that stand in for full models"
        f"{what}; their numbers are not the full models' numbers."
    )


def text(frame: pd.DataFrame) -> str:
    """A table as fixed-width text, with the note on tiny twins below.

    A model, dataset, attack or seed that all rows share is said once, above it, so that one run's
    controls fit a terminal.
    """
    shared = [c for c in [*SETUP, "seed"] if c in frame and frame[c].nunique() == 1]
    said = ", ".join(f"{c} {frame[c].iloc[0]}" for c in shared)
    body = _tabulated(frame.drop(columns=shared), "simple")
    note = textwrap.fill(tiny_note(frame), 80)
    return "\n\n".join(part for part in (said, body, note) if part)


def _tabulated(frame: pd.DataFrame, style: str) -> str:
    rows = frame.astype(str).to_numpy().tolist()
    return tabulate(rows, headers=list(frame.columns), tablefmt=style, disable_numparse=True)


def write(
    frame: pd.DataFrame, folder: Path, name: str, caption: str, bold: pd.DataFrame | None = None
) -> list[Path]:
    """Write <name>.csv, <name>.md and <name>.tex, each whole or not at all; says tiny in the last
    two. The LaTeX is a `table` with \\label{tab:<name>} and needs the booktabs package.

    Args:
        bold: which cells stand out in Markdown and LaTeX, a boolean frame of the same shape.
    Returns:
        the three files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    caption = " ".join(part for part in (caption, tiny_note(frame)) if part)
    contents = {
        "csv": frame.to_csv(index=False),
        "md": f"{caption}\n\n{_markdown(frame, bold)}\n",
        "tex": latex(frame, caption, name, bold),
    }
    files = [folder / f"{name}.{suffix}" for suffix in contents]
    for file, content in zip(files, contents.values(), strict=True):
        write_text(file, content)
    return files


def _markdown(frame: pd.DataFrame, bold: pd.DataFrame | None) -> str:
    escaped = frame.astype(str).map(lambda cell: cell.replace("|", "\\|"))
    return _tabulated(_marked(escaped, bold, "**{}**"), "github")


def _marked(frame: pd.DataFrame, bold: pd.DataFrame | None, style: str) -> pd.DataFrame:
    return frame if bold is None else frame.mask(bold, frame.map(style.format))


def latex(frame: pd.DataFrame, caption: str, name: str, bold: pd.DataFrame | None = None) -> str:
    """A booktabs `table` environment, with every special character escaped."""
    cells = _marked(frame.astype(str).map(escape), bold, "\\textbf{{{}}}")
    lines = [[escape(str(column)) for column in frame.columns], *cells.to_numpy()]
    header, *body = [f"{' & '.join(line)} \\\\" for line in lines]
    parts = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape(caption)}}}",
        f"\\label{{tab:{name}}}",
        f"\\begin{{tabular}}{{{'l' * frame.shape[1]}}}",
        "\\toprule",
        header,
        "\\midrule",
        *body,
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(parts) + "\n"


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
}


def escape(content: str) -> str:
    """Text that LaTeX prints as it stands."""
    return re.sub(r"[&%$#_{}\\~^<>]", lambda found: _LATEX[found[0]], content)
