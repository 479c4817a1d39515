"""The training loop of every stage on every host: a state machine, and `fit`, which drives it.

A `TrainingRun` knows which packs a step trains, and when to validate, save and stop. It never trains a step itself and
never calls the host. Its driver does both:

      driver                          TrainingRun                        writes (rank 0, see recorder.py)
      ──────                          ───────────                        ────────────────────────────────
      next_step()           ───────►  takes packs, asks for a stop
      trains the Step       ◄───────  Step, or None at the end   ─────►  at the end: state and result in run.json
      finish_step(result)   ───────►  counts, validates          ─────►  metrics.jsonl, then a checkpoint
      reports to the host   ◄───────  Report, or None
      reported(proceed)     ───────►  ends early unless `proceed`
      ...and again from next_step; close() in any case

There are two drivers. `fit` (below) drives one run: it trains each step with `training_step`. `Lockstep` (fused.py)
drives many runs on one base: it brings all of them to their next step and trains these steps in the same passes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from shlex import quote
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.data.batch import Batch, batch_from_packs, passes
from minimind_ray.data.pack import Pack
from minimind_ray.data.plan import TrainingData
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.ops import run_eagerly
from minimind_ray.model.transformer import Transformer
from minimind_ray.tasks.items import PREFIX, Item
from minimind_ray.train.answers import Answers
from minimind_ray.train.checkpoint import load_resume
from minimind_ray.train.context import (
    Context,
    arithmetic,
    deterministic,
    keep_freed_memory,
    resolve_precision,
    settle_compile,
)
from minimind_ray.train.evaluate import Evaluation
from minimind_ray.train.footprint import settle_pass_tokens
from minimind_ray.train.ledger import Ledger
from minimind_ray.train.meter import Meter
from minimind_ray.train.optim import AdamW, FlatGradients, build_adamw
from minimind_ray.train.prefetch import ahead
from minimind_ray.train.progress import Progress
from minimind_ray.train.recorder import Recorder
from minimind_ray.train.run import RunDirectory, last_sound_checkpoint
from minimind_ray.train.schedule import lr_factor, shortfall
from minimind_ray.train.step import DivergedError, NonFiniteError, Objective, StepResult, training_step
from minimind_ray.train.throughput import training_flops_per_token
from minimind_ray.train.validation import Validation
from minimind_ray.train.writer import Weights


@dataclass(frozen=True, slots=True)
class Step:
    """A step to train: this worker's `packs`, and the `batches` they were assembled into.

    `step` counts from 0. `stop`: this worker's host wants the run to end after the step.
    """

    packs: list[Pack]
    batches: list[Batch]
    step: int
    lr: float
    stop: bool


@dataclass(frozen=True, slots=True)
class Report:
    """A report for the host: the metrics of a step with a validation or a checkpoint, and the checkpoint's path."""

    metrics: dict[str, Any]
    checkpoint: str | None


