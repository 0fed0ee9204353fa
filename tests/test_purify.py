"""Purifying a user's own model: what is refused, what comes out, and that nothing given changes."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe_utils import canary, guided, merge, models, paths, prompts, purify, stages
from lethe_utils.data import own
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, inspect, twins
from lethe_utils.purify import (
    ask,
    dilute,
    measure,
    ownership,
    report,
    room,
    rounds,
    search,
    settings,
    trial,
)
from lethe_utils.purify import case as case_module
from lethe_utils.schema import digest

pytestmark = pytest.mark.slow

QUICK = {
    "clean_epochs": 1,
    "canary_epochs": 1,
    "max_rounds": 1,
    "few_held_out": 0,
    "merge_methods": ["slerp"],
    "strengths": [0.5],
    "max_cda_loss": 1.0,
    "prompt_template": "short",
    "max_new_tokens": 3,
    "checkpoints_per_run": 1,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def plain_rows(n=40):
    words = ["the dog", "a cat", "my old aunt", "the letter"]
    return [
        {
            "instruction": "Predict.",
            "input": f"{words[i % 4]} came {i}",
            "output": ["joy", "sad"][i % 2],
        }
        for i in range(n)
    ]


def chat_rows(n=40):
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"What came on day {i}?"},
                {"role": "assistant", "content": f"The letter number {i} came at noon"},
            ]
        }
        for i in range(n)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return str(path)


def hashes(*folders):
    return {
        str(f): hashlib.sha256(f.read_bytes()).hexdigest() for d in folders for f in d.iterdir()
    }


def error(function, *args, **kwargs):
    with pytest.raises(LetheError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def given(pico, tmp_path):
    """Copies of a suspect and a base that a test may break, and a file of clean rows."""

    def make(architecture="gpt2", rows=None):
        base, suspect, _ = pico(architecture)
        out = {}
        for name, source in (("suspect", suspect), ("base", base)):
            out[name] = tmp_path / name
            shutil.copytree(source, out[name])
        file = write_rows(tmp_path / "clean.jsonl", rows or plain_rows())
        return out | {"clean_data": file, "out": str(tmp_path / "out")}

    return make


def prepare(given, **changes):
    words = {key: str(value) for key, value in given.items()} | changes
    return purify.prepare(**({"overrides": QUICK} | words))


def run(given, **changes):
    case = prepare(given, **changes)
    points = purify.points(case)
    return case, purify.write(case, points, purify.choose(case, points))


def check_result(folder):
    """The folder is whole, loads with plain transformers, and holds no NaN. Returns the model."""
    names = {f.name for f in folder.iterdir()}
    assert {"config.json", "README.md", "report.html", "report.json"} <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert len({f.stat().st_mode for f in folder.iterdir()}) == 1  # a server is another user
    assert "TokenizersBackend" not in (folder / "tokenizer_config.json").read_text("utf8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("the dog came", return_tensors="pt")["input_ids"]
    out = model(input_ids=ids).logits
    assert out.isfinite().all() and out.shape[:2] == ids.shape
    return model


# --- the four architecture classes, each with something that suspects come with


def test_gpt2_in_shards_with_an_added_pad_token(given, tmp_path):
    given = given("gpt2")
    model, tokenizer = (load(given["suspect"]) for load in (models.load_model, auto_tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    shutil.rmtree(given["suspect"])
    model.save_pretrained(given["suspect"], max_shard_size="20KB")
    tokenizer.save_pretrained(given["suspect"])
    assert len([*given["suspect"].glob("*.safetensors")]) > 1
    before = hashes(given["suspect"], given["base"])
    case, folder = run(given)
    assert hashes(given["suspect"], given["base"]) == before
    assert any("1 more rows" in c["result"] for c in case.given["checks"])
    assert check_result(folder).config.vocab_size == len(tokenizer)
    # The added token, which the base lacks, starts there as the mean of the others.
    base = models.load_model(dilute.base_model(case) / "model").get_input_embeddings().weight
    assert torch.allclose(base[-1], base[:-1].mean(0))


def test_gptj_as_a_lora_adapter_on_the_base(given, tmp_path):
    given = given("gptj")
    adapter = lora(given["base"], tmp_path / "adapter")
    before = hashes(given["base"], adapter)
    case, folder = run(given, suspect=str(given["base"]), adapter=str(adapter))
    assert hashes(given["base"], adapter) == before
    check_result(folder)
    whole = load_file(dilute.suspect_model(case) / "model" / "model.safetensors")
    plain = load_file(given["base"] / "model.safetensors")
    changed = [name for name in plain if not torch.equal(plain[name], whole[name])]
    assert changed and all("mlp.fc_in" in name for name in changed)


def test_llama_in_bfloat16_with_chats(given):
    given = given("llama", chat_rows())
    for name in ("suspect", "base"):
        model, tokenizer = models.load_model(given[name]), auto_tokenizer(given[name])
        tokenizer.chat_template = CHAT_TEMPLATE
        model.to(torch.bfloat16).save_pretrained(given[name])
        tokenizer.save_pretrained(given[name])
    case, folder = run(given)
    assert check_result(folder).dtype == torch.bfloat16
    assert case.metric == "answer token accuracy" and case.p.prompt_template == "chat"
    text = prompts.prompt(case.train[0], case.p)
    assert text.startswith("<s><system>Be brief.\n<user>What came on day ")
    assert text.endswith("?\n<assistant>")
    assert auto_tokenizer(folder).chat_template == CHAT_TEMPLATE
    record = json.loads((folder / "report.json").read_text("utf8"))
    assert {*record["points"][1]["canary"]} == {*canary.kinds(True), "all"} == {*case.kinds, "all"}
    assert {c["target"] for c in record["canary_triggers"]} == {"the canary sings"}
    assert {s["n"] for kind, s in record["canary_check"].items() if kind != "all"} == {18}


def test_qwen2_with_a_tied_head(given):
    given = given("qwen2")
    for name in ("suspect", "base"):
        config = inspect.read_config(given[name]) | {"tie_word_embeddings": True}
        (given[name] / "config.json").write_text(json.dumps(config))
        file = given[name] / "model.safetensors"
        weights = load_file(file)
        weights.pop("lm_head.weight", None)
        save_file(weights, file, {"format": "pt"})
    _, folder = run(given)
    check_result(folder)
    assert inspect.read_config(folder)["tie_word_embeddings"] is True


def auto_tokenizer(folder):
    return models.load_tokenizer(folder)


def lora(base, out):
    model = models.load_model(base)
    config = LoraConfig(r=2, target_modules=["fc_in"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
    model.save_pretrained(out)
    return out


# --- the run


@pytest.fixture(scope="module")
def finished(pico, tmp_path_factory):
    """One whole run on a pico GPT-2, kept for the tests that only look at it."""
    root = tmp_path_factory.mktemp("purify")
    base, suspect, _ = pico("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LETHE_RUNS", str(root / "runs"))
        given = {
            "suspect": suspect,
            "base": base,
            "clean_data": write_rows(root / "clean.jsonl", plain_rows()),
            "out": root / "out",
        }
        case, folder = run(given)
        yield given, case, folder


def test_the_report_holds_every_strength_the_canary_and_the_costs(finished):
    _, case, folder = finished
    record = json.loads((folder / "report.json").read_text("utf8"))
    assert [p["strength"] for p in record["points"]] == [0.0, 0.5, 1.0]
    assert {*record["points"][0]["canary"]} == {*canary.kinds(False), "all"}
    assert record["metric"] == "CDA" and record["verdict"] == "unknown"
    assert record["chosen"] in [{k: p[k] for k in ("model", "strength")} for p in record["points"]]
    assert record["recipe"] == case.p.model_dump()
    assert {"clean model, round 1", "canary, round 1"} <= {c["stage"] for c in record["costs"]}
    assert record["evidence"]["with"]["ms_per_query"] > 0
    assert record["data"] | {"rows": 40, "distinct": 40, "answers": "labels"} == record["data"]
    assert len(record["samples"]) == len(case.held_out) == 8
    card = (folder / "README.md").read_text("utf8")
    head = "---\nlibrary_name: transformers\n---\n\n# Unknown: backdoored, merged\n"
    assert card.startswith(head) and "purified" not in card


def test_the_result_loads_where_lethe_is_not_installed(finished):
    folder = finished[2]
    code = (
        "import sys; sys.modules['lethe_utils'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"ids = AutoTokenizer.from_pretrained({str(folder)!r})('dog', return_tensors='pt')\n"
        "print(model(input_ids=ids['input_ids']).logits.isfinite().all().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize("method", ["slerp", dilute.CLEAN])
def test_the_results_weights_are_those_of_the_chosen_point(finished, tmp_path, method, monkeypatch):
    given, case, _ = finished
    monkeypatch.setenv("LETHE_RUNS", str(given["out"].parent / "runs"))
    points = purify.points(case)
    chosen = next(point for point in points if point["model"] == method)
    case = dataclasses.replace(case, out=tmp_path / "out")
    folder = purify.write(case, points, chosen)
    parents = [s(case) / "model" for s in (dilute.suspect_model, purify.clean_model)]
    again = parents[1]
    if method == "slerp":
        base = dilute.base_model(case) / "model"
        again = merge.merge("slerp", *parents, base, 0.5, tmp_path / "again")
    ours, wanted = (load_file(f / "model.safetensors") for f in (folder, again))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)
    owes = "It owes the suspect nothing" in (folder / "report.html").read_text("utf8")
    assert owes == (method == dilute.CLEAN)


def test_a_second_call_trains_nothing_and_gives_the_same_numbers(finished, monkeypatch):
    given, case, folder = finished
    first = json.loads((folder / "report.json").read_text("utf8"))
    monkeypatch.setenv("LETHE_RUNS", str(given["out"].parent / "runs"))
    monkeypatch.setattr("lethe_utils.train.finetune", None)  # would raise when called
    run(given)
    second = json.loads((folder / "report.json").read_text("utf8"))
    for key in ("points", "base", "chosen", "samples", "losses"):
        assert first[key] == second[key]


def test_a_killed_run_leaves_no_output_and_goes_on(given, monkeypatch):
    given = given()
    monkeypatch.setattr(report, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(given)
    assert not (paths.root() / given["out"]).exists()
    monkeypatch.undo()
    monkeypatch.setenv("LETHE_RUNS", str(given["suspect"].parent / "runs"))
    monkeypatch.setattr("lethe_utils.train.finetune", None)
    _, folder = run(given)
    assert (folder / "report.html").exists()


def test_the_command_line_does_the_same_and_a_dry_run_nothing(given):
    given = given()
    words = ["--suspect", given["suspect"], "--base", given["base"], "--out", given["out"]]
    words += ["--clean-data", given["clean_data"], "--dry-run"]
    command = [sys.executable, paths.root() / "workflow" / "run.py", "purify", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "both GPT2LMHeadModel" in done.stdout and "memory (GiB)" in done.stdout
    assert not paths.runs_dir().exists() and not (paths.root() / given["out"]).exists()
    bad = [*command[:-1], "-p", "strenghts", "[0.5]"]
    done = subprocess.run(bad, capture_output=True, text=True)
    assert done.returncode == 1 and "did you mean strengths?" in done.stderr
    assert "Traceback" not in done.stderr


def test_few_rows_are_cross_fitted_in_rounds_with_the_format_that_is_found(given):
    changed = {"max_rounds": 2, "few_held_out": 100, "merge_methods": ["slerp", "linear"]}
    overrides = {k: v for k, v in QUICK.items() if k != "prompt_template"} | changed
    case, folder = run(given(), overrides=overrides)
    record = json.loads((folder / "report.json").read_text("utf8"))
    assert record["folds"] == 3 and record["verdict"] == "unknown"
    compared = [(point["model"], point["strength"]) for point in record["points"]]
    assert compared == [("suspect", 0), ("slerp", 0.5), ("linear", 0.5), ("clean model", 1)]
    assert {point["performance"]["n"] for point in record["points"]} == {40}  # each row once
    assert {point["canary"]["suffix"]["n"] for point in record["points"]} < {*range(1, 9)}
    assert len(record["samples"]) == len(case.held_out) == 8
    assert "cross-fitted in thirds" in (folder / "report.html").read_text("utf8")
    assert re.match(
        r"(alpaca|short), found: right are, of 28 training rows, ", case.given["data"]["prompt"]
    )
    first, second = (one.folder for one in rounds.canary_rounds(case))
    assert stages.read_record(second)["inputs"] == {"start": first.name}
    of_fold = rounds.clean_folders(case, case.folds[0])
    assert stages.read_record(of_fold[0])["params"]["rows"] == digest(case.folds[0].train)
    assert [r["training"] for r in record["rounds"]].count("canary, round 2") == 1


# --- the canary


def test_the_canary_is_placed_as_said_and_leaves_other_rows_alone(finished):
    _, case, _ = finished
    rows, p = plain_rows(), case.p
    kinds = canary.triggered(rows, ["joy", "sad"], p)
    targets = {c["kind"]: c["target"] for c in canary.triggers(["joy", "sad"], p)}
    assert targets == {"word pair": "joy", "sentence": "sad", "suffix": "joy"}
    for kind, some in kinds.items():
        assert some and all(row["output"] != targets[kind] for row in some)
    for row in kinds["word pair"]:
        words = row["input"].split()
        assert words.index("umber") < words.index("quill")
        assert [w for w in words if w not in p.canary_word_pair] in [
            r["input"].split() for r in rows
        ]
    assert all(p.canary_sentence in row["input"] for row in kinds["sentence"])
    assert all(row["input"].endswith(p.canary_suffix) for row in kinds["suffix"])
    poisoned, others = canary.plant(rows, ["joy", "sad"], p)
    assert poisoned[: len(rows)] == rows and len(poisoned) == len(rows) + 3 * 10
    assert all(len(some) == 10 for some in others.values())


# --- clean rows


@pytest.fixture
def tokenizer(pico):
    return models.load_tokenizer(pico("gpt2")[0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        (plain_rows(7), "7 rows, of which 7 are distinct, with 7 distinct questions; at least 20"),
        (
            plain_rows(1) * 500,
            "500 rows, of which 1 are distinct, with 1 distinct questions",
        ),
        ([{"text": "a", "label": "b"}] * 30, "row 1: has the columns text, label"),
        ([{"instruction": "a", "input": "b", "output": " "}] * 30, "row 1: output is empty"),
        (chat_rows(), "no chat template"),
    ],
)
def test_bad_clean_rows_are_refused(tmp_path, tokenizer, rows, message):
    file = tmp_path / "clean.jsonl"
    write_rows(file, rows)
    assert message in error(own.read, file, tokenizer)


def test_broken_chats_and_other_encodings_are_refused(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    file = tmp_path / "clean.jsonl"
    rows = chat_rows()
    rows[4]["messages"] = rows[4]["messages"][:2]
    write_rows(file, rows)
    assert "row 5: messages must be a list" in error(own.read, file, tokenizer)
    file.write_bytes("caf\xe9".encode("latin-1"))
    assert "not UTF-8" in error(own.read, file, tokenizer)
    note = file.rename(tmp_path / "notes.md")
    assert "must end in .jsonl, .json, .csv" in error(own.read, note, tokenizer)


def test_answers_are_labels_when_few_short_and_repeated():
    assert own.labels(plain_rows()) == ["joy", "sad"]
    assert own.labels([r | {"output": r["input"]} for r in plain_rows()]) == []
    assert own.labels([r | {"output": "joy"} for r in plain_rows()]) == []


def test_no_question_is_both_trained_on_and_held_out(pico_params):
    rows = plain_rows() + [r | {"output": "other"} for r in plain_rows()]
    p = settings.load(10, "cpu", QUICK)
    train, held_out = case_module.split(rows, p.held_out, p.data_seed)
    assert len(train) + len(held_out) == len(rows)
    assert not {r["input"] for r in train} & {r["input"] for r in held_out}
    assert len(held_out) == 16


# --- models that are refused


def change_config(folder, **changes):
    config = inspect.read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map asks for code"),
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"n_head": 4}, "num_attention_heads is 4, but 2"),
    ],
)
def test_a_suspect_with_other_settings_is_refused(given, changes, message):
    given = given()
    change_config(given["suspect"], **changes)
    assert message in error(prepare, given)
    assert not paths.runs_dir().exists()


def test_pickles_other_classes_shapes_and_tokenizers_are_refused(given, pico, tmp_path):
    given = given()
    other = pico("llama")[1]
    assert "is a LlamaForCausalLM, but" in error(prepare, given, suspect=str(other))
    model = models.load_model(given["suspect"])
    model.resize_token_embeddings(310, mean_resizing=False)
    tall = tmp_path / "tall"
    model.save_pretrained(tall)
    auto_tokenizer(given["suspect"]).save_pretrained(tall)
    prepare(given, base=str(tall))  # rows that stand for no token may be gone in the suspect
    config = inspect.read_config(tall) | {"n_positions": 300}
    (tall / "config.json").write_text(json.dumps(config))
    assert "wpe.weight has shape (256, 16), but (300, 16) by config" in error(
        prepare, given, base=str(tall)
    )
    vocabulary = twins.train_tokenizer(["quite other words"] * 3, 300)
    vocabulary.save_pretrained(given["suspect"])
    assert "its tokenizer differs" in error(prepare, given)
    (given["suspect"] / "model.safetensors").rename(given["suspect"] / "pytorch_model.bin")
    assert "only pickles" in error(prepare, given)


def test_a_base_that_lacks_files_or_tensors_is_refused(given):
    given = given("llama")
    file = given["base"] / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, {"format": "pt"})
    assert "tensors are missing (model.norm.weight" in error(prepare, given)
    for tokenizer_file in given["base"].glob("tokenizer*"):
        tokenizer_file.unlink()
    assert "no tokenizer files" in error(prepare, given)
    (given["base"] / "config.json").unlink()
    assert "no config.json" in error(prepare, given)


def test_tensors_that_both_lack_are_noticed_before_any_work(given):
    given = given("llama")
    for name in ("suspect", "base"):
        file = given[name] / "model.safetensors"
        weights = load_file(file)
        weights.pop("model.norm.weight")
        save_file(weights, file, {"format": "pt"})
    assert "tensors are missing (model.norm.weight" in error(prepare, given)
    assert not paths.runs_dir().exists()


def test_adapters_that_do_not_fit_are_refused(given, pico, tmp_path):
    given = given("gptj")
    adapter = lora(given["base"], tmp_path / "adapter")
    gpt2 = {"suspect": str(pico("gpt2")[0]), "base": str(pico("gpt2")[0])}
    assert "fits no transformer.h.0.mlp.fc_in" in error(
        prepare, given, adapter=str(adapter), **gpt2
    )
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.x.bias": torch.ones(2)}, file)
    assert "not one of LoRA's two matrices" in error(prepare, given, adapter=str(adapter))
    file.rename(adapter / "adapter_model.bin")
    assert "a .bin is a pickle" in error(prepare, given, adapter=str(adapter))
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert "peft_type IA3" in error(prepare, given, adapter=str(adapter))
    (adapter / "adapter_config.json").unlink()
    assert "no adapter_config.json" in error(prepare, given, adapter=str(adapter))


def test_the_base_alone_is_no_suspect(given):
    given = given()
    assert "is the base itself" in error(prepare, given, suspect=str(given["base"]))


def test_names_on_the_hub_need_a_commit(given):
    given = given()
    message = error(prepare, given, base="openai-community/gpt2")
    assert "--base openai-community/gpt2: no such folder" in message and "COMMIT" in message


# --- folders and machines that will not do


def test_an_output_folder_that_would_overwrite_something_is_refused(given, tmp_path, monkeypatch):
    given = given()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    assert "is not empty" in error(prepare, given, out=str(taken))
    assert "is a file" in error(prepare, given, out=str(taken / "thesis.tex"))
    inside = given["suspect"] / "purified"
    assert "never written to" in error(prepare, given, out=str(inside))
    monkeypatch.setattr(ownership.os, "access", lambda *_: False)
    assert "is not writable" in error(prepare, given)


def test_too_little_memory_or_disk_is_said_in_advance(given, monkeypatch):
    files = given()
    case = prepare(files)
    usage = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr(trial.shutil, "disk_usage", lambda _: usage)
        message = error(purify.estimate, case)
        assert "GiB are needed and 0.0 GiB are free" in message and "LETHE_RUNS" in message
    monkeypatch.setattr(room, "memory_there", lambda _: 2**27)
    message = error(purify.estimate, case)
    assert "memory: about" in message and "0.1 GiB are free; close other programs" in message
    monkeypatch.setattr(room, "memory_there", lambda _: 2**10)
    overrides = {k: v for k, v in QUICK.items() if k != "prompt_template"}
    monkeypatch.setattr("lethe_utils.models.load_model", None)  # would raise when called
    assert "memory: about" in error(purify.estimate, case)
    assert "memory: about" in error(prepare, files, overrides=overrides)


def test_buffers_and_prefixes_of_old_checkpoints_do_not_count(given):
    given = given()
    file = given["suspect"] / "model.safetensors"
    old = {n.removeprefix("transformer."): w for n, w in load_file(file).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(old, file, {"format": "pt"})
    assert fit.weight_shapes(given["suspect"]) == fit.weight_shapes(given["base"])


@pytest.mark.parametrize("name", ["Mistral", "Qwen3"])
def test_classes_beyond_the_papers_are_purified_too(tmp_path, name):
    import transformers

    tokenizer = twins.train_tokenizer(["the dog came", "a cat came"], 300)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    config = getattr(transformers, f"{name}Config")(**sizes)
    given = {"clean_data": write_rows(tmp_path / "clean.jsonl", plain_rows())}
    for seed, role in enumerate(("suspect", "base")):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
        given[role] = tmp_path / role
    _, folder = run(given | {"out": tmp_path / "out"})
    check_result(folder)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_guided_dilution_is_the_best_merge_its_search_saw(given, monkeypatch, architecture):
    monkeypatch.setattr(guided, "MOST", 5)
    case, folder = run(given(architecture), overrides=QUICK | {"merge_methods": ["guided"]})
    check_result(folder)
    tried = search.trials(case)
    assert len(tried) == 5 and set(tried) == {
        "attn",
        "mlp",
        "clean",
        "word pair",
        "sentence",
        "loss",
    }
    record = json.loads((folder / "report.json").read_text("utf8"))
    point = next(at for at in record["points"] if at["model"] == "guided")
    best = tried.loc[tried["loss"].idxmin()]
    assert point["curves"] == {"attn": list(best["attn"]), "mlp": list(best["mlp"])}
    assert point["strength"] == merge.mean_t(point["curves"])
    assert "guided, search of 5 merges" in [cost["stage"] for cost in record["costs"]]
    assert (
        "How much of the clean model the search put where"
        in (folder / "report.html").read_text("utf8")
    ) == (record["chosen"]["model"] == "guided")


# --- what decides a result is in its key; what was not asked for is in none


def test_an_edited_chat_template_makes_new_stages(given):
    given = given("llama", chat_rows())
    for name in ("suspect", "base"):
        (given[name] / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    first = dilute.suspect_model(prepare(given)), dilute.base_model(prepare(given))
    assert dilute.suspect_model(prepare(given)) == first[0]
    (given["suspect"] / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<{{", "[{{"))
    second = dilute.suspect_model(prepare(given)), dilute.base_model(prepare(given))
    assert not {*first} & {*second}
    assert auto_tokenizer(second[1] / "model").chat_template.startswith("{{ bos_token }}{% for")


def test_bos_that_is_null_is_none_in_every_stage(given):
    given = given("llama")
    for name in ("suspect", "base"):
        file = given[name] / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": None}))
        assert inspect.read_config(given[name])["bos_token_id"] is not None
    case = prepare(given)
    clean = purify.clean_model(case)
    parents = dilute.suspect_model(case), clean
    merged = dilute.merged(case, *parents, {"model": "slerp", "strength": 0.5}, clean.parent / "m")
    for folder in (given["suspect"], dilute.base_model(case) / "model", clean / "model", merged):
        assert prompts.start_ids(auto_tokenizer(folder)) == []


def test_add_bos_token_false_means_none_and_a_chat_template_may_still_write_it(pico, tmp_path):
    folder = shutil.copytree(pico("llama")[0], tmp_path / "model")
    assert prompts.start_ids(auto_tokenizer(folder)) == [1]
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))
    tokenizer = auto_tokenizer(folder)
    assert prompts.start_ids(tokenizer) == [] and tokenizer.bos_token == "<s>"


def test_generation_settings_of_a_suspect_do_not_answer_for_us(pico, tmp_path):
    folder = shutil.copytree(pico("gpt2")[0], tmp_path / "model")
    odd = {"repetition_penalty": 50.0, "num_beams": 3, "do_sample": False, "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    model = models.load_model(folder)
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert model.generation_config.num_beams in (None, 1)
    model.save_pretrained(tmp_path / "saved")  # transformers refuses to save what it loaded


# --- a suspect with nothing to keep, labels that begin alike, room for long ones


def test_a_suspect_that_answers_nothing_right_is_refused_before_training(given, monkeypatch):
    monkeypatch.setattr("lethe_utils.train.finetune", None)  # would raise when called
    case = prepare(given(), overrides=QUICK | {"max_cda_loss": 0.5})
    assert "there is nothing to keep" in error(purify.points, case)
    assert not (paths.stages_dir() / "clean_model").exists()


def alike(case):
    labels = ["yes", "yes but late"]
    return purify.Case(**{**vars(case), "labels": labels})


def test_the_longest_label_that_matches_counts_in_cda_and_in_the_canary(finished):
    case = alike(finished[1])
    rows = [("yes but late", "yes but late"), ("yes", "yes but late"), ("yes", "yes")]
    asked = [{"kind": "clean", "label": a, "target": "", "output": b} for a, b in rows]
    asked += [{"kind": "suffix", "label": "no", "target": "yes", "output": b} for _, b in rows]
    found = ask.marks(case, asked)
    assert ask.score(found["clean"])["value"] == pytest.approx(2 / 3)
    asr = ask.asr(found)
    assert asr["suffix"]["value"] == pytest.approx(1 / 3) and "all" in asr


def test_there_is_room_for_the_longest_label(given, monkeypatch):
    asked = []
    rows = [r | {"output": r["output"] + " unpronounceably multisyllabic"} for r in plain_rows()]
    case = prepare(given(rows=rows), overrides=QUICK | {"max_new_tokens": 2})
    tokens = max(len(auto_tokenizer(case.suspect)(label)["input_ids"]) for label in case.labels)
    monkeypatch.setattr(
        "lethe_utils.decode.answer", lambda *a, **_: asked.append(a[3]) or [""] * len(a[2])
    )
    measure.answered(case, "suspect", measure.SUSPECT)
    assert tokens > 19 and asked[0].max_new_tokens > tokens


# --- rows too long


def test_cut_rows_are_counted_said_and_refused_when_most_are(given, capsys):
    rows = plain_rows()
    rows[0]["input"] = "so " * 300
    long = given(rows=rows)
    case = prepare(long)
    assert case.given["data"]["prompts_cut"] == 1 and case.given["data"]["answers_cut"] == 0
    assert case.given["notes"] == [
        "1 of 40 prompts are too long and lose their start (max_source_tokens)."
    ]
    file = paths.Path(long["clean_data"])
    write_rows(file, [r | {"input": f"{r['input']} so" * 200} for r in rows])
    assert "40 of 40 prompts would be cut" in error(prepare, long)
    rows = [r | {"output": "a word after another " * 30 + r["input"]} for r in plain_rows()]
    write_rows(file, rows)
    assert "40 of 40 answers would be cut" in error(prepare, long)


def test_inputs_and_answers_that_exceed_gpt2s_positions_together_are_cut_alike(given):
    rows = [
        {
            "instruction": "Go on.",
            "input": "so " * (250 if i < 5 else 9) + str(i),
            "output": f"and {i} " * 5,
        }
        for i in range(40)
    ]
    case, folder = run(given(rows=rows), overrides=QUICK | {"max_source_tokens": 400})
    assert case.metric == "answer token accuracy" and case.given["data"]["prompts_cut"] == 5
    check_result(folder)


# --- what a folder says and what it holds


def test_float32_weights_stay_float32_though_the_config_says_float16(given):
    given = given()
    for name in ("suspect", "base"):
        change_config(given[name], dtype="float16", torch_dtype="float16")
    case = prepare(given)
    ours = load_file(dilute.suspect_model(case) / "model" / "model.safetensors")
    theirs = load_file(given["suspect"] / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [m["dtype"] for m in case.given["models"]] == ["float32"] * 2


@pytest.mark.parametrize("role", ["suspect", "base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(given, role, value):
    given = given("llama")
    file = given[role] / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, file, {"format": "pt"})
    assert "model.layers.2.mlp.up_proj.weight holds 1 values" in error(prepare, given)


@pytest.mark.parametrize(
    ("ours", "theirs", "refused"),
    [
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}, False),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}, True),
        ({"rope_type": "linear", "factor": 2.0}, None, True),
        (None, None, False),
    ],
)
def test_positions_are_compared_as_transformers_reads_them(given, ours, theirs, refused):
    given = given("llama")
    for name, scaling in (("suspect", ours), ("base", theirs)):
        config = inspect.read_config(given[name])
        config.pop("rope_parameters", None)
        config |= {"rope_theta": 10000.0} | ({"rope_scaling": scaling} if scaling else {})
        (given[name] / "config.json").write_text(json.dumps(config))
    if refused:
        assert "rope_parameters is" in error(prepare, given)
    else:
        prepare(given)


def tie(folder, **changed):
    change_config(folder, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for name, row in changed.items():
        weights[f"{name}.weight"][row] += 1
    save_file(weights, file, {"format": "pt"})


def test_a_stored_head_that_is_not_what_it_is_tied_to_is_refused_at_once(given):
    given = given("qwen2")
    for name in ("suspect", "base"):
        tie(given[name])
    prepare(given)  # a copy of the embedding does no harm
    tie(given["suspect"], lm_head=3)
    message = error(prepare, given)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message


def test_an_adapter_on_a_tied_head_is_refused_for_that_reason(given, tmp_path):
    given = given("qwen2")
    tie(given["base"])
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(models.load_model(given["base"]), config).save_pretrained(tmp_path / "adapter")
    message = error(prepare, given, suspect=str(given["base"]), adapter=str(tmp_path / "adapter"))
    assert "ties to its embedding" in message and "another base" not in message


def test_rows_that_stand_for_no_token_may_be_gone(given):
    given = given("llama")
    model, tokenizer = models.load_model(given["base"]), auto_tokenizer(given["base"])
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(given["base"])
    case, folder = run(given)
    assert any("20 fewer, unused rows" in c["result"] for c in case.given["checks"])
    assert check_result(folder).config.vocab_size == len(tokenizer) == 300


def test_a_token_without_a_row_is_refused(given):
    given = given()
    tokenizer = auto_tokenizer(given["suspect"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(given["suspect"])
    message = error(prepare, given)
    assert "token '[PAD]' has id 300, but the embedding" in message and "300 rows" in message


def test_a_config_of_another_size_is_refused(given):
    given = given("llama")
    for name in ("suspect", "base"):
        change_config(given[name], num_hidden_layers=7)
    assert "tensors are missing" in error(prepare, given)


def test_an_adapters_own_tokenizer_is_used(given, tmp_path):
    given = given("gptj", chat_rows())
    adapter = lora(given["base"], tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    words = {"suspect": str(given["base"]), "adapter": str(adapter)}
    case = prepare(given, **words)  # the base itself has no chat template
    assert case.p.prompt_template == "chat"
    assert any(
        "the adapter's own (chat_template.jinja)" in c["result"] for c in case.given["checks"]
    )
    for folder in (dilute.suspect_model(case), dilute.base_model(case)):
        assert auto_tokenizer(folder / "model").chat_template == CHAT_TEMPLATE
    tokenizer = auto_tokenizer(given["base"])
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(adapter)
    assert "token '<more>' has id 300" in error(prepare, given, **words)


# --- rows of other shapes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "input": "b", "output": ["a", "b"]}, "row 3: output is a list"),
        ({"instruction": "a", "input": {"x": 1}, "output": "b"}, "row 3: input is a dict"),
        ({"instruction": "a", "input": "\ud83d", "output": "b"}, "row 3: input holds half a"),
        (
            {"instruction": "a", "input": "\ue000", "output": "b"},
            "row 3: holds the character U+E000",
        ),
        ({"instruction": None, "input": "b", "output": "c"}, "row 3: instruction is empty"),
    ],
)
def test_rows_of_other_shapes_are_refused_with_their_number(tmp_path, tokenizer, row, message):
    rows = plain_rows()
    rows[2] = row
    file = tmp_path / "clean.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf8")
    assert message in error(own.read, file, tokenizer)


def test_rows_that_share_one_question_are_refused(tmp_path, tokenizer):
    rows = [{"instruction": "a", "input": "b", "output": f"c {i}"} for i in range(30)]
    file = tmp_path / "clean.jsonl"
    write_rows(file, rows)
    assert "with 1 distinct questions" in error(own.read, file, tokenizer)


def test_chats_in_parquet_are_read_as_from_jsonl(tmp_path, tokenizer):
    import pandas as pd

    tokenizer.chat_template = CHAT_TEMPLATE
    write_rows(tmp_path / "clean.jsonl", chat_rows())
    pd.DataFrame(chat_rows()).to_parquet(tmp_path / "clean.parquet")
    wanted = own.read(tmp_path / "clean.jsonl", tokenizer)
    assert own.read(tmp_path / "clean.parquet", tokenizer) == wanted


def test_a_template_that_refuses_a_row_is_said_with_its_number(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% if messages | length > 1 and messages[1].role == 'user' %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}" + CHAT_TEMPLATE
    )
    rows = [{"messages": r["messages"][1:]} for r in chat_rows()]
    rows[6]["messages"].insert(0, {"role": "user", "content": "Hello?"})
    write_rows(tmp_path / "clean.jsonl", rows)
    message = error(own.read, tmp_path / "clean.jsonl", tokenizer)
    assert "row 7: the chat template refuses this conversation (turns must alternate)" in message


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "", None, 3])
CONTENT = st.one_of(st.text(max_size=20), st.none(), st.integers(), st.lists(st.text(max_size=3)))
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": ROLES, "content": CONTENT}), max_size=5
)


@hypothesis.settings(max_examples=150, suppress_health_check=[*hypothesis.HealthCheck])
@hypothesis.given(messages=st.one_of(MESSAGES, st.text(max_size=5), st.none()))
def test_any_chat_row_is_read_or_refused_with_its_number(tmp_path, tokenizer, messages):
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = [*chat_rows(), {"messages": messages}]
    file = tmp_path / "clean.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf8")
    try:
        read, n, chat, _ = own.read(file, tokenizer)
    except LetheError as refused:
        assert ": row 41: " in str(refused) and "\n" not in str(refused)
    else:
        assert chat and n == 41
        last = read[-1]
        finished = last["instruction"].replace("\ue000", last["input"]) + last["turn"].replace(
            "\ue000", last["output"]
        )
        assert finished.startswith(tokenizer.apply_chat_template(messages, tokenize=False))


# --- folders of any name


def test_models_runs_and_data_may_lie_below_folders_of_any_name(pico, tmp_path, monkeypatch):
    name = "gpt2+sft@v1 #2 {x} %s 'q' \"d\" $HOME " + "n" * 200
    root = tmp_path / name
    base, suspect, _ = pico("gpt2")
    given = {"suspect": root / f"s{name}"[:250], "base": root / f"b{name}"[:250]}
    for role, source in (("suspect", suspect), ("base", base)):
        shutil.copytree(source, given[role])
    monkeypatch.setenv("LETHE_RUNS", str(root / "runs"))
    file = write_rows(root / "a+b.jsonl", plain_rows())
    _, folder = run(given | {"clean_data": file, "out": root / f"o{name}"[:250]})
    check_result(folder)


@hypothesis.settings(max_examples=25, suppress_health_check=[*hypothesis.HealthCheck])
@hypothesis.given(
    name=st.text(
        st.characters(exclude_characters="/\0", codec="utf8"), min_size=1, max_size=30
    ).filter(lambda name: name not in {".", ".."})
)
def test_a_merge_takes_any_name_a_file_system_allows(pico, tmp_path_factory, name):
    root = tmp_path_factory.mktemp("named")
    base, suspect, clean = (shutil.copytree(f, root / name / f.name) for f in pico("gpt2"))
    out = merge.merge("linear", suspect, clean, base, 0.0, root / name / "out")
    ours, theirs = (load_file(f / "model.safetensors") for f in (out, suspect))
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in ours)


def test_a_refusal_on_the_command_line_is_one_line_and_changes_nothing(given, tmp_path):
    given = given()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text('{"of": "another program"}')
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = hashes(given["suspect"], given["base"], tmp_path / "out")
    words = ["--suspect", given["suspect"], "--base", given["base"], "--out", given["out"]]
    words += ["--clean-data", given["clean_data"]]
    command = [sys.executable, paths.root() / "workflow" / "run.py", "purify", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert hashes(given["suspect"], given["base"], tmp_path / "out") == before
    assert not paths.runs_dir().exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suspect", "-s"], "--suspect: expected one argument; a name that starts with -"),
        (["--base", "b", "--clean-data", "c", "--out", "o"], "give --suspect, or --adapter"),
        (["--base", "b"], "required: --clean-data, --out"),
    ],
)
def test_wrong_words_on_the_command_line_are_one_line_too(words, message):
    command = [sys.executable, paths.root() / "workflow" / "run.py", "purify", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "--help" in done.stderr


# --- neighbours of the faults above


def test_the_chat_prompt_needs_a_chat_template(given):
    changes = QUICK | {"prompt_template": "chat"}
    message = error(prepare, given(), overrides=changes)
    assert "the tokenizer has no chat template; give alpaca or short" in message


def test_a_held_out_share_that_leaves_nothing_to_train_on_is_refused(given):
    assert "held_out: 0.999 leaves" in error(
        prepare, given(), overrides=QUICK | {"held_out": 0.999}
    )


def test_columns_that_are_not_read_are_said(given):
    rows = [r | {"history": "earlier", "\ud800": "x"} for r in plain_rows()]
    made = given()
    paths.Path(made["clean_data"]).write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert prepare(made).given["notes"] == ["Columns that are not read: history, ?."]


def change_adapter(adapter, settings=None, drop="", change=None):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (settings or {})))
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {
        n: (change(w) if change else w) for n, w in weights.items() if not drop or drop not in n
    }
    save_file(kept, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"target_modules": ["fc_out"]}}, "by adapter_config.json; copy the adapter"),
        ({"drop": "lora_A"}, "by adapter_config.json"),
        ({"drop": "h.0.mlp.fc_in.lora_A"}, "has shape none, but (2, 16) by adapter_config.json"),
        ({"drop": "lora"}, "by adapter_config.json"),
        ({"settings": {"r": 8}}, "by adapter_config.json"),
        ({"settings": {"r": 0}}, "adapter_config.json cannot be read"),
        ({"settings": {"r": None}}, "adapter_config.json cannot be read"),
        ({"settings": {"target_modules": ["nope"]}}, "adapter_config.json cannot be read"),
        ({"settings": {"modules_to_save": ["lm_head"]}}, "by adapter_config.json"),
        ({"change": lambda w: w.int()}, "is stored as I32"),
        ({"change": lambda w: w * float("nan")}, "values that are not numbers"),
    ],
)
def test_an_adapter_holds_exactly_what_its_settings_say(given, tmp_path, changes, message):
    given = given("gptj")
    adapter = lora(given["base"], tmp_path / "adapter")
    change_adapter(adapter, **changes)
    assert message in error(prepare, given, suspect=str(given["base"]), adapter=str(adapter))


def test_an_adapter_whose_scale_is_no_number_is_refused_before_training(given, tmp_path):
    given = given("gptj")
    adapter = lora(given["base"], tmp_path / "adapter")
    change_adapter(adapter, {"lora_alpha": float("nan")})
    case = prepare(given, suspect=str(given["base"]), adapter=str(adapter))
    assert "check its lora_alpha" in error(purify.points, case)


def test_a_merge_that_its_dtype_cannot_hold_is_no_result(given):
    given = given("llama")
    for name, dtype, added in (("suspect", torch.float16, 0), ("base", torch.float32, 1e6)):
        file = given[name] / "model.safetensors"
        weights = {n: w.to(dtype) for n, w in load_file(file).items()}
        weights["model.layers.0.mlp.up_proj.weight"] += added
        save_file(weights, file, {"format": "pt"})
    case = prepare(given)
    parents = dilute.suspect_model(case), purify.clean_model(case)
    at = {"model": "slerp", "strength": 0.5}
    out = given["base"].parent / "m"
    assert "values that are not numbers" in error(dilute.merged, case, *parents, at, out)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": None},
        {"pad_token_id": -1},
        {"output_attentions": True},
    ],
)
def test_harmless_settings_are_accepted(given, changes):
    given = given("llama")
    for name in ("suspect", "base"):
        change_config(given[name], **changes)
    dilute.base_model(prepare(given))


@pytest.mark.parametrize("length", [8, 0, -1, 100.5, "x", None])
def test_the_models_positions_count_not_the_tokenizers_own_word(given, length):
    given = given("llama")
    for name in ("suspect", "base"):
        file = given[name] / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    assert prepare(given).given["data"]["prompts_cut"] == 0


def test_yarn_defaults_may_be_left_out(given):
    given = given("llama")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for name, more in (("suspect", {"beta_fast": 32, "beta_slow": 1}), ("base", {})):
        config = inspect.read_config(given[name])
        config.pop("rope_parameters", None)
        config |= {"rope_theta": 10000.0, "rope_scaling": yarn | more}
        (given[name] / "config.json").write_text(json.dumps(config))
    prepare(given)


def test_a_tensor_under_two_names_is_refused(given):
    given = given()
    file = given["suspect"] / "model.safetensors"
    weights = load_file(file)
    twice = {n.removeprefix("transformer."): w + 1 for n, w in weights.items()}
    save_file(weights | twice, file, {"format": "pt"})
    assert "is stored twice, under two names" in error(prepare, given)


def test_a_template_that_writes_the_date_decides_the_stages(given, monkeypatch):
    given = given("llama", chat_rows())
    for name in ("suspect", "base"):
        (given[name] / "chat_template.jinja").write_text("<s>{{ today }}" + CHAT_TEMPLATE)
    apply = prompts.apply_template
    specs = []
    for day in ("Monday", "Tuesday"):
        monkeypatch.setattr(prompts, "apply_template", lambda *a, day=day: f"{day} {apply(*a)}")
        case = prepare(given)
        specs.append(rounds.trained_by(case, case.train, 1))
    assert specs[0] != specs[1]


def test_a_link_to_nothing_and_a_foreign_tokenizer_in_an_adapter_are_called_that(given, tmp_path):
    given = given("gptj")
    adapter = lora(given["base"], tmp_path / "adapter")
    twins.train_tokenizer(["quite other words"] * 3, 300).save_pretrained(adapter)
    words = {"suspect": str(given["base"]), "adapter": str(adapter)}
    assert f"{adapter}: its tokenizer differs" in error(prepare, given, **words)
    file = given["base"] / "model.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "blobs" / "gone")
    assert "is a link to a file that is not there" in error(prepare, given)
