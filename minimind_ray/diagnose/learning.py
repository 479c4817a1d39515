"""Rules about the training curve: baselines, the learning rate, warm-up, clipping, over-fitting and repeated data.

Each rule compares differences with the scatter of the curve itself (see robust.py), and says nothing about runs that
are too short to tell.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from minimind_ray.diagnose.facts import Curve, Facts
from minimind_ray.diagnose.finding import Finding, rounded
from minimind_ray.diagnose.robust import Level, difference, level, scatter, smooth
from minimind_ray.sweep.trials import NOT_FINITE

LEAST_STEPS = 50
"""Fewer steps do not show the shape of a curve: a tenth of them, from which levels are taken, is 5 values."""
LEAST_BASELINE_STEPS = 100
"""A new model needs some dozens of steps to learn how often each token occurs, at any good learning rate."""
LARGEST_RATE = 0.01
"""No AdamW run of a transformer needs a higher rate."""
SURE = 4.0
"""How many standard errors a difference must have. Neighbouring steps are not independent, so 2 would be too few."""


class Course(NamedTuple):
    """The levels of a curve in its first and last tenth, and the change between them."""

    start: Level
    end: Level
    change: Level


def course(curve: Curve) -> Course:
    """Return the course of a curve of at least 5 values."""
    tenth = max(5, len(curve) // 10)
    first, last = curve.values[:tenth], curve.values[-tenth:]
    return Course(level(first), level(last), difference(first, last))


def loss_not_finite(facts: Facts) -> Finding | None:
    """Find a loss or gradient that is infinite or NaN, in training or in a validation."""
    step = None
    for name in ("loss", "grad_norm", "val/loss"):
        curve = facts.curve(name)
        bad = curve.steps[~np.isfinite(curve.values)]
        if len(bad) and (step is None or bad[0] < step):
            step = int(bad[0])
    if step is None and NOT_FINITE.search(str(facts.info.get("error"))):
        step = facts.steps + 1
    if step is None:
        return None
    rates = facts.curve("lr")
    rate = float(rates.values[rates.steps <= step][-1]) if len(rates) and rates.steps[0] <= step else facts.lr
    evidence = {"step": step, "rate": rate}
    return Finding("loss_not_finite", "error", evidence, (step,), "optim.lr", rounded(min(rate / 3, LARGEST_RATE)))


def above_uniform(facts: Facts) -> Finding | None:
    """Find a model that ends worse than one that gives each token the same probability."""
    uniform, loss = facts.baseline("uniform"), facts.curve("loss")
    if not facts.per_token or uniform is None or len(loss) < LEAST_STEPS:
        return None
    end = course(loss).end
    # New weights begin within a percent or two of ln V.
    if end.value < 1.02 * uniform + SURE * end.error:
        return None
    return Finding("above_uniform", "error", {"loss": end.value, "uniform": uniform}, (), "optim.lr")


def above_unigram(facts: Facts) -> Finding | None:
    """Find a model that ends no better than one that knows only how often each token occurs."""
    unigram, uniform, loss = facts.baseline("unigram"), facts.baseline("uniform"), facts.curve("loss")
    if not facts.per_token or unigram is None or uniform is None or len(loss) < LEAST_BASELINE_STEPS:
        return None
    validations = facts.curve("val/loss")
    end = float(validations.values[-1]) if len(validations) else course(loss).end.value
    # 0.05 nats: the baseline is computed on other tokens than the loss.
    if not unigram - 0.05 < end < 1.02 * uniform:
        return None
    evidence = {"loss": end, "unigram": unigram, "uniform": uniform, "steps": facts.steps}
    return Finding("above_unigram", "error", evidence, (), "optim.lr")


def rate_too_high(facts: Facts) -> Finding | None:
    """Find a loss that rises above its start, or that ends far above the lowest level it had reached."""
    loss = facts.curve("loss").thinned()
    if len(loss) < LEAST_STEPS or not np.isfinite(loss.values).all():
        return None
    whole = course(loss)
    width = max(5, len(loss) // 20) | 1
    line = smooth(loss.values, width)
    error = 1.25 * scatter(loss.values) / math.sqrt(width)
    top, bottom = int(line[: len(line) * 2 // 3].argmax()), int(line[: len(line) * 9 // 10].argmin())
    begin, first = float(facts.curve("loss").values[0]), float(np.median(loss.values[:3]))
    # The first loss comes before any step. If the next ones are far higher, the first steps made it jump.
    jumped = first > begin + SURE * scatter(facts.curve("loss").values)
    first = begin if jumped else first
    low = float(line[bottom])
    climbed, rose = line[top] - first, whole.end.value - low
    # A tenth of the level: a rise that a reader sees in a plot. The start has few values, so its level is not sure.
    if (jumped or top > 1) and climbed > max(2 * SURE * error, 0.1 * abs(first)):
        step, before, after = int(loss.steps[top]), first, float(line[top])
    elif rose > max(SURE * math.hypot(error, whole.end.error), 0.1 * abs(low), 0.05 * (first - low)):
        step, before, after = int(loss.steps[bottom]), low, whole.end.value
    else:
        return None
    rate = rate_at(facts, step)
    severity = "error" if whole.end.value >= first else "warning"
    evidence = {"step": step, "before": before, "after": after, "end": whole.end.value, "rate": rate}
    return Finding("rate_too_high", severity, evidence, (step,), "optim.lr", rounded(min(facts.lr / 10, LARGEST_RATE)))


def rate_too_low(facts: Facts) -> Finding | None:
    """Find a loss that hardly moves, or that falls along a straight line to the end, far from what can be reached.

    The line is drawn over the sum of the learning rates so far, so that the schedule does not bend it.
    """
    loss, rates = facts.curve("loss"), facts.curve("lr")
    if not facts.per_token or len(loss) < LEAST_STEPS or len(rates) != len(loss):
        return None
    start, end, change = course(loss)
    fall = -change.value
    if fall > 0.25 * start.value:  # A quarter of the loss: whatever the shape, the model has learned much.
        return None
    if abs(fall) + SURE / 2 * change.error < 0.02 * start.value:  # Flat, and no scatter hides a fall.
        ratio = 1.0
    else:
        done = np.cumsum(rates.values) / rates.values.sum()
        parts = [loss.values[(done > low) & (done <= low + 0.2)] for low in (0.0, 0.4, 0.8)]
        if min(map(len, parts)) < 5:
            return None
        first, second = difference(parts[0], parts[1]), difference(parts[1], parts[2])
        # A healthy curve bends: its second half falls by a third of its first half or less.
        if -second.value < SURE * second.error or second.value > 0.6 * first.value:
            return None
        ratio = second.value / first.value if first.value else 1.0
    unigram = facts.baseline("unigram")
    if facts.starts_new and unigram is not None and end.value < unigram - 0.05:
        return None
    evidence = {"start": start.value, "end": end.value, "steps": facts.steps, "rate": facts.lr, "ratio": ratio}
    return Finding("rate_too_low", "warning", evidence, (), "optim.lr", rounded(10 * facts.lr))


def plateau(facts: Facts) -> Finding | None:
    """Find a loss that fell, and then stayed level for the second half of the run or longer."""
    loss = facts.curve("loss").thinned()
    if len(loss) < 2 * LEAST_STEPS or not np.isfinite(loss.values).all():
        return None
    start, end, change = course(loss)
    half = loss.values[len(loss) // 2 :]
    late = difference(half[: len(half) // 2], half[len(half) // 2 :])
    fallen = -change.value
    # Level: even the largest fall that the scatter allows is 1 % of the fall of the whole run.
    if fallen < SURE * change.error or abs(late.value) + SURE / 2 * late.error > 0.01 * fallen:
        return None
    validations = facts.curve("val/loss")
    if len(validations) > 3:
        middle = len(validations) // 2
        if validations.values[middle:].min() < 0.99 * validations.values[:middle].min():
            return None
    line = smooth(loss.values, max(5, len(loss) // 20) | 1)
    since = int(loss.steps[np.argmax(line < end.value + 0.02 * fallen)])
    evidence = {"since": since, "loss": end.value, "start": start.value, "steps": facts.steps}
    return Finding("plateau", "note", evidence, (since,), "train.max_steps", since)


def spikes(facts: Facts) -> Finding | None:
    """Find steps at which loss and gradient norm jump far out of the scatter, after the first tenth of the run."""
    loss, norm, rates = facts.curve("loss"), facts.curve("grad_norm"), facts.curve("lr")
    if len(loss) < LEAST_STEPS or not len(loss) == len(norm) == len(rates) or not np.isfinite(loss.values).all():
        return None
    line, usual = smooth(loss.values, 15), smooth(norm.values, 15)
    line = np.maximum(line, np.concatenate([line[:8], line[:-8]]))  # Where the curve is steep, the values before count.
    # 8 sigma, because hard batches make heavy tails; a twentieth of the level, because some curves hardly scatter.
    high = loss.values - line > np.maximum(8 * scatter(loss.values), 0.05 * np.abs(line))
    steep = norm.values > 2 * usual
    steep |= np.roll(steep, 1) | np.roll(steep, -1)
    found = np.flatnonzero(high & steep & (np.arange(len(loss)) > len(loss) // 10))
    if not len(found):
        return None
    starts = found[np.diff(found, prepend=-9) > 3]  # Steps close to each other are one spike.
    worst = int(found[np.argmax((loss.values - line)[found])])
    if len(starts) < 2 and loss.values[worst] < 1.3 * line[worst]:  # A single small spike may be a hard batch.
        return None
    steps = tuple(int(step) for step in loss.steps[starts])
    evidence = {
        "count": len(starts), "step": int(loss.steps[worst]), "before": float(line[worst]),
        "loss": float(loss.values[worst]), "rate": float(rates.values[worst]),
    }  # fmt: skip
    return Finding("spikes", "warning", evidence, steps, "optim.lr", rounded(facts.lr / 2))


def warmup_too_long(facts: Facts) -> Finding | None:
    """Find a warm-up that takes more than a quarter of the run, or is longer than the run."""
    warmup, planned = facts.number("schedule.warmup"), facts.planned
    # Usual are 1 to 10 %. Short runs are tests.
    if planned < 20 or not planned / 4 < warmup < math.inf:
        return None
    severity = "warning" if warmup >= planned else "note"
    evidence = {"warmup": int(warmup), "steps": planned, "share": min(1.0, warmup / planned)}
    return Finding("warmup_too_long", severity, evidence, (), "schedule.warmup", max(1, planned // 20))


def clipped(facts: Facts) -> Finding | None:
    """Find a gradient norm far above `optim.clip` in nearly every step after the beginning."""
    clip, norm, warmup = facts.number("optim.clip"), facts.curve("grad_norm"), facts.number("schedule.warmup")
    if not clip > 0 or len(norm) < LEAST_STEPS:
        return None
    later = norm.between(max(len(norm) // 10, warmup if warmup > 0 else 0), facts.steps).values
    if len(later) < LEAST_STEPS // 2:
        return None
    share, usual = float((later > clip).mean()), float(np.median(later))
    # AdamW divides by the gradient's own size, so clipping by a factor that changes little does little harm. The
    # gradient of a preference loss scales with beta (IPO's with 1 / beta): 20 is a usual norm there.
    if share < 0.95 or usual < (5 if facts.per_token else 100) * clip:
        return None
    evidence = {"share": share, "norm": usual, "clip": clip, "times": usual / clip}
    return Finding("clipped", "warning", evidence, (), "optim.clip", rounded(2 * usual))


def overfitting(facts: Facts) -> Finding | None:
    """Find a validation loss that turns up while the training loss goes on falling."""
    validations, loss = facts.curve("val/loss"), facts.curve("loss")
    if len(validations) < 4 or not np.isfinite(validations.values).all():
        return None
    best = int(validations.values.argmin())
    later = validations.values[best + 1 :]
    if len(later) < 2:
        return None
    lowest, last, step = float(validations.values[best]), float(later[-1]), int(validations.steps[best])
    # 3 %: the validation set is the same each time, so a rise is not due to other rows.
    if last < 1.03 * lowest or not (np.diff(later[-2:]) > -0.01 * lowest).all():
        return None
    window = max(5, int(validations.steps[1] - validations.steps[0]))
    before, after = loss.between(step - window, step), loss.between(facts.steps - window, facts.steps)
    if min(len(before), len(after)) < 5:
        return None
    fall = difference(before.values, after.values)
    if -fall.value < SURE / 2 * fall.error or fall.value >= 0:
        return None
    train_before, train_after = level(before.values).value, level(after.values).value
    evidence = {"step": step, "lowest": lowest, "last": last, "before": train_before, "after": train_after}
    return Finding("overfitting", "warning", evidence, (step, facts.steps), "train.max_steps", step)


def epoch_jump(facts: Facts) -> Finding | None:
    """Find a training loss, but no validation loss, that falls where the data begin again: rows known by heart."""
    loss, epoch = facts.curve("loss"), facts.curve("epoch")
    if len(epoch) != len(loss):
        return None
    largest: Finding | None = None
    for at in np.flatnonzero(np.diff(epoch.values) > 0) + 1:
        length = int((epoch.values == epoch.values[at - 1]).sum())
        window = min(20, length // 4)
        # Fewer than 5 steps on each side: an epoch of under 20 steps has no boundary that a curve could show.
        if window < 5 or at + window > len(loss):
            continue
        earlier, before, after = (loss.values[at + i * window : at + (i + 1) * window] for i in (-2, -1, 0))
        drift, jump = difference(earlier, before).value, difference(before, after)
        fall, was = -jump.value, level(before).value
        # Three times the fall of the steps before, so that a steep curve is no jump.
        if fall < max(SURE * jump.error, 0.08 * was, 3 * -drift) or still_learns(facts, int(loss.steps[at])):
            continue
        evidence = {"step": int(loss.steps[at]), "before": was, "after": was - fall, "epoch": int(epoch.values[at]) + 1}
        if largest is None or fall > largest.evidence["before"] - largest.evidence["after"]:
            largest = Finding("epoch_jump", "note", evidence, (int(loss.steps[at]),), "train.epochs")
    return largest


def still_learns(facts: Facts, step: int) -> bool:
    """Whether the validation loss falls by 3 % or more after a step: then the model learns more than its rows."""
    validations = facts.curve("val/loss")
    before, after = validations.between(0, step), validations.between(step, facts.steps)
    return bool(len(before) and len(after) and after.values.min() < 0.97 * before.values[-1])


def rate_at(facts: Facts, step: int) -> float:
    """Return the learning rate of a step."""
    rates = facts.curve("lr")
    return float(rates.values[np.searchsorted(rates.steps, step).clip(0, len(rates) - 1)]) if len(rates) else facts.lr
