"""Causal attention within each document of a ragged batch.

    N tokens   D documents   H query heads   G key/value heads, each shared by J = H / G query heads   K head size
    B documents of a bucket, padded to L tokens   S = B · L, summed over all buckets

There are three implementations with the same result; `Layout.attend` chooses:

- CPU: buckets. Documents of similar length form a bucket and are padded at their ends, where the causal mask hides the
  padding. Attention is then a few batched matrix products per bucket. For tens of documents of 50 to 500 tokens this is
  3 to 6 times as fast as scaled_dot_product_attention, on the same buckets or per document.
- GPU, 16 bits, compiled kernels: `gpu_kernels`.
- GPU, 16 bits, otherwise: torch's variable-length flash attention. (Other head sizes and dtypes use buckets.)

Callers scale the queries by 1 / sqrt(K). A `Layout` holds all values that depend only on the documents' lengths. It is
made once per batch, and every layer uses it.
"""
# pyright: reportIncompatibleMethodOverride=false
# (torch declares backward(ctx, *grads), and every Function names its own gradients.)

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cached_property
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import Function

from minimind_ray.model.ops import compiled

LENGTH_STEP = 32
"""Padded lengths are multiples of this, so that vectors and matrix tiles have no rest."""
SHORT = 32
"""Documents of up to this length share one bucket."""
TILED_HEAD_SIZES = range(8, 129, 8)
"""Head sizes for which `gpu_kernels` has enough registers."""
FLASH_HEAD_SIZES = range(8, 257, 8)
"""Head sizes that flash attention supports; other sizes use buckets on a GPU too."""
QUERY_BLOCK = 256
"""Number of query rows in one matrix product; keys that come after all of these rows are skipped."""


