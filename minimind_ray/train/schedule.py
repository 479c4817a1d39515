"""Learning-rate schedules, as pure functions of the step number."""

from __future__ import annotations

import math

from minimind_ray.config.schema import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate in `step` (0 .. steps - 1) of a run of `steps`.

    Warm-up is linear over `config.warmup` steps; its last step has factor 1. From the next step on the factor follows
    the schedule, and reaches `config.final` in the run's last step. Without warm-up the first step has factor 1. The
    only step of a run of one step has factor 1.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    peak = max(0, config.warmup - 1)  # the last step with factor 1
    falling = steps - 1 - peak
    progress = (step - peak) / falling if falling else 0.0
    match config.name:
        case "cosine":
            return cosine(progress, config.final)
        case "linear":
            return linear(progress, config.final)
        case "wsd":
            last = min(falling, max(1, round(config.decay * steps))) if config.decay else 0
            return stable_then_decay(step, steps, last, config.final)
        case "constant":
            return 1.0


def cosine(progress: float, final: float) -> float:
    """Return half a cosine wave from 1 (progress 0) to `final` (progress 1). MiniMind has `final` 0.1."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float, final: float) -> float:
    """Return a straight line from 1 (progress 0) to `final` (progress 1)."""
    return 1 - (1 - final) * progress


def stable_then_decay(step: int, steps: int, last: int, final: float) -> float:
    """Return 1, or in the `last` steps of `steps` a straight line from 1 to `final` (WSD: Hu et al. 2024, MiniCPM)."""
    taken = max(0, step + 1 - (steps - last))
    return linear(taken / last, final) if last else 1.0


def shortfall(config: ScheduleConfig, steps: int) -> str | None:
    """Return a warning for a run of `steps` that ends before its warm-up does; None if it is long enough."""
    if config.warmup <= steps:
        return None
    return f"schedule.warmup {config.warmup} is longer than the run's {steps} steps, so optim.lr is never reached"
