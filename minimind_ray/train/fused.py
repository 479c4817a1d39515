"""Train the adapters of many runs on one frozen base at the same time, with one pass over the base for all runs.

    K runs   P numbers of an adapter, ranks padded   D documents   M the loss and the metrics

Each run is a `TrainingRun` with its own packs, schedule, validations, checkpoints and run directory. Only the steps are
shared: micro-batch i of a step has pack i of every run (on a GPU several packs of every run). Gradient norm, clipping,
the check for non-finite values, and AdamW's state stay separate for each run; they are vectors over K.

A caller makes a `Member` for each run, adds the members to a `Lockstep`, and calls `turn` until all runs have ended.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from minimind_ray.config.schema import OptimConfig
from minimind_ray.data.batch import Batch, batch_from_packs, passes
from minimind_ray.data.columns import Column
from minimind_ray.data.pack import Pack
from minimind_ray.model.fused_lora import AdapterStack, FusedTransformer
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.context import Context, PlainContext
from minimind_ray.train.loop import Step, TrainingRun
from minimind_ray.train.optim import AdamW, l2_norm
from minimind_ray.train.step import NonFiniteError, Objective, StepResult, autocast

PASS_TOKENS = {"cpu": 0, "cuda": 32768}
"""Maximum tokens of a pass for all runs together, unless one pack of each run is already more. Smaller passes would
leave a GPU idle between kernels."""


class FusedContext(Context, Protocol):
    """A host with `report` in two parts, so that all runs report before any of them waits for its host's decision."""

    def post(self, metrics: dict[str, Any], checkpoint: str | None) -> None:
        """Report as `Context.report` does, but do not wait for the host's decision."""
        ...

    def verdict(self) -> bool:
        """Return whether to continue training, as the host decided about the last report; wait for the decision."""
        ...


class PlainFusedContext(PlainContext):
    """The host of a run that is trained with others in one process without Ray. All runs share the base's `weights`."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        super().__init__(device)
        self.weights = weights

    def base_weights(self, directory: Path) -> Mapping[str, Tensor]:
        """Return the base's weights, not a copy of them."""
        return self.weights

    def post(self, metrics: dict[str, Any], checkpoint: str | None) -> None:
        """Do nothing: the run directory has the report's content already."""

    def verdict(self) -> bool:
        """Return True: this host never stops a run early."""
        return True


@runtime_checkable
class DocumentObjective(Objective, Protocol):
    """An objective that depends only on each document's log-probability, so that many runs can share a forward pass."""

    def log_probs(self, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each document's log-probability in nats, summed over its counted tokens, and their number: [D]."""
        ...

    def of_documents(self, logp_D: Tensor, counts_D: Tensor, columns: Mapping[Column, Tensor]) -> dict[str, Tensor]:
        """Return the same as `examples`, computed from the results of `log_probs`."""
        ...


@dataclass(eq=False)
class Member:
    """One of the runs that are trained together.

    `optimizer` holds the state of the run's AdamW; this module updates it. `step` is the run's next step, None after
    its end. `error` is the exception that ended the run, None if it ended after its last step or a stop.
    """

    model: Transformer
    objective: DocumentObjective
    optimizer: AdamW
    config: OptimConfig
    context: FusedContext
    run: TrainingRun
    step: Step | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)

    def finish(self, result: StepResult | NonFiniteError) -> bool:
        """Give the run the result of its step. Return whether the run reported to its host; if so, call `judge`."""
        with self._ending_at_an_error():
            if report := self.run.finish_step(result):
                self.context.post(report.metrics, report.checkpoint)
                return True
        return False

    def judge(self) -> None:
        """Wait for the host's verdict on the last report, and pass it to the run."""
        with self._ending_at_an_error():
            self.run.reported(self.context.verdict())

    def advance(self) -> None:
        """Get the run's next step, or end the run after its last."""
        self.step = None
        if self.error is None:
            with self._ending_at_an_error():
                self.step = self.run.next_step()
                if self.step is None:
                    self.run.close()

    def fail(self, error: BaseException) -> None:
        """End the run because of an error."""
        self.step, self.error = None, error
        with suppress(Exception):
            self.run.close(error)

    @contextmanager
    def _ending_at_an_error(self) -> Generator[None]:
        try:
            yield
        except BaseException as error:
            self.fail(error)


