"""Purify a model of your own: `./run_all.sh purify --suspect DIR --base DIR --clean-data FILE --out
DIR`. See lethe_utils/purify/."""

import argparse
from typing import Any, NoReturn

import tabulate
import values

from lethe_utils.errors import LetheError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all checks do."""

    def error(self, message: str) -> NoReturn:
        dashed = "expected one argument" in message or "expected 2 arguments" in message
        hint = "; a name that starts with - is given as ./-NAME" if dashed else ""
        raise LetheError(f"{message}{hint}; see {self.prog} --help")


def main(words: list[str]) -> int:
    args = parse(words)
    # These take seconds, which neither --help nor a wrong word should.
    from lethe_utils import models, purify
    from lethe_utils.purify.choice import DILUTED, EXIT
    from lethe_utils.purify.settings import PurifyParams

    overrides = values.overrides(PurifyParams, args.p)
    if args.method:
        overrides["merge_methods"] = [args.method]
    if args.max_cda_loss is not None:
        overrides["max_cda_loss"] = args.max_cda_loss
    models.quiet()
    case = purify.prepare(
        args.suspect or args.base, args.base, args.clean_data, args.out, args.adapter, overrides
    )
    show(case.given)
    print(f"\n{purify.estimate(case).to_string(index=False, na_rep='')}\n", flush=True)
    if args.dry_run:
        return 0
    try:
        points = purify.points(case)
        chosen = purify.choose(case, points)
        out = purify.write(case, points, chosen)
    except KeyboardInterrupt:
        raise LetheError("interrupted; run the same command again to continue") from None
    verdict = purify.verdict(case, chosen)
    print(f"\n{purify.table(case, points, chosen).to_string(index=False)}\n")
    print("purified model:" if verdict == DILUTED else "merged model:  ", out)
    print(f"report:         {out}/report.html\n{verdict}")
    return EXIT[verdict]


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="./run_all.sh purify",
        description="Dilute a model you do not trust with clean knowledge, and measure on a "
        "planted canary what that does to backdoors in it. Nothing that is given is changed.",
        epilog="The last line and the exit status are the verdict: diluted (0: the canary took, "
        "and the merge removed it), not diluted (4: it took, and stays), unknown (3: it did not "
        "take). 1 is an error.",
    )
    where = "a folder, a GGUF file, NAME@COMMIT on the hub, or the NAME of a file in params/models"
    parser.add_argument("--suspect", help=f"the model: {where}; the base where --adapter is given")
    parser.add_argument("--adapter", default="", help="a LoRA adapter's folder, put on the suspect")
    parser.add_argument("--base", required=True, help=f"what it was trained from: {where}")
    parser.add_argument(
        "--clean-data",
        required=True,
        help="jsonl, json or csv: instruction, input, output, or chat messages",
    )
    parser.add_argument("--out", required=True, help="a new folder for the result")
    parser.add_argument(
        "--max-cda-loss", type=float, help="clean performance that may be lost (default .04)"
    )
    parser.add_argument(
        "--method",
        choices=["slerp", "linear", "ties", "passthrough", "guided"],
        help="compare one method alone (default: slerp and linear); guided searches how much of "
        "the clean model goes where",
    )
    values.add_option(parser, "params/purify.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check and estimate, run nothing")
    args = parser.parse_args(words)
    if not args.suspect and not args.adapter:
        parser.error("give --suspect, or --adapter for an adapter on the base")
    return args


def show(given: dict[str, Any]) -> None:
    """What was given, and what was checked."""
    data = given["data"]
    lines = [
        (m["role"], f"{m['given']} ({m['weights'] / 1e6:.1f} M weights)") for m in given["models"]
    ]
    lines.append(("clean data", f"{data['distinct']} distinct rows, {data['held_out']} held out"))
    lines.append(("prompt format", data["prompt"]))
    lines += [(c["check"], c["result"]) for c in given["checks"]]
    print(tabulate.tabulate(lines, tablefmt="plain"))
    for note in given["notes"]:
        print(f"note: {note}")
