"""Tables and figures: exact cells, the paper's numbers apart from ours, mixed runs refused."""

import csv
import hashlib

import pandas as pd
import pytest

from lethe_utils import metrics, paths, plots, tables
from lethe_utils.errors import LetheError
from lethe_utils.metrics import COLUMNS


def row(defense="backdoored", metric="asr", hits=90, n=100, **other):
    low, high = metrics.wilson(hits, n)
    common = {"model": "tiny-gpt2", "dataset": "embedded", "attack": "cba", "seed": 0}
    common |= {"defense": defense, "evidence": 0, "split": "test", "metric": metric}
    common |= {"value": hits / n, "n": n, "ci_low": low, "ci_high": high, "run_id": "run-a"}
    return common | other


def frame(*rows):
    return pd.DataFrame(rows)


def a_run(**other):
    return [
        row(d, m, hits, evidence=e, **other)
        for e in (0, 1)
        for d, asr, cda in (
            ("backdoored", 90, 95),
            ("base", 2, 93),
            ("slerp", 10, 94),
            ("mine", 5, 80),
        )
        for m, hits in (("cda", cda), ("asr", asr), ("ftr_input_one", 3), ("ftr", 3))
    ]


def test_select_returns_the_rows_and_only_the_known_columns():
    chosen = tables.select(frame(row(evidence=True, extra="x")))
    assert list(chosen) == COLUMNS
    assert chosen["evidence"].tolist() == [1]


def test_a_bound_off_by_rounding_is_accepted():
    assert len(tables.select(frame(row(hits=0, ci_low=1e-19), row("base", hits=100)))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 1.2, "ci_high": 1.3}, "not within \\[0, 1\\]"),
        ({"value": float("nan")}, "not within \\[0, 1\\]"),
        ({"value": "failed"}, "not within \\[0, 1\\]"),
        ({"value": 0.5}, "not within its interval"),
        ({"n": 0}, "not a count"),
        ({"n": 2.5}, "not a count"),
        ({"evidence": 3}, "not 0 or 1"),
        ({"run_id": None}, "empty"),
        ({"defense": None}, "empty"),
    ],
)
def test_impossible_rows_are_refused(change, message):
    with pytest.raises(LetheError, match=message):
        tables.select(frame(row("base"), row() | change))


def test_a_missing_column_and_an_empty_table_are_named():
    with pytest.raises(LetheError, match="ci_low, run_id"):
        tables.select(frame(row()).drop(columns=["ci_low", "run_id"]))
    with pytest.raises(LetheError, match="no rows"):
        tables.select(frame(row()).head(0))


BUILDERS = [
    tables.select,
    tables.table2,
    tables.controls_table,
    tables.headline_table,
    tables.ftr_table,
    plots.bars,
]


@pytest.mark.parametrize("build", BUILDERS)
def test_mixed_runs_are_refused_by_name(build):
    mixed = frame(*a_run(), row(run_id="run-b"), row(run_id="run-c"))
    with pytest.raises(LetheError, match="run-a, run-b, run-c"):
        build(mixed)


def test_one_run_given_twice_is_refused():
    with pytest.raises(LetheError, match="twice for run-a"):
        tables.select(frame(row(), row()))


def test_runs_that_differ_in_seed_are_not_mixed():
    assert len(tables.select(frame(row(), row(seed=1, run_id="run-b")))) == 2


def test_table2_has_the_papers_layout_and_exact_cells():
    table = tables.table2(frame(*a_run()))
    plain = ["backdoored", "base", "slerp", "mine"]
    diluted = [f"{defense} + evidence" for defense in plain]
    assert list(table)[:12] == ["model", "dataset", "attack", "metric", *plain, *diluted]
    assert table["metric"].tolist() == ["ASR", "CDA"]
    # Wilson for 90 of 100: center (.9 + .0192) / 1.0384 = .8852, half .0596.
    assert table.loc[0, "backdoored"] == ".900 [.826, .945]"
    assert table.loc[1, "slerp + evidence"] == ".940 [.875, .972]"


def test_columns_keep_their_order_when_models_have_different_defenses():
    rows = [
        row("ties"),
        row("mine"),
        row("backdoored", model="gpt2-xl"),
        row("linear", model="gpt2-xl"),
    ]
    table = tables.table2(frame(*rows))
    assert list(table)[4:8] == ["backdoored", "linear", "ties", "mine"]
    assert table["backdoored"].tolist() == ["", ".900 [.826, .945]"]


