"""The reference model's log-probabilities of preference data: computed once per data, base weights and precision.

They lie beside the packs, in a file named after the hash of the base and the precision, so that no reference model is
in memory while training, and runs and trials on the same base and data share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.files import exists, join
from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore, write_reference
from minimind_ray.model.checkpoint import load_model, model_fingerprint
from minimind_ray.objectives.preference import pair_log_probs
from minimind_ray.train.context import default_device, resolve_precision
from minimind_ray.train.step import autocast


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of the packs of `store` under the model in `base`, matrix products in `dtype`."""

    store: str
    base: str
    dtype: torch.dtype
    gpus: float = 0.0

    @cached_property
    def path(self) -> str:
        """Where they lie."""
        dtype = str(self.dtype).removeprefix("torch.")
        return join(self.store, f"reference-{model_fingerprint(self.base)[:40]}-{dtype}.parquet")


ComputeReference = Callable[[Reference], Iterable[np.ndarray]]
ResolveDtype = Callable[[str, float], torch.dtype]
"""What `train.precision` comes to on a worker with so many GPUs."""


def dtype_here(precision: str, gpus: float = 0.0) -> torch.dtype:
    """As `ResolveDtype`, on this process's device."""
    return resolve_precision(precision, default_device())


class ReferenceModel:
    """The base in eval mode; called with a pack, it gives each document's log-probability, float32 [D]."""

    def __init__(self, reference: Reference, device: torch.device | None = None) -> None:
        self.device = device or default_device()
        self.dtype = reference.dtype
        self.model = load_model(Path(reference.base), self.device).eval()

    @torch.no_grad()
    def __call__(self, pack: Pack) -> np.ndarray:
        """Summed over the document's answer tokens, in nats."""
        with autocast(self.device, self.dtype):
            logp_D, _ = pair_log_probs(self.model, batch_from_packs([pack]).to(self.device))
        return logp_D.float().cpu().numpy()


def compute_here(reference: Reference) -> Iterator[np.ndarray]:
    """Pack by pack, in this process."""
    return map(ReferenceModel(reference), PackStore(reference.store))


def ensure_reference(reference: Reference, compute: ComputeReference) -> bool:
    """Compute what is not there yet; whether there was anything to do."""
    if exists(reference.path):
        return False
    write_reference(PackStore(reference.store), reference.path, compute(reference))
    return True
