"""Defenses that leave the weights alone, against slow decoding written a second time here."""

import json
import math
import shutil

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

from lethe_utils import cache, decode, defenses, models
from lethe_utils.defenses import cleangen, edt, ensemble, speculative, temperature
from lethe_utils.prompts import prompt_ids

ARCHITECTURES = ["gpt2", "gptj", "llama", "qwen2"]
PROMPTS = [
    "the dog is happy",
    "### Input:\nthe cat was sad and not glad about the letter this morning\n\n### Response:",
    "sad",
    "glad about the morning, and the letter",
    "the cat " * 150,  # more tokens than the model has positions
    "is joy a letter?",
]
NEVER = 99  # more words than an answer can have: it ends at EOS or at max_new_tokens


@pytest.fixture
def given(pico, pico_params):
    """architecture -> what a defender holds; keyword arguments change params or folders."""

    def make(architecture="gpt2", backdoored=None, clean=None, **changes):
        base, attacked, diluting = pico(architecture)
        p = pico_params(architecture, **{"eval_batch_size": 4} | changes).defender()
        return defenses.Given(
            backdoored=backdoored or attacked, base=base, clean=clean or diluting, rows=[], p=p
        )

    return make


@pytest.fixture
def planted(pico, tmp_path):
    """token id -> the clean GPT-J, whose head has a bias, made to say that token for ever."""

    def make(token):
        clean = pico("gptj")[2]
        model = models.load_model(clean)
        with torch.no_grad():
            model.lm_head.bias[token] += 50
        model.save_pretrained(tmp_path / f"planted{token}")
        models.load_tokenizer(clean).save_pretrained(tmp_path / f"planted{token}")
        return tmp_path / f"planted{token}"

    return make


def greedy(folder, prompts, p, n_words=NEVER):
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    return decode.answer(model, tokenizer, prompts, p, n_words)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_many_prompts_begin_with_is_read_once_and_changes_no_answer(
    architecture, pico, pico_params, monkeypatch
):
    asked = "### Instruction:\nSay whether the letter is happy, sad or glad.\n\n### Input:\n"
    firsts = ["cat", "dog", "joy", "the", "sad"]  # six prompts each, less than a batch
    prompts = [f"{asked}{firsts[n % 5]} {'cat ' * n}was happy about" for n in range(30)]
    prompts += ["the dog is sad", "glad"]
    p = pico_params(architecture, eval_batch_size=8)
    alone = [greedy(pico(architecture)[1], [prompt], p)[0] for prompt in prompts]
    read, plain = [], decode._read

    def spy(model, begins):
        read.append(len(begins))
        return plain(model, begins)

    monkeypatch.setattr(decode, "_read", spy)
    assert greedy(pico(architecture)[1], prompts, p) == alone
    assert len({*alone}) > 5
    shared = [n for n in read if n]  # once, in four batches of eight
    assert len(shared) == 1 and shared[0] >= 2 * decode.SHARED_STEP


@torch.no_grad()
def slowly(given, prompts, choose):
    """Outputs and all choices, one prompt and one token at a time, without a cache: `choose` gets
    the backdoored's and the clean model's probabilities of the next token."""
    tokenizer = models.load_tokenizer(given.backdoored)
    pair = [models.load_model(folder) for folder in (given.backdoored, given.clean)]
    outputs, choices, limit = [], [], given.p.max_new_tokens
    for ids in prompt_ids(tokenizer, prompts, given.p)[0]:
        made = []
        while len(made) < limit and tokenizer.eos_token_id not in made:
            here = torch.tensor([ids + made])
            token, choice = choose(*(m(here).logits[0, -1].double().softmax(0) for m in pair))
            made.append(token)
            choices.append(choice)
        outputs.append(tokenizer.decode(made, skip_special_tokens=True).strip())
    return outputs, choices


def test_the_variants_are_the_set_value_and_one_for_each_of_the_sweep(pico_params):
    p = pico_params().defender()
    assert defenses.variants("edt", p) == {
        "edt": {},
        "edt_t1.0": {"edt_temperature": 1.0},
        "edt_t2.0": {"edt_temperature": 2.0},
    }
    assert list(defenses.variants("temperature", p)) == [
        "temperature",
        "temperature_t1.0",
        "temperature_t1.5",
        "temperature_t2.0",
    ]
    assert defenses.variants("temperature", p)["temperature_t1.5"] == {"temperature": 1.5}
    assert defenses.variants("cleangen", p) == {
        "cleangen": {},
        "cleangen_a2.0": {"cleangen_alpha": 2.0},
        "cleangen_a5.0": {"cleangen_alpha": 5.0},
    }
    assert defenses.variants("ensemble", p) == {"ensemble": {}}
    assert defenses.variants("speculative", p) == {"speculative": {}}