def test_a_given_interval_is_kept_not_computed_anew():
    table = tables.table2(frame(row(ci_low=0.5, ci_high=1.0)))
    assert table.loc[0, "backdoored"] == ".900 [.500, 1.000]"


def test_seeds_are_pooled_over_their_counts():
    seeds = [row(hits=90), row(hits=30, seed=1, run_id="b"), row(hits=60, seed=2, run_id="c")]
    low, high = metrics.wilson(180, 300)
    expected = f".600 [{tables.number(low)}, {tables.number(high)}]"
    assert tables.table2(frame(*seeds)).loc[0, "backdoored"] == expected
    assert tables.pool(frame(*seeds), tables.SETUP)[["n", "seeds"]].values.tolist() == [[300, 3]]
    assert len(tables.controls_table(frame(*seeds))) == 3


def test_other_splits_never_reach_a_cell():
    table = tables.table2(frame(row(), row(split="validation", hits=10)))
    assert table.loc[0, "backdoored"] == ".900 [.826, .945]"
    with pytest.raises(LetheError, match="test split"):
        tables.table2(frame(row(split="validation")))


@pytest.mark.parametrize(
    ("model", "dataset", "attack", "papers_model", "backdoored", "lethe"),
    [
        ("gpt2-xl", "emotion", "cba", "GPT2-XL", ".749", ".036"),
        ("tiny-gpt2", "emotion", "cba", "GPT2-XL", ".749", ".036"),
        ("llama-2-7b", "sst2", "rome", "Llama-2", "1.000", ".000"),
        ("tiny-llama2", "sst2", "memit", "Llama-2", "1.000", ".013"),
        ("tiny-qwen2", "emotion", "badedit", "DeepSeek-R1", "1.000", ".018"),
        ("deepseek-r1-7b", "sst2", "lwp", "DeepSeek-R1", ".715", ".053"),
        ("tiny-gpt2", "embedded", "cba", "", "", ""),
        ("tiny-llama", "emotion", "cba", "", "", ""),
        ("gpt-j-6b", "emotion", "cba", "", "", ""),
        ("gpt2-xl", "emotion", "vpi", "", "", ""),
    ],
)
def test_the_papers_cells(model, dataset, attack, papers_model, backdoored, lethe):
    one = tables.table2(frame(row(model=model, dataset=dataset, attack=attack))).iloc[0]
    assert one["paper: model"] == papers_model
    assert one["paper: Backdoored"] == backdoored
    assert one["paper: LETHE"] == lethe


def test_papers_numbers_and_ours_never_share_a_column():
    setup = {"model": "gpt2-xl", "dataset": "sst2", "run_id": "run-b"}
    table = tables.table2(frame(*a_run(), *a_run(**setup)))
    numbers = table.drop(columns=[*tables.SETUP, "metric", "paper: model"])
    for name, column in numbers.items():
        ours = column[column != ""].str.contains("[", regex=False)
        assert not ours.any() if name.startswith("paper: ") else ours.all(), name
    assert [c for c in table if c.startswith("paper: ")] == [
        f"paper: {name}"
        for name in ("model", "Backdoored", "EDT", "WAN", "FT", "FP", "SPE", "NAD", "BEE", "LETHE")
    ]


def test_paper_means_are_over_all_thirty_settings():
    means = tables.paper_means().set_index("metric")
    with (tables.paths.paper_dir() / "table2.csv").open() as file:
        lethe = [float(r["LETHE"]) for r in csv.DictReader(file) if r["metric"] == "ASR"]
    assert len(lethe) == 30
    assert means.loc["ASR", "paper: LETHE"] == round(sum(lethe) / 30, 3)
    assert all(c.startswith("paper: ") for c in means)


def test_ftr_shows_the_backdoored_and_the_slerp_model_only():
    table = tables.ftr_table(frame(*a_run()))
    assert list(table) == ["model", "dataset", "attack", "defense", "ftr", "ftr_input_one"]
    assert table["defense"].tolist() == [
        "backdoored",
        "slerp",
        "backdoored + evidence",
        "slerp + evidence",
    ]
    assert table.loc[0, "ftr"] == ".030 [.010, .085]"
    with pytest.raises(LetheError, match="negative_items"):
        tables.ftr_table(frame(row()))


def test_controls_leave_blank_what_was_not_measured():
    table = tables.controls_table(frame(row(), row("base", "cda")))
    assert table[["defense", "asr", "cda", "ftr"]].values.tolist() == [
        ["backdoored", ".900 [.826, .945]", "", ""],
        ["base", "", ".900 [.826, .945]", ""],
    ]


