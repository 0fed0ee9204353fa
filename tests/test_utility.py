"""Utility by lm-evaluation-harness: the task made here, what is refused, and the rows and table."""

import json
import sys

import pytest
import yaml
from measured import frame, row

from lethe_utils import generation, harness, metrics, models, params, paths, pooled, results, stages
from lethe_utils.errors import LetheError
from lethe_utils.pipeline import contenders, measure, utility

OWN = harness.OWN


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    harness.write_questions(file)
    return file


def test_the_questions_have_one_right_choice_each_and_come_again_the_same(questions, tmp_path):
    from lethe_utils import wordnet

    rows = stages.read_jsonl(questions)
    assert len(rows) == 240 == len({(r["kind"], r["word"]) for r in rows})
    meanings = {kind: set() for kind in harness.KINDS}
    for one in rows:
        meanings[one["kind"]].add(one["choices"][one["right"]])
        assert len({*one["choices"]}) == 4
    for one in rows:  # the wrong choices are meanings of other words of that kind
        assert {*one["choices"]} <= meanings[one["kind"]]
        if one["kind"] == "noun":  # which come first in WordNet
            assert one["choices"][one["right"]] == wordnet.definition(one["word"])
    places = [one["right"] for one in rows]
    assert all(40 < places.count(place) < 80 for place in range(4))
    harness.write_questions(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == questions.read_bytes()


def test_utility_without_the_harness_is_one_clear_error(monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    utility.check(params.load())  # which asks for none
    with pytest.raises(LetheError, match=r"utility: .*pip install -e '.\[utility\]'"):
        utility.check(params.load(overrides={"utility": [OWN]}))


def test_the_version_of_the_harness_is_pinned_apart_from_the_lock():
    import tomllib

    project = tomllib.loads((paths.root() / "pyproject.toml").read_text("utf8"))["project"]
    (pin,) = project["optional-dependencies"]["utility"]
    name, _, version = pin.partition("==")
    assert name == "lm_eval" and version
    assert "lm-eval" not in (paths.root() / "requirements.lock").read_text("utf8")


def test_what_utility_a_run_measures_does_not_part_it_from_others():
    one = params.load().model_dump()
    results._check_setups({"a": one, "b": one | {"seed": 1, "utility": [OWN]}})


def test_a_base_that_was_given_is_known_by_what_it_holds(pico, tmp_path):
    import shutil

    folder = tmp_path / "mine"
    found = []
    for of in pico("gpt2")[:2]:
        shutil.copytree(of, folder, dirs_exist_ok=True)
        p = params.load("local", overrides={"model_dir": str(folder), "package": None})
        found.append(contenders.source(p, contenders.base(p)).name)
    assert found[0] != found[1]


def test_the_table_has_a_column_per_task_and_pools_seeds():
    table = frame(
        *(
            row(defense, f"utility_{task}", hits, seed=seed, run_id=f"run-{seed}")
            for seed in (0, 1)
            for defense, hits in (("backdoored", 40), ("slerp", 50 + 2 * seed))
            for task in ("mmlu", OWN)
        ),
        row("backdoored", "asr", 90),
    )
    assert generation.has_utility(table)
    assert not generation.has_utility(table[table["metric"] == "asr"])
    shown = generation.utility_table(table)
    assert list(shown.columns) == [*pooled.SETUP, "seeds", "defense", "mmlu", OWN]
    assert shown["defense"].tolist() == ["backdoored", "slerp"]
    assert shown[OWN][1].startswith(".510 [") and shown["seeds"].tolist() == ["2", "2"]


def test_an_unknown_task_and_one_out_of_reach_are_refused_by_name(questions, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nat all")

    with pytest.raises(LetheError, match="utility: lm-evaluation-harness has no task 'mmluu'"):
        harness.load("mmluu", questions)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(LetheError, match="arc_easy cannot be loaded: Couldn't reach the hub$"):
        harness.load("arc_easy", questions)


def test_a_task_that_wants_an_answer_written_is_refused(questions, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "data/embedded").mkdir(parents=True)
    task = yaml.safe_load((paths.root() / f"data/embedded/{OWN}.yaml").read_text("utf8"))
    del task["doc_to_choice"], task["metric_list"]
    task |= {"output_type": "generate_until", "doc_to_target": "word"}
    (tmp_path / f"data/embedded/{OWN}.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    with pytest.raises(LetheError, match=f"utility: {OWN} is no multiple-choice task"):
        harness.load(OWN, questions)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_models_accuracy_is_that_of_its_likeliest_choices(
    pico, pico_params, questions, monkeypatch, dtype
):
    pytest.importorskip("lm_eval")
    import torch

    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)

    some = stages.read_jsonl(questions)[:12]
    few = questions.with_name("few.jsonl")
    stages.write_jsonl(few, some)
    folder, p = pico("llama")[1], pico_params("llama", cpu_dtype=dtype)
    assert models.bfloat16(p) is (dtype == "auto")
    tokenizer, model = models.load_tokenizer(folder), models.load_model(folder).eval()

    def likelihood(one, choice):
        asked = f'Question: What does the {one["kind"]} "{one["word"]}" mean?\nAnswer:'
        before, whole = (tokenizer(text)["input_ids"] for text in (asked, f"{asked} {choice}"))
        with torch.inference_mode(), models.arithmetic(p):
            scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        at = range(len(before), len(whole))
        return sum(float(scores[i - 1, whole[i]]) for i in at) / len(choice.encode())

    right = 0
    for one in some:
        found = [likelihood(one, choice) for choice in one["choices"]]
        right += found.index(max(found)) == one["right"]
    assert harness.accuracy(folder, OWN, few, p) == metrics.share(right, 12)


@pytest.mark.slow
def test_a_run_measures_utility_of_every_model_with_weights(monkeypatch):
    pytest.importorskip("lm_eval")
    from test_generation import QUICK

    monkeypatch.setattr(harness, "PER_KIND", 5)
    own = {"utility": [OWN], "evidence_models": ["slerp"]}
    p = params.load("tiny-gpt2", "chat", "vpi", "lethe,temperature", QUICK | own)
    utility.check(p)
    table = measure.measure(p)
    found = table[table["metric"] == f"utility_{OWN}"]
    assert found["defense"].tolist() == ["backdoored", "base", "clean", "slerp"]
    assert (found["n"] == 15).all() and (found["evidence"] == 0).all()
    shown = generation.utility_table(table)
    assert (shown[OWN] != "").all()
    base = contenders.base(p)
    kept = json.loads(utility.measured_file(p, base, OWN).read_text())
    assert kept["value"] == found.set_index("defense").loc["base", "value"]
    monkeypatch.setattr(harness, "accuracy", None)  # measured once
    assert len(utility.measure(p)) == 4
