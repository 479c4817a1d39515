"""The training loop, one for every stage and host."""

from __future__ import annotations

import hashlib
import math
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config, ModelShape
from minimind_ray.data.batch import Batch, batch_from_packs, passes
from minimind_ray.data.pack import Pack
from minimind_ray.data.plan import TrainingData
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.generate import generate
from minimind_ray.model.ops import compiled, run_eagerly
from minimind_ray.model.transformer import Transformer
from minimind_ray.track.wandb import mark_failure, open_tracker
from minimind_ray.train.checkpoint import load_resume, optimizer_tensors, save_resume
from minimind_ray.train.context import Context, arithmetic, keep_freed_memory, resolve_precision, settle_compile
from minimind_ray.train.evaluate import Evaluation, drop_stale, evaluate, packs_within
from minimind_ray.train.footprint import settle_pass_tokens
from minimind_ray.train.ledger import Ledger
from minimind_ray.train.optim import FlatGradients, build_adamw
from minimind_ray.train.run import VALIDATION, RunDirectory, resolve_model, sound
from minimind_ray.train.schedule import lr_factor, shortfall
from minimind_ray.train.step import NonFiniteError, Objective, StepResult, autocast, training_step
from minimind_ray.train.throughput import measure_matmul_flops, training_flops_per_token
from minimind_ray.train.writer import CheckpointWriter, HostCopy, Write

T = TypeVar("T")


class Weights(Protocol):
    """How a stage's result is written and read: a whole model or an adapter."""

    def snapshot(self) -> Write:
        """Copy the weights; what it returns writes them as transformers or peft loads them, until the next snapshot."""
        ...

    def load(self, directory: Path) -> None:
        """Put back what was written."""
        ...


@dataclass
class Progress:
    """What the loop remembers between steps, and a resume reads back."""

    step: int = 0
    tokens: int = 0
    best: str | None = None
    best_value: float = math.inf
    ledger: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state: dict[str, Any], checkpoint: Path) -> Progress:
        """What `checkpoint` says. Raises UserError where another version wrote it."""
        try:
            progress = cls(**state)
            if progress.ledger:
                Ledger(**progress.ledger)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{checkpoint}/resume/state.json: not what this version writes: {error}") from None
        return progress

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint written after this step."""
        return f"step-{self.step:08d}"


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random choices (dropout) of one worker in one step, so that resuming needs no random state."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class Step:
    """A run wants this step trained; its answer is a StepResult, or the NonFiniteError it ended in.

    `batches` are what its `packs` were assembled into.
    """

    packs: list[Pack]
    batches: list[Batch]
    step: int
    lr: float
    stop: bool


@dataclass(frozen=True, slots=True)
class Report:
    """A run has validated, or written a checkpoint, or both; its answer is whether it is worth going on."""

    metrics: dict[str, Any]
    checkpoint: str | None


Training = Generator[Step | Report, StepResult | NonFiniteError | bool | None, None]
"""A run between its steps: what it asks for, and is answered."""


def fit(
    model: Transformer,
    objective: Objective,
    weights: Weights,
    config: Config,
    context: Context,
    data: TrainingData,
    tokenizer: Tokenizer,
) -> None:
    """Train from the run's last sound checkpoint, or from the start, to the plan's last step or a stop.

    Writes metrics, samples and checkpoints to the run directory (rank 0) and reports each validation and checkpoint
    to the host (all ranks).

    Raises:
        UserError: a loss or gradient that is not finite; the documents of the step lie in the run directory.
    """
    device = context.device
    with deterministic(config.train.deterministic and device.type == "cuda"):
        before = RunDirectory(config.out).info()
        dtype = resolve_precision(config.train.precision, device)
        flops = data.plan.steps * config.batch.tokens * training_flops_per_token(model.shape, 0, config.trains_adapter)
        settle_compile(config.train.compile, flops, device, before.get("compiled"))
        most = config.data.pack_tokens
        try:
            optimizer, gradients = build_adamw(model, config.optim), FlatGradients(model)
            pass_tokens = settle_pass_tokens(config, model, dtype, before.get("pass_tokens"))
            most = max(min(pass_tokens, config.batch.tokens), most)

            def answer(asked: Step | Report) -> StepResult | NonFiniteError | bool:
                if isinstance(asked, Report):
                    return context.report(asked.metrics, asked.checkpoint)
                try:
                    return training_step(
                        model, objective, asked.packs, asked.batches, optimizer, gradients, step=asked.step,
                        lr=asked.lr, clip=config.optim.clip, device=device, dtype=dtype, stop=asked.stop,
                    )  # fmt: skip
                except NonFiniteError as error:
                    return error

            run = training(model, objective, optimizer, weights, config, context, data, tokenizer, pass_tokens)
            # However it ends, the run's own ending is not to wait until nobody refers to it any more.
            with closing(run), suppress(StopIteration):
                asked = next(run)
                while True:
                    asked = run.send(answer(asked))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not hold what goes through the model at once, up to {most} tokens: set "
                f"batch.pass_tokens lower, or data.pack_tokens too ({str(error).partition('. ')[0]})"
            ) from error
        finally:
            run_eagerly()  # What the process does next has not asked for anything else.


@contextmanager
def deterministic(wanted: bool) -> Generator[None]:
    """Torch's deterministic algorithms while inside, where `wanted`."""
    before = torch.are_deterministic_algorithms_enabled()
    if before or not wanted:  # Nothing to ask for; asking imports torch's compiler, seconds of a run's start.
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def training(
    model: Transformer,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    weights: Weights,
    config: Config,
    context: Context,
    data: TrainingData,
    tokenizer: Tokenizer,
    pass_tokens: int | None = None,
) -> Training:
    """As `fit`, but whoever drives it trains the steps and passes the reports on, for many runs together too.

    Batches hold up to `pass_tokens`, or one pack. None: whoever drives it makes its own.
    """
    run = RunDirectory(config.out, writes=context.rank == 0)
    with run.writing() if run.writes else nullcontext(), mark_failure(str(run.path)):
        yield from _training(model, objective, optimizer, weights, config, context, data, tokenizer, pass_tokens)


