"""Next-token prediction, the objective of pretrain, sft and lora: cross-entropy over the tokens that carry loss.

    N tokens   M tokens with weight > 0 ("counted" tokens)   C channels   V vocabulary   D documents

Other objectives compute their log-probabilities with this module's functions, too.
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

MAX_LOGITS = 2**26
"""Maximum number of logits in memory at once on a CPU: 256 MB in float32."""


def max_logits(device: torch.device) -> int:
    """Return how many logits may be in memory at once.

    More logits are computed piece by piece, and a second time in the backward pass. On a GPU, with this limit, three
    float32 copies of the logits, which uncompiled code makes, take an eighth of the memory.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 96
    return MAX_LOGITS


def token_log_probs(model: Transformer, hidden_NC: Tensor, batch: Batch) -> Tensor:
    """Return the log-probability, in nats, of each counted token's target given the document so far: float32 [M].

    `hidden_NC` are the model's hidden states for the batch's tokens.
    """
    count = len(batch.counted_M)
    extra = model.stable_size(count) - count
    if count == len(hidden_NC):
        hidden_MC, targets_M = F.pad(hidden_NC, (0, 0, 0, extra)), F.pad(batch.targets_N, (0, extra))
    else:
        counted_M = F.pad(batch.counted_M, (0, extra))
        hidden_MC, targets_M = (x.index_select(0, counted_M) for x in (hidden_NC, batch.targets_N))
    step = max(1, max_logits(hidden_NC.device) // model.shape.vocab_size)
    if len(targets_M) <= step:
        return _log_probs(model, hidden_MC, targets_M)[:count]
    pieces = zip(hidden_MC.split(step), targets_M.split(step))
    parts = [cast(Tensor, checkpoint(_log_probs, model, *piece, use_reentrant=False)) for piece in pieces]
    return torch.cat(parts)[:count]


def _log_probs(model: Transformer, hidden_MC: Tensor, targets_M: Tensor) -> Tensor:
    return log_probs(model.project(hidden_MC), targets_M)


def sequence_log_probs(model: Transformer, hidden_NC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each document's log-probability in nats, summed over its counted tokens, and their number: [D]."""
    logp_M = token_log_probs(model, hidden_NC, batch)
    bounds_D1 = batch.bounds_D1.to(batch.counted_M.device, torch.long, non_blocking=True)
    counts_D = torch.searchsorted(batch.counted_M, bounds_D1).diff()
    return torch.segment_reduce(logp_M, "sum", lengths=counts_D), counts_D


class CausalLM:
    """Summed cross-entropy. In training, models with experts add the routers' load-balancing loss per counted token."""

    unit = "token"

    def __init__(self, shape: ModelShape) -> None:
        self.metrics: tuple[str, ...] = ("aux",) if shape.num_experts else ()

    def count(self, pack: Pack) -> float:
        """Return the number of tokens of `pack` that carry loss."""
        return pack.counted

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's counted tokens, and its part `aux` that balances experts."""
        loss = -token_log_probs(model, model(batch.tokens_N, batch.bounds_D1), batch).sum()
        if not self.metrics:
            return loss, {}
        aux = model.aux_loss() * len(batch.counted_M)
        return loss + aux, {"aux": aux.detach()}

    def examples(self, model: Transformer, batch: Batch) -> dict[str, Tensor]:
        """Return each document's `loss`, summed over counted tokens without `aux`, and their `count`: float32 [D]."""
        return self.of_documents(*self.log_probs(model, batch), batch.columns)

    def log_probs(self, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each document's log-probability in nats, summed over its counted tokens, and their number: [D]."""
        return sequence_log_probs(model, model(batch.tokens_N, batch.bounds_D1), batch)

    def of_documents(self, logp_D: Tensor, counts_D: Tensor, columns: Mapping[Column, Tensor]) -> dict[str, Tensor]:
        """Return the same as `examples`, computed from the result of `log_probs`."""
        return {"loss": -logp_D, "count": counts_D.float()}
