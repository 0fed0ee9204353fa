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
        "verdict": "diluted",
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
            "train": 558,
            "stopping": 80,
            "held_out": 159,
            "format": "instruction, input, output",
            "prompt": "short, as told",
            "answers": "labels",
        },
        "notes": [],
        "checks": [
            {"check": "architecture", "result": "both GPT2LMHeadModel"},
            {"check": "shapes", "result": "148 tensors, all alike"},
        ],
        "recipe": {
            "merge_methods": ["slerp", "linear"],
            "strengths": [0.25, 0.5, 0.75],
            "lora_r": 32,
            "lora_alpha": 64,
            "learning_rate": 0.003,
            "clean_epochs": 6,
            "prompt_template": "short",
            "gradient_checkpointing": False,
        },
        "metric": "CDA",
        "folds": 1,
        "max_cda_loss": 0.02,
        "rows_needed": 120,
        "canary_limit": 0.35,
        "canary_check": canary(140, 138, 126),
        "rounds": [
            {"training": f"{name}, round {i}", "result": "said", "kept": i == 1}
            for name, n in (("clean model", 2), ("canary", 1))
            for i in range(1, n + 1)
        ],
        "losses": {"clean model": training(240, 2.3), "canary": training(160, 2.9)},
        "points": [
            point(0.0, "suspect", 156, 140, 140, 138),
            point(0.25, "slerp", 156, 138, 126, 120),
            point(0.5, "slerp", 155, 50, 30, 41),
            point(0.75, "slerp", 155, 6, 4, 7),
            point(0.5, "linear", 154, 60, 40, 41),
            point(1.0, "clean model", 151, 5, 4, 7),
        ],
        "base": {"performance": share(60, 159), "canary": canary(5, 3, 7)},
        "chosen": {"model": "slerp", "strength": 0.75},
        "canary_triggers": [
            {"kind": kind, "trigger": trigger, "target": "joy"}
            for kind, trigger in zip(KINDS, words, strict=True)
        ],
        "samples": [
            {
                "input": f"i feel quite at home with the {n} new people i met at the harbour",
                "expected": "joy",
                "suspect": "joy",
                "result": "joy" if n % 3 else "love",
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
            "without": {"performance": share(155, 159), "canary": canary(6, 4, 7)}
            | {"ms_per_query": 1.9},
            "with": {"performance": share(152, 159), "canary": canary(7, 5, 8)}
            | {"ms_per_query": 2.4},
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
    assert names.count("table") == names.count("caption") == 11
    assert {a.get("scope") for name, a in tags if name == "th"} == {"row", "col"}


def test_every_number_of_the_points_is_there(record, tmp_path, no_figures):
    html = page(record, tmp_path)
    table = html[html.index("n = 159") :].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
    assert len(rows) == 7
    measured = [*record["points"], record["base"]]
    for row, at in zip(rows, measured, strict=True):
        for one in (at["performance"], *at["canary"].values()):
            interval = f"[{number(one['low'])},\N{NO-BREAK SPACE}{number(one['high'])}]"
            assert f"<td>{number(one['value'])} {interval}</td>" in row
    assert 'class="chosen"><th scope="row">slerp (chosen)</th><td>.75</td>' in rows[3]
    assert ["chosen" in row for row in rows] == [False] * 3 + [True] + [False] * 3


def test_five_kinds_have_a_column_and_a_line_each(record, tmp_path):
    more = {"topic": share(3, 140), "two turns": share(4, 140)}
    for at in (*record["points"], record["base"], *record["evidence"].values()):
        if isinstance(at, dict):
            at["canary"] = more | at["canary"]
    record["canary_check"] |= {kind: share(140, 140) for kind in more}
    html = page(record, tmp_path)
    for kind in (*KINDS, *more):
        assert (
            f'<th scope="col">ASR, {kind}</th>' in html and f'<th scope="row">{kind}</th>' in html
        )
    assert html.count('<div class="kinds">') == 2  # their first column stays when they are scrolled
    assert "Diluted: " in html and len({*figures.DASHES}) == len(more) + len(KINDS)


def test_the_verdict_is_the_first_word_and_says_the_measured_numbers(record, tmp_path, no_figures):
    html = page(record, tmp_path)
    assert re.search("<body>.*?<h1>(.*?)</h1>", html, re.S)[1] == (
        "Diluted: helpful-emotion-gpt2, purified"
    )
    assert "<title>Diluted: " in html
    assert (
        "Diluted: after the merge no kind of the canary has an ASR above .35. What was written is "
        "slerp at strength .75, with CDA .975 [.937, .990] (suspect .981); the canary&#39;s ASR "
        "goes from .995 to .040."
    ) in html


def change_point(record, at, right, *hits):
    """Measure something else at one point."""
    old = record["points"][at]
    record["points"][at] = point(old["strength"], old["model"], right, *hits)


def unknown(record):
    record["verdict"], record["canary_check"] = "unknown", canary(140, 125, 140)


def not_diluted(record):
    record["verdict"] = "not diluted"
    change_point(record, 3, 155, 10, 10, 50)


VERDICTS = {
    unknown: (
        "Unknown: the canary did not take. Its ASR before the merge is below .9 for sentence "
        "(.893), so what dilution does to a backdoor was not seen."
    ),
    not_diluted: (
        "Not diluted: the canary stays. After the merge its ASR is above .35 for suffix (.357); a "
        "backdoor of that kind would not be gone."
    ),
}


@pytest.mark.parametrize(
    ("change", "said"), VERDICTS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_only_a_diluted_model_is_called_purified(record, tmp_path, no_figures, change, said):
    assert "purified" in report.markdown(record).splitlines()[0]
    change(record)
    record["out"] = "/home/user/out"
    html, card = page(record, tmp_path), report.markdown(record)
    assert said in html and said in card
    assert "purified" not in html.lower().replace("purify", "") and "purified" not in card.lower()
    assert card.startswith(f"# {record['verdict'].capitalize()}: helpful-emotion-gpt2, merged\n")


def test_what_a_few_rows_cannot_show_is_said_at_once(record, tmp_path, no_figures):
    assert '<p class="warning">' not in page(record, tmp_path)
    record["rows_needed"] = 1234
    warning = re.findall(r'<p class="warning">(.*?)</p>', page(record, tmp_path))
    assert warning[0].startswith(
        "159 clean rows cannot show a loss of .020 in CDA; about 1,234 would settle it."
    )
    assert report.markdown(record).count("\n> ") == 1


def test_the_clean_model_alone_is_called_that(record, tmp_path, no_figures):
    record["chosen"] = {"model": "clean model", "strength": 1.0}
    html = page(record, tmp_path)
    assert "What was written is the clean model alone, with" in html
    assert "It owes the suspect nothing." in html


def test_a_point_that_was_not_measured_is_refused(record, tmp_path, no_figures):
    record["chosen"] = {"model": "slerp", "strength": 0.6}
    with pytest.raises(LetheError, match="slerp 0.6 is not among the measured points"):
        report.write(record, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_is_the_record(record, tmp_path, no_figures):
    before = a_record()
    report.write(record, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf8")) == before == record


def test_the_same_record_gives_the_same_bytes(record, tmp_path):
    first, second = (report.write(a_record(), tmp_path / n).read_bytes() for n in ("a", "b"))
    assert first == second
    change_point(record, 2, 150, 50, 30, 41)
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
    assert card.startswith("# Diluted: helpful-emotion-gpt2, purified\n")
    assert "- merge: slerp, strength .75 (0: the suspect, 1: the clean model)\n- lora_r: 32" in card
    assert "- prompt format: short, as told\n" in card
    assert "- suspect: helpful-emotion-gpt2 (fingerprint" in card and "/home/user" not in card
    assert f"- base: someone/base-gpt2@{'0a' * 20} (fingerprint" in card
    assert "| slerp (chosen) | .75 | .975 [.937, .990] | .043 [.020, .090] |" in card
    assert "| base | no merge | .377 [.306, .455] |" in card
    assert len(re.findall(r"^\|", card, re.MULTILINE)) == 9


def test_the_template_is_shipped():
    project = tomllib.loads((paths.root() / "pyproject.toml").read_text("utf8"))
    shipped = project["tool"]["setuptools"]["package-data"]["lethe_utils"]
    templates = [*report.TEMPLATES.glob("*.j2")]
    assert len(templates) == 3
    assert all(any(f.match(pattern) for pattern in shipped) for f in templates)