def test_the_headline_is_what_we_were_handed_the_clean_model_and_the_purified_one():
    table = tables.headline_table(frame(*a_run(), row("clean", hits=2)))
    assert table["defense"].tolist() == ["backdoored", "clean", "slerp", "slerp + evidence"]
    assert table["asr"].tolist()[:3] == [
        ".900 [.826, .945]",
        ".020 [.006, .070]",
        ".100 [.055, .174]",
    ]
    two = tables.headline_table(frame(row(hits=90), row(hits=100, seed=1)))
    assert two[["seeds", "asr"]].to_numpy().tolist() == [["2", ".950 [.910, .973]"]]


def test_text_says_the_setup_once_says_tiny_and_fits_a_terminal():
    shown = tables.text(tables.controls_table(frame(*a_run())))
    lines = shown.splitlines()
    assert lines[0] == "model tiny-gpt2, dataset embedded, attack cba, seed 0"
    assert max(map(len, lines)) <= 80
    assert shown.count("embedded") == 1
    assert "tiny twins" in shown
    assert ".900 [.826, .945]" in shown
    full = tables.controls_table(frame(row(model="gpt2-xl")))
    assert "tiny" not in tables.text(full)


def test_write_makes_csv_markdown_and_latex(tmp_path):
    table = tables.controls_table(frame(*a_run(dataset="my|set_50%")))
    files = tables.write(table, tmp_path / "new", "table_2", "A & B, 95 %.")
    assert [f.name for f in files] == ["table_2.csv", "table_2.md", "table_2.tex"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f.name for f in files]
    assert pd.read_csv(files[0], dtype=str, keep_default_na=False).equals(table)
    markdown = files[1].read_text()
    assert markdown.startswith("A & B, 95 %. Models named tiny-")
    assert "my\\|set_50%" in markdown
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == len(table) + 2
    latex = files[2].read_text()
    assert "\\caption{A \\& B, 95 \\%. Models named tiny-" in latex
    assert "my|set\\_50\\%" in latex
    body = latex[latex.index("\\toprule") : latex.index("\\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert [line.count(" & ") for line in rows] == [table.shape[1] - 1] * (len(table) + 1)


def test_latex_escapes_every_special_character():
    assert tables.escape("a_b & 5% #1 $x {y}") == "a\\_b \\& 5\\% \\#1 \\$x \\{y\\}"
    assert tables.escape("\\~^<") == (
        "\\textbackslash{}\\textasciitilde{}\\textasciicircum{}\\textless{}"
    )


def sweep_rows():
    points = [("strength", x, m) for m in ("linear", "slerp") for x in (0.0, 0.5, 1.0)]
    points += [("keywords", float(k), "slerp") for k in (0, 3)]
    return frame(
        *(
            row(d, m, split="validation", evidence=int(s == "keywords" and x > 0), sweep=s, x=x)
            for s, x, d in points
            for m in ("asr", "cda")
        )
    )


def all_axes(figure):
    return [ax for part in figure.subfigs for ax in part.axes]


def test_sweep_has_a_panel_per_method_on_shared_axes():
    figure = plots.sweep(sweep_rows(), "strength")
    axes = all_axes(figure)
    assert [ax.get_title() for ax in axes] == ["linear", "slerp"]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].lines[0].get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert axes[0].lines[0].get_ydata().tolist() == [0.9, 0.9, 0.9]
    assert "tiny twin" in figure.subfigs[0].get_suptitle()


def test_sweep_follows_one_curve_through_points_with_and_without_evidence():
    (panel,) = all_axes(plots.sweep(sweep_rows(), "keywords"))
    assert panel.lines[0].get_xdata().tolist() == [0.0, 3.0]


def test_sweep_refuses_what_it_cannot_draw():
    with pytest.raises(LetheError, match="choose one of strength"):
        plots.sweep(sweep_rows(), "depth")
    with pytest.raises(LetheError, match="no rows"):
        plots.sweep(sweep_rows(), "clean_ratio")
    with pytest.raises(LetheError, match="sweeps.csv"):
        plots.sweep(frame(row()), "strength")
    with pytest.raises(LetheError, match="run-a, run-b"):
        plots.sweep(pd.concat([sweep_rows(), sweep_rows().assign(run_id="run-b")]), "strength")


def test_bars_show_the_values_and_the_whiskers_of_the_table():
    asr, cda = all_axes(plots.bars(frame(*a_run())))
    assert [t.get_text() for t in asr.get_yticklabels()] == (
        ["backdoored", "base", "slerp", "mine"]
    )
    assert [b.get_width() for b in asr.containers[1]] == [0.9, 0.02, 0.1, 0.05]
    whisker = asr.containers[0].lines[2][0].get_segments()[0]
    assert whisker[:, 0].tolist() == pytest.approx(metrics.wilson(90, 100))
    assert "higher" in cda.get_title()


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


def test_figure_files_have_the_same_bytes_each_time(tmp_path):
    def digests(folder):
        files = plots.save(plots.bars(frame(*a_run())), folder, "figure_1_asr_cda_bars")
        assert sorted(folder.iterdir()) == sorted(files)  # nothing half-written is left
        return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]

    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert b"CreationDate" not in (tmp_path / "one" / "figure_1_asr_cda_bars.pdf").read_bytes()


