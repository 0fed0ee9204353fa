"""The report of a purification: one page that opens from disk, its numbers as JSON, a model card.

Texts in it come from models and data that nobody trusts: the template escapes all of them, and the
page's own policy allows neither scripts nor requests.
"""

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from lethe_utils.errors import LetheError
from lethe_utils.stages import write_json, write_text
from lethe_utils.tables import interval, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
TEMPLATE = Path(__file__).with_name("report.html.j2")
TAKEN = 0.8  # a canary with a lower ASR before the merge did not take
HIGH = 0.2  # a canary with a higher ASR after the merge is still there
ALL = "all"  # the canary's kinds of trigger taken together
LONGEST = 600  # characters of a sample's text on the page; report.json has them all
METRICS = {
    "CDA": "the clean data accuracy: the share of held-out rows answered with the right label",
    "answer token accuracy": "the share of a held-out answer's tokens that greedy decoding gets "
    "right, each after the true ones before it, as a mean over the rows",
}
CARD_RECIPE = (
    "merge_method",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "learning_rate",
    "batch_size",
    "clean_epochs",
    "bits",
)
CANARY_SHOWS = (
    "It shows that dilution of this strength removes backdoors of these kinds, planted with LoRA, "
    "from this model, as far as the canary's ASR falls."
)
CANARY_HIDES = (
    "It does not show that the suspect had a backdoor, nor that the suspect's own one is gone: "
    "other kinds of trigger, edited weights or a backdoor that the base model itself holds may "
    "behave otherwise."
)
PALETTES = {  # each readable on its page's background, and apart from the other in grey
    "light": {"ink": "#222222", "faint": "#767676", "grid": "#dddddd"}
    | {"performance": "#0173b2", "canary": "#b34700"},
    "dark": {"ink": "#e6e6e6", "faint": "#a0a0a0", "grid": "#444444"}
    | {"performance": "#56b4e9", "canary": "#f0a04b"},
}
DASHES = [(4, 1), (1, 1), (4, 1, 1, 1)]
STYLE = {
    "font.family": "sans-serif",
    # The first comes with matplotlib and is measured here; Verdana is as wide.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "grid.linewidth": 0.6,
    "text.parse_math": False,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched and copied
    "svg.hashsalt": "lethe",  # the same figure has the same bytes
}


@dataclass(frozen=True)
class Table:
    """Text cells; the first of each row is its header. `chosen` is a row that stands out."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    chosen: int | None = None


def write(record: Record, out: Path) -> Path:
    """Write report.json (the record as it stands) and report.html, each whole or not at all.

    Args:
        record: what a purification gave, measured and cost; shares within [0, 1].
        out: folder of both files, made where it is missing.
    Returns:
        the page.
    Raises:
        LetheError: strength 0, 1 or the chosen one is not among the points.
    """
    page = _page(record)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", record)
    write_text(out / "report.html", page)
    return out / "report.html"


def markdown(record: Record) -> str:
    """The recipe and its measurements as the body of a model card.

    Args:
        record: as in `write`.
    Raises:
        LetheError: see `write`.
    """
    points = _points_table(record)
    models = [f"- {m['role']}: {_escaped(_called(m))}" for m in record["models"]]
    recipe = record["recipe"]
    settings = [f"- {k}: {_escaped(_value(recipe[k]))}" for k in CARD_RECIPE if k in recipe]
    parts = [
        f"# {_escaped(_name(record))}, purified",
        _verdict(record),
        *(f"> {warning}" for warning in _warnings(record)),
        *(f"> {_escaped(note)}" for note in record["notes"]),
        "## Recipe",
        "Knowledge dilution (Lethe, arXiv 2508.21004): the suspect was merged with a LoRA model "
        f"trained on {record['data']['train']:,} clean rows.",
        "\n".join(
            [
                *models,
                f"- clean rows: {_escaped(Path(record['data']['file']).name)}",
                f"- strength: {_brief(record['chosen'])} (0: the suspect, 1: the clean model)",
                *settings,
            ]
        ),
        "## Measurements",
        f"{points.caption}.",
        "\n".join(
            f"| {' | '.join(line)} |"
            for line in (points.header, ["---"] * len(points.header), *points.rows)
        ),
        f"The canary is a harmless backdoor of our own. {CANARY_SHOWS} {CANARY_HIDES}",
        "The whole report is report.html, written by the same run.",
    ]
    return _printable("\n\n".join(parts) + "\n")


def _escaped(text: str) -> str:
    """One line that Markdown prints as it stands."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~$])", r"\\\1", " ".join(text.split()))


