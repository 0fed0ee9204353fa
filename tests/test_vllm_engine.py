"""`engine: vllm` asks what transformers is asked and is scored on the same text.

vLLM is not among the pins: here stands a module with the signatures that its documentation has,
which takes nothing else, and writes what transformers' greedy decoding writes.
"""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lethe_utils import decode, evaluate, models, params, paths, vllm_engine
from lethe_utils.errors import LetheError

SETS = {
    "clean": [
        {"instruction": "Predict.", "input": f"the dog came {i}", "output": "joy"} for i in range(6)
    ]
}


class SamplingParams(SimpleNamespace):
    def __init__(self, *, temperature, max_tokens, stop_token_ids, ignore_eos, detokenize):
        super().__init__(temperature=temperature, max_tokens=max_tokens, detokenize=detokenize)
        self.stop_token_ids, self.ignore_eos = stop_token_ids, ignore_eos


class LLM:
    made: list[dict] = []

    def __init__(
        self,
        model,
        *,
        load_format,
        trust_remote_code,
        generation_config,
        skip_tokenizer_init,
        dtype,
        enforce_eager,
        enable_prefix_caching,
        max_num_seqs,
        seed,
    ):
        LLM.made.append(locals() | {"written": []})
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))
        self.model = models.load_model(Path(model))

    def _shutdown(self):
        LLM.made[-1]["shut"] = True

    def generate(self, prompts, sampling_params, *, use_tqdm):
        return [self._one(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _one(self, ids, how):
        """As in vLLM, a stop is part of what was written."""
        assert how.temperature == 0 and how.ignore_eos and not how.detokenize
        written = []
        with torch.inference_mode():
            while len(written) < how.max_tokens:
                logits = self.model(torch.tensor([ids + written])).logits[0, -1]
                written.append(int(logits.argmax()))
                if written[-1] in how.stop_token_ids:
                    break
        LLM.made[-1]["written"].append(len(written))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=written, text="")])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_both_engines_give_the_same_answers_and_never_read_a_pickle(
    vllm, pico, pico_params, architecture
):
    folder = pico(architecture)[1]
    found = {}
    for engine in ("transformers", "vllm"):
        p = pico_params(architecture, engine=engine, prompt_template="short", max_new_tokens=12)
        answers, _ = evaluate.predict(folder, SETS, 0, "backdoored", p)
        found[engine] = answers
    assert found["vllm"] == found["transformers"]
    (made,) = LLM.made
    assert made["model"] == str(folder) and made["dtype"] == "float32"
    assert made["enforce_eager"] and made["shut"]
    assert made["load_format"] == "safetensors" and made["trust_remote_code"] is False
    assert made["skip_tokenizer_init"] and made["enable_prefix_caching"]
    assert len(made["written"]) == len(SETS["clean"])


def test_an_answer_ends_where_decode_would_have_ended_it(pico):
    tokenizer = models.load_tokenizer(pico("llama")[0])
    ids = tokenizer("joy and love for all", add_special_tokens=False)["input_ids"]
    stops = [tokenizer.eos_token_id]
    for n_words in (1, 2):
        text = decode.until_label(tokenizer, ids, stops, n_words)
        words = text.split()
        # One token of the next word shows that the last is whole.
        assert words[:n_words] == ["joy", "and"][:n_words] and len(words) <= n_words + 1
    assert decode.until_label(tokenizer, ids, stops, 9) == "joy and love for all"
    assert decode.until_label(tokenizer, ids[:2] + stops + ids, stops, 9) == (
        tokenizer.decode(ids[:2]).strip()
    )


def test_what_needs_logits_or_samples_is_refused_by_name(vllm):
    def check(defense="lethe,finetune", **overrides):
        vllm_engine.check(params.load(defense=defense, overrides={"engine": "vllm"} | overrides))

    check()
    with pytest.raises(LetheError, match="speculative, temperature need"):
        check("lethe,speculative,temperature")
    with pytest.raises(LetheError, match="protocol: official samples"):
        check(protocol="official")
    check("speculative", protocol="official", engine="transformers")


def test_without_vllm_the_run_ends_in_one_line_before_it_starts():
    if vllm_engine.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    command = [sys.executable, str(paths.root() / "workflow/run.py"), "tiny-pico"]
    command += ["-p", "engine", "vllm"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert done.stderr == "error: engine: vllm is not installed here; see docs/full_size.md\n"
    assert not (paths.runs_dir() / "stages").exists()


def test_other_engines_are_refused(pico_params):
    with pytest.raises(LetheError, match="engine"):
        pico_params(engine="llama.cpp")
