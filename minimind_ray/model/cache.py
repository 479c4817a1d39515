"""The key/value cache of generation: the keys and values of earlier tokens, so that each token is computed once.

    B rows, one sequence in each   T positions   H query heads, G key/value heads, J = H / G   K head size
    D sequences read at once, with N tokens   A rows that get one new token   M tokens of one sequence

Each `attend…` method returns an attention function for `Transformer.decode`. The function stores the keys and values of
the new tokens in the cache and attends to all tokens of the sequence. `Engine` decides which row each sequence has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_ray.model.attention import Layout
from minimind_ray.model.transformer import Attend

GROWTH = 64


class Cache:
    """Keys and values of `rows` sequences, in memory that grows with the longest sequence."""

    def __init__(self, rows: int) -> None:
        self.rows, self.capacity = rows, 0
        self.layers: list[Tensor] = []
        """For each layer the keys and the values, [2, B, T, G, K]."""

    def reserve(self, positions: int) -> None:
        """Make room for this number of positions in every row."""
        if positions > self.capacity:
            self.capacity = positions + max(GROWTH, positions // 2)
        for layer, kept in enumerate(self.layers):
            if (room := self.capacity - kept.shape[2]) > 0:
                self.layers[layer] = F.pad(kept, (0, 0, 0, 0, 0, room))

    def swap(self, one: int, other: int, positions: int) -> None:
        """Exchange the first `positions` of two rows."""
        for kept in self.layers:
            kept[:, [one, other], :positions] = kept[:, [other, one], :positions]

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` of a row to another."""
        for kept in self.layers:
            kept[:, target, :positions] = kept[:, source, :positions]

    def attend_within(self, layout: Layout, rows: Sequence[int]) -> Attend:
        """Return attention for new sequences, one for each of `rows`; each sequence attends to itself."""
        rows_D = torch.tensor(rows, device=layout.device)
        rows_N = rows_D.repeat_interleave(layout.lengths_D.to(layout.device))

        def attend(layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            kept = self._layer(layer, k_NGK)
            kept[0, rows_N, layout.positions_N], kept[1, rows_N, layout.positions_N] = k_NGK, v_NGK
            return layout.attend(q_NHK, k_NGK, v_NGK)

        return attend

    def attend_after(self, row: int, positions_M: Tensor, end: int) -> Attend:
        """Return attention for the next tokens of one row, at `positions_M` up to `end`, after the cached tokens."""
        start = end - len(positions_M)
        mask_MT = torch.arange(end, device=positions_M.device) <= positions_M.unsqueeze(1)

        def attend(layer: int, q_MHK: Tensor, k_MGK: Tensor, v_MGK: Tensor) -> Tensor:
            kept = self._layer(layer, k_MGK)
            kept[0, row, start:end], kept[1, row, start:end] = k_MGK, v_MGK
            q_1HMK, k_1GTK, v_1GTK = (x.transpose(0, 1).unsqueeze(0) for x in (q_MHK, *kept[:, row, :end]))
            out_1HMK = F.scaled_dot_product_attention(
                q_1HMK, k_1GTK, v_1GTK, attn_mask=mask_MT, scale=1.0, enable_gqa=True
            )
            return out_1HMK[0].transpose(0, 1)

        return attend

    def attend_newest(self, positions_A: Tensor, longest: int) -> Attend:
        """Return attention for one new token in each of the first A rows, at `positions_A`.

        `longest` is the length of the longest sequence, with its new token.
        """
        count = len(positions_A)
        rows_A = torch.arange(count, device=positions_A.device)
        mask_A11T = (torch.arange(longest, device=positions_A.device) <= positions_A.unsqueeze(1))[:, None, None]

        def attend(layer: int, q_AHK: Tensor, k_AGK: Tensor, v_AGK: Tensor) -> Tensor:
            kept = self._layer(layer, k_AGK)
            kept[0, rows_A, positions_A], kept[1, rows_A, positions_A] = k_AGK, v_AGK
            k_AGTK, v_AGTK = kept[:, :count, :longest].transpose(2, 3)
            # Treat the J query heads of a key head as J queries, so that keys and values are not copied per query head.
            q_AGJK = q_AHK.unflatten(1, (k_AGK.shape[1], -1))
            out_AGJK = F.scaled_dot_product_attention(q_AGJK, k_AGTK, v_AGTK, attn_mask=mask_A11T, scale=1.0)
            return out_AGJK.flatten(1, 2)

        return attend

    def _layer(self, layer: int, like_NGK: Tensor) -> Tensor:
        if layer == len(self.layers):
            self.layers.append(like_NGK.new_zeros(2, self.rows, self.capacity, *like_NGK.shape[1:]))
        return self.layers[layer]
