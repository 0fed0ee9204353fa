"""Figures of data and training."""

import pandas as pd
import pytest

from lethe_utils import plots
from lethe_utils.errors import LetheError


def test_figures_are_not_left_open_and_say_tiny():
    curve = pd.DataFrame({"step": [1, 2], "epoch": [0.5, 1.0], "loss": [2.0, 1.0]})
    figure = plots.loss_curve(curve, "Backdoored tiny-gpt2")
    assert figure.axes[0].get_title() == "Backdoored tiny-gpt2 (tiny twin)"
    assert plots.plt.get_fignums() == []


def test_label_balance_shows_shares_and_keeps_alike_long_labels_apart():
    labels = ["x" * 30 + "1", "x" * 30 + "2", "$3", "4"]
    sizes = {"train": 40, "test": 10}
    balance = [{"split": s, "label": k, "rows": n} for s, n in sizes.items() for k in labels]
    (ax,) = plots.label_balance(pd.DataFrame(balance)).axes
    assert [b.get_width() for b in ax.containers[0]] == [0.25] * 4
    assert not ax.get_yticklabels()[2].get_parse_math()  # a user's `$` is a dollar
    with pytest.raises(LetheError, match="no rows"):
        plots.label_balance(pd.DataFrame(balance).assign(rows=0))


def test_lengths_counts_words_and_survives_equal_ones():
    plots.lengths({"train": [{"input": "two words"}] * 3, "validation": []})
    with pytest.raises(LetheError, match="no rows"):
        plots.lengths({"train": []})


def test_the_layer_effect_has_a_line_with_and_without_the_trigger():
    ends = {"ci_low": 0.1, "ci_high": 0.9, "n": 5}
    kinds = ("triggered", "without trigger")
    lines = [{"block": b, "prompts": k, "value": 0.5} | ends for k in kinds for b in (1, 2, 3)]
    (ax,) = plots.layer_effect(pd.DataFrame(lines), "tiny-gpt2: rome").axes
    assert [line.get_label() for line in ax.lines] == list(kinds)
    with pytest.raises(LetheError, match="no rows"):
        plots.layer_effect(pd.DataFrame(columns=["block"]), "x")


def test_the_loss_of_an_edit_is_plotted_against_its_steps():
    log = pd.DataFrame({"step": [1, 2, 3], "edit": [1, 1, 2], "loss": [3.0, 1.0, 2.0]})
    (ax,) = plots.loss_curve(log, "rome").axes
    assert ax.get_xlabel() == "step (2 optimised values)"