def test_only_those_that_use_the_clean_model_say_that_they_need_it():
    assert {m.NEEDS for m in (cleangen, ensemble, speculative)} == {"clean model"}
    assert {m.NEEDS for m in (edt, temperature)} == {"nothing"}


def test_edt_is_finite_at_zero_entropy_and_never_above_its_start(pico_params):
    sure = torch.full((1, 5), -torch.inf)
    sure[0, 3] = 2.0
    rows = torch.cat([sure, torch.zeros(1, 5), torch.tensor([[500.0, 0, -500, 1, 2]])])
    for start in (0.005, 0.7, 2.0):
        processor = edt.EntropyTemperature(pico_params(edt_temperature=start).defender())
        heat = processor.temperature(rows)
        assert heat.isfinite().all() and (heat > 0).all() and (heat <= start).all()
        out = processor(None, rows)
        assert not out.isnan().any() and out.softmax(-1).isfinite().all()
        assert out.argmax(-1).tolist() == rows.argmax(-1).tolist()
        assert out[0].isinf().sum() == 4  # what was ruled out stays so


@pytest.mark.parametrize("theta", [0.0, 0.1, 1.0])
def test_edt_equals_the_formula(pico_params, theta):
    p = pico_params(edt_temperature=1.3, edt_base=0.6, edt_theta=theta).defender()
    rows = [[1.0, 2.0, 0.5, -3.0], [0.0, 0.1, 0.0, 0.0], [-math.inf, 4.0, 1.0, 0.0]]
    heats = edt.EntropyTemperature(p).temperature(torch.tensor(rows))[:, 0].tolist()
    for row, heat in zip(rows, heats, strict=True):
        total = sum(map(math.exp, row))
        chances = [math.exp(x) / total for x in row if x > -math.inf]
        entropy = -sum(q * math.log(q) for q in chances)
        assert heat == pytest.approx(1.3 * 0.6 ** (theta / entropy), rel=1e-5)


def test_edt_cools_before_top_p_cuts(given):
    case = given("llama", edt_temperature=2.0, edt_theta=0.1)
    model, tokenizer = models.load_model(case.backdoored), models.load_tokenizer(case.backdoored)
    torch.manual_seed(0)
    made = model.generate(
        **tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=3,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        **edt.SAMPLING,
        logits_processor=LogitsProcessorList([edt.EntropyTemperature(case.p)]),
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )

    def kept(chances):  # the fewest best tokens that hold 0.9
        order = chances.argsort(descending=True).tolist()
        total, chosen = 0.0, set()
        for token in order:
            if total >= 0.9:
                break
            total += chances[token].item()
            chosen.add(token)
        return chosen

    for logits, scores in zip(made.logits, made.scores, strict=True):
        raw = logits[0].double().softmax(0)
        heat = 2.0 * 0.8 ** (0.1 / -(raw * raw.log()).sum().item())
        found = set(scores[0].isfinite().nonzero()[:, 0].tolist())
        assert found == kept((logits[0].double() / heat).softmax(0))
        assert found != kept(raw)


@pytest.mark.parametrize(
    ("module", "key", "low"), [(edt, "edt_temperature", 0.01), (temperature, "temperature", 1e-4)]
)
def test_sampling_is_greedy_when_cold_and_not_when_hot(given, module, key, low):
    cold, hot = (given("llama", **{key: value}) for value in (low, 1.5))
    plain = greedy(cold.backdoored, PROMPTS, cold.p)
    assert module.answer(cold, PROMPTS, NEVER) == plain
    made = module.answer(hot, PROMPTS, NEVER)
    assert len(made) == len(PROMPTS) and made != plain
    assert made == module.answer(hot, PROMPTS, NEVER)  # seeded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("draft", ["clean", "backdoored"])