def _training(
    model: Transformer,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    weights: Weights,
    config: Config,
    context: Context,
    data: TrainingData,
    tokenizer: Tokenizer,
    pass_tokens: int | None,
) -> Training:
    keep_freed_memory()
    plan, main = data.plan, context.rank == 0
    run = RunDirectory(config.out, writes=main)
    dtype = resolve_precision(config.train.precision, context.device)
    progress = Progress()
    if checkpoint := last_sound_checkpoint(run):
        weights.load(checkpoint)
        progress = Progress.of(load_resume(checkpoint, model, optimizer), checkpoint)
    ledger = Ledger(plan.packs_per_step, plan.packs_per_epoch, progress.ledger.get("epochs"))
    eval_every = config.eval.every or max(1, plan.steps // 10)
    checkpoint_every = config.checkpoint.every or eval_every
    validate = Validation(model, objective, config, context, data.val, tokenizer, dtype, pass_tokens or 0)
    tracker, writer, optimizer_copy = None, None, HostCopy()
    if main:
        run.forget_after(progress.step)
        # Gone, if a better one came after it and was found damaged.
        if progress.best and run.checkpoint_path(progress.best) not in run.checkpoints():
            progress.best, progress.best_value = None, math.inf
        drop_stale(run.path / VALIDATION, progress.best_value)
        writer = CheckpointWriter(run, config.checkpoint.keep, (progress.best, progress.best_value))
        cpu, before = None if context.device.type == "cuda" else arithmetic(dtype), run.info().get("cpu")
        if progress.step and before and cpu and cpu != before:
            print(
                f"until now the run computed with {before}; from now on it computes with {cpu}: its weights will "
                "differ in their last digits from those of a run without a stop",
                file=sys.stderr,
            )
        run.update(compiled=compiled(), pass_tokens=pass_tokens, cpu=cpu)
        base = resolve_model(config.init_from) if config.init_from else None
        here = config.model_copy(update={"out": str(run.path)})
        tracker = open_tracker(here, run.info(), metrics=run.metrics(), samples=run.samples(), base=base)
        if tracker:
            run.update(wandb=tracker.identity)
    meter = Meter(model.shape, context, dtype, frozen=config.trains_adapter)
    state = "finished"
    model.train()

    on_gpu = context.device.type == "cuda"

    def assemble(packs: list[Pack]) -> list[Batch]:
        if pass_tokens is None:
            return []
        batches = (batch_from_packs(together) for together in passes(packs, pass_tokens))
        return [batch.pinned() if on_gpu else batch for batch in batches]

    steps = ((packs, assemble(packs)) for packs in data.source.steps(progress.step))
    for packs, batches in ahead(steps) if on_gpu and data.source.prefetch else steps:
        torch.manual_seed(step_seed(config.train.seed, progress.step, context.rank))
        lr = config.optim.lr * lr_factor(config.schedule, progress.step, plan.steps)
        stop = context.should_stop() or (tracker is not None and tracker.stop_requested)
        result = yield Step(packs, batches, progress.step, lr, stop)
        if isinstance(result, NonFiniteError):
            if writer:
                writer.settle()
            _keep_documents(run, result.step, context.rank, packs, tokenizer)
            raise UserError(
                f"step {result.step + 1}: the loss is {result.loss} and the gradient norm {result.grad_norm}; training "
                f"stopped with the weights as they were. The step's documents are in {run.where}/nonfinite-*.jsonl, "
                "any earlier checkpoint is kept. Try a lower optim.lr, or train.precision float32"
            )
        assert isinstance(result, StepResult)
        epoch = plan.epoch(progress.step)
        ledger.add(epoch, (pack.id for pack in packs))
        progress.step, progress.tokens = progress.step + 1, progress.tokens + result.tokens
        last = progress.step == plan.steps
        # Not at a stop: a notice may leave no time for it, and a run that goes on is to have the lines of one without.
        validating = data.val is not None and (last or progress.step % eval_every == 0)
        saving = last or result.stop or progress.step % checkpoint_every == 0

        metrics: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens, "epoch": epoch, "lr": lr}
        metrics |= {**result.means, "grad_norm": result.grad_norm}
        metrics["timing"] = meter.read(result.tokens, packs, plan.steps - progress.step, result.seconds)
        began = time.perf_counter()
        evaluation = validate() if validating else None
        samples = validate.samples(progress.step) if evaluation and writer and config.eval.samples else []
        if evaluation:
            metrics["timing"]["validation_seconds"] = time.perf_counter() - began
            metrics |= {f"val/{name}": value for name, value in evaluation.means.items()}
        if writer:
            if warning := writer.news() or (shortfall(config.schedule, plan.steps) if progress.step == 1 else None):
                metrics["warning"] = warning
            # The line comes before the checkpoint: a resume drops the lines after the checkpoint it starts from.
            run.append("metrics.jsonl", metrics)
            if samples:
                run.append("samples.jsonl", {"step": progress.step, "samples": samples})
            if tracker:
                tracker.log(metrics, samples)
        if saving:
            progress.ledger = ledger.gather()
            if writer:  # One at a time; and where the last one was lost, the best is another.
                progress.best, progress.best_value = writer.settle()
            # Without validation data the last is the best; with them only what was validated can be.
            value = evaluation.means["loss"] if evaluation else math.nan if data.val else -float(progress.step)
            better = value <= progress.best_value
            if better:
                progress.best, progress.best_value = progress.checkpoint, value
            if writer:
                tensors = optimizer_copy(optimizer_tensors(model, optimizer))
                writer.save(
                    progress.checkpoint,
                    partial(_write, weights.snapshot(), tensors, asdict(progress)),
                    (progress.best, progress.best_value),
                    evaluation.write if better and evaluation else None,
                )
                if context.reads_checkpoints:
                    writer.settle()
        if validating or saving:
            worth_it = yield Report(metrics, str(run.checkpoint_path(progress.checkpoint)) if saving else None)
            meter.restart()
            if not (last or result.stop or worth_it):
                state = "early-stopped"
                break
        if result.stop and not last:
            state = "stopped"
            break
    if state == "finished" and progress.step < plan.steps:
        if writer:
            writer.settle()
        raise UserError(
            f"the data ended after step {progress.step} of {plan.steps}: the first piece of data.train holds more "
            "tokens for its size than the others; leave data.cache out, or train with --no-ray"
        )
    if writer:
        writer.close()
        run.write_lines()
        best = run.checkpoint_path(progress.best) if progress.best else next(reversed(run.checkpoints()), None)
        result = best and str(best.relative_to(run.path))
        run.update(state=state, steps=progress.step, tokens=progress.tokens, result=result)
        if tracker:
            tracker.finish(state, best)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in another thread while the one before is in use: a GPU does not wait for it.

    Whoever stops asking does not wait for the item under way.
    """

    def begin() -> Future[T | None]:
        coming = Future[T | None]()

        def make() -> None:
            try:
                coming.set_result(next(items, None))
            except BaseException as error:
                coming.set_exception(error)

        threading.Thread(target=make, name="ahead", daemon=True).start()
        return coming

    coming = begin()
    while (item := coming.result()) is not None:
        coming = begin()
        yield item


def _write(weights: Write, optimizer: Mapping[str, Tensor], state: dict[str, Any], directory: Path) -> None:
    weights(directory)
    save_resume(directory, optimizer, state)


def last_sound_checkpoint(run: RunDirectory) -> Path | None:
    """The newest checkpoint whose sums hold, here; damaged ones after it are named on stderr and passed over."""
    checkpoints = run.checkpoints()
    for checkpoint in reversed(checkpoints):
        if sound(run.fetch(checkpoint)):
            return checkpoint
        print(f"{checkpoint} is damaged (its sums do not hold), so it is passed over", file=sys.stderr)
    if checkpoints:
        print(f"{run.where}: no sound checkpoint is left, so training starts at the first step", file=sys.stderr)
    return None


class Validation:
    """Means over the validation packs, shared out over the workers, and samples of what the model writes."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        config: Config,
        context: Context,
        store: PackStore | None,
        tokenizer: Tokenizer,
        dtype: torch.dtype,
        pass_tokens: int,
    ) -> None:
        self.model, self.objective, self.context, self.dtype = model, objective, context, dtype
        self.pass_tokens = pass_tokens
        self.store, self.tokenizer, self.config = store, tokenizer, config.eval
        self.chat = config.stage != "pretrain" and bool(config.eval.prompts)
        self.token_bytes_V = torch.from_numpy(tokenizer.token_bytes()).to(context.device)

    def __call__(self) -> Evaluation:
        """The result over all workers' packs, the same on all of them."""
        assert self.store
        count = packs_within(self.store, self.config.max_tokens)
        ids = range(count)[self.context.rank :: self.context.world_size]
        packs = (self.store.read([i])[0] for i in ids)
        return evaluate(
            self.model, self.objective, packs, token_bytes_V=self.token_bytes_V,
            device=self.context.device, dtype=self.dtype, pass_tokens=self.pass_tokens,
        )  # fmt: skip

    def samples(self, step: int) -> list[str]:
        """Texts that begin with the configured prompts, or with nothing, as the model goes on with them.

        After other stages than pretrain a prompt is a user's turn, and what follows its line is the answer.
        """
        prompts = self.config.prompts or [""]
        texts = [prompts[i % len(prompts)] for i in range(self.config.samples)]
        if self.chat:
            ids = [self.tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in texts]
        else:
            ids = [[self.tokenizer.bos_id, *tokens] for tokens in self.tokenizer.encode(texts)]
        self.model.eval()
        with autocast(self.context.device, self.dtype):
            written = generate(
                self.model, ids,
                max_new_tokens=self.config.sample_tokens, temperature=self.config.temperature,
                stop_ids=self.tokenizer.stop_ids, seed=step,
            )  # fmt: skip
        self.model.train()
        if self.chat:
            return [f"{text}\n{self.tokenizer.answer_text(p, w)}" for text, p, w in zip(texts, ids, written)]
        return [t + self.tokenizer.decode(w, skip_special=True, after=p) for t, p, w in zip(texts, ids, written)]


