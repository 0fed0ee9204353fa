"""`engine: vllm`: the same prompts, asked through vLLM's offline LLM class where it is installed;
greedy, and each answer ends where `decode` would have ended it, so scoring reads the same text.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lethe_utils import defenses, models
from lethe_utils.errors import LetheError
from lethe_utils.models import inspect
from lethe_utils.schema import Params


def check(p: Params) -> None:
    """Raises LetheError where vLLM is not installed, or what is asked for needs transformers."""
    if p.engine != "vllm":
        return
    if find_spec("vllm") is None:
        raise LetheError("engine: vllm is not installed here; see docs/full_size.md")
    if p.protocol == "official":
        raise LetheError("engine: vllm is greedy; protocol: official samples: use transformers")
    decoding = [name for name in p.defenses if defenses.decodes(name)]
    if decoding:
        raise LetheError(
            f"engine: vllm gives no logits, which {', '.join(decoding)} need; leave those out, "
            "or use engine: transformers"
        )


@contextmanager
def opened(
    folder: Path, tokenizer: Any, p: Params
) -> Iterator[Callable[[list[str], int, str], list[str]]]:
    """A model in vLLM while it is asked: prompts, n_words and a progress bar's name -> outputs, as
    `decode.answer` gives them. Raises LetheError as `check`, and for a broken folder."""
    from lethe_utils import decode
    from lethe_utils.prompts import prompt_ids

    check(p)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    inspect.check_folder(folder)
    on_gpu = models.resolve_device(p.device) == "cuda"
    # Never a pickle, never remote code, and nothing of the folder's own generation settings.
    engine = LLM(
        model=str(folder),
        load_format="safetensors",
        trust_remote_code=False,
        generation_config="vllm",
        skip_tokenizer_init=True,  # ours reads files that its own may read otherwise
        dtype="bfloat16" if on_gpu else "float32",
        enforce_eager=not on_gpu,  # on a CPU compiling takes minutes, and a C++ compiler
        enable_prefix_caching=True,
        max_num_seqs=p.eval_batch_size,
        seed=p.seed,
    )

    def respond(prompts: list[str], n_words: int, progress: str) -> list[str]:
        ids, _ = prompt_ids(tokenizer, prompts, p)
        as_written = decode.generation(tokenizer, p, max(map(len, ids), default=0))
        ends = as_written.eos_token_id
        how = SamplingParams(
            temperature=0,
            max_tokens=as_written.max_new_tokens,
            stop_token_ids=ends,
            ignore_eos=True,  # those ends alone, as in decode
            detokenize=False,
        )
        made = engine.generate([{"prompt_token_ids": one} for one in ids], how, use_tqdm=False)
        return [decode.until_label(tokenizer, o.outputs[0].token_ids, ends, n_words) for o in made]

    try:
        yield respond
    finally:  # its own process holds the memory, and outlives the object
        engine.llm_engine.engine_core.shutdown()