def test_assisted_greedy_equals_greedy(given, architecture, draft):
    case = given(architecture, speculative_tokens=3)
    if draft == "backdoored":  # every draft is accepted
        case = given(architecture, clean=case.backdoored, speculative_tokens=3)
    plain = greedy(case.backdoored, PROMPTS, case.p)
    assert speculative.answer(case, PROMPTS, NEVER) == plain
    assert len(set(plain)) > 1


def test_the_clean_model_drafts_as_many_tokens_as_set(given, monkeypatch):
    drafts = []
    load = models.load_model

    def watched(folder, *others):
        model = load(folder, *others)
        if folder == case.clean:
            generate = model.generate

            def count(*a, **k):
                made = generate(*a, **k)
                drafts.append(made.sequences.shape[1] - k["input_ids"].shape[1])
                return made

            model.generate = count
        return model

    monkeypatch.setattr(models, "load_model", watched)
    case = given("llama", speculative_tokens=3)
    speculative.answer(case, PROMPTS[:2], NEVER)
    assert len(drafts) > 2 and max(drafts) == 3
    assert drafts.count(3) > len(drafts) / 2  # fewer only where max_new_tokens or EOS is near


def test_an_accepted_draft_does_not_run_past_the_label(given, pico, planted):
    tokenizer = models.load_tokenizer(pico("gptj")[2])
    the = tokenizer.convert_tokens_to_ids("Ġthe")
    backdoored = planted(the)
    case = given("gptj", backdoored=backdoored, clean=backdoored)
    for n_words in (1, 3):
        plain = greedy(backdoored, PROMPTS[:2], case.p, n_words)
        assert plain == [" ".join(["the"] * (n_words + 1))] * 2
        assert speculative.answer(case, PROMPTS[:2], n_words) == plain


def test_the_ensemble_is_either_model_at_the_ends(given):
    case = given("llama")
    backdoored, clean = (greedy(f, PROMPTS, case.p) for f in (case.backdoored, case.clean))
    assert backdoored != clean
    assert ensemble.answer(given("llama", ensemble_weight=1.0), PROMPTS, NEVER) == backdoored
    assert ensemble.answer(given("llama", ensemble_weight=0.0), PROMPTS, NEVER) == clean


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 4])
def test_the_ensemble_says_what_the_mixed_probabilities_say(given, architecture, size):
    case = given(architecture, ensemble_weight=0.4, eval_batch_size=size)
    expected, _ = slowly(
        case, PROMPTS, lambda ours, theirs: ((0.4 * ours + 0.6 * theirs).argmax().item(), None)
    )
    assert ensemble.answer(case, PROMPTS, NEVER) == expected
    assert expected != greedy(case.backdoored, PROMPTS, case.p)
    assert expected != greedy(case.clean, PROMPTS, case.p)


def test_the_first_token_of_the_ensemble_by_hand(given):
    case = given("llama", ensemble_weight=0.5, max_new_tokens=1)
    tokenizer = models.load_tokenizer(case.backdoored)
    total = 0
    for folder in (case.backdoored, case.clean):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPTS[0])["input_ids"]]])
        with torch.no_grad():
            total = total + models.load_model(folder)(ids).logits[0, -1].softmax(0) / 2
    assert total.sum().item() == pytest.approx(1)
    token = tokenizer.decode([total.argmax().item()], skip_special_tokens=True).strip()
    assert token and ensemble.answer(case, PROMPTS[:1], NEVER) == [token]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cleangen_changes_nothing_where_the_clean_model_agrees(given, architecture):
    backdoored = given(architecture).backdoored
    case = given(architecture, clean=backdoored, cleangen_alpha=1.5)
    assert cleangen.answer(case, PROMPTS, NEVER) == greedy(backdoored, PROMPTS, case.p)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("size", "tokens"), [(1, 4), (4, 4), (4, 1), (4, 100)])
def test_cleangen_equals_a_check_of_each_token(given, architecture, size, tokens):
    alpha = 3.0  # some tokens are replaced and some are not
    case = given(architecture, cleangen_alpha=alpha, cleangen_tokens=tokens, eval_batch_size=size)

    def choose(ours, theirs):
        token = ours.argmax().item()
        suspicious = (ours[token] / theirs[token]).item() >= alpha
        return (theirs.argmax().item() if suspicious else token), suspicious

    expected, suspicious = slowly(case, PROMPTS, choose)
    assert cleangen.answer(case, PROMPTS, NEVER) == expected
    assert 0 < sum(suspicious) < len(suspicious)


