"""Adding a method is one module and one params file: a toy attack and a toy defense do it."""

import shutil

import pytest

from lethe_utils import attacks, defenses, params, paths, tables
from lethe_utils.errors import LetheError
from lethe_utils.pipeline import contenders, measure

ATTACK = '''
"""A toy: the head is left as it is, and rows end in the trigger."""

import shutil

from lethe_utils.groups import Group, Ratio, TriggerParams


class ToyAttackParams(Group):
    toy_share: Ratio


PARAMS = (TriggerParams, ToyAttackParams)
TRIGGERS = 1
LAYERS = ""


def poison(rows, p, seed):
    chosen = rows[: round(p.toy_share * len(rows))]
    return [row | {"output": p.target_output, "kind": "backdoor"} for row in chosen]


def plant(start, poisoned, corpus, p, out):
    shutil.copytree(start, out / "model")
    (out / "loss.csv").write_text("step,epoch,loss\\n1,1.0,0.5\\n")


def triggered(rows, p, seed):
    return {"backdoor": [row | {"input": f"{row['input']} {p.triggers[0]}"} for row in rows]}
'''
DEFENSE = '''
"""A toy: it says one label, whatever it is asked."""

from lethe_utils.groups import Group, Key


class ToyParams(Group):
    toy_answer: Key


class ToyColumns(Group):
    toy_answers_sweep: list[Key]


PARAMS = (ToyParams,)
COLUMNS = (ToyColumns,)
NEEDS = "nothing"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0


def variants(p):
    return {"toy_defense": {}} | {
        f"toy_defense_{a}": {"toy_answer": a} for a in p.toy_answers_sweep
    }


def answer(given, prompts, n_words, progress=""):
    return [given.p.toy_answer] * len(prompts)
'''


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """The two modules and their params files, in folders of their own."""
    shutil.copytree(paths.params_dir(), tmp_path / "params")
    shutil.copytree(paths.root() / "data", tmp_path / "data")
    monkeypatch.setenv("LETHE_ROOT", str(tmp_path))
    for package, name, code, values in (
        (attacks, "toy_attack", ATTACK, "toy_share: 0.5\ntriggers: [zq]\noutput_mode: replace\n"),
        (defenses, "toy_defense", DEFENSE, "toy_answer: joy\ntoy_answers_sweep: [fear]\n"),
    ):
        kind = package.__name__.split(".")[1]
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{name}.py").write_text(code)
        places = "trigger_positions: [suffix]\ntrigger_level: word\n" if package is attacks else ""
        (tmp_path / "params" / kind / f"{name}.yaml").write_text(values + places)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / kind)])
    yield
    for known in (attacks, defenses):
        for name in ("toy_attack", "toy_defense"):
            monkeypatch.delitem("sys.modules", f"{known.__name__}.{name}", raising=False)


def small(pico_params, **changes):
    """A run of seconds."""
    sizes = {"rows": {"pretrain": 40, "train": 60, "validation": 20, "test": 20}, "checksums": {}}
    tiny = pico_params().part(params.BaseModelParams)
    kept = ("n_layers", "width", "n_heads", "n_kv_heads", "mlp_width", "vocab_size", "positions")
    quick = {"base_epochs": 1, "base_evidence_share": 0.0, "clean_epochs": 1, "keywords_sweep": []}
    quick |= {"strengths_sweep": [], "clean_ratios_sweep": []}
    return params.load(
        attack="toy_attack",
        defense="toy_defense",
        overrides=sizes | {k: tiny[k] for k in kept} | quick | changes,
    )


def test_a_toy_attack_and_a_toy_defense_run_from_outside(toys, pico_params):
    p = small(pico_params)
    assert (p.toy_share, p.toy_answer) == (0.5, "joy")
    assert params.table(p).loc["toy_share", "set in"] == "params/attacks/toy_attack.yaml"
    names = [c.name for c in contenders.everyone(p)]
    assert names == ["backdoored", "base", "clean", "toy_defense", "toy_defense_fear"]
    table = measure.measure(p)
    asr = table[table["metric"] == "asr"].set_index("defense")["value"]
    assert (asr["toy_defense"], asr["toy_defense_fear"]) == (1.0, 0.0)
    assert "toy_defense_fear" in tables.table2(table)
    assert defenses.registered("toy_defense_fear") == "toy_defense"
    costs = measure.costs(p).set_index("defense")
    assert costs.loc["toy_defense", "acts"] == "while decoding"


def test_a_toys_params_are_checked_as_all_others(toys, pico_params):
    with pytest.raises(LetheError, match="command line: toy_share: .*less than or equal to 1"):
        small(pico_params, toy_share=2.0)
    with pytest.raises(LetheError, match="toy_shar: unknown key; did you mean toy_share"):
        small(pico_params, toy_shar=0.2)
    assert "toy_share" not in params.load().model_dump()  # no key of another attack's run
    assert "toy_answer" in params.load().model_dump()  # every defense's params are known


def test_a_change_of_a_toys_columns_leaves_its_answers_alone(toys, pico_params):
    def file(changes):
        p = small(pico_params, **changes)
        first = next(c for c in contenders.everyone(p) if c.name == "toy_defense")
        return contenders.tested_file(p, first, 0)

    assert file({}) == file({"toy_answers_sweep": ["fear", "anger"]})
    assert file({}) != file({"toy_answer": "anger"})
