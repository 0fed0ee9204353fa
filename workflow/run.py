"""Front door behind run_all.sh: check everything, then let Snakemake run the notebooks.

python workflow/run.py [MODEL] [--dataset D] [--attack A] [-p key value ...] [--dry-run]
python workflow/run.py tables
python workflow/run.py release RUN_ID
python workflow/run.py grid NAME
python workflow/run.py purify --suspect DIR --base DIR --clean-data FILE --out DIR
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import dag
import grid
import values

from lethe_utils import defenses, params, paths
from lethe_utils.errors import LetheError
from lethe_utils.groups import DEFAULT_ATTACK, DEFAULT_DATASET, DEFAULT_DEFENSE, SOURCES

FOLDERS = ("LETHE_RUNS", "LETHE_DATA_DIR", "LETHE_CACHE")


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill`: as Ctrl-C
    for name in FOLDERS:
        if os.environ.get(name):  # the notebooks run in another folder
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())
    try:
        check_names([*sys.argv, *(os.environ.get(name, "") for name in FOLDERS)])
        if sys.argv[1:2] == ["grid"]:
            return grid.main(sys.argv[2:])
        if sys.argv[1:2] == ["purify"]:
            import purify

            try:
                return purify.main(sys.argv[2:])
            except LetheError as error:  # one line, though a folder's name may hold two
                raise LetheError(" ".join(str(error).splitlines())) from None
        if sys.argv[1:2] == ["release"]:
            return release(sys.argv[2:])
        args = parse(sys.argv[1:])
        return released_tables() if args.model == "tables" else run(args)
    except LetheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a name that is too long, a disk that is gone
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 1


def check_names(words: list[str]) -> None:
    """Refuse a name that is not UTF-8, which tokenizers and reports cannot write."""
    for word in words:
        try:
            word.encode("utf8")
        except UnicodeEncodeError:
            raise LetheError(f"{word!r}: its name is not UTF-8; rename it") from None


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        allow_abbrev=False,  # or --model would be taken for --model-dir
        description="Train a backdoor, dilute it, measure what that bought. Without arguments: "
        "the embedded data on SmolLM2-135M, on two CPU cores in 13 to 27 minutes.",
        epilog="also: ./run_all.sh test (all tests), ./run_all.sh tables (tables and figures from "
        "the committed results, no training), ./run_all.sh release RUN_ID (a finished run joins "
        "them), ./run_all.sh grid NAME (many runs, see grid --help), "
        "./run_all.sh purify (a model of your own, see purify --help)",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help=f"tables, or {', '.join(params.choices('models'))}; its params are the run's",
    )
    parser.add_argument(
        "--model-dir",
        metavar="PATH",
        help="a model of yours, as a folder with safetensors or a GGUF file, with the params of "
        "MODEL (local, the paper's own, where none is named)",
    )
    parser.add_argument(
        "--dataset",
        default=DEFAULT_DATASET,
        help="embedded, emotion, sst2, chat, or a jsonl/json/csv/tsv file",
    )
    parser.add_argument(
        "--attack", default=DEFAULT_ATTACK, help=", ".join(params.choices("attacks"))
    )
    parser.add_argument(
        "--defense",
        default=DEFAULT_DEFENSE,
        help=f"all, or names joined by commas: {', '.join(params.choices('defenses'))}",
    )
    values.add_option(parser, "params/base.yaml, e.g. -p seed 1 -p poison_ratio 0.05")
    parser.add_argument("--dry-run", action="store_true", help="check and show, run nothing")
    dag.add_options(parser)
    args = parser.parse_args(words)
    args.model = args.model or ("local" if args.model_dir else params.default_model())
    return args


def source(model_dir: str | None, overrides: dict[str, object]) -> dict[str, object]:
    """What --model-dir, or `-p model_dir`, sets: that folder, as the only source."""
    given = model_dir or overrides.get("model_dir")
    if not given:
        return {}
    # The notebooks run in another folder.
    return dict.fromkeys(SOURCES) | {"model_dir": str(paths.expanded(str(given)))}


def absolute(dataset: str) -> str:
    """A data set's name as it is; the whole path of a file, for notebooks run in another folder."""
    return str(Path(dataset).resolve()) if params.is_file(dataset) else dataset


