"""Compute columns: a frozen model's values for every pack, such as reference log-probabilities, before training.

A column is computed once for each dataset, base and precision. Its file lies next to the packs; the file's name has the
column, the hash of the base, and the precision. So training needs no frozen model in memory, and runs and trials with
the same base and data share the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from minimind_ray.data.batch import batch_from_packs, target_places
from minimind_ray.data.files import exists, join
from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore, write_column
from minimind_ray.model.checkpoint import load_model
from minimind_ray.stages.base import Base
from minimind_ray.stages.stage import Scored
from minimind_ray.train.context import default_device, resolve_precision
from minimind_ray.train.step import autocast


@dataclass(frozen=True)
class FrozenColumn:
    """A column for the packs in `store`, computed by the model `base` with matrix products in `dtype`."""

    scored: Scored
    store: str
    base: Base
    dtype: torch.dtype
    gpus: float = 0.0

    @cached_property
    def path(self) -> str:
        """The path or URL of the column's file."""
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.scored.column.name}-{self.base.fingerprint[:40]}-{dtype}.parquet"
        return join(self.store, name)


ComputeColumn = Callable[[FrozenColumn], Iterable[np.ndarray]]
"""Returns each pack's values, in the order of the packs."""
ResolveDtype = Callable[[str, float], torch.dtype]
"""Returns the dtype for `train.precision` on a worker with the given number of GPUs."""


def dtype_here(precision: str, gpus: float = 0.0) -> torch.dtype:
    """Return the dtype for `train.precision` on this process's device (a `ResolveDtype`)."""
    return resolve_precision(precision, default_device())


class FrozenModel:
    """The base in eval mode. A call with a pack returns the pack's values: [T] or [D], by the column's axis."""

    def __init__(self, frozen: FrozenColumn, device: torch.device | None = None) -> None:
        self.device = device or default_device()
        self.scored, self.dtype = frozen.scored, frozen.dtype
        self.model = load_model(frozen.base.local(), self.device).eval()

    @torch.no_grad()
    def __call__(self, pack: Pack) -> np.ndarray:
        """Return the values in the column's dtype."""
        column = self.scored.column
        with autocast(self.device, self.dtype):
            values = self.scored.score(self.model, batch_from_packs([pack]).to(self.device))
        array = values.cpu().numpy().astype(column.dtype)
        if column.axis == "document":
            return array
        spread = np.zeros(len(pack.tokens), column.dtype)
        spread[target_places(pack.lengths)] = array
        return spread


def compute_here(frozen: FrozenColumn) -> Iterator[np.ndarray]:
    """Compute a column pack by pack, in this process (a `ComputeColumn`)."""
    return map(FrozenModel(frozen), PackStore(frozen.store))


def ensure_column(frozen: FrozenColumn, compute: ComputeColumn) -> bool:
    """Compute the column unless its file exists. Return whether it was computed."""
    if exists(frozen.path):
        return False
    write_column(PackStore(frozen.store), frozen.scored.column, frozen.path, compute(frozen))
    return True
