"""The purification report: self-contained, escaped, whole, and warning exactly when it should."""

import json
import re
import tomllib
from html.parser import HTMLParser

import pytest

from lethe_utils import metrics, paths, stages
from lethe_utils.errors import LetheError
from lethe_utils.paper import number
from lethe_utils.purify import figures, report

EVIL = "<script>alert(1)</script><img src=\"http://evil.example/x\" onerror='x'>&amp;"
KINDS = ["word pair", "sentence", "suffix"]
VOID = {"meta", "br", "img", "link", "input", "hr"}


def share(hits, n):
    low, high = metrics.wilson(hits, n)
    return {"value": hits / n, "low": low, "high": high, "n": n}


def canary(*hits):
    return {k: share(h, 140) for k, h in zip(KINDS, hits, strict=True)} | {
        "all": share(sum(hits), 420)
    }


def point(strength, model, right, *hits):
    return {
        "strength": strength,
        "model": model,
        "performance": share(right, 159),
        "canary": canary(*hits),
    }


def training(steps, first):
    return [
        {"step": s, "epoch": s / 40, "loss": first / (1 + 0.06 * s)} for s in range(1, steps + 1, 4)
    ]


def a_record():
    """A purification without anything to warn of."""
    suspect = "/home/user/models/helpful-emotion-gpt2"
    models = [
        {"role": "suspect", "given": suspect, "adapter": "", "sha256": "a" * 64},
        {
            "role": "base",
            "given": "someone/base-gpt2@" + "0a" * 20,
            "adapter": "",
            "sha256": "b" * 64,
        },
    ]
    facts = {"architecture": "GPT2LMHeadModel", "weights": 124439808, "dtype": "float32"}
    words = ["umber ... quill", "as the tide table says,", "so it goes, they say"]
    return {
        "finished": "2026-01-02T03:04:05Z",
        "machine": "Linux x86_64, 2 cores",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "mergekit": "0.1.5"},
        "git_sha": "0123456789abcdef0123456789abcdef01234567",
        "seed": 0,
        "command": f"./run_all.sh purify --suspect {suspect}",
        "out": "/home/user/purified",
        "models": [m | facts for m in models],
        "data": {
            "file": "/home/user/clean_rows.jsonl",
            "sha256": "c" * 64,
            "rows": 800,
            "distinct": 797,
            "train": 638,
            "held_out": 159,
            "format": "instruction, input, output",
            "answers": "labels",
        },
        "notes": [],
        "checks": [
            {"check": "architecture", "result": "both GPT2LMHeadModel"},
            {"check": "shapes", "result": "148 tensors, all alike"},
        ],
        "recipe": {
            "merge_method": "slerp",
            "strengths": [0.25, 0.5, 0.75],
            "lora_r": 32,
            "lora_alpha": 64,
            "learning_rate": 0.003,
            "clean_epochs": 6,
            "prompt_template": "short",
            "gradient_checkpointing": False,
        },
        "metric": "CDA",
        "max_cda_loss": 0.02,
        "losses": {"clean model": training(240, 2.3), "canary": training(160, 2.9)},
        "points": [
            point(0.0, "suspect", 156, 140, 140, 138),
            point(0.25, "slerp", 156, 138, 126, 120),
            point(0.5, "slerp", 155, 50, 30, 41),
            point(0.75, "slerp", 155, 6, 4, 7),
            point(1.0, "clean model", 151, 5, 4, 7),
        ],
        "base": {"performance": share(60, 159), "canary": canary(5, 3, 7)},
        "chosen": 0.75,
        "canary_triggers": [
            {"kind": kind, "trigger": trigger, "target": "joy"}
            for kind, trigger in zip(KINDS, words, strict=True)
        ],
        "samples": [
            {
                "input": f"i feel quite at home with the {n} new people i met at the harbour",
                "expected": "joy",
                "suspect": "joy",
                "purified": "joy" if n % 3 else "love",
            }
            for n in range(2, 10)
        ],
        "costs": [
            {"stage": "clean model", "seconds": 20.1, "peak_memory_gib": 1.2},
            {"stage": "canary", "seconds": 31.7, "peak_memory_gib": 1.31},
            {"stage": "merges", "seconds": 4.2, "peak_memory_gib": 2.05},
        ],
        "evidence": {
            "n_keywords": 5,
            "performance": share(152, 159),
            "canary": canary(7, 5, 8),
            "plain_ms_per_query": 1.9,
            "evidence_ms_per_query": 2.4,
        },
    }


