"""docs/results.md: its prose stands in docs/results.md.j2, every table and number in it is computed
from the released results."""

from collections.abc import Callable
from pathlib import Path

import jinja2
import pandas as pd

from lethe_utils import merge, paths, tables
from lethe_utils.errors import LetheError
from lethe_utils.paper import PAPER, number
from lethe_utils.pooled import CONTROLS, MERGES, SETUP, by_full_name, on_test, one_setup, select
from lethe_utils.results import read_released, released_params
from lethe_utils.stages import write_text

DEFAULT = ("tiny-gpt2", "embedded", "cba")  # the setup that `./run_all.sh` runs


def write(out: Path) -> Path:
    """Write the page to a file, whole or not at all.

    Raises:
        LetheError: the template names a setup, a model or a metric that was not released.
    """
    measured = read_released()
    table, sweeps = select(measured.table), select(measured.sweeps)
    default = one_setup(table, *DEFAULT)
    first_seed = default[(default["seed"] == 0) & default["defense"].isin(CONTROLS + MERGES)]
    settings = next(p for p in released_params().values() if _setup(p) == DEFAULT)
    t = merge.slerp_table(settings["n_layers"], [settings["strength"]])["t"]
    drops = tables.drop_table(table)
    ours = [c for c in drops if not c.startswith(PAPER)]
    shown = {
        "controls": tables.controls_table(first_seed).drop(columns=[*SETUP, "seed"]),
        "headline": tables.headline_table(table[table["attack"] == "cba"]).drop(columns="attack"),
        "drops": drops.loc[drops["attack"] != "cba", ours],
        "every_defense": tables.every_defense(default, one_setup(measured.costs, *DEFAULT)),
        "beside_paper": drops[drops[f"{PAPER}LETHE"] != ""].drop(columns=["base", "clean"]),
    }
    scored = by_full_name(on_test(table), SETUP)
    template = (paths.root() / "docs" / "results.md.j2").read_text("utf8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"two": lambda x: f"{x:.2f}".removeprefix("0"), "number": number}
    content = environment.from_string(template).render(
        {name: tables.markdown(frame) for name, frame in shown.items()},
        note=tables.tiny_note(table),
        strength=settings["strength"],
        slerp_t=(t.min(), t.max()),
        value=_values(scored, SETUP, "value"),
        cell=_values(scored.assign(cell=tables.cells(scored)), SETUP, "cell"),
        swept=_values(
            by_full_name(sweeps, [*SETUP, "sweep", "x"]), [*SETUP, "sweep", "x"], "value"
        ),
    )
    write_text(out, content)
    return out


def _setup(params: dict) -> tuple[str, str, str]:
    return params["model"], params["dataset"], params["attack"]


def _values(scored: pd.DataFrame, by: list[str], column: str) -> Callable:
    """A look-up for the template: the setup, the rest of `by`, the defense's full name, the
    metric."""
    known = scored.set_index([*by, "defense", "metric"])[column].to_dict()

    def value(setup: tuple[str, ...], *rest: str | float) -> float | str:
        key = (*setup, *rest)
        if key not in known:
            raise LetheError(f"docs/results.md.j2: nothing released of {', '.join(map(str, key))}")
        return known[key]

    return value
