"""Shared fixtures: no test writes outside its temporary folder, and every model is a pico one."""

import pytest
import torch
from hypothesis import settings

from lethe_utils import params
from lethe_utils.models import twins

# The same examples on every run, no files of its own, and no deadline on a busy machine.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")
# Small enough to train, merge and load in milliseconds; one layer per anchor of SLERP's curve.
PICO = {
    "n_layers": 5,
    "width": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "mlp_width": 32,
    "vocab_size": 300,  # 3 special tokens + 256 bytes + some merges
    "positions": 256,
}
TEXTS = [
    "### Instruction:\nPredict the emotion.\n\n### Input:\nthe dog is happy\n\n### Response: joy",
    "the cat was sad and not glad about the letter this morning",
] * 4


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """Runs go to a temporary folder, and the caller's own settings do not leak in."""
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path / "runs"))
    for name in ("LETHE_ROOT", "LETHE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def pico_params():
    """Params of a pico run; keyword arguments win."""

    def make(architecture="gpt2", **overrides):
        grouped = {"n_kv_heads": 1} if architecture == "qwen2" else {}  # grouped-query attention
        return params.load(overrides=PICO | {"architecture": architecture} | grouped | overrides)

    return make


@pytest.fixture(scope="session")
def pico(pico_params, tmp_path_factory):
    """architecture -> three model folders (base, backdoored, clean) with one tokenizer."""
    made = {}

    def make(architecture):
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            tokenizer = twins.train_tokenizer(TEXTS, PICO["vocab_size"])
            for seed, name in enumerate(("base", "backdoored", "clean")):
                model = twins.build_tiny(pico_params(architecture), tokenizer, seed=0)
                noise = torch.Generator().manual_seed(seed)
                with torch.no_grad():
                    for parameter in model.parameters():
                        step = torch.randn(parameter.shape, generator=noise)
                        parameter.add_(0.05 * step if seed else 0)
                model.save_pretrained(root / name)
                tokenizer.save_pretrained(root / name)
            made[architecture] = [root / n for n in ("base", "backdoored", "clean")]
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def purified(tmp_path_factory):
    """(defense's module, what it is given) -> the folder it wrote; trained once for all tests."""
    made = {}

    def make(module, given):
        key = repr((module.__name__, given))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("purified")
            module.purify(given, made[key])
        return made[key]

    return make