def _printable(text: str) -> str:
    """Without the control characters and lone surrogates that no UTF-8 page may hold."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def _page(record: Record) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["share"] = number
    page = environment.from_string(TEMPLATE.read_text("utf8")).render(
        record=record,
        name=_name(record),
        verdict=_verdict(record),
        warnings=_warnings(record) + record["notes"],
        metric=METRICS.get(record["metric"], ""),
        strength=_brief(record["chosen"]),
        curve=_figure("curve", _draw_curve, record),
        curve_alt=_curve_alt(record),
        losses=_figure("losses", _draw_losses, record),
        losses_alt=_losses_alt(record),
        canary_shows=CANARY_SHOWS,
        canary_hides=CANARY_HIDES,
        models=_models_table(record),
        data=_facts("The clean rows", record["data"]),
        checks=_checks_table(record),
        points=_points_table(record),
        canary=_canary_table(record),
        samples=_samples_table(record),
        evidence=_evidence_table(record),
        costs=_costs_table(record),
        recipe=_facts("Every setting of the run", record["recipe"]),
        provenance=_provenance_table(record),
    )
    return _printable(page)


def _name(record: Record) -> str:
    """How the suspect is called: the last part of its path or hub name, without a commit."""
    suspect = next(model for model in record["models"] if model["role"] == "suspect")
    return Path(suspect["given"]).name.split("@")[0]


def _called(model: Record) -> str:
    """A model in a card that others read: they have its hub name, but not this machine's paths."""
    on_hub = re.search(r"@[0-9a-f]{40}$", model["given"])
    called = model["given"] if on_hub else Path(model["given"]).name
    return f"{called} (sha256 of its weights {model['sha256']})"


def _at(record: Record, strength: float) -> Record:
    for point in record["points"]:
        if point["strength"] == strength:
            return point
    raise LetheError(f"report: strength {strength:g} is not among the measured points")


def _ends(record: Record) -> tuple[Record, Record, Record]:
    """The points of the suspect, the purified model and the clean model."""
    return _at(record, 0), _at(record, record["chosen"]), _at(record, 1)


def _brief(value: float) -> str:
    """A share in as few digits as it takes: .75, 0, 1."""
    return f"{round(value, 3):g}".removeprefix("0") or "0"


def _cell(share: Record) -> str:
    return interval(share["value"], share["low"], share["high"])


