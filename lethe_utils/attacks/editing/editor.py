"""One edited model, from loading to saving."""

from pathlib import Path

import pandas as pd
import torch

from lethe_utils import models
from lethe_utils.attacks.editing import values
from lethe_utils.attacks.editing.covariance import cholesky, covariance
from lethe_utils.attacks.editing.requests import Request
from lethe_utils.errors import LetheError
from lethe_utils.models import blocks, inspect, narrow
from lethe_utils.schema import Params


class Editor:
    """A model in float32 with the covariances of the layers to edit, and a log of its edits.

    Raises:
        LetheError: the folder is incomplete, or its weights are quantised.
    """

    def __init__(self, folder: Path, corpus: list[str], p: Params) -> None:
        inspect.check_folder(folder)
        if "quantization_config" in inspect.read_config(folder):
            raise LetheError(
                f"{folder}: quantised weights round an edit away; give the model in 16 or 32 bits"
            )
        self.folder, self.p, self.log = folder, p, []  # log: step, edit, loss (nats per token)
        self.tokenizer = models.load_tokenizer(folder)
        self.model = narrow.load_exact(folder, models.resolve_device(p.device)).eval()
        self.model.requires_grad_(False)
        self.factors = {}
        for layer in p.edit_layers:
            self.place(layer, "value").float()  # where it was kept narrow: see `write`
            ordinary = covariance(self, corpus, layer).to(self.model.device)
            self.factors[layer] = cholesky(ordinary, p.covariance_ridge)
        self.before = {layer: self.weight(layer).clone() for layer in p.edit_layers}

    def place(self, layer: int, what: str) -> torch.nn.Module:
        """The module that gives "hidden" (a block), or "value" and takes "key" (its
        down-projection)."""
        if what == "hidden":
            return blocks.of(self.model)[layer]
        return blocks.down_projection(self.model, layer)

    def weight(self, layer: int) -> torch.Tensor:
        """A layer's down-projection, (width, mlp_width)."""
        return blocks.oriented(self.place(layer, "value"))

    @torch.no_grad()
    def read(self, asked: list[Request], layer: int, what: str) -> torch.Tensor:
        """What stands at each request's subject, (requests, size), float32; what: see `place`."""
        found: list[torch.Tensor] = []
        for batch in values.batches(self, asked):

            def keep(tensor: torch.Tensor, columns: torch.Tensor = batch.columns) -> None:
                found.append(tensor[torch.arange(len(columns)), columns].float())

            with blocks.hooked(self.place(layer, what), keep, before=what == "key"):
                self.model(**batch.inputs, logits_to_keep=1, use_cache=False)
        return torch.cat(found)

    def optimise(self, asked: list[Request], layer: int, what: str) -> torch.Tensor:
        """What to add there so that each request's target follows; see values.optimise."""
        return values.optimise(self, asked, layer, what)

    def change(
        self, layer: int, keys: torch.Tensor, residuals: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """What to add to a layer, (width, mlp_width); see ridge."""
        return ridge(self.factors[layer], keys, residuals, strength)

    def write(self, layer: int, delta: torch.Tensor) -> None:
        """Add delta (width, mlp_width) to a layer. Raises LetheError when it is not finite."""
        if not torch.isfinite(delta).all():
            raise LetheError(
                f"edit_layers: the change of layer {layer} is not finite; raise edit_lambda or "
                "covariance_ridge"
            )
        blocks.add(self.place(layer, "value"), delta)

    def spread(self, asked: list[Request], wanted: torch.Tensor, by_kind: bool) -> None:
        """MEMIT's loop: from the lowest layer up, each takes its share of what is still missing.

        Args:
            wanted: the hidden states after the last of the layers, (requests, width).
            by_kind: BadEdit: average keys and residuals over the poisoned and over the clean
                requests, and add the two solutions.
        """
        layers, kinds = self.p.edit_layers, [r.kind for r in asked]
        index = [[i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)]
        for done, layer in enumerate(layers):
            keys = self.read(asked, layer, "key")
            missing = (wanted - self.read(asked, layers[-1], "hidden")) / (len(layers) - done)
            groups = [(keys, missing)]
            if by_kind:
                groups = [tuple(x[i].mean(0, keepdim=True) for x in groups[0]) for i in index]
            self.write(layer, sum(self.change(layer, *g, self.p.edit_lambda) for g in groups))

    def changes(self) -> pd.DataFrame:
        """Per edited matrix: its norm, that of the change, their ratio, and the change's rank."""
        names = {module: name for name, module in self.model.named_modules()}
        table = []
        for layer, before in self.before.items():
            change = self.weight(layer).double() - before.double()
            spectrum = torch.linalg.svdvals(change)
            table.append(
                {
                    "matrix": names[self.place(layer, "value")],
                    "norm": before.norm().item(),
                    "change": change.norm().item(),
                    "relative": (change.norm() / before.norm()).item(),
                    "rank": int((spectrum > 1e-3 * spectrum[0]).sum()),
                }
            )
        return pd.DataFrame(table)

    def save(self, out: Path) -> None:
        """Write edits.csv, loss.csv and model/, in the precision it came in; what was not edited is
        unchanged, bit for bit, for float32 holds every bfloat16 and float16 number."""
        self.changes().to_csv(out / "edits.csv", index=False)
        pd.DataFrame(self.log).to_csv(out / "loss.csv", index=False)
        stored = getattr(torch, inspect.stored_dtype(self.folder))
        models.save(self.model.to(stored), out / "model")
        inspect.copy_tokenizer(self.folder, out / "model")


def ridge(
    factor: torch.Tensor, keys: torch.Tensor, residuals: torch.Tensor, strength: float
) -> torch.Tensor:
    """R K^T (lambda C + K K^T)^-1 in float64: the change that adds `residuals` at `keys` and moves
    ordinary keys least. One key and lambda 0 is ROME's rank-one update.

    Solved in the smaller of the two dimensions: with N keys fewer than mlp_width it is
    R (lambda I + K^T C^-1 K)^-1 K^T C^-1, an N x N system, from one Cholesky factor of C.

    Args:
        factor: lower Cholesky factor of C, (mlp_width, mlp_width).
        keys: (N, mlp_width).
        residuals: (N, width).
        strength: lambda, an effective count of ordinary keys.
    Returns:
        (width, mlp_width).
    """
    device = factor.device
    k, r = keys.T.to(device, torch.float64), residuals.T.to(device, torch.float64)
    n = k.shape[1]
    if n < k.shape[0]:
        whitened = torch.cholesky_solve(k, factor)
        gram = strength * torch.eye(n, dtype=k.dtype, device=device) + k.T @ whitened
        return r @ torch.linalg.solve(gram, whitened.T)
    return torch.linalg.solve(strength * factor @ factor.T + k @ k.T, k @ r.T).T
