"""The learning rate of a step, as pure functions of the step."""

from __future__ import annotations

import math

from minimind_ray.config.schema import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by in `step` (0 .. steps - 1) of a run of `steps`.

    Warm-up is linear over `config.warmup` steps, reaching 1 in the last of them. After it, with p in [0, 1) the part
    of the remaining steps already taken and f = `config.final`:

        cosine    f + (1 - f) (1 + cos pi p) / 2     (MiniMind's, which has f = 0.1)
        linear    1 - (1 - f) p
        constant  1
        wsd       1, then linear to f over the last `config.decay` of the run (Hu et al. 2024, MiniCPM)
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    if config.name == "cosine":
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2
    if config.name == "linear":
        return 1 - (1 - config.final) * progress
    if config.name == "wsd":
        decaying = max(0.0, step - steps * (1 - config.decay)) / max(1e-9, steps * config.decay)
        return 1 - (1 - config.final) * decaying
    return 1.0


def shortfall(config: ScheduleConfig, steps: int) -> str | None:
    """What to tell somebody whose run of `steps` ends before its warm-up does."""
    if config.warmup <= steps:
        return None
    return f"schedule.warmup {config.warmup} is longer than the run's {steps} steps, so optim.lr is never reached"
