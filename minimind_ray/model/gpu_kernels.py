"""GPU kernels in Triton: attention over short documents, and RMSNorm with rotation of queries and keys.

    N tokens   D documents   H query heads   G key/value heads, each shared by H / G query heads   K head size
    R = K / 2 rotary pairs   T tiles: pieces of a document of up to TILE tokens   M = N · H rows of K numbers

`attention.py` and `ops.py` use these kernels after `compile_kernels`, if the device is a GPU.

Attention is flash attention (Dao et al. 2022, algorithms 1 and 4) over tiles of documents. Torch's own kernels have two
drawbacks. For every document they start as many blocks as the longest document needs, so most blocks have no work if
documents are short. And their backward pass adds a query's gradients in an order that varies from run to run.

Here each existing tile has one program. The gradients of queries and of keys have separate kernels; both compute the
probabilities again. So two runs give the same bits.
"""
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportCallIssue=false
# (Triton has hardly any types, and is installed only with torch's builds for GPUs.)

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function

TILE = 64
"""Tokens of a tile. On an H200, 64 was faster than 32 for documents of 20 to 330 tokens, and faster than 128 for these
documents and for documents of 512 and 2,048 tokens."""
ROWS = 32
"""Number of rows of K numbers that one program rotates."""
LOG2_E = tl.constexpr(1.4426950408889634)


