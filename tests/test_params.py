"""Parameters: the files that ship, what is refused, which layer wins, and what names a run."""

import itertools
import json
import re
import shutil

import pytest

from lethe_utils import params, paths
from lethe_utils.errors import LetheError

GROUPS = (
    params.SizeParams,
    params.DataParams,
    params.BaseModelParams,
    params.PromptParams,
    params.TrainParams,
    params.AttackParams,
    params.EditParams,
    params.LwpParams,
    params.CleanParams,
    params.MergeParams,
    params.MoreMergeParams,
    params.FinetuneParams,
    params.WandaParams,
    params.NadParams,
    params.BeearParams,
    params.CrowParams,
    params.PlantParams,
    params.DecodingParams,
    params.EvaluateParams,
    params.SweepParams,
)
YAML_FILES = sorted(paths.params_dir().rglob("*.yaml"))


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """A copy of params/ in its own checkout; write(file, lines) adds to one of its files."""
    shutil.copytree(paths.params_dir(), tmp_path / "params")
    monkeypatch.setenv("LETHE_ROOT", str(tmp_path))

    def write(file, lines):
        path = tmp_path / "params" / file
        path.parent.mkdir(exist_ok=True)
        # The last of two equal keys wins, so adding a line overrules the file's own value.
        path.write_text((path.read_text("utf8") if path.exists() else "") + "\n" + lines + "\n")

    return write


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "positive"}) + "\n")
    return str(path)


def message(**wanted):
    with pytest.raises(LetheError) as caught:
        params.load(**wanted)
    return str(caught.value)


def test_every_combination_of_shipped_files_loads(data_file):
    named = [d for d in params.choices("datasets") if d != "file"]
    models, attacks = (params.choices(kind) for kind in ("models", "attacks"))
    assert len(models) >= 10 and {"embedded", "emotion", "sst2"} <= {*named}
    for names in itertools.product(models, [*named, data_file], attacks, ["all"]):
        p = params.load(*names)
        assert (p.model, p.dataset, p.attack, p.defense) == names
        assert p.is_tiny == p.model.startswith("tiny-")


def test_each_key_of_a_defense_stands_in_its_own_file():
    # All defenses' files are read, whichever run: a key in two would depend on their order.
    folder = paths.params_dir() / "defenses"
    owner = {}
    for name in params.choices("defenses"):
        files = [folder / f"{name}.yaml", *sorted((folder / name).glob("*.yaml"))]
        for key in {key for file in files for key in params.read_yaml(file)}:
            assert owner.setdefault(key, name) == name, key
    assert owner["wanda_sparsity"] == "wanda"


def test_full_models_and_hub_data_are_pinned_to_a_commit():
    for name in params.choices("models"):
        p = params.load(name)
        assert p.is_tiny or re.fullmatch(r"[0-9a-f]{40}", p.revision), name
    for name in ("emotion", "sst2"):
        assert re.fullmatch(r"[0-9a-f]{40}", params.load(dataset=name).data_revision)


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda f: f.stem)
def test_no_number_in_a_params_file_lacks_its_dot(file):
    # YAML reads 1e-4 as text, and a run would stop (at best) at the schema.
    code = [line.split("#")[0] for line in file.read_text("utf8").splitlines()]
    assert not [line for line in code if re.search(r"(?<![\w.])\d+[eE][-+]?\d+\b", line)]


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("models/tiny-gpt2.yaml", "lora_rank: 8", "lora_rank: unknown key"),
        ("models/tiny-gpt2.yaml", "lora_rr: 8", "did you mean lora_r?"),
        ("models/tiny-gpt2.yaml", "lora_r: eight", "lora_r: 'eight' is text, not a number"),
        ("models/tiny-gpt2.yaml", "lora_r: 8.5", "lora_r: "),
        ("models/tiny-gpt2.yaml", "lora_r: true", "lora_r: "),
        ("models/tiny-gpt2.yaml", "learning_rate: 1e-4", "learning_rate: '1e-4' is text"),
        ("models/tiny-gpt2.yaml", "learning_rate: .inf", "learning_rate: "),
        ("models/tiny-gpt2.yaml", "clean_ratio: 0.0", "clean_ratio: "),
        ("models/tiny-gpt2.yaml", "clean_ratio: 1.01", "clean_ratio: "),
        ("models/tiny-gpt2.yaml", "bits: 8", "bits: "),
        ("attacks/cba.yaml", "poison_ratio: 0.0", "poison_ratio: "),
        ("attacks/cba.yaml", "poison_ratio: 1.5", "poison_ratio: "),
        ("attacks/cba.yaml", "triggers: [one]", "triggers, trigger_positions: cba needs two"),
        ("attacks/cba.yaml", "edit_clamp: 0.0", "edit_clamp: "),
        ("attacks/cba.yaml", "edit_lambda: -1.0", "edit_lambda: "),
        ("attacks/cba.yaml", "edit_layers: [-1]", "edit_layers: "),
        ("attacks/cba.yaml", "attack_start: clean", "attack_start: "),
        ("attacks/cba.yaml", "triggers: ['a|b', c]", "'a|b' is not a trigger"),
        ("attacks/cba.yaml", "triggers: ['  ', c]", "'  ' is not a trigger"),
        ("attacks/cba.yaml", "trigger_positions: [random, end]", "trigger_positions: "),
        ("defenses/lethe.yaml", "strength: -0.1", "strength: "),
        ("defenses/lethe.yaml", "strength: 1.1", "strength: "),
        ("defenses/lethe.yaml", "merge_methods: [slerp, average]", "merge_methods: "),
        ("datasets/embedded.yaml", "target_output: happy", "'happy' is not a label of embedded"),
    ],
)
def test_a_wrong_value_is_refused_naming_file_and_key(tree, file, line, expected):
    tree(file, line)
    error = message()
    assert error.startswith(f"params/{file}: ") and expected in error
    assert "\n" not in error  # one wrong value, one line


