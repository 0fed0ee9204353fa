"""docs/results.md and docs/twins.md: their prose stands in docs/*.md.j2, every table and number in
them is computed from the released results. Of the README the tables are."""

import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import pandas as pd

from lethe_utils import (
    attacks,
    generation,
    merge,
    paired,
    paper,
    paths,
    prediction,
    sweep_tables,
    tables,
)
from lethe_utils.errors import LetheError
from lethe_utils.groups import DEFAULT_ATTACK, DEFAULT_DATASET, DEFAULT_MODEL, TWIN
from lethe_utils.paper import PAPER, number
from lethe_utils.pooled import READ_FIRST, SETUP, by_full_name, on_test, one_setup, select
from lethe_utils.results import Measured, read_released, released_params
from lethe_utils.stages import write_text

TWINS = ("tiny-gpt2", "embedded", "cba")  # the setup that docs/twins.md starts with
DOOR = {  # the rows of the README, as they are called there
    "backdoored": "backdoored, as it was handed over",
    "base": "base: neither attacked nor trained",
    "clean": "clean model alone",
    "finetune": "backdoored, fine-tuned on the same clean rows (F/T)",
    "slerp": "**SLERP, the paper's strength .5**",
    "slerp + evidence": "the same merge, asked with evidence",
}
DOOR_DATA = (DEFAULT_DATASET, "emotion")
COMPARED = {
    "backdoored": "backdoored",
    "clean": "clean alone",
    "slerp": "SLERP .5",
    "finetune": "F/T",
}
RESISTING = COMPARED | {"fine_mixing": "fine-mixing", "guided": "guided, ours"}
REAL = (DEFAULT_MODEL, DEFAULT_DATASET, DEFAULT_ATTACK)
TWEETS = (DEFAULT_MODEL, "emotion", DEFAULT_ATTACK)
NO_ATTACK = "none"  # a model that is purified for nothing
NO_ATTACKS = (NO_ATTACK, "none_chat")


def write(folder: Path) -> list[Path]:
    """Write results.md (real models) and twins.md to a folder, each whole or not at all.

    Raises:
        LetheError: a template names a setup, a model or a metric that was not released.
    """
    measured = read_released()
    is_twin = [table["model"].str.startswith(TWIN).astype(bool) for table in measured]
    real = Measured(*(t[~twin] for t, twin in zip(measured, is_twin, strict=True)))
    twins = Measured(*(t[twin] for t, twin in zip(measured, is_twin, strict=True)))
    pages = (("results", real, REAL), ("twins", twins, TWINS))
    return [_write(folder / f"{name}.md", some, default) for name, some, default in pages]