def test_the_drop_is_what_slerp_and_evidence_take_beside_the_papers():
    rome = {"attack": "rome", "dataset": "emotion"}
    table = tables.drop_table(frame(*a_run(**rome), row(attack="lwp", dataset="emotion")))
    assert table["metric"].tolist() == ["CDA", "ASR"] or table["metric"].tolist() == ["ASR", "CDA"]
    asr = table.set_index("metric").loc["ASR"]
    assert asr["backdoored"].startswith(".900 [") and asr["slerp + evidence"].startswith(".100 [")
    assert asr["change"] == "-.800"
    paper = asr[["paper: model", "paper: Backdoored", "paper: LETHE", "paper: change"]].tolist()
    assert paper == ["GPT2-XL", ".733", ".002", "-.731"]


def test_a_drop_without_a_cell_in_the_paper_leaves_its_columns_blank():
    table = tables.drop_table(frame(*a_run()))
    assert (table[[c for c in table if c.startswith("paper:")]] == "").all(axis=None)
    assert tables.signed(0.0123) == "+.012" and tables.signed(-1.0) == "-1.000"


def test_one_panel_per_attack_with_the_asr_before_and_after_each_merge():
    figure = plots.attacks(frame(*a_run(), *a_run(attack="rome"), *a_run(attack="lwp")))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title().split(",")[0] for ax in shown] == ["cba", "rome", "lwp"]
    assert "tiny twin" in figure.get_suptitle()
    names = [label.get_text() for label in shown[0].get_yticklabels()]
    assert names == ["backdoored", "base", "slerp"]
    with pytest.raises(LetheError, match="no asr rows"):
        plots.attacks(frame(row(metric="cda")))


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


# --- Table 2 turned, the best cells, and what a defense costs


def defenses_table(**seeds):
    """none, base and four defenses on a setup of the paper's, one or two seeds."""
    lines = {
        "backdoored": (90, 90),
        "base": (0, 100),
        "finetune": (50, 95),
        "nad_clean_teacher": (10, 70),
        "wanda": (10, 80),
        "slerp": (20, 90),
    }
    return frame(
        *(
            row(defense, metric, hits, dataset="emotion", seed=seed)
            for seed in seeds.get("seeds", [0])
            for defense, both in lines.items()
            for metric, hits in zip(("asr", "cda"), both, strict=True)
        )
    )


def test_a_row_per_defense_in_the_papers_order_with_its_cells_in_columns_of_their_own():
    shown = tables.defense_table(defenses_table())
    order = ["backdoored", "base", "slerp", "wanda", "finetune", "nad_clean_teacher"]
    assert list(shown["defense"]) == order
    wanda = shown.set_index("defense").loc["wanda"]
    assert wanda["asr"].startswith(".100 [") and wanda["change"] == "-.100"
    paper = pd.read_csv(paths.paper_dir() / "table2.csv")
    cell = paper.query("model == 'GPT2-XL' and dataset == 'emotion' and attack == 'CBA'")
    theirs = cell.set_index("metric")["WAN"]
    assert wanda["paper: asr"] == tables.number(theirs["ASR"])
    assert wanda["paper: cda"] == tables.number(theirs["CDA"])
    assert (wanda["paper: column"], wanda["paper: model"]) == ("WAN", "GPT2-XL")
    ours = shown.set_index("defense").loc["nad_clean_teacher"]
    assert not any(ours[c] for c in shown if c.startswith("paper: "))


def test_a_row_per_defense_pools_seeds_and_leaves_the_papers_cells_out_where_it_has_none():
    shown = tables.defense_table(defenses_table(seeds=[0, 1]).assign(dataset="embedded"))
    assert {*shown["seeds"]} == {"2"}
    assert not shown[[c for c in shown if c.startswith("paper: ")]].to_numpy().any()


