"""Next-token prediction: cross-entropy over the tokens that carry loss.

N tokens   M of them with weight > 0   C channels   V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minimind_ray.config.schema import ModelShape
from minimind_ray.data.batch import Batch
from minimind_ray.data.columns import Column
from minimind_ray.data.pack import Pack
from minimind_ray.model.ops import log_probs
from minimind_ray.model.transformer import Transformer

MOST_LOGITS = 2**26
"""Logits held at once on a CPU, 256 MB in float32."""


def most_logits(device: torch.device) -> int:
    """Logits held at once; more are computed piece by piece, and again in the backward pass.

    On a GPU three float32 copies of them, which uncompiled code makes, take an eighth of its memory.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 96
    return MOST_LOGITS


def token_log_probs(model: Transformer, hidden_NC: Tensor, batch: Batch) -> Tensor:
    """log p(target | what precedes it in its document), in nats, of the tokens with weight > 0: float32 [M].

    `hidden_NC` is what the model made of the batch's tokens.
    """
    count = len(batch.counted_M)
    extra = model.stable_size(count) - count
    if count == len(hidden_NC):
        hidden_MC, targets_M = F.pad(hidden_NC, (0, 0, 0, extra)), F.pad(batch.targets_N, (0, extra))
    else:
        counted_M = F.pad(batch.counted_M, (0, extra))
        hidden_MC, targets_M = (x.index_select(0, counted_M) for x in (hidden_NC, batch.targets_N))
    step = max(1, most_logits(hidden_NC.device) // model.shape.vocab_size)
    if len(targets_M) <= step:
        return _log_probs(model, hidden_MC, targets_M)[:count]
    pieces = zip(hidden_MC.split(step), targets_M.split(step))
    parts = [cast(Tensor, checkpoint(_log_probs, model, *piece, use_reentrant=False)) for piece in pieces]
    return torch.cat(parts)[:count]


def _log_probs(model: Transformer, hidden_MC: Tensor, targets_M: Tensor) -> Tensor:
    return log_probs(model.project(hidden_MC), targets_M)


def sequence_log_probs(model: Transformer, hidden_NC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each document's weighted tokens, summed, in nats: float32 [D]; and how many they are, [D]."""
    logp_M = token_log_probs(model, hidden_NC, batch)
    bounds_D1 = batch.bounds_D1.to(batch.counted_M.device, torch.long, non_blocking=True)
    counts_D = torch.searchsorted(batch.counted_M, bounds_D1).diff()
    return torch.segment_reduce(logp_M, "sum", lengths=counts_D), counts_D


class CausalLM:
    """Summed cross-entropy; with experts, in training, plus the routers' load-balancing loss per counted token."""

    unit = "token"

    def __init__(self, shape: ModelShape) -> None:
        self.metrics: tuple[str, ...] = ("aux",) if shape.num_experts else ()

    def count(self, pack: Pack) -> float:
        """Tokens of `pack` that carry loss."""
        return pack.counted

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch's counted tokens; `aux` is the part of it that balances experts."""
        loss = -token_log_probs(model, model(batch.tokens_N, batch.bounds_D1), batch).sum()
        if not self.metrics:
            return loss, {}
        aux = model.aux_loss() * len(batch.counted_M)
        return loss + aux, {"aux": aux.detach()}

    def examples(self, model: Transformer, batch: Batch) -> dict[str, Tensor]:
        """Each document's `loss`, summed over its counted tokens without `aux`, and their `count`: float32 [D]."""
        return self.of_documents(*self.log_probs(model, batch), batch.columns)

    def log_probs(self, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each document's log-probability, summed over its counted tokens, in nats, and how many they are: [D]."""
        return sequence_log_probs(model, model(batch.tokens_N, batch.bounds_D1), batch)

    def of_documents(self, logp_D: Tensor, counts_D: Tensor, columns: Mapping[Column, Tensor]) -> dict[str, Tensor]:
        """As `examples`, of what `log_probs` gave."""
        return {"loss": -logp_D, "count": counts_D.float()}
