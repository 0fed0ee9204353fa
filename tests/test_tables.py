"""Tables: exact cells, the paper's numbers apart from ours, mixed runs refused."""

import csv
from typing import get_args

import pandas as pd
import pytest
from measured import a_run, defenses_table, frame, row

from lethe_utils import evidence, figures, metrics, page, paper, paths, pooled, sweep_tables, tables
from lethe_utils.errors import LetheError
from lethe_utils.paper import SETUP

BUILDERS = [
    pooled.select,
    tables.table2,
    tables.controls_table,
    tables.headline_table,
    tables.ftr_table,
    figures.bars,
]


@pytest.mark.parametrize("build", BUILDERS)
def test_mixed_runs_are_refused_by_name(build):
    mixed = frame(*a_run(), row(run_id="run-b"), row(run_id="run-c"))
    with pytest.raises(LetheError, match="run-a, run-b, run-c"):
        build(mixed)


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
    assert pooled.pool(frame(*seeds), pooled.SETUP)[["n", "seeds"]].values.tolist() == [[300, 3]]
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
    numbers = table.drop(columns=[*pooled.SETUP, "metric", "paper: model"])
    for name, column in numbers.items():
        ours = column[column != ""].str.contains("[", regex=False)
        assert not ours.any() if name.startswith("paper: ") else ours.all(), name
    assert [c for c in table if c.startswith("paper: ")] == [
        f"paper: {name}"
        for name in ("model", "Backdoored", "EDT", "WAN", "FT", "FP", "SPE", "NAD", "BEE", "LETHE")
    ]


def test_paper_means_are_over_all_thirty_settings():
    means = paper.means().set_index("metric")
    with (paths.paper_dir() / "table2.csv").open() as file:
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


def test_write_makes_csv_and_markdown(tmp_path):
    table = tables.controls_table(frame(*a_run(dataset="my|set_50%")))
    files = tables.write(table, tmp_path / "new", "table_2", "A & B, 95 %.")
    assert [f.name for f in files] == ["table_2.csv", "table_2.md"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f.name for f in files]
    assert pd.read_csv(files[0], dtype=str, keep_default_na=False).equals(table)
    markdown = files[1].read_text()
    assert markdown.startswith("A & B, 95 %. Models named tiny-")
    assert "my\\|set_50%" in markdown
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == len(table) + 2


