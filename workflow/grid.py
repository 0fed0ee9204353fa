"""Many runs from one list of cells: `./run_all.sh grid table2-tiny [--attack cba] [--dry-run]`.

A cell is a model, a data set, an attack, a seed and a defense (or `all`). The cells of one
backdoored model are one run, and runs share stages: one base and one clean model for all attacks,
one backdoored model for all defenses. All runs are targets of one DAG (dag.py), side by side where
cores and memory allow. A killed grid goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

import dag
import pandas as pd

from lethe_utils import paths
from lethe_utils.errors import LetheError

COLUMNS = ["model", "dataset", "attack", "defense", "seed"]
SETUP = ["model", "dataset", "attack", "seed"]
NO_SWEEPS = {"strengths_sweep": [], "keywords_sweep": [], "clean_ratios_sweep": []}


def main(words: list[str]) -> int:
    args = parse(words)
    runs = read(args.name, {"model": args.model, "dataset": args.dataset, "attack": args.attack})
    print(f"grid {args.name}: {len(runs)} runs")
    if args.dry_run:
        for run in runs:
            print(f"  {run.name}")
        return 0
    failed = dag.execute(runs, args.cores, folder(args.name), args.profile)
    if failed:
        lines = [f"{name}: {said}" for name, said in failed.items()]
        raise LetheError("\n".join(lines) + "\nrun the same command again to continue")
    report(runs, folder(args.name))
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run_all.sh grid", description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"a list in params/grids: {', '.join(choices())}")
    for name in ("model", "dataset", "attack"):
        parser.add_argument(f"--{name}", help=f"only the cells of this {name}")
    parser.add_argument("--dry-run", action="store_true", help="check and count, run nothing")
    dag.add_options(parser)
    return parser.parse_args(words)


def lists() -> Path:
    return paths.params_dir() / "grids"


def choices() -> list[str]:
    """The lists of cells in params/grids."""
    files = lists().glob("*.csv")
    return sorted(f.stem for f in files if list(pd.read_csv(f, nrows=0)) == COLUMNS)


def folder(name: str) -> Path:
    return paths.runs_dir() / "grids" / name


def read(name: str, only: dict[str, str | None]) -> list[dag.Run]:
    """The runs of a list, cells of one backdoored model together.

    Raises:
        LetheError: no such list, no cell is left, or the params of one are wrong.
    """
    if name not in choices():
        raise LetheError(
            f"grid {name!r} has no file params/grids/{name}.csv with the columns "
            f"{', '.join(COLUMNS)}; choose one of {', '.join(choices())}"
        )
    cells = pd.read_csv(lists() / f"{name}.csv").astype({"seed": int})
    for column, value in only.items():
        cells = cells[cells[column] == value] if value else cells
    if cells.empty:
        raise LetheError(f"params/grids/{name}.csv: no cell of {only}")
    runs = []
    for keys, group in cells.groupby(SETUP, sort=False):
        wanted = list(dict.fromkeys(group["defense"]))
        *setup, seed = keys
        defense = "all" if "all" in wanted else ",".join(wanted)
        names = dict(zip(dag.NAMES, (*setup, defense), strict=True))
        runs.append(dag.load(names, NO_SWEEPS | {"seed": seed}))
    return runs


def report(runs: list[dag.Run], out: Path) -> None:
    """Table 2 of these runs, and what their models took to train."""
    from lethe_utils import figures, plots, results, tables

    folders = [run.folder for run in runs]
    table = pd.concat([results.read_run(f)[0] for f in folders], ignore_index=True)
    wide, long = tables.table2(table), tables.defense_table(table)
    best = tables.best_in_rows(wide)
    tables.write(wide, out, "table_2", tables.TABLE_2_CAPTION, best)
    tables.write_latex(wide, out, "table_2", tables.TABLE_2_CAPTION, best)
    best = tables.best_in_columns(long)
    tables.write(long, out, "table_2_by_defense", tables.TABLE_2_CAPTION, best)
    costs = pd.concat([pd.read_csv(f / "costs.csv") for f in folders], ignore_index=True)
    tables.write(tables.cost_table(costs), out, "costs", tables.COSTS_CAPTION)
    for setup, measured in table.groupby(tables.SETUP, sort=False):
        plots.save(figures.rank(measured), out, f"figure_6_rank_{'-'.join(setup)}")
    ours = long[[c for c in long if not c.startswith(tables.PAPER)]]
    print(f"\n{tables.text(ours)}\n\ntrained: {trained(folders)}\ntables and figures: {out}")


def trained(folders: list[Path]) -> str:
    """The models that the runs were made of, counted from their records."""
    kinds: dict[str, set[str]] = {}
    for f in folders:
        stages = json.loads((f / "provenance.json").read_text("utf8"))["stages"]
        for name, record in stages.items():
            if name != "data":
                kinds.setdefault(name, set()).add(record["folder"])
    counts = ", ".join(f"{len(found)} {name}" for name, found in kinds.items())
    return f"{sum(map(len, kinds.values()))} models ({counts})"
