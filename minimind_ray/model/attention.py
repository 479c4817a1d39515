"""Causal attention within each document of a ragged batch.

    N tokens   D documents   H query heads   G key/value heads, each shared by H / G query heads   K head size

`Layout` holds what depends on the documents' bounds alone; it is made once per batch and used by every layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout:
    """Where the documents of one batch lie: `bounds_D1` int32 on the host, `device` where the tokens are.

    `positions_N` int64 counts from 0 in every document.
    """

    def __init__(self, bounds_D1: Tensor, device: torch.device) -> None:
        lengths_D = bounds_D1.diff().long()
        starts_N = bounds_D1[:-1].long().repeat_interleave(lengths_D)
        self.lengths: list[int] = lengths_D.tolist()
        self.positions_N = (torch.arange(len(starts_N)) - starts_N).to(device)
        self.bounds_D1 = bounds_D1.to(device) if device.type == "cuda" else bounds_D1

    def attend(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Softmax attention (Vaswani et al. 2017, eq. 1) of each token over its document up to itself: [N, H, K]."""
        if q_NHK.device.type == "cuda":
            return varlen_attention(q_NHK, k_NGK, v_NGK, self)
        return per_document_attention(q_NHK, k_NGK, v_NGK, self)


def per_document_attention(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layout: Layout) -> Tensor:
    """One scaled-dot-product call per document."""
    repeats = q_NHK.shape[1] // k_NGK.shape[1]
    k_NHK, v_NHK = (x.repeat_interleave(repeats, dim=1) for x in (k_NGK, v_NGK))
    documents = zip(*(x.split(layout.lengths) for x in (q_NHK, k_NHK, v_NHK)))
    outs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in document), is_causal=True)
        for document in documents
    ]
    return torch.cat([out.squeeze(0).transpose(0, 1) for out in outs])


def varlen_attention(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layout: Layout) -> Tensor:
    """torch's variable-length flash attention: CUDA, bfloat16 or float16."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(layout.lengths)
    out = varlen_attn(
        q_NHK, k_NGK, v_NGK, layout.bounds_D1, layout.bounds_D1, longest, longest,
        window_size=(-1, 0), enable_gqa=True,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out