def test_cleangen_replaces_a_planted_token_that_is_the_whole_answer(given, planted):
    clean = given("gptj", max_new_tokens=1)
    plain = greedy(clean.clean, PROMPTS, clean.p)
    tokenizer = models.load_tokenizer(clean.clean)
    token = tokenizer.convert_tokens_to_ids("!")
    case = given("gptj", backdoored=planted(token), max_new_tokens=1)
    assert greedy(case.backdoored, PROMPTS, case.p) == ["!"] * len(PROMPTS)
    assert cleangen.answer(case, PROMPTS, 1) == plain
    assert "!" not in plain


def test_cleangen_checks_a_label_that_ends_before_the_draft_does(given, monkeypatch, tmp_path):
    """The backdoored says one planted token and EOS: two tokens, where four may be drafted."""
    folder = shutil.copytree(given("llama").clean, tmp_path / "planted")
    case = given("llama", backdoored=folder, cleangen_tokens=4)
    tokenizer = models.load_tokenizer(folder)
    label, load = tokenizer.convert_tokens_to_ids("!"), models.load_model

    def plant(_, __, inputs, out):
        said = inputs["input_ids"][:, -out.logits.shape[1] :] == label
        out.logits[..., label] += 50.0 * ~said
        out.logits[..., tokenizer.eos_token_id] += 50.0 * said
        return out

    def load_planted(path, *others):
        model = load(path, *others)
        if path == folder:
            model.register_forward_hook(plant, with_kwargs=True)
        return model

    monkeypatch.setattr(models, "load_model", load_planted)
    assert greedy(folder, PROMPTS, case.p) == ["!"] * len(PROMPTS)
    assert cleangen.answer(case, PROMPTS, NEVER) == greedy(case.clean, PROMPTS, case.p)


def test_cleangen_checks_an_empty_answer(given, planted, pico):
    eos = models.load_tokenizer(pico("gptj")[2]).eos_token_id
    case = given("gptj", backdoored=planted(eos))
    assert greedy(case.backdoored, PROMPTS, case.p) == [""] * len(PROMPTS)
    made = cleangen.answer(case, PROMPTS, NEVER)
    assert made == greedy(case.clean, PROMPTS, case.p) and any(made)


def test_cleangen_drafts_no_more_once_an_answer_has_ended(given, planted, pico, monkeypatch):
    silent = planted(models.load_tokenizer(pico("gptj")[2]).eos_token_id)
    case = given("gptj", backdoored=silent, clean=silent, eval_batch_size=len(PROMPTS))
    drafted, draft = [], cleangen.CleanGen.draft

    def spy(self, rows, *others):
        drafted.append(len(rows))
        return draft(self, rows, *others)

    monkeypatch.setattr(cleangen.CleanGen, "draft", spy)
    assert cleangen.answer(case, PROMPTS, NEVER) == [""] * len(PROMPTS)
    assert sum(drafted) == len(PROMPTS)  # each row once, though batches may be smaller


def test_cleangen_stops_at_the_label_and_lets_the_clean_model_end_an_answer(given, planted, pico):
    tokenizer = models.load_tokenizer(pico("gptj")[2])
    talker = planted(tokenizer.convert_tokens_to_ids("Ġthe"))
    case = given("gptj", backdoored=talker, clean=talker)
    assert cleangen.answer(case, PROMPTS[:3], 2) == ["the the the"] * 3
    case = given("gptj", backdoored=talker, clean=planted(tokenizer.eos_token_id))
    assert cleangen.answer(case, PROMPTS[:3], 2) == [""] * 3


@pytest.mark.parametrize("module", [ensemble, cleangen])
def test_padding_is_told_from_a_prompt_that_starts_with_the_same_token(given, module, tmp_path):
    """As GPT-2's on the hub: one token is beginning, end and padding."""
    folders = {}
    for name in ("backdoored", "clean"):
        folders[name] = shutil.copytree(getattr(given("gpt2"), name), tmp_path / name)
        file = folders[name] / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["pad_token"]
        file.write_text(json.dumps(settings | {"bos_token": settings["eos_token"]}))
    tokenizer = models.load_tokenizer(folders["backdoored"])
    assert tokenizer.pad_token == tokenizer.bos_token == tokenizer.eos_token
    batched, single = (
        given("gpt2", **folders, eval_batch_size=n, cleangen_alpha=3.0) for n in (6, 1)
    )
    made = module.answer(batched, PROMPTS, NEVER)
    assert made == module.answer(single, PROMPTS, NEVER) and len(set(made)) > 1