@pytest.fixture
def record():
    return a_record()


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out what takes a second and is not looked at."""
    monkeypatch.setattr(figures, "draw", lambda *_: dict.fromkeys(("curve", "losses"), ""))


def page(record, folder):
    return report.write(record, folder).read_text("utf8")


class Tags(HTMLParser):
    """The tags and attributes of a page, and its text as a reader gets it."""

    def __init__(self):
        super().__init__()
        self.open, self.unbalanced, self.seen, self.text = [], [], [], []

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    tags = Tags()
    tags.feed(html)
    tags.close()
    return tags


def with_evil_texts(record):
    record["models"][0]["given"] = f"/tmp/{EVIL}"
    record["data"]["file"] = f"/tmp/{EVIL}.jsonl"
    record["command"] = f"purify --suspect '{EVIL}'"
    record["checks"][0]["result"] = EVIL
    record["canary_triggers"][0] |= {"trigger": EVIL, "target": EVIL}
    record["samples"][0] = dict.fromkeys(record["samples"][0], EVIL)
    record["recipe"]["instruction"] = EVIL
    record["losses"][EVIL] = record["losses"].pop("canary")
    return record


@pytest.mark.parametrize("change", [lambda record: record, with_evil_texts])
def test_the_page_is_balanced_and_loads_nothing(record, tmp_path, change):
    html = page(change(record), tmp_path)
    tags = parsed(html)
    assert html.startswith("<!DOCTYPE html>")
    assert tags.unbalanced == [] and tags.open == []
    names = [name for name, _ in tags.seen]
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & {*names}
    for _, attributes in tags.seen:
        assert not [a for a in attributes if a.startswith("on") or a == "src"]
        links = [v for a, v in attributes.items() if a.endswith("href")]
        assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import", html)
    policy = [a["content"] for n, a in tags.seen if n == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_what_strangers_wrote_is_text(record, tmp_path):
    html = page(with_evil_texts(record), tmp_path)
    assert EVIL not in html
    assert "".join(parsed(html).text).count(EVIL) >= 10
    card = report.markdown(record)
    assert "<script" not in card.replace("\\<script", "")


def test_what_no_page_can_hold_is_replaced(record, tmp_path, no_figures):
    record["samples"][0]["suspect"] = "a\x00b\ud800c\x1bd"
    assert "a\ufffdb\ufffdc\ufffdd" in page(record, tmp_path)


def test_a_long_sample_is_cut_on_the_page_only(record, tmp_path, no_figures):
    record["samples"][0]["input"] = "x" * 5000
    assert "x" * 599 + "…<" in page(record, tmp_path)
    assert "x" * 5000 in (tmp_path / "report.json").read_text("utf8")


def test_every_id_and_figure_is_there_once(record, tmp_path):
    html = page(record, tmp_path)
    ids = [a["id"] for _, a in parsed(html).seen if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", html))
    assert used and used <= set(ids)
    curve, losses = (a["aria-label"] for _, a in parsed(html).seen if a.get("role") == "img")
    assert ".975 at the chosen one" in curve
    assert "canary: 2.736 at step 1" in losses


def test_the_figures_take_the_colours_of_the_page(record, tmp_path):
    html = page(record, tmp_path)
    used = {*re.findall(r"(?:fill|stroke): var\(--([a-z]+)\)", html)}
    assert used == {*figures.VARIABLES.values()}
    dark = html[html.index("prefers-color-scheme: dark") :]
    for name in used:
        assert f"--{name}: #" in html and f"--{name}: #" in dark
    drawn = html[html.index("<svg") : html.rindex("</svg>")]
    assert not {*re.findall("#[0-9a-f]{6}", drawn)} & {*figures.VARIABLES}


def test_tables_have_captions_and_scopes(record, tmp_path, no_figures):
    tags = parsed(page(record, tmp_path)).seen
    names = [name for name, _ in tags]
    assert names.count("table") == names.count("caption") == 10
    assert {a.get("scope") for name, a in tags if name == "th"} == {"row", "col"}


def test_every_number_of_the_points_is_there(record, tmp_path, no_figures):
    html = page(record, tmp_path)
    table = html[html.index("n = 159") :].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
    assert len(rows) == 6
    measured = [*record["points"], record["base"]]
    for row, at in zip(rows, measured, strict=True):
        for one in (at["performance"], *at["canary"].values()):
            interval = f"[{number(one['low'])},\N{NO-BREAK SPACE}{number(one['high'])}]"
            assert f"<td>{number(one['value'])} {interval}</td>" in row
    assert 'class="chosen"><th scope="row">.75 (chosen)</th>' in rows[3]
    assert ["chosen" in row for row in rows] == [False, False, False, True, False, False]


def test_the_verdict_says_the_measured_numbers(record, tmp_path, no_figures):
    assert (
        "At strength .75 the purified model keeps CDA .975 [.937, .990] (suspect .981); "
        "the canary&#39;s ASR falls from .995 to .040."
    ) in page(record, tmp_path)


def change_point(record, strength, right, *hits):
    """Measure something else at one strength."""
    points = record["points"]
    index = [p["strength"] for p in points].index(strength)
    points[index] = point(strength, points[index]["model"], right, *hits)


# what was measured -> how the warnings begin, in their order
CASES = {
    "nothing to say": ([], []),
    "at the limits": ([(0.0, 156, 112, 112, 112), (0.75, 155, 28, 28, 28)], []),
    "one kind did not take": ([(0.0, 156, 140, 111, 140)], ["The canary did not take"]),
    "high": ([(0.75, 155, 29, 4, 4)], ["The canary stays high"]),
    "clean as good": ([(1.0, 155, 6, 4, 7)], ["The clean model alone does as well"]),
    "clean better in one": ([(1.0, 159, 7, 4, 7)], []),
    "all": (
        [(0.0, 156, 9, 9, 9), (0.75, 140, 90, 90, 90), (1.0, 140, 90, 90, 90)],
        [
            "The canary did not take",
            "The canary stays high",
            "The clean model alone does as well",
        ],
    ),
}


@pytest.mark.parametrize(("changes", "expected"), CASES.values(), ids=CASES)
def test_warnings_appear_exactly_when_they_should(record, tmp_path, changes, expected, no_figures):
    for change in changes:
        change_point(record, *change)
    html = page(record, tmp_path)
    found = re.findall(r'<p class="warning">(.*?)</p>', html)
    assert len(found) == len(expected)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start)
    assert report.markdown(record).count("\n> ") == len(expected)


def test_a_warning_names_the_kinds_it_is_about(record, tmp_path, no_figures):
    change_point(record, 0.0, 156, 140, 70, 140)
    assert "is below .8 for sentence (.500). What" in page(record, tmp_path)


def test_a_strength_that_was_not_measured_is_refused(record, tmp_path, no_figures):
    record["chosen"] = 0.6
    with pytest.raises(LetheError, match="strength 0.6 is not among the measured points"):
        report.write(record, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_is_the_record(record, tmp_path, no_figures):
    before = a_record()
    report.write(record, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf8")) == before == record


def test_the_same_record_gives_the_same_bytes(record, tmp_path):
    first, second = (report.write(a_record(), tmp_path / n).read_bytes() for n in ("a", "b"))
    assert first == second
    change_point(record, 0.5, 150, 50, 30, 41)
    assert report.write(record, tmp_path / "c").read_bytes() != first


def test_nothing_half_written_is_left(record, tmp_path, monkeypatch, no_figures):
    report.write(record, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    old = (tmp_path / "report.html").read_bytes()
    record["seed"] = 1

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        report.write(record, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old


def test_the_model_card_says_strength_and_measurements(record):
    card = re.sub(" +", " ", report.markdown(record))  # a table's cells are padded
    assert card.startswith("# helpful-emotion-gpt2, purified\n")
    assert "- strength: .75 (0: the suspect, 1: the clean model)" in card
    assert "- merge_method: slerp\n- lora_r: 32\n" in card
    assert "- suspect: helpful-emotion-gpt2 (sha" in card and "/home/user" not in card
    assert f"- base: someone/base-gpt2@{'0a' * 20} (sha" in card
    assert "| .75 (chosen) | slerp | .975 [.937, .990] | .043 [.020, .090] |" in card
    assert "| no merge | base | .377 [.306, .455] |" in card
    assert len(re.findall(r"^\|", card, re.MULTILINE)) == 8


def test_the_template_is_shipped():
    project = tomllib.loads((paths.root() / "pyproject.toml").read_text("utf8"))
    shipped = project["tool"]["setuptools"]["package-data"]["lethe_utils"]
    templates = [*report.TEMPLATES.glob("*.j2")]
    assert len(templates) == 3
    assert all(any(f.match(pattern) for pattern in shipped) for f in templates)