class Lockstep:
    """Trains runs step by step on one base. All runs share its `weights`, given by name."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.weights, self.device, self.dtype = weights, device, dtype
        self.members: list[Member] = []
        self.fused: FusedRuns | None = None

    def add(self, member: Member) -> None:
        """Add a run; it takes part from the next turn."""
        self.members.append(member)

    def turn(self) -> list[Member]:
        """Train the next step of every run. Return the runs that had no further step; they are removed.

        An error in the shared step ends all runs and is raised.
        """
        for member in self.members:
            member.advance()
        ended = [member for member in self.members if member.step is None]
        self.members = [member for member in self.members if member.step is not None]
        if self.members:
            results = self._train()
            # All runs post before any run waits, so that their hosts decide at the same time.
            reporting = [m for m, result in zip(self.members, results, strict=True) if m.finish(result)]
            for member in reporting:
                member.judge()
        return ended

    def _train(self) -> list[StepResult | NonFiniteError]:
        try:
            if self.fused is None or self.fused.members != self.members:
                self.fused = FusedRuns(self.members, self.weights, self.device, self.dtype)
            return self.fused.step([member.step for member in self.members if member.step])
        except BaseException as error:
            for member in self.members:
                member.fail(error)
            raise


class FusedRuns:
    """Trains the adapters of K runs in one pass.

    The adapters and the state of their optimizers are moved into arrays [K, P]. The runs' parameters and optimizers
    become views of these arrays, so a run saves its checkpoints as usual.
    """

    def __init__(
        self, members: Sequence[Member], weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.members, self.device, self.dtype = list(members), device, dtype
        stack = AdapterStack([member.model for member in members])
        self.values_KP, self.gradients_KP, self.mean_KP, self.square_KP = (stack.zeros() for _ in range(4))
        # Like AdamW, keep a step count for each parameter.
        self.steps_KT = torch.zeros(len(members), 2 * len(stack.sizes), device=device)
        for k, member in enumerate(members):
            state = member.optimizer.state
            views = zip(*(stack.of(k, array) for array in (self.values_KP, self.mean_KP, self.square_KP)), strict=True)
            for step, ((parameter, value), (_, mean), (_, square)) in zip(self.steps_KT[k], views, strict=True):
                value.copy_(parameter.data)
                parameter.data = value
                if before := state[parameter]:
                    mean.copy_(before["exp_avg"])
                    square.copy_(before["exp_avg_sq"])
                    step.copy_(before["step"])
                state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        self.model = FusedTransformer(members[0].model.shape, weights, stack, self.values_KP, dtype)
        self.gradients = [matrix for matrices in stack.matrices(self.gradients_KP).values() for matrix in matrices]
        self.settings = [self._column([getattr(m.config, name) for m in members]) for name in SETTINGS]

    def step(self, steps: Sequence[Step]) -> list[StepResult | NonFiniteError]:
        """Train one step of every run. If a run's loss or gradient is not finite, its weights do not change."""
        start = time.perf_counter()
        self.gradients_KP.zero_()
        counts = [sum(map(m.objective.count, step.packs)) for m, step in zip(self.members, steps, strict=True)]
        names = ["loss", *self.members[0].objective.metrics]
        sums_KM = torch.zeros(len(steps), len(names), dtype=torch.float64, device=self.device)
        share = PASS_TOKENS[self.device.type] // len(steps)
        for packs in zip_longest(*(passes(step.packs, share) for step in steps), fillvalue=()):
            sums_KM += self._micro_batch(packs, counts, names)
        norm_K = l2_norm(self.gradients_KP)
        means_KM = sums_KM / self._column(counts)
        good_K = norm_K.isfinite() & means_KM[:, 0].isfinite()
        clip_K1, beta1_K1, beta2_K1, eps_K1, decay_K1 = self.settings
        # A clip of 0 means no clipping.
        factor_K1 = torch.where(clip_K1 > 0, (clip_K1 / (norm_K.unsqueeze(1) + 1e-6)).clamp(max=1.0), 1.0).float()
        self.gradients_KP.mul_(factor_K1)
        self.gradients_KP.masked_fill_(~good_K.unsqueeze(1), 0.0)
        lr_K1 = self._column([step.lr for step in steps]) * good_K.unsqueeze(1)
        self._adamw(lr_K1, beta1_K1, beta2_K1, eps_K1, decay_K1)
        found = torch.cat((means_KM, norm_K.unsqueeze(1), good_K.unsqueeze(1)), 1).tolist()
        tokens = [sum(len(p.tokens) - len(p.lengths) for p in step.packs) for step in steps]
        per_token = (time.perf_counter() - start) / sum(tokens)
        return [
            StepResult(dict(zip(names, means)), norm, count, own, step.stop, per_token * own)
            if good
            else NonFiniteError(step.step, means[0], norm)
            for (*means, norm, good), step, count, own in zip(found, steps, counts, tokens, strict=True)
        ]

    def _micro_batch(self, packs: Sequence[Sequence[Pack]], counts: Sequence[float], names: Sequence[str]) -> Tensor:
        """Add the gradients of each run's `packs`; return the sums of loss and metrics, float64 [K, M]."""
        vocabulary = self.model.shape.vocab_size
        batch = batch_from_packs([pack for own in packs for pack in own])
        lengths = [sum(len(pack.tokens) - len(pack.lengths) for pack in own) for own in packs]
        adapter_N = torch.from_numpy(np.repeat(np.arange(len(packs)), lengths))
        batch = replace(batch, tokens_N=batch.tokens_N + vocabulary * adapter_N).to(self.device)
        with autocast(self.device, self.dtype):
            logp_D, counts_D = self.members[0].objective.log_probs(self.model, batch)
        documents = [sum(len(pack.lengths) for pack in own) for own in packs]
        sizes = {"document": documents, "token": lengths}
        columns = {column: values.split(sizes[column.axis]) for column, values in batch.columns.items()}
        parts = zip(logp_D.split(documents), counts_D.split(documents), strict=True)
        total = torch.zeros((), device=self.device)
        sums_KM = torch.zeros(len(packs), len(names), dtype=torch.float64, device=self.device)
        for k, (member, (logp, count)) in enumerate(zip(self.members, parts, strict=True)):
            if packs[k]:
                own = {column: values[k] for column, values in columns.items()}
                values = member.objective.of_documents(logp, count, own)
                total = total + values["loss"].sum() / counts[k]
                sums_KM[k] = torch.stack([values[name].detach().sum() for name in names])
        # Do not use `backward`: it requires the gradient of a view to be contiguous.
        for gradient, found in zip(self.gradients, torch.autograd.grad(total, self.model.leaves), strict=True):
            gradient.add_(found)
        return sums_KM

    @torch.no_grad()
    def _adamw(self, lr_K1: Tensor, beta1_K1: Tensor, beta2_K1: Tensor, eps_K1: Tensor, decay_K1: Tensor) -> None:
        """Update by AdamW (Loshchilov & Hutter 2019, algorithm 2) with each run's own settings.

        Weight decay applies to all parameters, because all parameters of adapters are matrices.
        """
        self.steps_KT += 1
        steps_K1 = self.steps_KT[:, :1]
        self.values_KP.mul_(1 - lr_K1 * decay_K1)
        self.mean_KP.lerp_(self.gradients_KP, (1 - beta1_K1).expand_as(self.mean_KP))
        self.square_KP.mul_(beta2_K1).add_(self.gradients_KP.square() * (1 - beta2_K1))
        root_KP = self.square_KP.sqrt().div_((1 - beta2_K1**steps_K1).sqrt()).add_(eps_K1)
        self.values_KP.sub_(self.mean_KP * (lr_K1 / (1 - beta1_K1**steps_K1)) / root_KP)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).unsqueeze(1)


SETTINGS = ("clip", "beta1", "beta2", "eps", "weight_decay")
