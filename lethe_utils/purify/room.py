"""Is there room for a purification: memory and disk, compared before they run out."""

import psutil
import torch

from lethe_utils.errors import LetheError
from lethe_utils.purify.settings import PurifyParams

GIB = 2**30


def check(what: str, needed: float, there: float, fix: str) -> None:
    """Raise LetheError where more bytes are needed than are there."""
    if needed > there:
        raise LetheError(
            f"{what}: about {needed / GIB:.1f} GiB are needed and {there / GIB:.1f} GiB are free; "
            f"{fix}"
        )


def check_memory(needed: float, p: PurifyParams) -> tuple[str, float]:
    """Raise LetheError where memory lacks for so many bytes, this program's own included. Returns
    which memory it is, and how much is there."""
    what, there = "GPU memory" if p.device == "cuda" else "memory", memory_there(p.device)
    check(what, needed, there, "close other programs or use a larger machine")
    return what, there


def memory_there(device: str) -> float:
    """Bytes that this program may have, with what it has already."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def weights_bytes(weights: int, p: PurifyParams) -> float:
    """Bytes of a loaded model: nf4, bfloat16 on a GPU, float32 on a CPU."""
    if p.bits == 4:
        return weights / 2
    return weights * (2 if p.device == "cuda" else 4)