def run(args: argparse.Namespace) -> int:
    """Check, run the missing notebooks, print the table."""
    dataset = absolute(args.dataset)
    overrides = values.overrides(params.run_schema(args.attack), args.p)
    overrides |= source(args.model_dir, overrides)
    if "clean_source" in overrides:
        overrides["clean_source"] = absolute(str(overrides["clean_source"]))
    names = dict(zip(dag.NAMES, (args.model, dataset, args.attack, args.defense), strict=True))
    run = dag.load(names, overrides)
    if args.dry_run:
        return show(run)
    check(run.p)
    failed = dag.execute([run], args.cores, run.folder, args.profile)
    if failed:
        raise LetheError(failed[run.name])
    report(run.folder)
    return 0


def check(p: params.Params) -> None:
    """Everything that can be wrong before training starts, most of it in a second."""
    from lethe_utils import models, pipeline, vllm_engine, wordnet
    from lethe_utils.pipeline import utility

    vllm_engine.check(p)
    print(f"run {p.run_id}: checking data, model, WordNet and device ...", flush=True)
    models.resolve_device(p.device)
    wordnet.find_wordnet()
    pipeline.data_stage(p)
    if not p.is_tiny:
        pipeline.base_folder(p)
        print(f"{pipeline.cut_rows(p).to_string()}\n", flush=True)
    pipeline.check_attack(p)
    for name in sorted({p.clean_source, *p.clean_sources_sweep} - {"base"}):
        pipeline.clean_source(p.model_copy(update={"clean_source": name}))
    utility.check(p)


def report(folder: Path) -> None:
    """The table, and where everything lies."""
    from lethe_utils import results

    results.point_latest(folder)
    print_table(folder / "figures" / "controls.csv")
    print(f"figures and tables: {folder / 'figures'}")
    print(f"executed notebooks: {folder / 'notebooks'}")
    print(f"results:            {folder / 'results.csv'}")


def print_table(file: Path) -> None:
    """A table that 06_tables wrote, for a terminal."""
    import pandas as pd

    from lethe_utils import tables

    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    print(f"\n{tables.text(frame)}\n")


def show(run: dag.Run) -> int:
    """--dry-run: the params, what set each, what is left to do, and how many rows would be cut."""
    from lethe_utils import pipeline

    p = run.p
    for key, row in params.table(p).iterrows():
        print(f"{key}: {row['value']}".ljust(48) + f"  # {row['set in']}")
    print(f"run {run.name} -> {run.folder}")
    for step in dag.STEPS:
        print(f"  {step}: {'finished' if run.finished(step) else 'to do'}")
    if run.finished("01_data"):
        print(pipeline.cut_rows(p).to_string())
    else:
        print("rows that are too long: 01_data counts them, with the model's tokenizer")
    if p.size_billion:
        print("GPU memory, estimated from the number of weights (GiB):")
        for name in p.defenses:
            print(f"  {name}: {defenses.gpu_memory(name, p):.0f}")
    return 0


def released_tables() -> int:
    """Tables, figures, the pages of results and the README's tables from the committed results; no
    training."""
    from lethe_utils import page

    out = paths.runs_dir() / "tables"
    out.mkdir(parents=True, exist_ok=True)
    notebook = str(paths.root() / "notebooks" / "06_tables.ipynb")
    # papermill fills in what stands in braces in a path.
    command = ["papermill", notebook.replace("{", "{{").replace("}", "}}"), "06_tables.ipynb"]
    command += ["--kernel", "python3", "--no-progress-bar"]
    env = dag.environment(out) | {"LETHE_PROGRESS": str(out / "06_tables.log")}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, cwd=out, **pipes) as process:
        written = [*page.write(paths.root() / "docs"), paths.root() / "README.md"]
        page.write_door(written[-1])
        errors = process.communicate()[1]
    if process.returncode:
        raise LetheError(f"06_tables failed: {errors.strip().splitlines()[-1]}")
    print_table(paths.figures_dir() / "drops.csv")
    print(f"figures and tables: {paths.figures_dir()}")
    print(f"pages:              {', '.join(map(str, written))}")
    print(f"executed notebook:  {out / '06_tables.ipynb'}")
    return 0


def release(words: list[str]) -> int:
    """`release RUN_ID`: a finished run joins the committed results."""
    from lethe_utils import results

    if len(words) != 1 or words[0].startswith("-"):
        raise LetheError("release: give one run's name, e.g. ./run_all.sh release RUN_ID")
    print(f"released: {results.release(words[0])}; now ./run_all.sh tables, and commit both")
    return 0


if __name__ == "__main__":
    sys.exit(main())