class TrainingRun:
    """One run between its steps; the module's text shows how to drive it.

    A new run starts from the last sound checkpoint in its directory, or from the first step. It writes to that
    directory (rank 0) until `close`, so every driver closes it; as a context manager it closes itself.

    Batches hold up to `pass_tokens` tokens, or one pack. With None the driver makes its own batches.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        optimizer: AdamW,
        weights: Weights,
        config: Config,
        context: Context,
        data: TrainingData,
        tokenizer: Tokenizer,
        pass_tokens: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.weights = model, optimizer, weights
        self.config, self.context, self.plan, self.tokenizer = config, context, data.plan, tokenizer
        self.pass_tokens, self.validates = pass_tokens, data.val is not None
        self.directory = RunDirectory(config.out, writes=context.rank == 0)
        self.eval_every = config.eval.every or max(1, self.plan.steps // 10)
        self.checkpoint_every = config.checkpoint.every or self.eval_every
        self.ending: str | None = None
        self.progress, self.recorder = Progress(), None
        self._resources = ExitStack()
        try:
            if self.directory.writes:
                self._resources.enter_context(self.directory.writing())
            self._start(objective, data)
        except BaseException as error:
            self.close(error)
            raise

    def _start(self, objective: Objective, data: TrainingData) -> None:
        keep_freed_memory()
        config, context = self.config, self.context
        dtype = resolve_precision(config.train.precision, context.device)
        if checkpoint := last_sound_checkpoint(self.directory):
            self.weights.load(checkpoint)
            self.progress = Progress.of(load_resume(checkpoint, self.model, self.optimizer), checkpoint)
        epochs = self.progress.ledger.get("epochs")
        self.ledger = Ledger(self.plan.packs_per_step, self.plan.packs_per_epoch, epochs)
        self.validation = Validation(
            self.model, objective, config, context, data.val, self.tokenizer, dtype, self.pass_tokens or 0
        )
        if self.directory.writes:
            cpu = None if context.device.type == "cuda" else arithmetic(dtype)
            self.recorder = Recorder(self.directory, self.progress, config)
            self.recorder.begin(steps=self.plan.steps, cpu=cpu, pass_tokens=self.pass_tokens, base=data.base)
            if not self.progress.step:
                self.recorder.log_start(self.validation.answers)
        self.meter = Meter(self.model.shape, context, dtype, frozen=config.trains_adapter)
        self.model.train()
        steps = ((packs, self._assemble(packs)) for packs in data.source.steps(self.progress.step))
        prefetch = context.device.type == "cuda" and data.source.prefetch
        self._steps = ahead(steps) if prefetch else steps
        self._packs: list[Pack] = []
        self._data_seconds = 0.0  # How long the step waited for its packs.

    def _assemble(self, packs: list[Pack]) -> list[Batch]:
        if self.pass_tokens is None:
            return []
        batches = (batch_from_packs(together) for together in passes(packs, self.pass_tokens))
        return [batch.pinned() if self.context.device.type == "cuda" else batch for batch in batches]

    def next_step(self) -> Step | None:
        """Return the next step to train; None after the run's end, when its state and result are written.

        Raises:
            UserError: the data ended before the last step.
        """
        began = time.perf_counter()
        item = None if self.ending else next(self._steps, None)
        self._data_seconds = time.perf_counter() - began
        if item is None:
            self._end()
            return None
        self._packs, batches = item
        step = self.progress.step
        torch.manual_seed(step_seed(self.config.train.seed, step, self.context.rank))
        stop = self.context.should_stop() or (self.recorder is not None and self.recorder.stop_requested)
        return Step(self._packs, batches, step, self._lr(), stop)

    def finish_step(self, result: StepResult | NonFiniteError) -> Report | None:
        """Take the result of the step that `next_step` returned last. Return a report for the host, or None.

        After a report, call `reported` before the next step.

        Raises:
            DivergedError: the loss or gradient is not finite. The documents of the step are in the run directory.
        """
        if isinstance(result, NonFiniteError):
            self._refuse(result)
        progress, lr, epoch = self.progress, self._lr(), self.plan.epoch(self.progress.step)
        self.ledger.add(epoch, (pack.id for pack in self._packs))
        progress.step, progress.tokens = progress.step + 1, progress.tokens + result.tokens
        last = progress.step == self.plan.steps
        # Skip validation on a stop: time may be short, and a resumed run must log the same lines as an unstopped one.
        validating = self.validates and (last or progress.step % self.eval_every == 0)
        saving = last or result.stop or progress.step % self.checkpoint_every == 0

        metrics: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens, "epoch": epoch, "lr": lr}
        metrics |= {**result.means, "grad_norm": result.grad_norm}
        left = self.plan.steps - progress.step
        metrics["timing"] = self.meter.read(result.tokens, self._packs, left, result.seconds)
        metrics["timing"]["data_seconds"] = self._data_seconds
        evaluation, answers, items = self._validate(metrics, last) if validating else (None, None, None)
        # The line comes before the checkpoint: a resume drops the lines after the checkpoint it starts from.
        self._log(metrics, answers)
        if saving:
            self._save(evaluation, items)
        if result.stop and not last:
            self.ending = "stopped"
        if not (validating or saving):
            return None
        return Report(metrics, str(self.directory.checkpoint_path(progress.checkpoint)) if saving else None)

    def reported(self, proceed: bool) -> None:
        """Take the host's answer to a Report. If `proceed` is false, the run ends early."""
        self.meter.restart()
        if not proceed and self.ending is None and self.progress.step < self.plan.steps:
            self.ending = "early-stopped"

    def close(self, error: BaseException | None = None) -> None:
        """Stop writing to the run directory. After an `error` of the driver, mark the run as failed in its trackers."""
        if error and self.recorder:
            self.recorder.fail(error)
        self._resources.__exit__(error and type(error), error, error and error.__traceback__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    def _lr(self) -> float:
        return self.config.optim.lr * lr_factor(self.config.schedule, self.progress.step, self.plan.steps)

    def _validate(
        self, metrics: dict[str, Any], last: bool
    ) -> tuple[Evaluation, Answers | None, Sequence[Item] | None]:
        """Validate, and add the means and the results of tasks to `metrics`.

        Return the evaluation; and on rank 0 the model's answers, and the items of the tasks if they ran.
        """
        began = time.perf_counter()
        evaluation = self.validation()
        answers = self.validation.answers() if self.recorder else None
        values, items = None, None
        if last or (self.progress.step // self.eval_every) % self.config.eval.tasks_every == 0:
            values, items = self.validation.tasks()
        metrics["timing"]["validation_seconds"] = time.perf_counter() - began
        metrics |= {f"val/{name}": value for name, value in evaluation.means.items()}
        metrics |= {f"{PREFIX}{name}": value for name, value in (values or {}).items()}
        return evaluation, answers, items

    def _log(self, metrics: dict[str, Any], answers: Answers | None) -> None:
        """Write the step's line of metrics.jsonl, with a warning if there is one."""
        if self.recorder:
            first = self.progress.step == 1
            warning = self.recorder.warning() or (first and shortfall(self.config.schedule, self.plan.steps))
            if warning:
                metrics["warning"] = warning
            self.recorder.log(metrics, answers)

    def _save(self, evaluation: Evaluation | None, items: Sequence[Item] | None) -> None:
        self.progress.ledger = self.ledger.gather()
        if self.recorder:
            self.recorder.save(
                self.weights, self.model, self.optimizer, evaluation, items,
                validates=self.validates, wait=self.context.reads_checkpoints,
            )  # fmt: skip

    def _end(self) -> None:
        done, steps = self.progress.step, self.plan.steps
        if self.ending is None and done < steps:
            if self.recorder:
                self.recorder.settle()
            raise UserError(
                f"the data ended after step {done} of {steps}: the number of epochs was estimated from the first piece "
                "of data.train, which has more tokens per byte than the others; leave data.cache out, or use --no-ray"
            )
        self.ending = self.ending or "finished"
        if self.recorder:
            self.recorder.end(self.ending)

    def _refuse(self, result: NonFiniteError) -> NoReturn:
        """Write the documents of a step whose loss or gradient is not finite, and raise DivergedError."""
        if self.recorder:
            self.recorder.settle()
        name = f"nonfinite-rank{self.context.rank}.jsonl"
        for pack in self._packs:
            for i, ids in enumerate(np.split(pack.tokens, np.cumsum(pack.lengths)[:-1])):
                text = self.tokenizer.decode(ids.tolist())
                self.directory.append(name, {"step": result.step + 1, "pack": pack.id, "document": i, "text": text})
        raise DivergedError(
            f"step {result.step + 1}: the loss is {result.loss} and the gradient norm {result.grad_norm}; training "
            f"stopped before this step changed the weights. The step's documents are in {self.directory.where}/"
            "nonfinite-*.jsonl, and all checkpoints are kept. Try a lower optim.lr, or train.precision float32. This "
            f"command explains it: minimind-ray diagnose {quote(self.directory.where)}"
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed for the random choices (dropout) of one worker in one step. So a resume needs no random state."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def fit(
    model: Transformer,
    objective: Objective,
    weights: Weights,
    config: Config,
    context: Context,
    data: TrainingData,
    tokenizer: Tokenizer,
) -> None:
    """Train from the run's last sound checkpoint, or from the first step, to the plan's last step or to a stop.

    Rank 0 writes metrics, samples and checkpoints to the run directory. All ranks report each validation and checkpoint
    to the host.

    Raises:
        UserError: a loss or gradient is not finite (the documents of the step are then in the run directory); the GPU
            has too little memory; or the data ended before the last step.
    """
    device = context.device
    with deterministic(config.train.deterministic and device.type == "cuda"):
        before = RunDirectory(config.out).info()
        flops = data.plan.steps * config.batch.tokens * training_flops_per_token(model.shape, 0, config.trains_adapter)
        settle_compile(config.train.compile, flops, device, before.get("compiled"))
        dtype = resolve_precision(config.train.precision, device)
        try:
            with _memory_suffices_for(config.data.pack_tokens):
                optimizer, gradients = build_adamw(model, config.optim), FlatGradients(model)
                pass_tokens = settle_pass_tokens(config, model, dtype, before.get("pass_tokens"))
            most = max(min(pass_tokens, config.batch.tokens), config.data.pack_tokens)
            with (
                _memory_suffices_for(most),
                TrainingRun(model, objective, optimizer, weights, config, context, data, tokenizer, pass_tokens) as run,
            ):
                while step := run.next_step():
                    try:
                        result = training_step(
                            model, objective, step.packs, step.batches, optimizer, gradients, step=step.step,
                            lr=step.lr, clip=config.optim.clip, device=device, dtype=dtype, stop=step.stop,
                        )  # fmt: skip
                    except NonFiniteError as error:
                        result = error
                    if report := run.finish_step(result):
                        run.reported(context.report(report.metrics, report.checkpoint))
        finally:
            run_eagerly()  # Later work in this process did not ask for compiled code.


@contextmanager
def _memory_suffices_for(tokens: int) -> Generator[None]:
    """Inside, raise UserError if the GPU's memory is too small for passes of up to `tokens` tokens."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is too small for passes of up to {tokens} tokens through the model: lower "
            f"batch.pass_tokens, and perhaps data.pack_tokens ({str(error).partition('. ')[0]})"
        ) from error