class Meter:
    """Tokens per second and the part of the machine's matrix-product rate used (MFU), validation left out."""

    def __init__(self, shape: ModelShape, context: Context, dtype: torch.dtype, *, frozen: bool) -> None:
        self.shape, self.frozen = shape, frozen
        self.peak = measure_matmul_flops(context.device, dtype) * context.world_size
        self.seconds_per_step: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin timing now."""
        self.start = time.perf_counter()

    def read(self, tokens: int, packs: list[Pack], steps_left: int, seconds: float | None = None) -> dict[str, float]:
        """Of the step since the last reading: all workers' `tokens`; `packs` are this worker's, for the contexts.

        `seconds` are this run's part of a step that others were trained in too.
        """
        now = time.perf_counter()
        seconds, self.start = now - self.start if seconds is None else seconds, now
        # The first step warms up; after it, a running mean for the time left.
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


def _keep_documents(run: RunDirectory, step: int, rank: int, packs: list[Pack], tokenizer: Tokenizer) -> None:
    for pack in packs:
        for i, ids in enumerate(np.split(pack.tokens, np.cumsum(pack.lengths)[:-1])):
            line = {"step": step + 1, "pack": pack.id, "document": i, "text": tokenizer.decode(ids.tolist())}
            run.append(f"nonfinite-rank{rank}.jsonl", line)