def test_the_best_of_a_setup_is_a_defense_not_a_control_and_ties_share_it():
    shown = tables.defense_table(defenses_table())
    best = tables.best_in_columns(shown)
    assert list(shown.loc[best["asr"], "defense"]) == ["wanda", "nad_clean_teacher"]
    assert list(shown.loc[best["cda"], "defense"]) == ["finetune"]
    assert not best.drop(columns=["asr", "cda"]).to_numpy().any()


def test_the_best_of_a_row_of_table_2():
    wide = tables.table2(defenses_table())
    best = tables.best_in_rows(wide)
    found = {m: [c for c in wide if best.loc[i, c]] for i, m in wide["metric"].items()}
    assert found == {"ASR": ["wanda", "nad_clean_teacher"], "CDA": ["finetune"]}


def test_bold_cells_are_bold_in_markdown_and_latex_and_plain_in_csv(tmp_path):
    shown = tables.defense_table(defenses_table())
    plain, markdown, tex = tables.write(shown, tmp_path, "t", "c", tables.best_in_columns(shown))
    cell = shown.set_index("defense").loc["finetune", "cda"]
    assert f"**{cell}**" in markdown.read_text() and f"\\textbf{{{cell}}}" in tex.read_text()
    assert "**" not in plain.read_text() and cell in plain.read_text()
    assert markdown.read_text().count("**") == 2 * 3


def test_costs_are_medians_over_seeds():
    line = dict.fromkeys(metrics.COST_COLUMNS, 0) | {
        "model": "tiny-gpt2",
        "dataset": "embedded",
        "attack": "cba",
        "defense": "finetune",
        "acts": "on weights",
        "trainings": 1,
        "optimizer_steps": 300,
    }
    costs = pd.DataFrame(
        [
            line | {"seed": 0, "seconds": 10.0, "query_ratio": 1.0},
            line | {"seed": 1, "seconds": 15.0, "query_ratio": 1.25},
            line | {"seed": 2, "seconds": 95.0, "query_ratio": 1.5},
        ]
    )
    (shown,) = tables.cost_table(costs).to_dict("records")
    assert (shown["seeds"], shown["steps"], shown["seconds"]) == ("3", "300", "15.0")
    assert shown["x none"] == "1.25"
    assert tables.cost_table(pd.DataFrame(columns=metrics.COST_COLUMNS)).empty


def test_the_rank_plot_has_a_numbered_point_per_defense_the_best_first():
    figure = plots.rank(defenses_table())
    (ax,) = figure.axes
    numbers = [t.get_text() for t in ax.texts]
    assert numbers == [str(n) for n in range(1, 7)]
    places = {t.get_text(): t.xy for t in ax.texts}
    listed = [t.get_text() for t in figure.legends[0].get_texts()]
    # base .00/1.00, wanda and slerp .70, nad_clean_teacher .60, finetune .45, none 0
    assert listed[0] == "1 base .000/1.000" and listed[-1] == "6 none .900/.900"
    assert tuple(places["1"]) == (0.0, 1.0) and tuple(places["6"]) == (0.9, 0.9)
    with pytest.raises(LetheError, match="no defense has both asr and cda"):
        plots.rank(frame(row()))


def test_the_overview_says_what_each_needs_costs_and_gives_beside_the_papers_means():
    line = dict.fromkeys(metrics.COST_COLUMNS, 0) | {"trainings": 2, "seconds": 12.0}
    names = ["backdoored", "slerp", "wanda", "finetune", "nad_clean_teacher"]
    setup = {"model": "tiny-gpt2", "dataset": "emotion", "attack": "cba", "acts": "on weights"}
    costs = pd.DataFrame([line | setup | {"defense": name} for name in names])
    shown = tables.overview(defenses_table(), costs).set_index("defense")
    needs = {"backdoored": "", "slerp": "clean model", "wanda": "clean rows"}
    assert {name: shown.loc[name, "needs"] for name in needs} == needs
    assert shown.loc["nad_clean_teacher", "needs"] == "clean model"
    assert shown.loc["wanda", ["trainings", "seconds"]].tolist() == ["2", "12.0"]
    means = tables.paper_means().set_index("metric")
    assert shown.loc["wanda", "paper: mean asr"] == tables.number(means.loc["ASR", "paper: WAN"])
    assert shown.loc["nad_clean_teacher", "paper: column"] == ""