def tiles_of(bounds_D1: Tensor) -> Tensor:
    """Return for each tile its document's first token, the document's length, and the tile's first row in the document.

    `bounds_D1` is on the host; the result is int32 [T, 3].
    """
    bounds = bounds_D1.numpy()
    lengths = np.diff(bounds)
    counts = -(-lengths // TILE)
    documents = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * TILE
    return torch.from_numpy(np.stack([bounds[:-1][documents], lengths[documents], first], 1).astype(np.int32))


@triton.jit
def _places(start, rows, length, head, heads, K: tl.constexpr, WIDTH: tl.constexpr):
    """Return the offsets of a document's `rows` of one head in [N, heads, K], and a mask of the existing elements."""
    columns = tl.arange(0, WIDTH)
    places = ((start + rows).to(tl.int64) * heads + head)[:, None] * K + columns[None, :]
    return places, (rows < length)[:, None] & (columns < K)[None, :]


@triton.jit
def _load(x, start, rows, length, head, heads, K: tl.constexpr, WIDTH: tl.constexpr):
    places, there = _places(start, rows, length, head, heads, K, WIDTH)
    return tl.load(x + places, mask=there, other=0.0)


@triton.jit
def _store(x, value, start, rows, length, head, heads, K: tl.constexpr, WIDTH: tl.constexpr):
    places, there = _places(start, rows, length, head, heads, K, WIDTH)
    tl.store(x + places, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def _attend(
    q, k, v, out, lse, tiles, N,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write `out`, and to `lse` [H, N] the binary logarithm of each softmax's denominator."""
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    group = head // (H // G)
    start, length, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows = first + tl.arange(0, TILE)
    q_ = _load(q, start, rows, length, head, H, K, WIDTH)
    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(0, first + TILE, TILE):
        keys = begin + tl.arange(0, TILE)
        k_ = _load(k, start, keys, length, group, G, K, WIDTH)
        v_ = _load(v, start, keys, length, group, G, K, WIDTH)
        scores = tl.where(rows[:, None] >= keys[None, :], tl.dot(q_, tl.trans(k_)) * LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(v_.dtype), v_, sums * shrink[:, None])
        highest = higher
    _store(out, sums / total[:, None], start, rows, length, head, H, K, WIDTH)
    tl.store(lse + head * N + start + rows, highest + tl.log2(total), mask=rows < length)


@triton.jit
def _attend_backward_queries(
    q, k, v, out, lse, grad, delta, grad_q, tiles, N,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write `grad_q`, and for the keys' kernel `delta` [H, N]: the dot products of outputs and their gradients."""
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    group = head // (H // G)
    start, length, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows = first + tl.arange(0, TILE)
    q_ = _load(q, start, rows, length, head, H, K, WIDTH)
    grad_ = _load(grad, start, rows, length, head, H, K, WIDTH)
    out_ = _load(out, start, rows, length, head, H, K, WIDTH)
    lse_ = tl.load(lse + head * N + start + rows, mask=rows < length, other=0.0)
    delta_ = tl.sum(grad_.to(tl.float32) * out_.to(tl.float32), 1)
    tl.store(delta + head * N + start + rows, delta_, mask=rows < length)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(0, first + TILE, TILE):
        keys = begin + tl.arange(0, TILE)
        k_ = _load(k, start, keys, length, group, G, K, WIDTH)
        v_ = _load(v, start, keys, length, group, G, K, WIDTH)
        p = tl.exp2(tl.dot(q_, tl.trans(k_)) * LOG2_E - lse_[:, None])
        p = tl.where(rows[:, None] >= keys[None, :], p, 0.0)
        grad_scores = p * (tl.dot(grad_, tl.trans(v_)) - delta_[:, None])
        sums = tl.dot(grad_scores.to(k_.dtype), k_, sums)
    _store(grad_q, sums, start, rows, length, head, H, K, WIDTH)


@triton.jit
def _attend_backward_keys(
    q, k, v, lse, grad, delta, grad_k, grad_v, tiles, N,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0) // G, tl.program_id(0) % G
    start, length, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    keys = first + tl.arange(0, TILE)
    k_ = _load(k, start, keys, length, group, G, K, WIDTH)
    v_ = _load(v, start, keys, length, group, G, K, WIDTH)
    sums_k = tl.zeros([TILE, WIDTH], tl.float32)
    sums_v = tl.zeros([TILE, WIDTH], tl.float32)
    for member in range(H // G):
        head = group * (H // G) + member
        for begin in range(first, length, TILE):
            rows = begin + tl.arange(0, TILE)
            q_ = _load(q, start, rows, length, head, H, K, WIDTH)
            grad_ = _load(grad, start, rows, length, head, H, K, WIDTH)
            # Infinite for rows after the document's end: their probabilities become 0.
            lse_ = tl.load(lse + head * N + start + rows, mask=rows < length, other=float("inf"))
            delta_ = tl.load(delta + head * N + start + rows, mask=rows < length, other=0.0)
            p = tl.exp2(tl.dot(k_, tl.trans(q_)) * LOG2_E - lse_[None, :])
            p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
            sums_v = tl.dot(p.to(grad_.dtype), grad_, sums_v)
            grad_scores = p * (tl.dot(v_, tl.trans(grad_)) - delta_[None, :])
            sums_k = tl.dot(grad_scores.to(q_.dtype), q_, sums_k)
    _store(grad_k, sums_k, start, keys, length, group, G, K, WIDTH)
    _store(grad_v, sums_v, start, keys, length, group, G, K, WIDTH)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, tiles_T3: Tensor) -> Any:
        (count, heads, size), groups = q_NHK.shape, k_NGK.shape[1]
        q, k, v = (x.contiguous() for x in (q_NHK, k_NGK, v_NGK))
        out_NHK, lse_HN = torch.empty_like(q), q.new_empty(heads, count, dtype=torch.float32)
        ctx.sizes = {"H": heads, "G": groups, "K": size, "WIDTH": max(16, triton.next_power_of_2(size)), "TILE": TILE}
        with torch.cuda.device_of(q):
            _attend[(len(tiles_T3) * heads,)](q, k, v, out_NHK, lse_HN, tiles_T3, count, **ctx.sizes, num_stages=3)
        ctx.save_for_backward(q, k, v, out_NHK, lse_HN, tiles_T3)
        return out_NHK

    @staticmethod
    def backward(ctx: Any, grad_NHK: Tensor) -> Any:
        q, k, v, out, lse_HN, tiles_T3 = ctx.saved_tensors
        grad, delta_HN, count = grad_NHK.contiguous(), torch.empty_like(lse_HN), len(q)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        with torch.cuda.device_of(q):
            _attend_backward_queries[(len(tiles_T3) * q.shape[1],)](
                q, k, v, out, lse_HN, grad, delta_HN, grad_q, tiles_T3, count, **ctx.sizes, num_stages=2
            )
            _attend_backward_keys[(len(tiles_T3) * k.shape[1],)](
                q, k, v, lse_HN, grad, delta_HN, grad_k, grad_v, tiles_T3, count, **ctx.sizes, num_stages=2
            )
        return grad_q, grad_k, grad_v, None


def attend(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, tiles_T3: Tensor) -> Tensor:
    """Return softmax(q kᵀ) v, [N, H, K]: each token attends to its document so far. `tiles_T3` are from `tiles_of`."""
    return _Attention.apply(q_NHK, k_NGK, v_NGK, tiles_T3)


@triton.jit
def _halves(rows, M, R: tl.constexpr, WIDTH: tl.constexpr):
    """Return the offsets of the first halves of `rows` in [M, 2R], a mask of the existing elements, and the columns."""
    columns = tl.arange(0, WIDTH)
    there = (rows < M)[:, None] & (columns < R)[None, :]
    return rows.to(tl.int64)[:, None] * (2 * R) + columns[None, :], there, columns


@triton.jit
def _turn(rows, there, columns, cos, sin, H: tl.constexpr, R: tl.constexpr):
    places = (rows // H).to(tl.int64)[:, None] * R + columns[None, :]
    return tl.load(cos + places, mask=there, other=0.0), tl.load(sin + places, mask=there, other=0.0)


@triton.jit
def _norm_rotate(
    x, weight, cos, sin, out, scales, M, eps, scale,
    H: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places, there, columns = _halves(rows, M, R, WIDTH)
    a = tl.load(x + places, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + places + R, mask=there, other=0.0).to(tl.float32)
    norm = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * R) + eps)
    tl.store(scales + rows, norm, mask=rows < M)
    a *= norm[:, None] * tl.load(weight + columns, mask=columns < R, other=0.0)[None, :]
    b *= norm[:, None] * tl.load(weight + R + columns, mask=columns < R, other=0.0)[None, :]
    c, s = _turn(rows, there, columns, cos, sin, H, R)
    tl.store(out + places, ((a * c - b * s) * scale).to(out.dtype.element_ty), mask=there)
    tl.store(out + places + R, ((b * c + a * s) * scale).to(out.dtype.element_ty), mask=there)


@triton.jit
def _norm_rotate_backward(
    grad, x, weight, scales, cos, sin, grad_x, grad_weights, M, scale,
    H: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write `grad_x`, and to `grad_weights` the weight's gradient from each program's rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places, there, columns = _halves(rows, M, R, WIDTH)
    c, s = _turn(rows, there, columns, cos, sin, H, R)
    a = tl.load(grad + places, mask=there, other=0.0).to(tl.float32)
    b = tl.load(grad + places + R, mask=there, other=0.0).to(tl.float32)
    grad_a, grad_b = (a * c + b * s) * scale, (b * c - a * s) * scale
    norm = tl.load(scales + rows, mask=rows < M, other=0.0)[:, None]
    normed_a = tl.load(x + places, mask=there, other=0.0).to(tl.float32) * norm
    normed_b = tl.load(x + places + R, mask=there, other=0.0).to(tl.float32) * norm
    mine = grad_weights + tl.program_id(0) * (2 * R) + columns
    tl.store(mine, tl.sum(grad_a * normed_a, 0), mask=columns < R)
    tl.store(mine + R, tl.sum(grad_b * normed_b, 0), mask=columns < R)
    grad_a *= tl.load(weight + columns, mask=columns < R, other=0.0)[None, :]
    grad_b *= tl.load(weight + R + columns, mask=columns < R, other=0.0)[None, :]
    mean = ((tl.sum(grad_a * normed_a, 1) + tl.sum(grad_b * normed_b, 1)) / (2 * R))[:, None]
    tl.store(grad_x + places, ((grad_a - normed_a * mean) * norm).to(grad_x.dtype.element_ty), mask=there)
    tl.store(grad_x + places + R, ((grad_b - normed_b * mean) * norm).to(grad_x.dtype.element_ty), mask=there)


def norm_rotate(
    x_NHK: Tensor, weight_K: Tensor, cos_NR: Tensor, sin_NR: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return `scale` · RMSNorm of each head with its pairs rotated, and 1 / RMS [N, H, 1], as `ops._norm_rotate`."""
    x, (count, heads, size) = x_NHK.contiguous(), x_NHK.shape
    out_NHK, scales_NH1 = torch.empty_like(x), x.new_empty(count, heads, 1, dtype=torch.float32)
    rows, sizes = count * heads, _sizes(heads, size)
    with torch.cuda.device_of(x):
        _norm_rotate[(triton.cdiv(rows, ROWS),)](
            x, weight_K, cos_NR, sin_NR, out_NHK, scales_NH1, rows, eps, scale, **sizes
        )
    return out_NHK, scales_NH1


def norm_rotate_backward(
    grad_out_NHK: Tensor, x_NHK: Tensor, weight_K: Tensor, scales_NH1: Tensor, cos_NR: Tensor, sin_NR: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and of the weight."""
    grad, x, (count, heads, size) = grad_out_NHK.contiguous(), x_NHK.contiguous(), x_NHK.shape
    rows, sizes = count * heads, _sizes(heads, size)
    programs = triton.cdiv(rows, ROWS)
    grad_x, grad_weights = torch.empty_like(x), x.new_empty(programs, size, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _norm_rotate_backward[(programs,)](
            grad, x, weight_K, scales_NH1, cos_NR, sin_NR, grad_x, grad_weights, rows, scale, **sizes
        )
    return grad_x, grad_weights.sum(0)


def _sizes(heads: int, size: int) -> dict[str, int]:
    return {"H": heads, "R": size // 2, "WIDTH": triton.next_power_of_2(size // 2), "ROWS": ROWS}
