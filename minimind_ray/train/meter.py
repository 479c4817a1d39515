"""Speed of a training run: tokens per second, MFU and the time left."""

from __future__ import annotations

import time

import numpy as np
import torch

from minimind_ray.config.schema import ModelShape
from minimind_ray.data.pack import Pack
from minimind_ray.train.context import Context
from minimind_ray.train.throughput import measure_matmul_flops, training_flops_per_token


class Meter:
    """Measures steps: tokens per second, and the share of the machine's matrix-product rate in use (MFU).

    Call `restart` after a validation, so that its time is left out. `frozen`: the base's weights are not trained.
    """

    def __init__(self, shape: ModelShape, context: Context, dtype: torch.dtype, *, frozen: bool) -> None:
        self.shape, self.frozen = shape, frozen
        self.peak = measure_matmul_flops(context.device, dtype) * context.world_size
        self.seconds_per_step: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin timing now."""
        self.start = time.perf_counter()

    def read(self, tokens: int, packs: list[Pack], steps_left: int, seconds: float | None = None) -> dict[str, float]:
        """Return the timing of the step since the last call; `seconds_left` is an estimate for `steps_left` steps.

        `tokens` is the number of all workers' tokens. `packs` are this worker's packs; the lengths of their documents
        give the cost of attention. `seconds` replaces the measured time if several runs were trained in one step.
        """
        now = time.perf_counter()
        seconds, self.start = now - self.start if seconds is None else seconds, now
        # A moving average. The first step is slow (warm-up); its weight decreases with every later step.
        before = self.seconds_per_step
        self.seconds_per_step = seconds if before is None else 0.9 * before + 0.1 * seconds
        lengths = np.concatenate([p.lengths for p in packs]) if packs else np.ones(1)
        mean_context = float((lengths.astype(float) ** 2).sum() / lengths.sum() / 2)
        flops = tokens * training_flops_per_token(self.shape, mean_context, self.frozen)
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self.peak,
            "seconds_left": self.seconds_per_step * steps_left,
        }