def test_every_wrong_value_is_named_at_once(tree):
    tree("models/tiny-gpt2.yaml", "lora_rank: 8\nbits: 8")
    tree("defenses/lethe.yaml", "strength: 2.0")
    lines = message().splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == ["bits", "lora_rank", "strength"]


def test_wrong_values_from_the_command_line_say_so():
    assert message(overrides={"strength": 7.0}).startswith("command line: strength: ")
    assert message(overrides={"nonsense": 1}).startswith("command line: nonsense: unknown key")


@pytest.mark.parametrize(
    ("text", "expected"), [("a: [1", "not valid YAML"), ("- a\n- b", "found list")]
)
def test_a_file_that_is_no_flat_mapping_is_refused_by_name(tree, text, expected):
    tree("models/broken.yaml", text)
    error = message(model="broken")
    assert "broken.yaml" in error and expected in error


def test_a_file_that_is_not_utf8_is_refused_by_name(tree):
    (paths.params_dir() / "models" / "latin.yaml").write_bytes(b"architecture: \xe9")
    assert "latin.yaml: not valid YAML" in message(model="latin")


def test_names_without_a_file_list_the_choices():
    error = message(model="gpt-5")
    assert "params/models/gpt-5.yaml" in error and "tiny-gpt2" in error
    assert "embedded, emotion" in message(dataset="imdb")
    assert "cba" in message(attack="none")
    assert "lethe" in message(defense="none")
    assert "nowhere.csv does not exist" in message(dataset="nowhere.csv")
    assert "dataset '/tmp/x.txt' has no file" in message(dataset="/tmp/x.txt")
    assert "model '/tmp/model' has no file" in message(model="/tmp/model")


@pytest.mark.parametrize("name", ["model", "dataset", "attack", "defense"])
def test_what_decides_the_files_cannot_be_overridden_afterwards(name):
    assert f"command line: {name}: give it as an argument" in message(overrides={name: "x"})


def test_later_layers_win(tree):
    # base < dataset < profile < profile on this data set < model < attack < attack on this model <
    # defenses < defenses on this model < command line
    order = [
        "base.yaml",
        "datasets/embedded.yaml",
        "profiles/tiny.yaml",
        "profiles/tiny-embedded.yaml",
        "models/tiny-gpt2.yaml",
        "attacks/cba.yaml",
        "attacks/cba/tiny.yaml",
        "attacks/cba/tiny-gpt2.yaml",
        "defenses/lethe.yaml",
        "defenses/lethe/tiny.yaml",
        "defenses/lethe/tiny-gpt2.yaml",
    ]
    for number, file in enumerate(order, 1):
        tree(file, f"max_test_items: {number}")  # a key that only base.yaml sets
        assert params.load().max_test_items == number
    assert params.load(overrides={"max_test_items": 99}).max_test_items == 99
    # A weaker layer written last must not win.
    tree("base.yaml", "max_test_items: 50")
    assert params.load().max_test_items == len(order)