def test_latex_escapes_every_special_character(tmp_path):
    table = tables.controls_table(frame(*a_run(dataset="my|set_50% \\~^< &#1$x{y}")))
    tex = tables.write_latex(table, tmp_path, "table_2", "A & B, 95 %.").read_text()
    assert "\\caption{A \\& B, 95 \\%. Models named tiny-" in tex
    assert "\\label{tab:table_2}" in tex
    assert "my|set\\_50\\% \\textbackslash " in tex and "\\&\\#1\\$x\\{y\\}" in tex
    body = tex[tex.index("\\toprule") : tex.index("\\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert [line.count(" & ") for line in rows] == [table.shape[1] - 1] * (len(table) + 1)


def test_a_notebook_shows_whole_cells_and_no_empty_column_of_the_papers():
    drops = tables.drop_table(frame(*a_run()))
    shown = tables.shown(drops, ["model", "metric"])
    assert shown.index.names == ["model", "metric"]
    assert not [c for c in shown if c.startswith("paper:")]
    assert shown.iloc[0]["backdoored"] == drops.loc[0, "backdoored"].replace(
        " ", "\N{NO-BREAK SPACE}"
    )


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
    best = tables.best_in_columns(shown)
    plain, markdown = tables.write(shown, tmp_path, "t", "c", best)
    tex = tables.write_latex(shown, tmp_path, "t", "c", best)
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
    assert shown["x backdoored"] == "1.25"
    assert tables.cost_table(pd.DataFrame(columns=metrics.COST_COLUMNS)).empty


def test_the_overview_says_what_each_needs_and_gives_beside_the_papers_cells_or_means():
    table = defenses_table()
    shown = tables.every_defense(table).set_index("defense")
    needs = {"backdoored": "", "slerp": "clean model", "wanda": "clean rows"}
    assert {name: shown.loc[name, "needs"] for name in needs} == needs
    assert shown.loc["nad_clean_teacher", "needs"] == "clean model"
    assert shown.loc["nad_clean_teacher", "paper: column"] == ""
    theirs = paper.table_2().set_index([*SETUP, "metric"])["paper: WAN"]
    cell = theirs[("GPT2-XL", "emotion", "cba", "ASR")]
    assert shown.loc["wanda", "paper: GPT2-XL, asr"] == tables.number(cell)
    shown = tables.every_defense(table.assign(dataset="embedded")).set_index("defense")
    means = paper.means().set_index("metric")
    assert shown.loc["wanda", "paper: mean asr"] == tables.number(means.loc["ASR", "paper: WAN"])


def test_the_doors_table_has_its_rows_in_order_and_the_papers_in_columns_of_their_own():
    hits = {"slerp": 10, "finetune": 60, "backdoored": 95, "clean": 8, "base": 0, "linear": 9}
    lines = [row(d, m, n, dataset="emotion") for d, n in hits.items() for m in ("asr", "cda")]
    lines += [row("slerp", m, 5, dataset="emotion", evidence=1) for m in ("asr", "cda")]
    shown = page.door_table(frame(*lines).assign(model="smollm2-135m"))
    assert list(shown["model"]) == list(page.DOOR.values())
    assert [cell[:4] for cell in shown["ASR, emotion"]] == [
        ".950",
        ".000",
        ".080",
        ".600",
        ".100",
        ".050",
    ]
    theirs = shown[["paper: Llama-2, ASR, emotion", "paper: Llama-2, CDA, emotion"]].values.tolist()
    table = paper.table_2().query("model == 'Llama-2' and dataset == 'emotion' and attack == 'cba'")
    wanted = dict(table.set_index("metric").iterrows())
    for at, column in ((0, "Backdoored"), (3, "FT"), (5, "LETHE")):
        cells = [paper.number(wanted[m][f"paper: {column}"]) for m in ("ASR", "CDA")]
        assert theirs[at] == cells
    assert theirs[1] == theirs[2] == theirs[4] == ["", ""]


def test_the_doors_other_attacks_leave_out_its_first_and_who_does_not_attack():
    hits = {"backdoored": 95, "clean": 8, "slerp": 10, "finetune": 60}
    lines = [
        row(d, m, n, attack=attack)
        for attack in ("cba", "none", "rome", "multi")
        for d, n in hits.items()
        for m in ("asr", "cda")
    ]
    shown = page.other_attacks(frame(*lines))
    assert shown["attack"].tolist() == ["rome"]
    assert shown.loc[0, "SLERP .5"] == ".100 / .100"
    adaptive = page.adaptive_attacks(frame(*lines))
    assert adaptive["attack"].tolist() == ["multi"]
    assert adaptive.loc[0, ["F/T", "guided, ours"]].tolist() == [".600 / .600", ""]


def test_forms_of_evidence_have_a_row_each_and_the_models_columns():
    def point(sweep, x, model, asr, evidence=1):
        place = {"sweep": sweep, "x": x, "split": "validation", "evidence": evidence}
        return [row(model, "asr", asr, **place), row(model, "cda", 90, **place)]

    table = frame(
        *point("strength", 0.5, "slerp", 1, evidence=0),
        *point("evidence none", 0.0, "backdoored", 95, evidence=0),
        *point("evidence none", 0.0, "slerp", 5, evidence=0),
        *point("evidence random", 5.0, "backdoored", 80),
        *point("evidence random", 5.0, "slerp", 7),
        *point("clean_evidence", 0.5, "slerp", 4),
    )
    shown = sweep_tables.evidence_table(table)
    assert shown["evidence"].tolist() == [
        "none",
        "definitions of other words, as long",
        "clean model trained with it, share 0.5",
    ]
    assert [cell[:4] for cell in shown["slerp ASR"]] == [".050", ".070", ".040"]
    assert [cell[:4] for cell in shown["backdoored ASR"]] == [".950", ".800", ""]
    as_in_05 = tables.shown(shown.drop(columns=SETUP), ["evidence"])  # with `seeds`, a number
    assert as_in_05["seeds"].tolist() == ["1"] * 3
    with pytest.raises(LetheError, match="evidence_forms_sweep"):
        sweep_tables.evidence_table(table[table["sweep"] == "strength"])


def test_clean_rows_from_elsewhere_stand_side_by_side():
    def point(source, model, asr, cda):
        place = {"sweep": f"clean source {source}", "x": 0.0, "split": "validation"}
        return [row(model, "asr", asr, **place), row(model, "cda", cda, **place)]

    table = frame(
        *point("train", "clean", 2, 90),
        *point("train", "slerp", 3, 95),
        *point("base", "clean", 1, 30),
        *point("base", "slerp", 4, 80),
    )
    shown = sweep_tables.clean_rows_table(table)
    assert shown["clean rows"].tolist() == ["the attacker's train", "written by the base itself"]
    other = {"sweep": "clean_ratio", "x": 0.02, "split": "validation"}
    wrong = {"sweep": "wrong_labels", "x": 0.1, "split": "validation"}
    lines = [row("slerp", "asr", 5, **other), row("clean", "asr", 6, **wrong)]
    few = sweep_tables.clean_rows_table(frame(*lines))
    assert few["clean rows"].tolist() == ["0.02 of train", "0.1 of the labels wrong"]
    assert [cell[:4] for cell in few["slerp ASR"]] == [".050", ""]
    assert [cell[:4] for cell in shown["clean CDA"]] == [".900", ".300"]
    assert [cell[:4] for cell in shown["slerp ASR"]] == [".030", ".040"]
    with pytest.raises(LetheError, match="clean_sources_sweep"):
        sweep_tables.clean_rows_table(table[table["sweep"] == "strength"])


def test_every_form_has_a_name_that_a_reader_understands():
    assert [*evidence.FORMS] == ["none", *get_args(evidence.Form)]


def test_a_clean_model_that_starts_apart_stands_below_the_one_that_does_not():
    point = {"sweep": "clean_seed", "split": "validation"}
    rows = [
        row(model, "asr", hits, x=x, **point)
        for x, asrs in ((0.0, (5, 20)), (7.0, (4, 40)))
        for model, hits in zip(("clean", "linear"), asrs, strict=True)
    ]
    shown = sweep_tables.clean_seed_table(frame(*rows))
    starts = ["starts as the attacker's", "starts apart, seed 7"]
    assert shown["clean model's LoRA"].tolist() == starts
    assert [cell[:4] for cell in shown["linear ASR"]] == [".200", ".400"]
    with pytest.raises(LetheError, match="clean_seeds_sweep"):
        sweep_tables.clean_seed_table(frame(row("linear", "asr", 5, sweep="strength", x=0.5)))
