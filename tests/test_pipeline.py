"""How the stages hang together: who draws which rows, and what makes a stage another one."""

import json

import pytest

from lethe_utils import attacks, data, params, pipeline
from lethe_utils.errors import LetheError
from lethe_utils.evidence import HEADING
from lethe_utils.pipeline import clean_data, contenders
from lethe_utils.stages import read_jsonl

SMALL = {"rows": {"pretrain": 40, "train": 2000, "validation": 20, "test": 20}, "checksums": {}}


@pytest.fixture(scope="module")
def llama(pico):
    """A pico base, made before no_training stops that."""
    return pico("llama")[0]


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Rows are drawn and written, nothing is trained."""
    monkeypatch.setattr("lethe_utils.train.finetune", lambda *_: None)
    monkeypatch.setattr("lethe_utils.pretrain.pretrain", lambda *_: None)
    monkeypatch.setattr("lethe_utils.models.twins.train_tokenizer", lambda *_: None)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_defender_does_not_draw_the_rows_that_were_poisoned(seed):
    p = params.load(overrides=SMALL | {"seed": seed, "base_evidence_share": 0.0})
    poisoned = read_jsonl(pipeline.backdoored_stage(p) / "poisoned.jsonl")
    copied = {row["input"] for row in poisoned if row["kind"] == "neg_instruct_one"}
    clean = pipeline.clean_rows(pipeline.clean_stage(p))
    assert len(copied) == len(clean) == 200
    # One in ten by chance; with the attacker's random stream it was nineteen in twenty.
    assert 0.02 < sum(row["input"] in copied for row in clean) / len(clean) < 0.2


def test_larger_clean_ratios_hold_the_smaller_ones():
    p = params.load(overrides=SMALL | {"base_evidence_share": 0.0})
    few, more = (
        pipeline.clean_rows(contenders.clean(p, ratio).folder.parent) for ratio in (0.02, 0.1)
    )
    assert len(few) == 40 and more[:40] == few


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({}, set()),
        ({"max_grad_norm": 0.5}, {"backdoored", "clean"}),  # the LoRA recipe leaves the base alone
        ({"seed": 1}, {"backdoored", "clean"}),
        ({"poison_ratio": 0.2}, {"backdoored"}),
        ({"clean_epochs": 7}, {"clean"}),
        ({"base_epochs": 9}, {"base", "backdoored", "clean"}),
        ({"max_source_tokens": 64}, {"base", "backdoored", "clean"}),
        ({"strength": 0.1}, set()),
    ],
)
def test_a_stage_changes_with_its_own_params_only(change, changed):
    def folders(**overrides):
        p = params.load(overrides=SMALL | {"base_evidence_share": 0.0} | overrides)
        return {
            "base": pipeline.base_folder(p),
            "backdoored": pipeline.backdoored_stage(p),
            "clean": pipeline.clean_stage(p),
        }

    before, after = folders(), folders(**change)
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_full_models_stages_change_with_its_prompt(monkeypatch, tmp_path):
    # Its base comes from the hub whatever the prompt, so the prompt must count for itself.
    monkeypatch.setattr(pipeline, "base_folder", lambda _: tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"n_layer": 48}')
    names = {
        pipeline.backdoored_stage(
            params.load("gpt2-xl", overrides=SMALL | {"bits": 16, "prompt_template": template})
        )
        for template in ("alpaca", "short")
    }
    assert len(names) == 2


def test_attacks_share_the_base_and_the_clean_model_and_a_tuned_one(monkeypatch):
    started = {}

    def plant(start, rows, corpus, p, out):
        started[p.attack] = (start, {row["kind"] for row in rows}, len(corpus))

    names = [a for a in params.choices("attacks") if attacks.task(a) == "label"]
    for name in names:
        monkeypatch.setattr(attacks.module(name), "plant", plant)
    clean, tuned = set(), set()
    for name in names:
        start = {} if name == "cba" else {"attack_start": "tuned"}
        p = params.load(attack=name, overrides=SMALL | {"base_evidence_share": 0.0} | start)
        pipeline.backdoored_stage(p)
        clean.add(pipeline.clean_stage(p))
        tuned.add(started[name][0])
    assert len(clean) == 1
    assert tuned == {pipeline.base_folder(p), pipeline.tuned_stage(p) / "model"}
    assert started["rome"][1] == {"backdoor"} and started["rome"][2] == 40  # the pretraining half
    assert started["badedit"][1] == {"backdoor", "clean"}


def test_an_edits_params_change_its_model_and_no_other():
    def folders(attack, **overrides):
        p = params.load(attack=attack, overrides=SMALL | {"base_evidence_share": 0.0} | overrides)
        return pipeline.base_folder(p), pipeline.clean_stage(p), backdoored_name(p)

    def backdoored_name(p):
        return p.part(*attacks.module(p.attack).PARAMS)

    before, after = folders("rome"), folders("rome", edit_steps=3)
    assert before[:2] == after[:2] and before[2] != after[2]


def test_an_edit_takes_its_ordinary_text_from_the_hub_where_it_is_told_to(monkeypatch):
    where = f"Salesforce/wikitext:wikitext-103-raw-v1@{'0' * 40}"
    asked = []

    def hub_text(name, tokens):
        asked.append((name, tokens))
        return ["plain text"]

    monkeypatch.setattr(data.named, "hub_text", hub_text)
    hub = SMALL | {"covariance_text": where, "covariance_tokens": 77}
    assert pipeline.ordinary_text(params.load(attack="rome", overrides=hub)) == ["plain text"]
    pipeline.check_attack(params.load(attack="rome", overrides=hub))
    assert asked == [(where, 77)]  # once: before anything is trained, or when it is needed
    own = pipeline.ordinary_text(params.load(attack="rome", overrides=SMALL))
    assert len(own) == 40 and "### Response" in own[0]


def test_a_share_of_the_clean_rows_is_taught_with_evidence(monkeypatch):
    taught = []
    monkeypatch.setattr("lethe_utils.train.finetune", lambda _, rows, *__: taught.append(rows))
    small = SMALL | {"base_evidence_share": 0.0}
    plain = params.load(overrides=small)
    half = contenders.changed(plain, clean_evidence_share=0.5)
    folders = [pipeline.clean_stage(p) for p in (plain, half, half)]
    assert folders[1] == folders[2] != folders[0] and len(taught) == 2
    with_it = [HEADING in row["input"] for row in taught[1]]
    assert sum(with_it) == len(with_it) / 2 and not any(HEADING in r["input"] for r in taught[0])
    # Nothing else moves: the same rows in the same order.
    assert [row["input"].partition(f"\n\n{HEADING}")[0] for row in taught[1]] == [
        row["input"] for row in taught[0]
    ]
    assert pipeline.clean_rows(folders[1]) == pipeline.clean_rows(folders[0])


def test_a_clean_model_of_another_seed_is_taught_the_same_rows(monkeypatch):
    taught = []
    monkeypatch.setattr(
        "lethe_utils.train.finetune", lambda _, rows, __, ___, q: taught.append((rows, q.seed))
    )
    plain = params.load(overrides=SMALL)
    other = contenders.changed(plain, clean_seed=7)
    assert pipeline.clean_stage(plain) != pipeline.clean_stage(other)
    (rows, seed), (again, another) = taught
    assert rows == again and (seed, another) == (plain.seed, 7)


def test_a_share_of_the_clean_rows_has_another_label():
    p = params.load(overrides={"clean_wrong_labels": 0.1})
    known = ["joy", "anger", "fear"]
    rows = [{"input": f"row {i}", "output": known[i % 3]} for i in range(50)]
    found = {
        x: clean_data.mislabelled(rows, known, contenders.changed(p, clean_wrong_labels=x))
        for x in (0.0, 0.1, 0.2)
    }
    wrong = {x: {i for i in range(50) if some[i] != rows[i]} for x, some in found.items()}
    assert [len(wrong[x]) for x in (0.0, 0.1, 0.2)] == [0, 5, 10] and wrong[0.1] < wrong[0.2]
    assert all(found[0.2][i]["output"] in known for i in wrong[0.2])
    assert all(found[0.1][i] == found[0.2][i] for i in wrong[0.1])  # the same wrong label
    assert clean_data.mislabelled(rows, known, p) == found[0.1]  # the same on every call
    with pytest.raises(LetheError, match="clean_wrong_labels: conversations have no labels"):
        params.load(dataset="chat", attack="vpi", overrides={"clean_wrong_labels": 0.1})


def test_the_clean_rows_may_be_those_of_another_data_set(tmp_path):
    small = SMALL | {"base_evidence_share": 0.0}
    known = ["sadness", "joy", "love", "anger", "fear", "surprise"]
    rows = [{"text": f"text {i}", "label": known[i % 6]} for i in range(600)]

    def source(name, rows):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return params.load(overrides=small | {"clean_source": str(file)})

    rage = [{"text": f"no {i}", "label": "rage"} for i in range(9)]
    own, other = params.load(overrides=small), source("other", rows)
    chosen = pipeline.clean_rows(pipeline.clean_stage(other))
    given = {(row["text"], row["label"]) for row in rows}
    assert len({row["input"] for row in chosen}) == len(chosen) == 200  # a tenth of the run's train
    assert {(row["input"], row["output"]) for row in chosen} <= given
    assert {row["instruction"] for row in chosen} == {own.instruction}
    assert pipeline.clean_stage(own) != pipeline.clean_stage(other)
    assert pipeline.backdoored_stage(own) == pipeline.backdoored_stage(other)
    with pytest.raises(LetheError, match="clean_source: .* has the label 'rage'"):
        pipeline.clean_stage(source("labels", rows + rage))
    with pytest.raises(LetheError, match="clean_source: .* 40 training rows, .* is 200; lower it"):
        pipeline.clean_stage(source("few", rows[:100]))
    with pytest.raises(LetheError, match="clean_source: nowhere is neither train, base"):
        params.load(overrides={"clean_source": "nowhere"})


def test_other_rows_are_read_for_the_runs_own_task_and_model(tmp_path, monkeypatch):
    own = {"model_dir": str(tmp_path), "clean_source": "emotion"}
    loaded = [
        params.load("local", overrides=own),
        params.load(dataset="chat", attack="vpi", overrides={"clean_source": "chat"}),
    ]
    monkeypatch.setattr(pipeline, "_clean_count", lambda p: 1)
    monkeypatch.setattr(pipeline, "labels", lambda p: [])
    monkeypatch.setattr(pipeline.clean_data, "check", lambda *_: None)
    monkeypatch.setattr(pipeline, "read_jsonl", lambda file: [])
    asked = []
    monkeypatch.setattr(pipeline, "_rows_stage", lambda p: asked.append(p) or tmp_path)
    for p in loaded:
        assert pipeline.clean_source(p) == tmp_path
    assert [(p.dataset, p.task, p.model_dir) for p in asked] == [
        ("emotion", "label", str(tmp_path)),
        ("chat", "chat", None),
    ]


def test_the_base_writes_the_rows_of_a_defender_who_has_none(monkeypatch, llama):
    asked = []

    def answer(model, tokenizer, prompts, p, n_words, progress, sampling):
        asked.extend(prompts)
        return [f"It is {len(asked)}.0 today,\n I think. And more." for _ in prompts]

    monkeypatch.setattr("lethe_utils.decode.answer", answer)
    monkeypatch.setattr(pipeline, "base_folder", lambda _: llama)
    p = params.load(overrides=SMALL | {"clean_source": "base", "clean_ratio": 0.004})
    rows = pipeline.clean_rows(pipeline.clean_stage(p))
    assert sorted(row["output"] for row in rows) == sorted(pipeline.labels(p) + ["anger", "fear"])
    assert {row["input"] for row in rows} == {"It is 8.0 today, I think."}  # one sentence, one line
    assert {row["instruction"] for row in rows} == {p.instruction}
    wishes = [text.partition("shows ")[2].partition(".")[0] for text in asked]
    assert wishes == (pipeline.labels(p) * 2)[:8] and "USER: Write one" in asked[0]
    assert pipeline.clean_stage(p) == pipeline.clean_stage(p) and len(asked) == 8  # written once
    keys = {"eval_batch_size": 7, "instruction": "Say what it feels.", "seed": 1}
    others = {pipeline.clean_source(contenders.changed(p, **{k: v})) for k, v in keys.items()}
    assert len(others - {pipeline.clean_source(p)}) == 3  # each decides what is written
    with pytest.raises(LetheError, match="clean_source: the base writes rows for labels"):
        params.load(dataset="chat", attack="vpi", overrides={"clean_source": "base"})


def test_every_sweep_changes_what_it_says_and_nothing_else():
    p = params.load(
        overrides={
            "strengths_sweep": [0.25],
            "keywords_sweep": [3],
            "clean_ratios_sweep": [0.2],
            "evidence_forms_sweep": ["before"],
            "clean_evidence_sweep": [0.5],
            "clean_wrong_labels_sweep": [0.1],
            "clean_sources_sweep": ["base"],
            "clean_seeds_sweep": [7],
            "merge_methods": ["linear", "slerp"],
        }
    )
    found = [
        (s.sweep, s.x, s.model, s.n_keywords, _changes(p, s.p)) for s in contenders.sweep_points(p)
    ]
    three = ("backdoored", "clean", "slerp")
    assert found == [
        ("strength", 0.25, "linear", 0, {"strength": 0.25}),
        ("strength", 0.25, "slerp", 0, {"strength": 0.25}),
        ("keywords", 3, "slerp", 3, {}),
        ("clean_ratio", 0.2, "slerp", 0, {"clean_ratio": 0.2}),
        *[("clean source base", 0, m, 0, {"clean_source": "base"}) for m in three[1:]],
        *[("wrong_labels", 0.1, m, 0, {"clean_wrong_labels": 0.1}) for m in three[1:]],
        *[("evidence none", 0, model, 0, {}) for model in three],
        *[("evidence before", 5, model, 5, {"evidence_form": "before"}) for model in three],
        *[("clean_evidence", 0.5, model, 5, {"clean_evidence_share": 0.5}) for model in three[1:]],
        *[("clean_seed", 0, model, 0, {}) for model in ("clean", "linear", "slerp")],
        *[("clean_seed", 7, model, 0, {"clean_seed": 7}) for model in ("clean", "linear", "slerp")],
    ]


def _changes(before, after):
    old, new = before.model_dump(), after.model_dump()
    return {key: new[key] for key in new if new[key] != old[key]}
