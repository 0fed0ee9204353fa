"""The paper's own Table 2, and how its words map to ours. Its numbers are always in columns of
their own, `paper: ...`."""

import pandas as pd

from lethe_utils import paths
from lethe_utils.errors import LetheError

SETUP = ["model", "dataset", "attack"]
PAPER = "paper: "
COLUMNS = {  # our name -> the paper's column in Table 2
    "backdoored": "Backdoored",
    "edt": "EDT",
    "wanda": "WAN",
    "finetune": "FT",
    "fineprune": "FP",
    "speculative": "SPE",
    "nad": "NAD",
    "beear": "BEE",
    "slerp + evidence": "LETHE",
}
MODELS = {"gpt2-xl": "GPT2-XL", "llama-2-7b": "Llama-2", "deepseek-r1-7b": "DeepSeek-R1"}
FULL_MODELS = {
    "tiny-gpt2": "gpt2-xl",
    "tiny-gptj": "gpt-j-6b",
    "tiny-llama": "llama-7b",
    "tiny-llama2": "llama-2-7b",
    "tiny-qwen2": "deepseek-r1-7b",
}

SAME_CLASS = {"smollm2-135m": "llama-2-7b"}  # beside which the paper's rows say most


def number(value: float) -> str:
    """A share as the paper prints it: .987, 1.000."""
    return f"{value:.3f}".removeprefix("0")


def table_2() -> pd.DataFrame:
    """The paper's Table 2: model, attack, dataset, metric, then `paper: ...` columns (floats)."""
    file = paths.paper_dir() / "table2.csv"
    if not file.exists():
        raise LetheError(f"{file}: missing; it is part of the checkout, restore it with git")
    table = pd.read_csv(file)
    table["attack"] = table["attack"].str.lower()
    return table.rename(columns={c: PAPER + c for c in table if c not in [*SETUP, "metric"]})


def papers_model(models: pd.Series) -> pd.Series:
    """The paper's model that each model is, stands for, or is of the class of; nothing where it has
    none."""
    return models.replace(FULL_MODELS | SAME_CLASS).map(MODELS)


def compared(model: str, dataset: str) -> bool:
    """Whether the paper's Table 2 has rows of this model, or of the one it stands for."""
    (name,) = papers_model(pd.Series([model]))
    table = table_2()
    return bool(((table["model"] == name) & (table["dataset"] == dataset)).any())


def beside(ours: pd.DataFrame) -> pd.DataFrame:
    """A table of model, dataset, attack, metric, with `paper: model` and the paper's nine columns
    at its right, as text; blank where the paper has no such row."""
    paper = table_2()
    values = [c for c in paper if c.startswith(PAPER)]
    paper[values] = paper[values].map(number)
    paper[f"{PAPER}model"] = paper["model"]
    keys = ours[["dataset", "attack", "metric"]].assign(model=papers_model(ours["model"]))
    theirs = keys.merge(paper, how="left", validate="m:1")
    return pd.concat([ours, theirs[[f"{PAPER}model", *values]].fillna("")], axis=1)


def means() -> pd.DataFrame:
    """Means of the paper's Table 2 over its 30 settings: metric, `paper: ...` columns (floats)."""
    paper = table_2()
    values = [c for c in paper if c.startswith(PAPER)]
    return paper.groupby("metric")[values].mean().round(3).reset_index()


def cells() -> pd.DataFrame:
    """The paper's Table 2, a row per cell: dataset, attack, `paper: model`, `paper: column`,
    `paper: asr` and `paper: cda` as text."""
    long = table_2().melt([*SETUP, "metric"], var_name="column", value_name="cell")
    long["metric"] = PAPER + long["metric"].str.lower()
    long["cell"] = long["cell"].map(number)
    wide = long.pivot(index=[*SETUP, "column"], columns="metric", values="cell").reset_index()
    wide["column"] = wide["column"].str.removeprefix(PAPER)
    return wide.rename(columns={c: PAPER + c for c in ("model", "column")})
