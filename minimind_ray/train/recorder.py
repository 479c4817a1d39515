"""Write all records of a run, on rank 0: metrics, samples, checkpoints, trackers and the final state in run.json.

The training loop (loop.py) decides when to write; the recorder knows where and in which order.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.model.ops import compiled
from minimind_ray.model.transformer import Transformer
from minimind_ray.tasks.items import FILE as TASKS
from minimind_ray.tasks.items import Item, write_items
from minimind_ray.track.registry import Trackers
from minimind_ray.track.tracker import TrackedRun
from minimind_ray.train.answers import Answers
from minimind_ray.train.card import finish
from minimind_ray.train.checkpoint import optimizer_tensors, save_resume
from minimind_ray.train.evaluate import Evaluation, drop_stale
from minimind_ray.train.optim import AdamW
from minimind_ray.train.progress import Progress
from minimind_ray.train.run import START, VALIDATION, RunDirectory
from minimind_ray.train.step import DivergedError
from minimind_ray.train.writer import CheckpointWriter, HostCopy, Weights, Write

ALERT_SECONDS = 20.0
"""How long the trackers of a lost run may take to open and to close."""


class Recorder:
    """Writes one run's directory and its trackers, on rank 0 only.

    The training loop owns `progress`; the recorder updates its `best` and `best_value`.
    """

    def __init__(self, directory: RunDirectory, progress: Progress, config: Config) -> None:
        """Prepare the directory for the steps after `progress`."""
        self.directory, self.progress, self.config = directory, progress, config
        directory.forget_after(progress.step)
        # The best checkpoint is gone if a better one replaced it and was then found damaged.
        if progress.best and directory.checkpoint_path(progress.best) not in directory.checkpoints():
            progress.best, progress.best_value = None, math.inf
        drop_stale(directory.path / VALIDATION, progress.best_value, [directory.path / TASKS])
        self.writer = CheckpointWriter(directory, config.checkpoint.keep, (progress.best, progress.best_value))
        self.optimizer_copy = HostCopy()
        self.trackers: Trackers | None = None
        self.base: Path | None = None

    def begin(self, *, steps: int, cpu: str | None, pass_tokens: int | None, base: Path | None) -> None:
        """Note in run.json how the run computes, and open the trackers.

        `steps` is the planned number of steps. `cpu` describes the CPU's arithmetic (see `arithmetic`); None if a GPU
        computes. `base` is the directory of the model that the run starts from, for the trackers and the model card.
        """
        config, directory, self.base = self.config, self.directory, base
        if self.progress.step:
            _warn_of_other_arithmetic(directory.info().get("cpu"), cpu)
        directory.update(planned_steps=steps, compiled=compiled(), pass_tokens=pass_tokens, cpu=cpu)
        here = config.model_copy(update={"out": str(directory.path)})
        self.trackers = Trackers(TrackedRun(here, directory.info(), directory.lines, base))
        if self.trackers.identities:
            directory.update(**self.trackers.identities)

    @property
    def stop_requested(self) -> bool:
        """Whether a user asked one of the trackers to stop the run."""
        return self.trackers is not None and self.trackers.stop_requested

    def warning(self) -> str | None:
        """Return a problem with checkpoints or the object store since the last call, or None."""
        return self.writer.pop_warning()

    def log_start(self, answers: Callable[[], Answers | None]) -> None:
        """Write the answers of the model before the first step, unless an earlier process of the run has done so."""
        if any(self.directory.samples()):
            return
        if found := answers():
            self._append(0, found)
            if self.trackers:
                self.trackers.log(START, found.texts)

    def log(self, metrics: Mapping[str, Any], answers: Answers | None) -> None:
        """Write one line of metrics.jsonl, and the answers of the same step."""
        self.directory.append("metrics.jsonl", dict(metrics))
        if answers:
            self._append(metrics["step"], answers)
        if self.trackers:
            self.trackers.log(metrics, answers.texts if answers else [])

    def _append(self, step: int, answers: Answers) -> None:
        self.directory.append("samples.jsonl", {"step": step, "samples": answers.texts, "prompts": answers.prompts})

    def save(
        self,
        weights: Weights,
        model: Transformer,
        optimizer: AdamW,
        evaluation: Evaluation | None,
        items: Sequence[Item] | None,
        *,
        validates: bool,
        wait: bool,
    ) -> None:
        """Begin to write a checkpoint of this step; with `wait`, return when it is written.

        `items` are the results of benchmarks at this step, None if they did not run. In a run that `validates`, the
        checkpoint with the lowest validation loss is the best. In other runs, the last checkpoint is the best.
        """
        progress = self.progress
        # Wait for the previous write; if it failed, fall back to the earlier best.
        progress.best, progress.best_value = self.writer.settle()
        value = evaluation.means["loss"] if evaluation else math.nan if validates else -float(progress.step)
        better = value <= progress.best_value
        if better:
            progress.best, progress.best_value = progress.checkpoint, value
        results: dict[str, Write | None] = {}
        if evaluation:
            tasks = None if items is None else partial(write_items, items=items)
            results = {VALIDATION: evaluation.write, TASKS: tasks}
        tensors = self.optimizer_copy(optimizer_tensors(model, optimizer))
        self.writer.save(
            progress.checkpoint,
            partial(_write, weights.snapshot(), tensors, asdict(progress)),
            (progress.best, progress.best_value),
            results if better else {},
        )
        if wait:
            self.writer.settle()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written."""
        self.writer.settle()

    def end(self, state: str) -> None:
        """Write the run's last lines, its `state`, and its result with the model card; close the trackers.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        progress, directory = self.progress, self.directory
        self.writer.close()
        directory.write_lines()
        checkpoints = directory.checkpoints()
        best = directory.checkpoint_path(progress.best) if progress.best else next(reversed(checkpoints), None)
        result = best and str(best.relative_to(directory.path))
        finish(directory, state=state, steps=progress.step, tokens=progress.tokens, result=result, base=self.base)
        if self.trackers:
            self.trackers.finish(state, best)

    def fail(self, error: BaseException) -> None:
        """Alert the user of the `error`, mark the run as failed in the trackers that are still open, and close them."""
        if self.trackers:
            if isinstance(error, Exception):  # Not at a second Ctrl-C.
                kind = "not-finite" if isinstance(error, DivergedError) else "failed"
                self.trackers.alert(kind, f"{self.directory.where}: {str(error) or type(error).__name__}")
            self.trackers.finish("failed")


def alert_of_lost_process(directory: RunDirectory, config: Config, error: str) -> None:
    """Alert the user of a run whose process was lost, so that its own `Recorder` could not, if the config asks for it.

    The run's trackers are opened once more for this, and mark the run as failed. A problem is printed to stderr.
    """
    if not config.track.alerts_of("failed"):
        return
    here = config.model_copy(update={"out": str(directory.path)})
    try:
        trackers = Trackers(TrackedRun(here, directory.info(), directory.lines, wait_seconds=ALERT_SECONDS))
        trackers.alert("failed", f"{directory.where}: {error}")
        trackers.finish("failed")
    except UserError as problem:
        print(f"no alert was sent: {problem}", file=sys.stderr)


def _warn_of_other_arithmetic(before: str | None, now: str | None) -> None:
    if before and now and now != before:
        print(
            f"until now the run computed with {before}; from now on it computes with {now}: its weights will "
            "differ in their last digits from those of a run without a stop",
            file=sys.stderr,
        )


def _write(weights: Write, optimizer: Mapping[str, Tensor], state: dict[str, Any], directory: Path) -> None:
    weights(directory)
    save_resume(directory, optimizer, state)