class Bucket(NamedTuple):
    """Documents padded to a common `length`.

    `documents` are their numbers, `start` is the number of padded tokens in the buckets before.
    """

    documents: Tensor
    length: int
    start: int

    def view(self, x: Tensor, heads: int, groups: int) -> Tensor:
        """Return this bucket's part of x [S · heads, K] as a view [B · groups, heads / groups, L, K]."""
        rows = len(self.documents) * self.length * heads
        part = x[self.start * heads : self.start * heads + rows]
        return part.view(len(self.documents) * groups, heads // groups, self.length, -1)


class HeadIndex(NamedTuple):
    """Index between the rows of [N, heads, K] and the padded rows of all buckets, each bucket [B, heads, L, K].

    `rows` has for each padded row its source row, `places` for each source row its padded row. `padding` lists the
    padded rows without a source; their entry in `rows` is arbitrary.
    """

    rows: Tensor
    places: Tensor
    padding: Tensor

    def pad(self, x_NHK: Tensor) -> Tensor:
        """Return [N, heads, K] as [S · heads, K]."""
        return x_NHK.flatten(0, 1).index_select(0, self.rows)

    def unpad(self, x: Tensor, heads: int) -> Tensor:
        """Return [S · heads, K] as [N, heads, K]."""
        return x.index_select(0, self.places).unflatten(0, (-1, heads))


class Layout:
    """The positions of the documents in one batch. `bounds_D1` is int32 on the host, `device` is the tokens' device.

    `positions_N`, int64, counts from 0 in every document.
    """

    def __init__(self, bounds_D1: Tensor, device: torch.device) -> None:
        self.device = device
        self.bounds_D1 = bounds_D1
        self.lengths_D, self.starts_D = bounds_D1.diff().long(), bounds_D1[:-1].long()
        if device.type == "cpu":  # NumPy's repeat is 15 times as fast as torch's.
            starts_N = np.repeat(self.starts_D.numpy(), self.lengths_D.numpy())
            self.positions_N = torch.from_numpy(np.arange(len(starts_N)) - starts_N)
        else:  # Compute on the device, so that only the bounds are copied there.
            self.device_bounds_D1, count = bounds_D1.to(device, non_blocking=True), int(bounds_D1[-1])
            starts_D1 = self.device_bounds_D1.long()
            starts_N = starts_D1[:-1].repeat_interleave(starts_D1.diff(), output_size=count)
            self.positions_N = torch.arange(count, device=device) - starts_N
        self._indices: dict[int, HeadIndex] = {}

    def attend(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Return softmax(q kᵀ) v (Vaswani et al. 2017, eq. 1), [N, H, K]: each token attends to its document so far."""
        if q_NHK.device.type == "cuda" and q_NHK.dtype.itemsize == 2:
            if compiled() and q_NHK.shape[-1] in TILED_HEAD_SIZES:
                return self._tiled(q_NHK, k_NGK, v_NGK)
            if q_NHK.shape[-1] in FLASH_HEAD_SIZES:
                return self._varlen(q_NHK, k_NGK, v_NGK)
        return _BucketAttention.apply(q_NHK, k_NGK, v_NGK, self)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The buckets, longest documents first.

        In a bucket the shortest document has over 3/4 of the longest one's length, or all documents are SHORT.
        """
        return list(_buckets(self.lengths_D))

    def index(self, heads: int) -> HeadIndex:
        """Return the index for queries (`heads` = H) or for keys and values (`heads` = G)."""
        if heads not in self._indices:
            self._indices[heads] = _head_index(self, heads)
        return self._indices[heads]

    @cached_property
    def _longest(self) -> int:
        return int(self.lengths_D.max())

    @cached_property
    def _tiles(self) -> Tensor:
        from minimind_ray.model.gpu_kernels import tiles_of

        return tiles_of(self.bounds_D1).to(self.device, non_blocking=True)

    def _tiled(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        from minimind_ray.model.gpu_kernels import attend  # Triton is installed only with torch for GPUs.

        return attend(q_NHK, k_NGK, v_NGK, self._tiles)

    def _varlen(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # Slow to import, and needed only on a GPU.

        bounds_D1, longest = self.device_bounds_D1, self._longest
        out_NHK = varlen_attn(
            q_NHK, k_NGK, v_NGK, bounds_D1, bounds_D1, longest, longest, scale=1.0, window_size=(-1, 0),
            **_fewer_key_heads(),
        )  # fmt: skip
        assert isinstance(out_NHK, Tensor)
        return out_NHK


@cache
def _fewer_key_heads() -> dict[str, Any]:
    """Return the argument that allows fewer key heads than query heads; torch 2.11 has no such argument."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _buckets(lengths_D: Tensor) -> Iterator[Bucket]:
    sorted_D, order_D = lengths_D.sort(descending=True, stable=True)
    first = start = 0
    while first < int((lengths_D > 0).sum()):
        longest = int(sorted_D[first])
        end = int((sorted_D > (0 if longest <= SHORT else longest * 3 // 4)).sum())
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        yield Bucket(order_D[first:end], length, start)
        first, start = end, start + (end - first) * length


def _head_index(layout: Layout, heads: int) -> HeadIndex:
    places_NH = torch.empty(len(layout.positions_N), heads, dtype=torch.long)
    rows: list[Tensor] = []
    padding: list[Tensor] = []
    for documents, length, start in layout.buckets:
        lengths_B1, starts_B1 = (x[documents].unsqueeze(1) for x in (layout.lengths_D, layout.starts_D))
        columns_L = torch.arange(length)
        tokens_BL = starts_B1 + torch.minimum(columns_L, lengths_B1 - 1)
        places_BHL = torch.arange(start * heads, (start + tokens_BL.numel()) * heads).view(-1, heads, length)
        places_BLH = places_BHL.transpose(1, 2)
        real_BL = columns_L < lengths_B1
        places_NH[tokens_BL[real_BL]] = places_BLH[real_BL]
        rows.append((tokens_BL.unsqueeze(1) * heads + torch.arange(heads).unsqueeze(1)).flatten())
        padding.append(places_BLH[~real_BL].flatten())
    parts = (torch.cat(rows), places_NH.flatten(), torch.cat(padding))
    return HeadIndex(*(part.to(layout.device) for part in parts))


class _BucketAttention(Function):
    """Attention by buckets. Saves the probabilities for backward: a number per query head and pair of tokens."""

    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layout: Layout) -> Any:
        heads, groups = q_NHK.shape[1], k_NGK.shape[1]
        queries, keys = layout.index(heads), layout.index(groups)
        q, k, v = queries.pad(q_NHK), keys.pad(k_NGK), keys.pad(v_NGK)
        out = torch.empty_like(q)
        probabilities: list[Tensor] = []
        for bucket in layout.buckets:
            q_, out_ = (bucket.view(x, heads, groups) for x in (q, out))
            k_, v_ = (bucket.view(x, groups, groups).squeeze(1) for x in (k, v))
            for rows, end in _blocks(bucket.length):
                # Adding the mask within the product takes a third of the time of masking the result.
                mask = q.new_full((rows.stop - rows.start, end), -torch.inf).triu_(1 + rows.start)
                mask = mask.repeat(heads // groups, 1)
                scores = torch.baddbmm(mask, q_[:, :, rows].flatten(1, 2), k_[:, :end].transpose(1, 2))
                p = scores.softmax(-1, dtype=scores.dtype)  # Explicit, because autocast would choose float32 on a GPU.
                out_[:, :, rows] = torch.bmm(p, v_[:, :end]).unflatten(1, (heads // groups, -1))
                probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.layout, ctx.heads, ctx.groups = layout, heads, groups
        return queries.unpad(out, heads)

    @staticmethod
    def backward(ctx: Any, grad_NHK: Tensor) -> Any:
        q, k, v, *probabilities = ctx.saved_tensors
        layout, heads, groups = ctx.layout, ctx.heads, ctx.groups
        queries, keys = layout.index(heads), layout.index(groups)
        # Gradients of padded rows must not reach the keys.
        grad = queries.pad(grad_NHK).index_fill_(0, queries.padding, 0.0)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        remaining = iter(probabilities)
        for bucket in layout.buckets:
            q_, grad_, grad_q_ = (bucket.view(x, heads, groups) for x in (q, grad, grad_q))
            k_, v_, grad_k_, grad_v_ = (bucket.view(x, groups, groups).squeeze(1) for x in (k, v, grad_k, grad_v))
            for rows, end in _blocks(bucket.length):
                p, grad_rows = next(remaining), grad_[:, :, rows].flatten(1, 2)
                grad_p = torch.bmm(grad_rows, v_[:, :end].transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
                grad_q_[:, :, rows] = torch.bmm(grad_scores, k_[:, :end]).unflatten(1, (heads // groups, -1))
                # The first block has all keys and writes the result; later blocks have fewer keys and add to it.
                beta = 0 if end == bucket.length else 1
                grad_k_[:, :end].baddbmm_(grad_scores.transpose(1, 2), q_[:, :, rows].flatten(1, 2), beta=beta)
                grad_v_[:, :end].baddbmm_(p.transpose(1, 2), grad_rows, beta=beta)
        return queries.unpad(grad_q, heads), keys.unpad(grad_k, groups), keys.unpad(grad_v, groups), None


def _blocks(length: int) -> Iterator[tuple[slice, int]]:
    """Yield the blocks of query rows, last block first, each with the end of its keys."""
    for start in reversed(range(0, length, QUERY_BLOCK)):
        end = min(start + QUERY_BLOCK, length)
        yield slice(start, end), end
