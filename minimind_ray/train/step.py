"""One optimizer step: accumulate gradients, sum them over workers, clip, check for non-finite values, update.

Every stage trains with `training_step`; a stage brings only its `Objective`. (Fused training, in fused.py, has its own
step, because it updates many runs at once.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.data.batch import Batch
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.optim import AdamW, FlatGradients


class Objective(Protocol):
    """The loss of a stage, as a sum over countable items (tokens or pairs). The step divides it by the global count."""

    unit: str
    """The kind of item: "token" or "pair"."""
    metrics: tuple[str, ...]
    """Names of the metrics that a call returns besides the loss."""

    def count(self, pack: Pack) -> float:
        """Return the number of items of `pack` that carry loss."""
        ...

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the batch's items, and each of `metrics`, summed in the same way."""
        ...

    def examples(self, model: Transformer, batch: Batch) -> dict[str, Tensor]:
        """Return for each document or pair its summed `loss`, the `count` of its items, and its metrics.

        All are float32 [examples].
        """
        ...


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite."""

    def __init__(self, step: int, loss: float, grad_norm: float) -> None:
        super().__init__(f"step {step}: loss {loss}, gradient norm {grad_norm}")
        self.step, self.loss, self.grad_norm = step, loss, grad_norm

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[int, float, float]]:
        return NonFiniteError, (self.step, self.loss, self.grad_norm)


class DivergedError(UserError):
    """Training ended at a step whose loss or gradient is not finite."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step over all workers.

    `means` has the loss and the metrics per counted item. `tokens` is the number of trained positions. `stop`: the host
    of at least one worker wants the run to end. `seconds` is this run's share of a step that trained several runs.
    """

    means: dict[str, float]
    grad_norm: float
    count: float
    tokens: int
    stop: bool
    seconds: float | None = None


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context manager in which matrix products are in `dtype`; with float32 nothing is cast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)


def all_reduce_sums(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Return each value summed over all workers, float64.

    If there is one worker and no value is a tensor, the result is on the CPU, so that the caller need not wait for a
    GPU.
    """
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
    optimizer: AdamW,
    gradients: FlatGradients,
    *,
    step: int,
    lr: float,
    clip: float,
    device: torch.device,
    dtype: torch.dtype,
    stop: bool = False,
) -> StepResult:
    """Train one step on this worker's `packs`; each of the `batches` made from them is one forward and backward pass.

    The loss of each batch is divided by the count over all packs of all workers. So the gradient does not depend on how
    the step's packs are split over workers and micro-batches. A worker without packs adds nothing.

    Raises:
        NonFiniteError: the loss or the gradient is not finite. It is raised on every worker; no weight has changed.
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
    optimizer.lr = lr
    # The optimizer itself skips the update if this is 1. A check by the host would make a GPU wait.
    optimizer.step(found_inf=(~(norm.isfinite() & totals[0].isfinite())).float())
    grad_norm, *found = torch.cat((norm.double().unsqueeze(0), totals)).tolist()
    means = dict(zip(sums, (total / count for total in found), strict=True))
    if not (math.isfinite(grad_norm) and math.isfinite(means["loss"])):
        raise NonFiniteError(step, means["loss"], grad_norm)
    return StepResult(means, grad_norm, count, int(all_tokens), stops > 0)