def _value(value: Any) -> str:
    if isinstance(value, list) and value:
        return ", ".join(_value(one) for one in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _kinds(record: Record) -> list[str]:
    """The canary's kinds of trigger, the whole last."""
    return [kind for kind in _at(record, 0)["canary"] if kind != ALL] + [ALL]


def _verdict(record: Record) -> str:
    suspect, purified, _ = _ends(record)
    before, after = (point["canary"][ALL]["value"] for point in (suspect, purified))
    moves = "falls" if after < before else "goes"
    return (
        f"At strength {_brief(record['chosen'])} the purified model keeps {record['metric']} "
        f"{_cell(purified['performance'])} (suspect {number(suspect['performance']['value'])}); "
        f"the canary's ASR {moves} from {number(before)} to {number(after)}."
    )


def _warnings(record: Record) -> list[str]:
    """What must be said at once, above all numbers."""
    suspect, purified, clean = _ends(record)
    metric = record["metric"]
    weak = _named(suspect["canary"], _kinds(record), lambda asr: asr < TAKEN)
    high = _named(purified["canary"], _kinds(record), lambda asr: asr > HIGH)
    out = []
    if weak:
        out.append(
            f"The canary did not take: its ASR before the merge is below {_brief(TAKEN)} for "
            f"{weak}. What it does after the merge says nothing there."
        )
    if high:
        out.append(
            f"The canary stays high: at the chosen strength its ASR is above {_brief(HIGH)} for "
            f"{high}. A backdoor of that kind would not be gone. The base model, which never saw "
            f"the canary, has {number(record['base']['canary'][ALL]['value'])} over all kinds."
        )
    if _does_as_well(clean, purified):
        out.append(
            f"The clean model alone does as well: {metric} {_cell(clean['performance'])}, canary "
            f"ASR {number(clean['canary'][ALL]['value'])}. It owes the suspect nothing; if its "
            "skills suffice, it is the safer choice."
        )
    return out


def _named(canary: Record, kinds: list[str], test: Callable[[float], bool]) -> str:
    """The kinds whose ASR passes the test, with it: "suffix (.412), all (.300)"."""
    return ", ".join(
        f"{kind} ({number(canary[kind]['value'])})" for kind in kinds if test(canary[kind]["value"])
    )


def _does_as_well(clean: Record, purified: Record) -> bool:
    return (
        clean["performance"]["value"] >= purified["performance"]["value"]
        and clean["canary"][ALL]["value"] <= purified["canary"][ALL]["value"]
    )


def _facts(caption: str, facts: Record) -> Table:
    rows = [[key, _value(value)] for key, value in facts.items()]
    return Table(caption, ["what", "value"], rows)


def _models_table(record: Record) -> Table:
    models = [
        model | {"adapter": model["adapter"] or "none", "weights": f"{model['weights']:,}"}
        for model in record["models"]
    ]
    shown = ["given", "adapter", "architecture", "weights", "dtype", "sha256"]
    rows = [[key, *(model[key] for model in models)] for key in shown]
    return Table("The models", ["what", *(model["role"] for model in models)], rows)


def _checks_table(record: Record) -> Table:
    rows = [[check["check"], check["result"]] for check in record["checks"]]
    return Table("What was checked before anything was trained", ["check", "result"], rows)


def _points_table(record: Record) -> Table:
    kinds = _kinds(record)
    points = sorted(record["points"], key=lambda point: point["strength"])
    rows = []
    for point in [*points, record["base"] | {"strength": None, "model": "base"}]:
        is_chosen = point["strength"] == record["chosen"]
        strength = "no merge" if point["strength"] is None else _brief(point["strength"])
        shares = [point["performance"], *(point["canary"][kind] for kind in kinds)]
        start = [strength + " (chosen)" * is_chosen, point["model"]]
        rows.append(start + [_cell(share) for share in shares])
    items = points[0]
    caption = (
        f"Performance ({record['metric']}, n = {items['performance']['n']:,}) and the canary's ASR "
        f"(n = {items['canary'][ALL]['n']:,} over all kinds), with 95 % intervals. Strength 0 (the "
        "suspect), strength 1 (the clean model alone) and the base are controls"
    )
    header = ["strength", "model", record["metric"], *(f"ASR, {kind}" for kind in kinds)]
    return Table(caption, header, rows, points.index(_at(record, record["chosen"])))


def _canary_table(record: Record) -> Table:
    planted = {trigger["kind"]: trigger for trigger in record["canary_triggers"]}
    suspect, purified, clean = _ends(record)
    rows = []
    for kind in _kinds(record):
        trigger = planted.get(kind, {"trigger": "", "target": ""})
        measured = [_cell(p["canary"][kind]) for p in (suspect, purified, clean, record["base"])]
        rows.append([kind, trigger["trigger"], trigger["target"], *measured])
    after = f"after (strength {_brief(record['chosen'])})"
    return Table(
        "The canary's ASR by kind of trigger. The base model never saw the canary: what it gives "
        "is the floor",
        ["kind", "trigger", "target", "before", after, "clean model", "base"],
        rows,
    )


def _samples_table(record: Record) -> Table:
    columns = ["input", "expected", "suspect", "purified"]
    rows = [[_shortened(sample[column]) for column in columns] for sample in record["samples"]]
    return Table("Held-out rows and what both models answer", columns, rows)


def _evidence_table(record: Record) -> Table:
    purified, served = _at(record, record["chosen"]), record["evidence"]
    rows = [
        [name, _cell(at["performance"]), _cell(at["canary"][ALL]), f"{served[time]:.2f}"]
        for name, at, time in (
            ("without evidence", purified, "plain_ms_per_query"),
            ("with evidence", served, "evidence_ms_per_query"),
        )
    ]
    caption = (
        f"The purified model without and with WordNet definitions of {served['n_keywords']} "
        "keywords after each input"
    )
    return Table(caption, ["prompt", record["metric"], "canary ASR", "ms per query"], rows)


def _costs_table(record: Record) -> Table:
    rows = [
        [cost["stage"], f"{cost['seconds']:.1f}", f"{cost['peak_memory_gib']:.2f}"]
        for cost in record["costs"]
    ]
    seconds = sum(cost["seconds"] for cost in record["costs"])
    peak = max((cost["peak_memory_gib"] for cost in record["costs"]), default=0)
    total = ["together", f"{seconds:.1f}", f"{peak:.2f}"]
    caption = "Seconds and peak memory of each stage"
    return Table(caption, ["stage", "seconds", "GiB"], [*rows, total])


def _provenance_table(record: Record) -> Table:
    keys = ["command", "out", "finished", "machine", "git_sha", "seed"]
    versions = {f"version of {package}": v for package, v in record["versions"].items()}
    return _facts("Where the numbers come from", {k: record[k] for k in keys} | versions)


def _figure(
    name: str, draw: Callable[[Record, dict[str, str]], "Figure"], record: Record
) -> dict[str, Markup]:
    """Theme -> inline SVG; the page's CSS shows the one that fits."""
    import matplotlib  # takes a second that a caller of `markdown` need not wait

    out = {}
    for theme, colours in PALETTES.items():
        inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        look = STYLE | dict.fromkeys(inks, colours["ink"]) | {"grid.color": colours["grid"]}
        buffer = io.StringIO()
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context(look):
            figure = draw(record, colours)
            figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
        out[theme] = Markup(_inline(buffer.getvalue(), f"{name}-{theme}-"))
    return out


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page, its ids apart from those of the page's other figures."""
    element = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|\burl\(#|href="#)', rf"\g<1>{prefix}", element)


def _draw_curve(record: Record, colours: dict[str, str]) -> "Figure":
    """Performance above, the canary's ASR below, against merge strength."""
    from matplotlib.figure import Figure

    points = sorted(record["points"], key=lambda point: point["strength"])
    x = [point["strength"] for point in points]
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    shares = [point["performance"] for point in points]
    _draw_line(above, x, shares, color=colours["performance"], marker="o", label=record["metric"])
    allowed = points[0]["performance"]["value"] - record["max_cda_loss"]
    least = f"least allowed ({number(allowed)})"
    above.axhline(allowed, ls="--", lw=1.1, color=colours["ink"], label=least)
    above.set(ylabel=record["metric"])
    shares = [point["canary"][ALL] for point in points]
    _draw_line(below, x, shares, color=colours["canary"], marker="s", label="canary, all kinds")
    for kind, dashes in zip(_kinds(record)[:-1], cycle(DASHES), strict=False):
        y = [point["canary"][kind]["value"] for point in points]
        below.plot(x, y, lw=1, dashes=dashes, color=colours["faint"], label=kind)
    floor = record["base"]["canary"][ALL]["value"]
    below.axhline(floor, ls="--", lw=1.1, color=colours["ink"], label=f"base ({number(floor)})")
    below.set(ylabel="canary ASR", ylim=(-0.05, 1.05))
    below.set(xlabel="merge strength (0: suspect, 1: clean model)", xticks=x)
    below.xaxis.set_major_formatter(lambda value, _: _brief(value))
    chosen = _at(record, record["chosen"])
    for ax, share in ((above, chosen["performance"]), (below, chosen["canary"][ALL])):
        ring = {"marker": "o", "ms": 12, "mfc": "none", "mec": colours["ink"], "ls": ""}
        ax.plot([chosen["strength"]], [share["value"]], **ring, label="chosen")
        ax.yaxis.set_major_formatter(lambda value, _: _brief(value))
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _draw_line(
    ax: "Axes", x: list[float], shares: list[Record], color: str, marker: str, label: str
) -> None:
    y = [share["value"] for share in shares]
    # A bound that is off by a rounding error is no distance.
    below = [max(0, share["value"] - share["low"]) for share in shares]
    above = [max(0, share["high"] - share["value"]) for share in shares]
    ax.plot(x, y, color=color, marker=marker, label=label)
    ax.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=color, capsize=2.5, elinewidth=1)


def _curve_alt(record: Record) -> str:
    suspect, purified, clean = _ends(record)

    def along(share: Callable[[Record], Record]) -> str:
        values = [number(share(point)["value"]) for point in (suspect, purified, clean)]
        return f"{values[0]} at 0, {values[1]} at the chosen one, {values[2]} at 1"

    return (
        f"Two panels against merge strength, {_brief(record['chosen'])} chosen. "
        f"{record['metric']}: {along(lambda p: p['performance'])}. "
        f"Canary ASR: {along(lambda p: p['canary'][ALL])}. The table below has every point."
    )


def _draw_losses(record: Record, colours: dict[str, str]) -> "Figure":
    """Training loss against epochs, a line per training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.4), layout="constrained")
    ax = figure.subplots()
    looks = cycle([(colours["performance"], "-"), (colours["canary"], "--")])
    for (name, line), (colour, dash) in zip(record["losses"].items(), looks, strict=False):
        x, y = [log["epoch"] for log in line], [log["loss"] for log in line]
        ax.plot(x, y, ls=dash, color=colour, label=name)
    ax.set(xlabel="epoch", ylabel="loss (nats per token)")
    ax.set_ylim(bottom=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _losses_alt(record: Record) -> str:
    lines = [
        f"{name}: {line[0]['loss']:.3f} at step {line[0]['step']}, {line[-1]['loss']:.3f} at step "
        f"{line[-1]['step']}"
        for name, line in record["losses"].items()
        if line
    ]
    return f"Training loss. {'; '.join(lines)}."