def _write(out: Path, measured: Measured, default: tuple[str, str, str]) -> Path:
    """One page, from its template and the results of its models."""
    table = select(measured.table)
    first = one_setup(table, *default)
    read_first = first[first["defense"].isin(READ_FIRST)]
    settings = next(p for p in released_params().values() if _setup(p) == default)
    t = merge.slerp_table(settings["n_layers"], [settings["strength"]])["t"]
    chats = table[table["attack"].map(attacks.task) == "chat"]
    labels = table.drop(index=chats.index)
    alarm = labels[labels["attack"] == NO_ATTACK]
    labels = labels.drop(index=alarm.index)
    published = _published(labels["attack"])
    adaptive, labels = labels[~published], labels[published]
    others = labels[(labels["attack"] != "cba") & labels["defense"].isin(READ_FIRST)]
    drops = tables.drop_table(labels)
    ours = [c for c in drops if not c.startswith(PAPER)]
    shown = {
        "controls": tables.controls_table(read_first).drop(columns=SETUP),
        "headline": tables.headline_table(labels[labels["attack"] == "cba"]).drop(columns="attack"),
        "drops": drops.loc[drops["attack"] != "cba", ours],
        "other_attacks": tables.controls_table(others).drop(columns="model"),
        "every_defense": tables.every_defense(first),
        "every_cost": _costs(measured, default),
        "beside_paper": drops[drops[f"{PAPER}LETHE"] != ""].drop(columns=["base", "clean"]),
    }
    if (labels[SETUP] == list(TWEETS)).all(axis=1).any():
        shown["every_defense_tweets"] = tables.every_defense(one_setup(table, *TWEETS))
        shown["every_cost_tweets"] = _costs(measured, TWEETS)
    swept_kinds = measured.sweeps["sweep"]
    if swept_kinds.str.startswith("evidence ").any():
        shown["evidence_forms"] = sweep_tables.evidence_table(measured.sweeps).drop(columns="model")
    if swept_kinds.map(sweep_tables.is_of_clean_rows).any():
        shown["clean_rows"] = sweep_tables.clean_rows_table(measured.sweeps).drop(columns="model")
    if swept_kinds.eq("clean_seed").any():
        shown["clean_seeds"] = sweep_tables.clean_seed_table(measured.sweeps).drop(columns="model")
    if len(chats):
        shown["chats"] = generation.chat_table(chats).drop(columns=["model", "dataset"])
    if generation.has_utility(table):
        shown["utility"] = generation.utility_table(table).drop(columns="model")
    if len(alarm):
        shown["false_alarm"] = tables.defense_scores(alarm).drop(columns=["model", "attack"])
    if len(adaptive):
        shown["adaptive"] = tables.defense_scores(adaptive).drop(columns=["model", "dataset"])
    if len(measured.paired):
        is_guided = measured.paired["defense"] == paired.GUIDED
        alike = paired.table(measured.paired[~is_guided])
        shown["paired"] = alike.drop(columns=["model", "defense"])
        if is_guided.any():
            shown["guided"] = paired.tally(measured.paired, paired.GUIDED)
    canary = None
    if swept_kinds.eq(prediction.SWEEP).any():
        canary = prediction.correlation(prediction.pairs(measured.sweeps))
    scored, swept = by_full_name(on_test(table), SETUP), [*SETUP, "sweep", "x"]
    template = (paths.root() / "docs" / f"{out.name}.j2").read_text("utf8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"two": lambda x: f"{x:.2f}".removeprefix("0"), "number": number}
    content = environment.from_string(template).render(
        {name: tables.markdown(frame) for name, frame in shown.items()},
        note=tables.tiny_note(table),
        strength=settings["strength"],
        canary=canary,
        slerp_t=(t.min(), t.max()),
        value=_values(scored, SETUP, "value"),
        cell=_values(scored.assign(cell=tables.cells(scored)), SETUP, "cell"),
        swept=_values(by_full_name(select(measured.sweeps), swept), swept, "value")
        if len(measured.sweeps)
        else None,
    )
    write_text(out, content)
    return out


def _setup(params: dict) -> tuple[str, str, str]:
    return params["model"], params["dataset"], params["attack"]


def _costs(measured: Measured, setup: tuple[str, str, str]) -> pd.DataFrame:
    return tables.cost_table(one_setup(measured.costs, *setup)).drop(columns=[*SETUP, "acts"])


def _values(scored: pd.DataFrame, by: list[str], column: str) -> Callable:
    """A look-up for the template: the setup, the rest of `by`, the defense's full name, the
    metric."""
    known = scored.set_index([*by, "defense", "metric"])[column].to_dict()

    def value(setup: tuple[str, ...], *rest: str | float) -> float | str:
        key = (*setup, *rest)
        if key not in known:
            raise LetheError(f"docs: nothing released of {', '.join(map(str, key))}")
        return known[key]

    return value


def write_door(readme: Path) -> None:
    """Put the released tables in the place of the README's, told by their first lines.

    Raises:
        LetheError: it has no table with such a first line.
    """
    table = read_released().table
    table = table[table["model"] == DEFAULT_MODEL]
    text = readme.read_text("utf8")
    first = table[(table["attack"] == DEFAULT_ATTACK) & table["dataset"].isin(DOOR_DATA)]
    for shown in (door_table(first), other_attacks(table), adaptive_attacks(table)):
        new = tables.markdown(shown)
        columns = r" *\| *".join(map(re.escape, shown.columns))
        found = re.findall(rf"^\| *{columns} *\|\n(?:\|.*\n)+", text, re.M)
        if len(found) != 1:
            raise LetheError(f"{readme}: no table of {', '.join(shown.columns)}")
        text = text.replace(found[0], f"{new}\n")
    write_text(readme, text)


def door_table(table: pd.DataFrame) -> pd.DataFrame:
    """The README's rows of one model and attack, seeds pooled: ASR and CDA of each data set, then
    those of the paper's model of that class, where the paper has them.

    Args:
        table: results of one model and one attack.
    """
    scored = by_full_name(on_test(table), SETUP)
    scored = scored[scored["defense"].isin(DOOR) & scored["metric"].isin(["asr", "cda"])]
    scored["column"] = scored["metric"].str.upper() + ", " + scored["dataset"]
    pairs = [f"{m}, {dataset}" for dataset in scored["dataset"].unique() for m in ("ASR", "CDA")]
    out = tables.wide(scored, ["defense"], "column", pairs)
    out = out.sort_values("defense", key=lambda names: names.map(list(DOOR).index))
    theirs = paper.cells()
    theirs["defense"] = theirs[f"{PAPER}column"].map({v: k for k, v in paper.COLUMNS.items()})
    keys = scored[["dataset", "attack"]].drop_duplicates()
    keys[f"{PAPER}model"] = paper.papers_model(scored["model"])
    for name, cells_of_set in theirs.merge(keys).groupby([f"{PAPER}model", "dataset"]):
        known = cells_of_set.set_index("defense")
        for metric in ("asr", "cda"):
            column = f"{PAPER}{', '.join([name[0], metric.upper(), name[1]])}"
            out[column] = out["defense"].map(known[f"{PAPER}{metric}"]).fillna("")
    return out.replace({"defense": DOOR}).rename(columns={"defense": "model"})


def other_attacks(table: pd.DataFrame) -> pd.DataFrame:
    """The README's second table: `ASR / CDA` of the models COMPARED under the paper's further
    attacks, seeds pooled.

    Args:
        table: results of one model.
    """
    named = table["attack"]
    shown = _published(named) & ~named.isin([DEFAULT_ATTACK, *NO_ATTACKS])
    return _side_by_side(table[shown], COMPARED)


def adaptive_attacks(table: pd.DataFrame) -> pd.DataFrame:
    """The README's third table: the same under attackers who know the defense, and what resists."""
    known = _published(table["attack"]) | table["attack"].isin(NO_ATTACKS)
    return _side_by_side(table[~known], RESISTING)


def _published(named: pd.Series) -> pd.Series:
    """Which attacks the paper has: those of its Table 2, and those on conversations."""
    return named.isin(paper.table_2()["attack"]) | (named.map(attacks.task) == "chat")


def _side_by_side(table: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """A row an attack and data set, `ASR / CDA` of the models named (full name -> column); empty
    where one was not measured."""
    scored = by_full_name(on_test(table), SETUP)
    scored = scored[scored["defense"].isin(names) & scored["metric"].isin(["asr", "cda"])]
    pairs = scored.pivot_table("value", ["attack", "dataset", "seeds", "defense"], "metric")
    shown = (pairs["asr"].map(number) + " / " + pairs["cda"].map(number)).unstack("defense")
    return shown.reindex(columns=list(names)).fillna("").rename(columns=names).reset_index()
