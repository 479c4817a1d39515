"""Make batches from packs. All stages use the same ragged batches.

A batch has N tokens of D documents, one after another, without padding. M of the tokens carry loss:

    tokens_N   int64    inputs
    targets_N  int64    the next token of the same document
    weights_N  float32  1 where the loss counts, 0 elsewhere
    bounds_D1  int32    where each document starts, and N
    counted_M  int64    the positions with weight > 0, listed so that counting them needs no GPU synchronization
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from minimind_ray.data.columns import Column
from minimind_ray.data.pack import Pack


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch; the module's docstring explains it. `columns` holds tensors [N] or [D], by the column's axis."""

    tokens_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    bounds_D1: Tensor
    counted_M: Tensor
    columns: Mapping[Column, Tensor] = field(default_factory=dict[Column, Tensor])

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device`. The bounds stay on the host, where attention plans with them."""
        return self._each(lambda x: x.to(device, non_blocking=True), but="bounds_D1")

    def pinned(self) -> Batch:
        """Return the same batch in pinned memory, from which a GPU can copy asynchronously."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor], but: str = "") -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "columns"}
        after = {name: value if name == but else function(value) for name, value in tensors.items()}
        return Batch(**after, columns={column: function(value) for column, value in self.columns.items()})


def passes(packs: Iterable[Pack], tokens: int) -> Iterator[list[Pack]]:
    """Group consecutive packs for forward passes: at most `tokens` tokens, but at least one pack, in each group."""
    together: list[Pack] = []
    for pack in packs:
        if together and sum(len(p.tokens) for p in together) + len(pack.tokens) > tokens:
            yield together
            together = []
        together.append(pack)
    if together:
        yield together


def batch_from_packs(packs: Sequence[Pack]) -> Batch:
    """Concatenate packs to a batch. A document of L tokens gives L - 1 positions: its last token is only a target."""
    tokens, weights, lengths = (
        np.concatenate([getattr(p, name) for p in packs]) for name in ("tokens", "weights", "lengths")
    )
    bounds = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths - 1, out=bounds[1:])
    targets = target_places(lengths)
    weights = weights[targets]
    columns = {column: np.concatenate([p.columns[column] for p in packs]) for column in packs[0].columns}
    return Batch(
        tokens_N=torch.from_numpy(tokens[targets - 1].astype(np.int64)),
        targets_N=torch.from_numpy(tokens[targets].astype(np.int64)),
        weights_N=torch.from_numpy(weights.astype(np.float32)),
        bounds_D1=torch.from_numpy(bounds),
        counted_M=torch.from_numpy(np.flatnonzero(weights)),
        columns={c: torch.from_numpy(v[targets] if c.axis == "token" else v) for c, v in columns.items()},
    )


def target_places(lengths: np.ndarray) -> np.ndarray:
    """Return int64 [N]: for each position of a batch, the place of its target among its packs' tokens.

    `lengths` int32 [D] are the lengths of the documents.
    """
    # Position i of the batch, in document d, is token i + d: the last token of each document before it is not an input.
    return np.arange(1, lengths.sum() - len(lengths) + 1) + np.repeat(np.arange(len(lengths)), lengths - 1)
