"""The report of a purification: one page that opens from disk, its numbers as JSON, a model card.

Texts in it come from models and data that nobody trusts: the templates escape all of them, and the
page's own policy allows neither scripts nor requests.
"""

import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
from tabulate import tabulate

from lethe_utils.canary import TAKEN
from lethe_utils.errors import LetheError
from lethe_utils.paper import number
from lethe_utils.purify import figures
from lethe_utils.purify.choice import DILUTED
from lethe_utils.purify.dilute import CLEAN
from lethe_utils.purify.figures import brief
from lethe_utils.purify.rounds import took
from lethe_utils.stages import write_json, write_text
from lethe_utils.tables import interval

Record = dict[str, Any]
Table = list[dict[str, str]]  # a dict a row, all with the same columns; the first is its header
TEMPLATES = Path(__file__).parent
WORDS = ("heading", "verdict", "warnings", "points_caption", "canary_shows", "canary_hides")
ALL = "all"  # the canary's kinds of trigger taken together


def write(record: Record, out: Path) -> Path:
    """Write report.json (the record as it stands) and report.html, each whole or not at all.

    Args:
        record: what a purification gave, measured and cost; shares within [0, 1].
        out: folder of both files, made where it is missing.
    Returns:
        the page.
    Raises:
        LetheError: the suspect, the clean model or the chosen one is not among the points.
    """
    page = _rendered("report.html.j2", record)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", record)
    write_text(out / "report.html", page)
    return out / "report.html"


def markdown(record: Record) -> str:
    """The recipe and its measurements as the body of a model card; see write."""
    return _rendered("card.md.j2", record)


def points_table(points: list[Record], chosen: Record, metric: str) -> Table:
    """A row a point: model, strength, performance, and the ASR of each kind of canary.

    Args:
        points: see measure.points; a strength of None is no merge.
        chosen: model and strength.
    """
    rows = []
    for point in points:
        strength = "no merge" if point["strength"] is None else brief(point["strength"])
        mark = " (chosen)" if chosen.items() <= point.items() else ""
        row = {"model": point["model"] + mark, "strength": strength}
        row[metric] = _cell(point["performance"])
        rows.append(row | {f"ASR, {kind}": _cell(point["canary"][kind]) for kind in _kinds(point)})
    return rows


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2"], default_for_string=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    look = {"headers": "keys", "tablefmt": "github", "disable_numparse": True}
    made.filters |= {"share": number, "brief": brief, "cell": _cell, "text": _text, "md": _escaped}
    made.filters |= {"called": _called, "table": partial(tabulate, **look)}
    # An interval stays on one line.
    made.filters["fixed"] = lambda cell: cell.replace(", ", ",\N{NO-BREAK SPACE}")
    return made


def _rendered(template: str, record: Record) -> str:
    suspect, result, clean = _ends(record)
    kinds = _kinds(suspect)
    known, limit = took(record["canary_check"], kinds[:-1]), record["canary_limit"]
    context = {
        "record": record,
        "suspect": suspect,
        "result": result,
        "clean": clean,
        "kinds": kinds,
        "points": _points(record),
        "alone": result["model"] == CLEAN,
        "weak": [kind for kind in kinds[:-1] if kind not in known],
        "taken": TAKEN,
        "strong": [kind for kind in kinds[:-1] if result["canary"][kind]["value"] > limit],
        "diluted": record["verdict"] == DILUTED,
        # How the suspect is called: the last part of its path or hub name, without a commit.
        "name": Path(record["models"][0]["given"]).name.split("@")[0],
        "draw": lambda: figures.draw(record, kinds[:-1], result),
    }
    module = _environment().get_template("words.j2").make_module(context)
    words = {name: getattr(module, name)() for name in WORDS}
    text = _environment().get_template(template).render(context, words=words)
    # Control characters and lone surrogates may stand in no UTF-8 page.
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def _escaped(text: str) -> str:
    """One line that Markdown prints as it stands."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~$])", r"\\\1", " ".join(text.split()))


def _text(value: Any) -> str:
    if isinstance(value, list) and value:
        return ", ".join(_text(one) for one in value)
    if isinstance(value, int) and value >= 100_000:
        return f"{value:,}"
    return (value or "none") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _called(model: Record) -> str:
    """A model in a card that others read: they have its hub name, but not this machine's paths."""
    on_hub = re.search(r"@[0-9a-f]{40}$", model["given"])
    called = model["given"] if on_hub else Path(model["given"]).name
    return f"{called} (fingerprint of its files {model['sha256']})"


def _ends(record: Record) -> list[Record]:
    """The points of the suspect, the result and the clean model."""
    out = []
    for wanted in ({"model": "suspect"}, record["chosen"], {"model": CLEAN}):
        found = next((p for p in record["points"] if wanted.items() <= p.items()), None)
        if found is None:
            said = " ".join(map(str, wanted.values()))
            raise LetheError(f"report: {said} is not among the measured points")
        out.append(found)
    return out


def _kinds(point: Record) -> list[str]:
    """The canary's kinds of trigger, the whole last."""
    return [kind for kind in point["canary"] if kind != ALL] + [ALL]


def _cell(share: Record) -> str:
    return interval(share["value"], share["low"], share["high"])


def _points(record: Record) -> Table:
    base = record["base"] | {"strength": None, "model": "base"}
    return points_table([*record["points"], base], record["chosen"], record["metric"])
