"""Read from a run directory what the rules look at: `Facts`, with one `Curve` for each metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import read_yaml
from minimind_ray.config.paths import input_path
from minimind_ray.config.stages import STAGES, StageRecord
from minimind_ray.sweep.trials import LARGEST
from minimind_ray.train.run import RunDirectory


class Curve(NamedTuple):
    """A metric over a run: `steps` int64, counted from 1, and `values` float64, which may be infinite or NaN."""

    steps: np.ndarray
    values: np.ndarray

    def between(self, first: float, last: float) -> Curve:
        """Return the part with `first` < step <= `last`."""
        inside = (self.steps > first) & (self.steps <= last)
        return Curve(self.steps[inside], self.values[inside])

    def thinned(self, most: int = 1000) -> Curve:
        """Return at most `most` points: the medians of equal blocks of neighbours, each at its last step."""
        size = -(-len(self) // most)
        if size < 2:
            return self
        first = len(self) % size
        steps, values = (each[first:].reshape(-1, size) for each in (self.steps, self.values))
        return Curve(steps[:, -1], np.median(values, axis=1))

    def __len__(self) -> int:
        return len(self.steps)


MOST_STEPS = 2**53
"""Larger numbers of steps, as in damaged files, are no exact floats."""
NOTHING = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote at one step: the prompt (None if it is not known), and what follows the prompt."""

    prompt: str | None
    text: str


@dataclass(frozen=True)
class Facts:
    """What a run's directory says about it.

    settings: the run's config, by dotted key.
    info: the content of run.json.
    curves: the metrics, by name as in metrics.jsonl; those of `timing` begin with `timing/`.
    samples: the texts of the last step with texts, which is `samples_step`.
    """

    where: str
    record: StageRecord
    settings: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    curves: Mapping[str, Curve] = field(default_factory=dict[str, Curve])
    samples: tuple[Sample, ...] = ()
    samples_step: int = 0

    def curve(self, name: str) -> Curve:
        """Return the metric of this name; an empty curve if the run has no such metric."""
        return self.curves.get(name, NOTHING)

    @property
    def steps(self) -> int:
        """The last step that the run has finished."""
        return int(self.curve("loss").steps[-1]) if len(self.curve("loss")) else 0

    @property
    def planned(self) -> int:
        """The number of steps that the run would have at its end."""
        planned = self.info.get("planned_steps")
        return planned if type(planned) is int and self.steps <= planned < MOST_STEPS else self.steps

    @property
    def lr(self) -> float:
        """The peak learning rate that the config asks for."""
        return self.number("optim.lr")

    def number(self, key: str) -> float:
        """Return a setting that is a number; NaN if it is missing or no number."""
        found = _number(self.settings.get(key))
        return math.nan if found is None else found

    @property
    def per_token(self) -> bool:
        """Whether the loss is a cross-entropy per token."""
        return self.record.rows != "pair"

    @property
    def starts_new(self) -> bool:
        """Whether the run starts from new weights."""
        return self.settings.get("init_from") is None

    def baseline(self, name: str) -> float | None:
        """Return a number from `baselines` in run.json (see data/baselines.py); None in runs that lack the number."""
        return _finite(self._baselines.get(name))

    def count(self, split: str, name: str) -> float | None:
        """Return a count of a data set from `baselines` in run.json, such as `count("val", "documents")`."""
        counts = self._baselines.get(split)
        return _finite(counts.get(name)) if isinstance(counts, dict) else None

    @property
    def _baselines(self) -> Mapping[str, Any]:
        found = self.info.get("baselines")
        return found if isinstance(found, dict) else {}


def read_facts(where: str) -> Facts:
    """Read a run by its path or URL, finished or not.

    Raises:
        UserError: the directory holds no run, or one of its files is damaged.
    """
    run = RunDirectory(input_path(where))
    config = run.file("config.yaml")
    if not config.exists():
        raise UserError(f"{where} holds no run: give a directory that minimind-ray train, run or tune has made")
    settings = dict(_flat(read_yaml(config)))
    stage = settings.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        raise UserError(f"{config}: stage is {stage!r}; known are: {', '.join(STAGES)}")
    samples, step = _samples(run, settings)
    return Facts(run.where, STAGES[stage], settings, run.info(), curves_of(run.metrics()), samples, step)


def curves_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return each metric of the lines of metrics.jsonl as a curve over the steps at which it was measured."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in _flat(line, separator="/") if 0 <= line["step"] < MOST_STEPS else ():
            if (number := _number(value)) is not None:
                found.setdefault(name, []).append((line["step"], number))
    return {
        name: Curve(np.array([step for step, _ in points], np.int64), np.array([value for _, value in points]))
        for name, points in found.items()
    }


def _samples(run: RunDirectory, settings: Mapping[str, Any]) -> tuple[tuple[Sample, ...], int]:
    last: Mapping[str, Any] = {}
    for line in run.samples():
        last = line if line["step"] else {}  # At step 0 the model has not learned yet.
    texts = last.get("samples")
    if not isinstance(texts, list):
        return (), 0
    prompts = last.get("prompts") or settings.get("eval.prompts")
    if not isinstance(prompts, list) or not prompts:
        return tuple(Sample(None, str(text)) for text in texts), int(last["step"])
    pairs = ((str(prompts[i % len(prompts)]), str(text)) for i, text in enumerate(texts))
    return tuple(Sample(prompt, text.removeprefix(prompt)) for prompt, text in pairs), int(last["step"])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else math.copysign(math.inf, value) if value == value else math.nan


def _finite(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def _flat(tree: Mapping[str, Any], at: str = "", separator: str = ".") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{at}{key}{separator}", separator)
        else:
            yield f"{at}{key}", value