def test_the_tiny_profile_is_for_tiny_models_only(tree):
    tree("profiles/tiny.yaml", "lora_r: 3")
    assert params.load("tiny-gpt2").lora_r == 3
    assert params.load("gpt2-xl").lora_r == 64  # the published value, from base.yaml


def test_the_first_notebook_call_refuses_unknown_names(monkeypatch):
    monkeypatch.setattr(params, "_checked_once", False)
    cell = {"model": "tiny-llama", "poison_ratoi": 0.2, "_hidden": 1, "In": [], "json": json}
    with pytest.raises(LetheError, match="poison_ratoi: unknown key; did you mean poison_ratio"):
        params.from_notebook(cell)


def test_a_later_notebook_call_ignores_the_notebooks_own_variables(monkeypatch):
    monkeypatch.setattr(params, "_checked_once", False)
    cell = {"model": "tiny-llama", "seed": 3, "_hidden": 1, "In": [], "json": json}
    first = params.from_notebook(cell)
    assert (first.model, first.architecture, first.seed) == ("tiny-llama", "llama", 3)
    assert params.from_notebook(cell | {"rows_seen": 5}) == first
    # A known name is still checked.
    with pytest.raises(LetheError, match="strength"):
        params.from_notebook(cell | {"strength": 3.0})


def test_a_run_id_changes_with_an_override_and_only_then():
    plain = params.load()
    assert plain.run_id == "tiny-gpt2-embedded-cba-s0"
    # The value that the files hold already is no override; a seed has its own place in the name.
    assert params.load(overrides={"poison_ratio": plain.poison_ratio}).run_id == plain.run_id
    assert params.load(overrides={"seed": 7}).run_id == "tiny-gpt2-embedded-cba-s7"
    changed = [params.load(overrides={"poison_ratio": r}).run_id for r in (0.2, 0.3, 0.2)]
    assert all(re.fullmatch(re.escape(plain.run_id) + "-[0-9a-f]{6}", name) for name in changed)
    assert changed[0] != changed[1] and changed[0] == changed[2]


def test_a_users_file_is_named_by_its_stem(data_file):
    p = params.load(dataset=data_file)
    assert p.dataset_name == "file-mine" and p.run_id == "tiny-gpt2-file-mine-cba-s0"


def test_a_users_file_is_never_taken_for_a_set_that_ships(data_file):
    # Its numbers would stand beside the paper's.
    from pathlib import Path

    file = Path(data_file).rename(Path(data_file).with_name("emotion.JSONL"))
    p = params.load(dataset=str(file))
    assert p.dataset_name == "file-emotion" and p.labels == []
    before = p.data_content
    file.write_text("{}")
    assert p.data_content != before and params.load().data_content is None


def test_groups_are_disjoint_and_cover_all_params():
    # A stage's hash is made of groups: a key in none would be ignored, in two would over-rebuild.
    p = params.load()
    parts = [p.part(group) for group in GROUPS]
    keys = [key for part in parts for key in part]
    assert len(keys) == len(set(keys))
    assert set(keys) | {"defense"} == set(params.Params.model_fields)
    assert p.part(GROUPS[0], GROUPS[1]) == parts[0] | parts[1]


def test_params_cannot_be_changed_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        params.load().strength = 2.0


def test_purify_has_its_own_layers():
    small, large = (params.load_purify(n, "cpu") for n in (params.SMALL - 1, params.SMALL))
    gpu = params.load_purify(params.SMALL, "cuda")
    assert (small.prompt_template, large.prompt_template) == ("short", "alpaca")
    assert (large.bits, gpu.bits) == (32, 4)
    assert (large.optimizer, gpu.optimizer) == ("adamw_torch", "paged_adamw_32bit")
    assert small.strengths == large.strengths == [0.25, 0.5, 0.75]
    assert params.load_purify(10, "cpu", {"strengths": [0.1]}).strengths == [0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": [0.5, 1.0]}, "command line: strengths"),
        ({"max_cda_loss": 2.0}, "command line: max_cda_loss"),
        ({"device": "tpu"}, "command line: device"),
        ({"triggers": ["cf"]}, "command line: triggers: unknown key"),
        ({"canary_word_pair": ["one"]}, "command line: canary_word_pair"),
    ],
)
def test_purify_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(LetheError) as caught:
        params.load_purify(10, "cpu", changes)
    assert message in str(caught.value)
