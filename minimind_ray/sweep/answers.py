"""What the trials of a sweep answer to the same prompts, at the start and at the end of training (train/answers.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minimind_ray.sweep.table import Comparison, Row
from minimind_ray.sweep.trials import Trial


@dataclass(frozen=True)
class PointAnswer:
    """The newest answer of a point: of its `trial`, after `step` steps. `start` is its answer before the first step."""

    row: Row
    trial: Trial
    step: int
    text: str
    start: str | None


@dataclass
class PromptAnswers:
    """A prompt, and the points' answers to it in the order of the table. Earlier versions did not note the prompts."""

    prompt: str
    points: list[PointAnswer] = field(default_factory=list[PointAnswer])

    @property
    def start(self) -> str | None:
        """The answer before training, if it was the same for all points."""
        starts = {point.start for point in self.points}
        return starts.pop() if len(starts) == 1 else None


def answers_of(comparison: Comparison) -> list[PromptAnswers]:
    """Return all prompts with the answers of each point's first trial that counts, or else its first with answers."""
    found: dict[tuple[str, int], PromptAnswers] = {}
    for row in comparison.rows:
        trial = next((t for t in (*row.compared[:1], *row.trials) if t.samples and t.samples[-1]["step"]), None)
        if trial is None:
            continue
        first, last = trial.samples[0], trial.samples[-1]
        starts = _by_prompt(first) if first["step"] == 0 else {}
        for key, text in _by_prompt(last).items():
            point = PointAnswer(row, trial, last["step"], text, starts.get(key))
            found.setdefault(key, PromptAnswers(key[0])).points.append(point)
    return list(found.values())


def answer_records(answers: Sequence[PromptAnswers]) -> list[dict[str, Any]]:
    """Return a record per prompt: the prompt, the answer before training, and the answer of each point by its label.

    All records have the same keys.
    """
    labels = dict.fromkeys(point.row.label for each in answers for point in each.points)
    records: list[dict[str, Any]] = []
    for each in answers:
        texts = {point.row.label: point.text for point in each.points}
        records.append({"prompt": each.prompt, "start": each.start} | {label: texts.get(label) for label in labels})
    return records


def _by_prompt(line: dict[str, Any]) -> dict[tuple[str, int], str]:
    """Return the answers of a line of samples.jsonl by their prompt, and by how often the prompt came before."""
    samples: list[str] = line["samples"]
    prompts: list[str] = line.get("prompts") or [""] * len(samples)
    seen, found = Counter[str](), dict[tuple[str, int], str]()
    for prompt, sample in zip(prompts, samples):
        found[prompt, seen[prompt]] = sample.removeprefix(prompt).strip("\n")
        seen[prompt] += 1
    return found
