"""The notebooks are thin, stripped but for one compared cell each, and nbval really compares it."""

import ast
import copy
import inspect
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest

from lethe_utils import groups, params, paths
from lethe_utils.purify import settings

NOTEBOOKS = sorted((paths.root() / "notebooks").glob("*.ipynb"))
NUMBERED = [n for n in NOTEBOOKS if n.stem[0].isdigit()]
COMPARED = {"keep_output", "nbval-check-output"}


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    return request.param, nbformat.read(request.param, 4)


def test_there_are_six_numbered_notebooks_and_the_tool():
    assert [n.stem[:2] for n in NUMBERED] == ["01", "02", "03", "04", "05", "06"]
    assert {*NOTEBOOKS} - {*NUMBERED} == {paths.root() / "notebooks" / "purify.ipynb"}


def test_title_and_badge_point_to_this_file(notebook):
    path, content = notebook
    project = tomllib.loads((paths.root() / "pyproject.toml").read_text("utf8"))["project"]
    slug = project["urls"]["Repository"].removeprefix("https://github.com/")
    first = content.cells[0].source
    assert ("# Purify" if path.stem == "purify" else f"# {path.stem[:2]} ") in first
    assert f"colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}" in first


def parameters(content):
    """What the one cell tagged `parameters` sets: literals only, for no name is available."""
    cells = [c for c in code_cells(content) if "parameters" in tags(c)]
    assert len(cells) == 1
    values = {}
    exec(cells[0].source, {"__builtins__": {}}, values)
    return values


def test_purify_takes_what_its_command_takes():
    from lethe_utils import purify

    values = parameters(nbformat.read(paths.root() / "notebooks" / "purify.ipynb", 4))
    assert values.pop("max_cda_loss") == settings.load(10, "cpu").max_cda_loss
    assert {*values} == {"suspect", "adapter", "base", "clean_data", "out"}
    assert {*values.values()} == {""}
    taken = inspect.signature(purify.prepare).parameters
    assert {*values} | {"overrides"} == {*taken}


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_one_parameters_cell_of_literals_that_are_the_defaults(path):
    values = parameters(nbformat.read(path, 4))
    values.pop("results_from", None)
    chosen = [values.pop(name) for name in ("model", "dataset", "attack", "defense")]
    assert chosen == [groups.DEFAULT_MODEL, *inspect.getfullargspec(params.load).defaults[1:4]]
    assert values == {"seed": 0}


def test_a_twin_takes_the_default_models_place_and_no_other_models(monkeypatch):
    monkeypatch.setattr(params, "_checked_once", False)
    named = {"dataset": "embedded", "attack": "cba", "defense": "lethe", "seed": 0}
    for model, in_its_place in ((groups.DEFAULT_MODEL, "tiny-qwen2"), ("tiny-llama", "tiny-llama")):
        monkeypatch.setenv("LETHE_MODEL", "tiny-qwen2")
        assert params.from_notebook(named | {"model": model}).model == in_its_place
        monkeypatch.delenv("LETHE_MODEL")
        assert params.from_notebook(named | {"model": model}).model == model
    assert params.load().model == groups.DEFAULT_MODEL


def test_code_is_thin_and_defines_nothing(notebook):
    source = [c.source for c in code_cells(notebook[1])]
    lines = [x for s in source for x in s.splitlines() if x.strip() and not x.startswith("#")]
    assert len(lines) <= 80
    assert not re.search(r"^\s*(def|class) ", "\n".join(source), re.M)
    assert not any(re.search(r"[!%]pip", s) for s in source[1:])


def test_only_the_compared_cells_keep_an_output(notebook):
    cells = code_cells(notebook[1])
    kept = [c for c in cells if tags(c) >= COMPARED]
    assert kept and all(c.outputs and c.execution_count is not None for c in kept)
    assert not [c for c in cells if c.outputs and not tags(c) & COMPARED]
    assert not [c for c in cells if "injected-parameters" in tags(c)]


def test_no_cell_gives_a_variable_the_name_of_a_param(notebook):
    # Run All a second time in one kernel would take it for the param.
    known = {k for a in params.choices("attacks") for k in params.run_schema(a).model_fields}
    for cell in code_cells(notebook[1]):
        code = "\n".join(
            x for x in cell.source.split("\n") if not x.lstrip().startswith(("!", "%"))
        )
        if "parameters" in tags(cell) or "google.colab" in code:
            continue
        stored = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)]
        names = {n.id for n in stored if isinstance(n.ctx, ast.Store)}
        assert notebook[0].stem == "purify" or not names & known


def run_nbval(notebook, path):
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", path]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent)


@pytest.mark.slow
def test_nbval_catches_a_wrong_stored_output(tmp_path):
    # 01's setup and its first table are quick; a compared cell on top of them must be able to fail.
    source = nbformat.read(NOTEBOOKS[0], 4)
    setup = next(c for c in code_cells(source) if "from_notebook" in c.source)
    literals = next(c for c in code_cells(source) if "parameters" in tags(c))
    compared = nbformat.v4.new_code_cell("print(P.target_output)", execution_count=3)
    compared.metadata["tags"] = sorted(COMPARED)
    compared.outputs = [nbformat.v4.new_output("stream", name="stdout", text="joy\n")]
    right = nbformat.v4.new_notebook(cells=[literals, setup, compared], metadata=source.metadata)
    wrong = copy.deepcopy(right)
    wrong.cells[-1].outputs[0].text = "fear\n"
    good = run_nbval(right, tmp_path / "right.ipynb")
    assert good.returncode == 0, good.stdout
    bad = run_nbval(wrong, tmp_path / "wrong.ipynb")
    assert bad.returncode == 1 and "1 failed" in bad.stdout
