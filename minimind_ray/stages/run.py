"""A stage's run on its host: what to prepare, the plan, and the run directory's beginning and end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.data.plan import StepPlan, read_steps
from minimind_ray.data.prepare import Prepared, RunUnits, prepare, run_units_here
from minimind_ray.data.store import PackStore
from minimind_ray.stages.registry import STAGES
from minimind_ray.stages.start import load_tokenizer
from minimind_ray.train.context import Context, PlainContext
from minimind_ray.train.loop import TrainingData
from minimind_ray.train.run import RunDirectory


@dataclass(frozen=True)
class Job:
    """All that a worker needs: the resolved config, the prepared sets and the plan over the first."""

    config: Config
    train: str
    val: str | None
    plan: StepPlan

    def data(self, context: Context) -> TrainingData:
        """Packs read straight from the prepared data, for hosts without Ray Data."""
        read = partial(read_steps, PackStore(self.train), self.plan, rank=context.rank, world_size=context.world_size)
        return TrainingData(self.plan, read, self.val_store())

    def val_store(self) -> PackStore | None:
        """The validation packs, if there are any."""
        return PackStore(self.val) if self.val else None

    def run(self, context: Context, data: TrainingData) -> None:
        """The stage's train-loop function."""
        STAGES[self.config.stage](self.config, context, data)


def resolve_paths(config: Config) -> Config:
    """The same config with absolute paths, since workers run in other directories."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).expanduser().absolute())

    def absolutes(paths: str | list[str] | None) -> str | list[str] | None:
        return [absolute(p) or p for p in paths] if isinstance(paths, list) else absolute(paths)

    data = config.data.model_copy(
        update={
            "train": absolutes(config.data.train),
            "val": absolutes(config.data.val),
            "tokenizer": absolute(config.data.tokenizer),
            "cache_dir": absolute(config.data.cache_dir),
        }
    )
    out = absolute(config.out.replace("{stage}", config.stage))
    return config.model_copy(update={"data": data, "out": out, "init_from": absolute(config.init_from)})


def prepare_job(config: Config, run_units: RunUnits = run_units_here) -> tuple[Job, list[Prepared]]:
    """Prepare what `config` (with resolved paths) names, and plan the steps.

    Raises:
        UserError: bad sources, too many bad rows, nothing to train on, or a budget that does not divide.
    """
    if config.data.train is None:
        raise UserError("data.train is not set: give the training files, such as --train 'data/*.jsonl'")
    packs_per_step = config.packs_per_step()
    tokenizer = load_tokenizer(config)
    train = prepare(config.stage, config.data, "train", tokenizer, run_units)
    prepared = [train]
    if config.data.val is not None or config.data.val_fraction > 0:
        prepared.append(prepare(config.stage, config.data, "val", tokenizer, run_units))
    store = PackStore(train.path)
    if store.n_packs == 0:
        raise UserError(f"data.train: no row of {config.data.train} is left to train on; see {train.rejects}")
    val = prepared[1].path if len(prepared) == 2 and PackStore(prepared[1].path).n_packs else None
    plan = StepPlan(
        tuple(store.row_groups), packs_per_step, config.train.epochs, config.train.seed, config.train.max_steps
    )
    return Job(config, train.path, val, plan), prepared


def begin(job: Job, *, resume: bool, facts: dict[str, Any] | None = None) -> RunDirectory:
    """Make or reopen the run directory; see `RunDirectory.create` for what is refused."""
    run = RunDirectory(job.config.out)
    run.create(job.config, {"data": {"train": job.train, "val": job.val}, **(facts or {})}, resume=resume)
    return run


def run_here(job: Job) -> None:
    """Run the stage in this process, without Ray. Ctrl-C stops after the step, with a checkpoint."""
    context = PlainContext()
    with context.stop_on_interrupt():
        job.run(context, job.data(context))
