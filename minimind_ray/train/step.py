"""One optimizer step: the only copy of accumulate, normalise, sum over workers, clip, check, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_ray.data.batch import Batch
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.optim import FlatGradients


class Objective(Protocol):
    """What a stage minimises, as a sum over countable items (tokens, pairs); the step divides by the global count."""

    unit: str
    """What is counted: "token" or "pair"."""
    metrics: tuple[str, ...]
    """Names of the sums that a call returns beside the loss."""

    def count(self, pack: Pack) -> float:
        """Items of `pack` that carry loss."""
        ...

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch's items, and each of `metrics` summed likewise."""
        ...

    def examples(self, model: Transformer, batch: Batch) -> dict[str, Tensor]:
        """For each document or pair its `loss` and `count` of items, summed, and its metrics: float32 [examples]."""
        ...


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite."""

    def __init__(self, step: int, loss: float, grad_norm: float) -> None:
        super().__init__(f"step {step}: loss {loss}, gradient norm {grad_norm}")
        self.step, self.loss, self.grad_norm = step, loss, grad_norm

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[int, float, float]]:
        return NonFiniteError, (self.step, self.loss, self.grad_norm)


@dataclass(frozen=True, slots=True)
class StepResult:
    """`means`: loss and metrics per counted item; `tokens`: all workers' positions; `stop`: some host wants to end.

    `seconds`: a run's part of a step that others were trained in too.
    """

    means: dict[str, float]
    grad_norm: float
    count: float
    tokens: int
    stop: bool
    seconds: float | None = None


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; in float32 nothing is cast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)


def all_reduce_sums(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Each value summed over all workers, float64; on the host where nothing has to be asked of a GPU."""
    if not dist.is_initialized() and not any(isinstance(v, Tensor) for v in values):
        device = torch.device("cpu")
    sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def training_step(
    model: Transformer,
    objective: Objective,
    packs: Sequence[Pack],
    batches: Iterable[Batch],
    optimizer: torch.optim.AdamW,
    gradients: FlatGradients,
    *,
    step: int,
    lr: float,
    clip: float,
    device: torch.device,
    dtype: torch.dtype,
    stop: bool = False,
) -> StepResult:
    """Train on this worker's `packs` of a step, made into `batches`, each a forward and a backward pass.

    A worker without packs adds nothing.

    The loss of every batch is divided by the count over all packs of all workers, so the gradient is the one of the
    whole batch, however it was split over workers and micro-batches. `optimizer` is a fused one.

    Raises:
        NonFiniteError: on every worker, and the weights are as they were.
    """
    tokens = sum(len(p.tokens) - len(p.lengths) for p in packs)
    count, all_tokens, stops = all_reduce_sums([sum(objective.count(p) for p in packs), tokens, stop], device).tolist()
    gradients.zero()
    sums: dict[str, Tensor | float] = dict.fromkeys(("loss", *objective.metrics), 0.0)
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, dtype):
            loss, metrics = objective(model, batch)
        (loss / count).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums[name] + value
    gradients.all_reduce()
    norm, totals = gradients.clip(clip), all_reduce_sums(list(sums.values()), device)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # The optimizer looks before it updates, so that the host need not: a GPU would wait for it to do so.
    optimizer.found_inf = (~(norm.isfinite() & totals[0].isfinite())).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    grad_norm, *found = torch.cat((norm.double().unsqueeze(0), totals)).tolist()
    means = dict(zip(sums, (total / count for total in found), strict=True))
    if not (math.isfinite(grad_norm) and math.isfinite(means["loss"])):
        raise NonFiniteError(step, means["loss"], grad_norm)
    return StepResult(means, grad_norm, count, int(all_tokens), stops > 0)