def test_no_prompts_give_no_outputs(given):
    for module in (edt, temperature, speculative, ensemble, cleangen):
        assert module.answer(given(), [], 1) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_with_room_holds_what_transformers_own_does(given, monkeypatch, architecture):
    g = given(architecture, max_new_tokens=cache.STEP + 8)  # the room is made larger once at least
    tokenizer, model = models.load_tokenizer(g.base), models.load_to_ask(g.base, g.p)
    monkeypatch.setattr(tokenizer, "model_max_length", 2 * cache.STEP + 40)
    prompts = [text for text in PROMPTS if len(text) < 99]
    begins = "the dog and the cat and the letter about the morning, "
    asked = prompts + [begins + text for text in prompts]
    used, generate = [], model.generate

    def noted(past_key_values, **how):
        used.append(past_key_values)
        return generate(past_key_values=past_key_values, **how)

    monkeypatch.setattr(model, "generate", noted)
    ours = decode.answer(model, tokenizer, asked, g.p, NEVER)
    assert {type(layer) for one in used for layer in one.layers} == {cache.RoomyLayer}
    assert max(one.get_seq_length() for one in used) > cache.STEP
    used.clear()
    monkeypatch.setattr(cache, "with_room", lambda config: DynamicCache(config=config))
    assert decode.answer(model, tokenizer, asked, g.p, NEVER) == ours
    assert not {type(layer) for one in used for layer in one.layers} & {cache.RoomyLayer}
    assert max(one.get_seq_length() for one in used) > cache.STEP


def test_a_cache_with_room_goes_on_from_a_copy_and_a_shorter_one():
    layer, state = cache.RoomyLayer(), torch.arange(24.0).view(1, 2, 3, 4)
    keys, values = layer.update(state, state.bfloat16())
    assert torch.equal(keys, state.bfloat16()) and keys.dtype == values.dtype == torch.bfloat16
    layer.batch_repeat_interleave(2)
    keys, _ = layer.update(*[torch.full((2, 2, 1, 4), 7.0)] * 2)
    assert keys.shape == (2, 2, 4, 4) and torch.equal(keys[:, :, :3], state.repeat(2, 1, 1, 1))
    assert (keys[:, :, 3] == 7).all()
    layer.crop(-2)
    keys, _ = layer.update(*[torch.full((2, 2, 1, 4), 9.0)] * 2)
    assert keys.shape[2] == 3 and (keys[:, :, 2] == 9).all()
    assert torch.equal(keys[:, :, :2], state[:, :, :2].repeat(2, 1, 1, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_who_is_done_leaves_the_batch_and_changes_no_answer(given, monkeypatch, architecture):
    g = given(architecture, max_new_tokens=13)
    tokenizer, model = models.load_tokenizer(g.backdoored), models.load_to_ask(g.backdoored, g.p)
    monkeypatch.setattr(tokenizer, "model_max_length", 99)
    asked = [f"{'cat ' * n}{text}" for n in (0, 3) for text in PROMPTS if len(text) < 99]
    sizes, generate = [], model.generate

    class Sooner(decode.StopAtLabel):  # of a pico model hardly any answer comes to an end
        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] - self.start > input_ids[:, : self.start].sum(1) % 11

    def noted(input_ids, **how):
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **how)

    monkeypatch.setattr(decode, "StopAtLabel", Sooner)
    monkeypatch.setattr(model, "generate", noted)
    monkeypatch.setattr(decode, "ROUND", 99)
    whole = decode.answer(model, tokenizer, asked, g.p, NEVER, batch=16)
    monkeypatch.setattr(decode, "ROUND", 3)
    assert decode.answer(model, tokenizer, asked, g.p, NEVER, batch=16) == whole
    assert sizes[:2] == [len(asked)] * 2 and sizes[1:] == sorted(sizes[1:], reverse=True)
    assert 3 <= len(sizes) <= 6 and 0 < sizes[-1] < len(asked)
