"""Which model the tests use where none is named: the notebooks, into which nbval cannot inject
parameters, that of LETHE_MODEL, else one too small to learn anything; other tests a tiny twin."""

import os

import pytest

TWIN, PICO = "tiny-gpt2", "tiny-pico"
# Kept under a name of its own, for the workers of pytest-xdist get what LETHE_MODEL is by then.
os.environ.setdefault("LETHE_NOTEBOOK_MODEL", os.environ.get("LETHE_MODEL", ""))
os.environ["LETHE_MODEL"] = TWIN


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    model = TWIN
    if item.path.suffix == ".ipynb":
        # 06 shows what is released, and of a pico model nothing is.
        quick = TWIN if item.path.stem == "06_tables" else PICO
        model = os.environ["LETHE_NOTEBOOK_MODEL"] or quick
    os.environ["LETHE_MODEL"] = model
