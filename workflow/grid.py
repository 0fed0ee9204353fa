"""Many runs from one list of cells: `./run_all.sh grid table2-tiny [--attack cba] [--dry-run]`.

A cell is a model, a data set, an attack, a seed and a defense (or `all`). The cells of one
backdoored model are one run, and runs share stages: one base and one clean model for all attacks,
one backdoored model for all defenses. Runs go side by side where cores and memory allow, in the
order of the list: the longest stand first in it, so that no core is idle at the end. A killed grid
goes on where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
from tqdm import tqdm

from lethe_utils import defenses, params, paths
from lethe_utils.errors import LetheError

COLUMNS = ["model", "dataset", "attack", "defense", "seed"]
SETUP = ["model", "dataset", "attack", "seed"]
NO_SWEEPS = {"strengths_sweep": [], "keywords_sweep": [], "clean_ratios_sweep": []}
GIB_PER_RUN = 2  # a tiny twin's notebook takes less
BUSY = "another process is working on this run"


@dataclass(frozen=True)
class Run:
    """All cells of one backdoored model."""

    model: str
    dataset: str
    attack: str
    seed: int
    defense: str  # as in params: `all`, or names joined by commas

    @property
    def params(self) -> params.Params:
        overrides = NO_SWEEPS | {"seed": self.seed}
        return params.load(self.model, self.dataset, self.attack, self.defense, overrides)

    @property
    def command(self) -> list[str]:
        words = [self.model, "--dataset", self.dataset, "--attack", self.attack]
        words += ["--defense", self.defense, "--cores", "1", "-p", "seed", str(self.seed)]
        for key in NO_SWEEPS:
            words += ["-p", key, "[]"]
        return [sys.executable, str(paths.root() / "workflow" / "run.py"), *words]


def main(words: list[str]) -> int:
    args = parse(words)
    runs = read(args.name, {"model": args.model, "dataset": args.dataset, "attack": args.attack})
    for run in runs:
        _ = run.params  # every cell's params are checked before the first run starts
    print(f"grid {args.name}: {len(runs)} runs, {trainings(runs)}")
    if args.dry_run:
        for run in runs:
            print(f"  {run.params.run_id}")
        return 0
    jobs = parallel(args.cores)
    print(f"{jobs} at a time; their logs are in {folder(args.name)}", flush=True)
    failed = run_all(runs, jobs, folder(args.name))
    if failed:
        raise LetheError("\n".join(failed) + "\nrun the same command again to continue")
    report(runs, folder(args.name))
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run_all.sh grid", description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"a list in params/grids: {', '.join(choices())}")
    for name in ("model", "dataset", "attack"):
        parser.add_argument(f"--{name}", help=f"only the cells of this {name}")
    parser.add_argument("--dry-run", action="store_true", help="check and count, run nothing")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="CPU cores to use")
    return parser.parse_args(words)


def choices() -> list[str]:
    """The lists of cells in params/grids."""
    files = (paths.params_dir() / "grids").glob("*.csv")
    return sorted(f.stem for f in files if list(pd.read_csv(f, nrows=0)) == COLUMNS)


def folder(name: str) -> Path:
    return paths.runs_dir() / "grids" / name


def read(name: str, only: dict[str, str | None]) -> list[Run]:
    """The runs of a list, cells of one backdoored model together.

    Raises:
        LetheError: no such list, or no cell is left.
    """
    if name not in choices():
        raise LetheError(
            f"grid {name!r} has no file params/grids/{name}.csv with the columns "
            f"{', '.join(COLUMNS)}; choose one of {', '.join(choices())}"
        )
    cells = pd.read_csv(paths.params_dir() / "grids" / f"{name}.csv").astype({"seed": int})
    for column, value in only.items():
        cells = cells[cells[column] == value] if value else cells
    if cells.empty:
        raise LetheError(f"params/grids/{name}.csv: no cell of {only}")
    runs = []
    for keys, group in cells.groupby(SETUP, sort=False):
        names = list(dict.fromkeys(group["defense"]))
        runs.append(Run(*keys, "all" if "all" in names else ",".join(names)))
    return runs


def trainings(runs: list[Run]) -> str:
    """How many models are trained, and how many would be if each cell trained its own."""
    shared: set[tuple] = set()
    own = naive = 0
    for run in runs:
        shared |= {("base", run.model, run.dataset)}
        shared |= {("clean", run.model, run.dataset, run.seed)}
        shared |= {("backdoored", run.model, run.dataset, run.attack, run.seed)}
        for name in params.defense_names(run.defense):
            columns = defenses.variants(name, run.params.defender())
            mine = sum(defenses.trainings(name, column) for column in columns)
            clean = any(defenses.needs(name, column) == "clean model" for column in columns)
            own += mine
            naive += 2 + clean + mine  # base and backdoored model at least
    return f"{len(shared) + own} trainings (one for each cell by itself: {naive})"


def parallel(cores: int) -> int:
    """Runs side by side: one per core and per GIB_PER_RUN of free memory; one on a GPU."""
    from lethe_utils import models

    if models.resolve_device("auto") == "cuda":
        return 1
    free = psutil.virtual_memory().available / 2**30
    return max(1, min(cores, int(free // GIB_PER_RUN)))


def run_all(runs: list[Run], jobs: int, logs: Path) -> list[str]:
    """Run everything, whatever fails. Returns a line for each run that failed."""
    logs.mkdir(parents=True, exist_ok=True)
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(finish, run, logs): run for run in runs}
        try:
            for done in tqdm(as_completed(started), "runs", len(runs), mininterval=2):
                run = started[done]
                tqdm.write(f"{run.params.run_id}: {done.result() or 'done'}")
                if done.result():
                    failed.append(f"{run.params.run_id}: {done.result()}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise LetheError("interrupted; run the same command again to continue") from None
    return failed


def finish(run: Run, logs: Path) -> str:
    """One run to its end. Returns its error, "" for none."""
    while True:
        with (logs / f"{run.params.run_id}.log").open("w+") as log:
            code = subprocess.run(run.command, stdout=log, stderr=log).returncode
            log.seek(0)
            text = log.read()
        if BUSY in text:  # left over from a grid that was killed: it ends by itself
            time.sleep(10)
            continue
        return "" if code == 0 else (text.strip().splitlines() or ["no output"])[-1]


def report(runs: list[Run], out: Path) -> None:
    """Table 2 of these runs, and what their models took to train."""
    from lethe_utils import figures, plots, results, tables

    folders = [paths.run_dir(run.params.run_id) for run in runs]
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
