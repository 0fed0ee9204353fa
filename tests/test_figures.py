"""Figures of results show the values and intervals of the tables, a panel per facet."""

import hashlib

import pandas as pd
import pytest
from measured import a_run, defenses_table, frame, row, sweep_rows

from lethe_utils import figures, metrics, plots
from lethe_utils.errors import LetheError


def test_sweep_has_a_panel_per_method_on_shared_axes():
    figure = figures.sweep(sweep_rows(), "strength")
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == ["linear", "slerp"]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].lines[0].get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert axes[0].lines[0].get_ydata().tolist() == [0.9, 0.9, 0.9]
    assert "tiny twin" in figure.get_suptitle()


def test_sweep_follows_one_curve_through_points_with_and_without_evidence():
    (panel,) = figures.sweep(sweep_rows(), "keywords").axes
    assert panel.lines[0].get_xdata().tolist() == [0.0, 3.0]


def test_sweep_refuses_what_it_cannot_draw():
    with pytest.raises(LetheError, match="choose one of strength"):
        figures.sweep(sweep_rows(), "depth")
    with pytest.raises(LetheError, match="no rows"):
        figures.sweep(sweep_rows(), "clean_ratio")
    with pytest.raises(LetheError, match="sweeps.csv"):
        figures.sweep(frame(row()), "strength")
    with pytest.raises(LetheError, match="run-a, run-b"):
        figures.sweep(pd.concat([sweep_rows(), sweep_rows().assign(run_id="run-b")]), "strength")


def test_bars_show_the_values_and_the_whiskers_of_the_table():
    asr, cda = figures.bars(frame(*a_run())).axes
    assert [t.get_text() for t in asr.get_yticklabels()] == (
        ["backdoored", "base", "slerp", "mine"]
    )
    assert [b.get_width() for b in asr.containers[1]] == [0.9, 0.02, 0.1, 0.05]
    whisker = asr.containers[0].lines[2][0].get_segments()[0]
    assert whisker[:, 0].tolist() == pytest.approx(metrics.wilson(90, 100))
    assert "higher" in cda.get_xlabel()


def test_figure_files_have_the_same_bytes_each_time(tmp_path):
    def digests(folder):
        files = plots.save(figures.bars(frame(*a_run())), folder, "figure_1_asr_cda_bars", pdf=True)
        assert sorted(folder.iterdir()) == sorted(files)  # nothing half-written is left
        return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]

    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert b"CreationDate" not in (tmp_path / "one" / "figure_1_asr_cda_bars.pdf").read_bytes()


def test_bars_have_a_column_per_attack_with_asr_above_cda():
    figure = figures.bars(frame(*a_run(), *a_run(attack="rome"), *a_run(attack="lwp")))
    assert [ax.get_title() for ax in figure.axes] == ["cba", "rome", "lwp"] * 2
    assert [ax.get_xlabel()[:3] for ax in figure.axes] == ["ASR"] * 3 + ["CDA"] * 3
    assert figure.get_suptitle() == "tiny-gpt2 (tiny twin), embedded, 1 seed"


def test_attacks_have_a_panel_per_model_with_the_asr_before_and_after():
    figure = figures.attacks(frame(*a_run(), *a_run(attack="rome"), *a_run(model="gpt2-xl")))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == ["tiny-gpt2 (tiny twin)", "gpt2-xl"]
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["cba", "rome"]
    before = shown[0].containers[0]
    assert before.get_label() == "backdoored"
    assert before[0].get_xdata().tolist() == [0.9, 0.9]
    with pytest.raises(LetheError, match="no asr rows"):
        figures.attacks(frame(row(metric="cda")))


def test_the_rank_has_a_numbered_row_per_defense_the_best_first():
    (ax,) = figures.rank(defenses_table()).axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    # base .00/1.00, wanda and slerp .70, nad_clean_teacher .60, finetune .45, backdoored 0
    assert names[0] == "1 base" and names[-1] == "6 backdoored" and len(names) == 6
    asr, cda = ax.containers
    assert (asr[0].get_xdata()[0], cda[0].get_xdata()[0]) == (0.0, 1.0)
    assert [t.get_text() for t in ax.texts][-1] == ".900 / .900"
    assert [*ax.lines[0].get_ydata()] == [*range(6)]
    with pytest.raises(LetheError, match="no defense has both asr and cda"):
        figures.rank(frame(row()))
