"""Validation: the objective's means over a validation set, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.pack import Pack
from minimind_ray.train.step import Objective, all_reduce_sums, autocast


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    packs: Iterable[Pack],
    *,
    token_bytes_V: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Means over all workers' packs, dropout off.

    For losses per token also `perplexity` = exp(loss) and `bits_per_byte`, the loss in bits over the bytes of text
    that the counted tokens stand for (`token_bytes_V` int32, 0 for control tokens), which compares tokenizers.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor | float] = dict.fromkeys(("count", "bytes", "loss", *objective.metrics), 0.0)
    for pack in packs:
        batch = batch_from_packs([pack]).to(device)
        with autocast(device, dtype):
            loss, metrics = objective(model, batch)
        text_bytes = (token_bytes_V[batch.targets_N] * batch.weights_N).sum()
        for name, value in {"count": objective.count(pack), "bytes": text_bytes, "loss": loss, **metrics}.items():
            sums[name] = sums[name] + value
    model.train(was_training)
    count, text_bytes, *rest = all_reduce_sums(list(sums.values()), device)
    means = {name: value / count for name, value in zip(list(sums)[2:], rest)}
    if objective.unit == "token":
        means["perplexity"] = math.exp(min(means["loss"], 700.0))
        means["bits_per_byte"] = means["loss"] * count / math.log(2) / text_bytes
    return means
