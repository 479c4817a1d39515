"""The one batch shape of every stage: ragged.

N tokens of D documents, one after another, no padding:

    tokens_N   int64    inputs
    targets_N  int64    the next token of the same document
    weights_N  float32  1 where the loss counts, 0 elsewhere
    bounds_D1  int32    where each document starts, and N
    counted_M  int64    the positions with weight > 0; a GPU need not be asked how many there are
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_ray.data.pack import Pack


@dataclass(frozen=True, slots=True)
class Batch:
    """See the module's legend; `reference_D` float32 are the reference log-probabilities of preference documents."""

    tokens_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    bounds_D1: Tensor
    counted_M: Tensor
    reference_D: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`. The bounds stay on the host: attention plans with them there."""
        return self._each(lambda x: x.to(device, non_blocking=True), but="bounds_D1")

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU copies from while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor], but: str = "") -> Batch:
        before = {f.name: getattr(self, f.name) for f in fields(self)}
        after: dict[str, Any] = {n: v if n == but or v is None else function(v) for n, v in before.items()}
        return Batch(**after)


def passes(packs: Iterable[Pack], tokens: int) -> Iterator[list[Pack]]:
    """Consecutive packs, as many for one forward pass as hold at most `tokens` together, but one at least."""
    together: list[Pack] = []
    for pack in packs:
        if together and sum(len(p.tokens) for p in together) + len(pack.tokens) > tokens:
            yield together
            together = []
        together.append(pack)
    if together:
        yield together


def batch_from_packs(packs: Sequence[Pack]) -> Batch:
    """Concatenate packs. A document of L tokens gives L - 1 positions: its last token is only a target."""
    tokens, weights, lengths = (
        np.concatenate([getattr(p, name) for p in packs]) for name in ("tokens", "weights", "lengths")
    )
    bounds = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths - 1, out=bounds[1:])
    # Position i of the batch, in document d, is token i + d: the last token of each document before it is no input.
    inputs = np.arange(bounds[-1]) + np.repeat(np.arange(len(lengths)), lengths - 1)
    weights = weights[inputs + 1]
    references = [p.reference for p in packs]
    return Batch(
        tokens_N=torch.from_numpy(tokens[inputs].astype(np.int64)),
        targets_N=torch.from_numpy(tokens[inputs + 1].astype(np.int64)),
        weights_N=torch.from_numpy(weights.astype(np.float32)),
        bounds_D1=torch.from_numpy(bounds),
        counted_M=torch.from_numpy(np.flatnonzero(weights)),
        reference_D=None
        if any(r is None for r in references)
        else torch.from_numpy(np.concatenate([r for r in references if r is not None])),
    )
