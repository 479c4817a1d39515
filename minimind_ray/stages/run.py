"""Run a stage: prepare its data and plan (`prepare_job`), make the run directory (`begun`), and train (`Job.run`).

The same `Job` trains on every host: in this process (`run_here`), on Ray Train, or as a Ray Tune trial (on_ray/). The
hosts differ in a `Host`, which says how to prepare data, and a `Context`, which the training loop calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config, DataConfig, ScaleConfig
from minimind_ray.data.baselines import baselines
from minimind_ray.data.claim import claimed
from minimind_ray.data.clusters import CLUSTER, clusters_file
from minimind_ray.data.columns import Column
from minimind_ray.data.files import join
from minimind_ray.data.pack import Pack
from minimind_ray.data.plan import PackSource, StepPlan, StepSource, TrainingData, read_steps
from minimind_ray.data.prepare import RunUnits, Split, encoding_of, plan_units, prepare, run_units_here
from minimind_ray.data.storage import StoreError
from minimind_ray.data.store import PackStore
from minimind_ray.data.stream import Stream, StreamPlan, stream_steps
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.stages.base import Base, resolve_base
from minimind_ray.stages.columns import (
    ComputeColumn,
    FrozenColumn,
    ResolveDtype,
    compute_here,
    dtype_here,
    ensure_column,
)
from minimind_ray.stages.stage import Policy, stage_of
from minimind_ray.stages.start import check_stage, initial_model, load_tokenizer, require_used
from minimind_ray.stages.weights import Adapter, WholeModel
from minimind_ray.tasks.measure import suite_of
from minimind_ray.train.context import Context, PlainContext
from minimind_ray.train.loop import fit
from minimind_ray.train.run import RunDirectory


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to train: the resolved config, the data, the plan of steps, and the base.

    `train` is the path of the prepared packs; with `data.cache` false it is a stream that makes packs. `train_columns`
    and `val_columns` are the files of the columns that a frozen model computed for the packs (see columns.py).
    `baselines` are facts about the data (see data/baselines.py).
    """

    config: Config
    plan: StepPlan | StreamPlan
    train: str | Stream
    val: str | None
    train_columns: Mapping[Column, str] = field(default_factory=dict[Column, str])
    val_columns: Mapping[Column, str] = field(default_factory=dict[Column, str])
    base: Base | None = None
    baselines: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def inputs(self) -> dict[str, str | None]:
        """The run's inputs besides its config, identified by content: each prepared set's folder is named by a hash."""
        train = self.train.key if isinstance(self.train, Stream) else self.train
        return {"data.train": train, "data.val": self.val, "init_from": self.base and self.base.fingerprint}

    def data(self, context: Context) -> TrainingData:
        """Return the loop's data with packs that this process reads or makes, for hosts without Ray Data."""
        return self.data_from(PackSource(partial(self.steps, context.rank, context.world_size)))

    def data_from(self, source: StepSource) -> TrainingData:
        """Return the loop's data with training packs from `source`."""
        return TrainingData(self.plan, source, self.val_store(), self.base and self.base.local())

    def steps(self, rank: int, world_size: int, start: int) -> Iterator[list[Pack]]:
        """Yield one worker's packs of each step, from step `start`."""
        if isinstance(self.train, Stream):
            assert isinstance(self.plan, StreamPlan)
            return stream_steps(self.train, self.plan, start, rank, world_size)
        assert isinstance(self.plan, StepPlan)
        return read_steps(PackStore(self.train, self.train_columns), self.plan, start, rank, world_size)

    def val_store(self) -> PackStore | None:
        """Return the validation packs, if there are any."""
        if not self.val:
            return None
        return PackStore(self.val, {**self.val_columns, CLUSTER: clusters_file(self.val, self.config.eval.cluster)})

    def with_config(self, config: Config) -> Job:
        """Return a job on the same data with another config, which may differ in optimisation, length and seed."""
        return replace(self, config=config, plan=step_plan(config, self.train))

    def run(self, context: Context, data: TrainingData) -> None:
        """Train the stage, from the run directory's last checkpoint or from the start."""
        config, stage = self.config, stage_of(self.config)
        base = self.base and self.base.local()
        tokenizer = load_tokenizer(config, base)
        model = initial_model(config, tokenizer, context, base)
        adapts = self.base if config.trains_adapter else None
        generation = self.base.generation.updated(config.generation) if self.base else config.generation
        weights = Adapter(model, config, adapts) if adapts else WholeModel(model, tokenizer, generation)
        objective = stage.objective(config, model.shape)
        source = stage.source(data.source, Policy(model, tokenizer, config, context))
        fit(model, objective, weights, config, context, replace(data, source=source), tokenizer)


@dataclass(frozen=True)
class Host:
    """How a host does the work before training: encode data, compute a frozen model's columns, find dtype and base."""

    run_units: RunUnits = run_units_here
    compute_column: ComputeColumn = compute_here
    dtype: ResolveDtype = dtype_here
    base: Callable[[Config], Base | None] = resolve_base


def prepare_job(
    config: Config,
    host: Host = Host(),
    say: Callable[[str], None] = lambda line: None,
    validation: DataConfig | None = None,
) -> Job:
    """Prepare the data of `config` (whose paths are resolved) and plan the steps. `say` gets progress messages.

    With `validation` the run is a trial: it is validated on the data of that section instead of its own, and may have
    settings that only other trials use.

    Raises:
        UserError: a source cannot be read, too many rows are bad, no row is left to train on, the batch does not divide
            into packs and workers, a setting is not used, or a trial has no row to validate on.
    """
    if config.data.train is None:
        raise UserError("data.train is not set: give the training files, such as --train 'data/*.jsonl'")
    config.packs_per_step()
    if validation is None:
        require_used(config)
    base = host.base(config)
    tokenizer = load_tokenizer(config, base and base.local())
    check_stage(config, tokenizer, base and base.local())
    if config.eval.tasks:
        suite_of(config.eval)
    splits: tuple[Split, ...] = ("train", "val") if config.data.val or config.data.val_fraction else ("train",)
    stores: dict[str, str] = {}
    stream: Stream | None = None
    if not config.data.cache:
        stream, splits = _stream(config, tokenizer), splits[1:]
        say(f"train: {len(stream.units)} pieces of {config.data.train}, encoded while training")
        stream, rows = stream.check_first()
        say(f"  {rows}; rejected rows: {stream.rejects}")
    for split in splits:
        data = validation if validation and split == "val" else config.data
        prepared = prepare(config.stage, data, split, tokenizer, host.run_units, cluster=config.eval.cluster)
        say(prepared.summary())
        if prepared.manifest.n_packs:
            stores[split] = prepared.path
        elif split == "train":
            raise UserError(f"data.train: no row of {config.data.train} is left to train on; see {prepared.rejects}")
        elif validation:
            raise UserError(
                "a sweep compares trials on validation data, and no row is left for it: give data.val, or raise "
                f"data.val_fraction {validation.val_fraction:g}"
            )
        else:
            say("  no validation, since no row is left for it: give data.val, or raise data.val_fraction")
    if config.eval.tasks and "val" not in stores:
        raise UserError("eval.tasks run at validations, but there is no validation data: give data.val")
    columns = {split: _columns(config, base, store, split, host, say) for split, store in stores.items()}
    train = stream or stores["train"]
    return Job(
        config, step_plan(config, train), train, stores.get("val"), columns.get("train", {}), columns.get("val", {}),
        base, baselines(stores.get("train"), stores.get("val"), tokenizer) if stores else {},
    )  # fmt: skip


def _columns(
    config: Config, base: Base | None, store: str, split: str, host: Host, say: Callable[[str], None]
) -> dict[Column, str]:
    """Return the files of the columns that the run's objective needs; compute missing files."""
    files: dict[Column, str] = {}
    for scored in stage_of(config).columns(config):
        assert base
        gpus = config.scale.gpus_per_worker
        frozen = FrozenColumn(scored, store, base, host.dtype(config.train.precision, gpus), gpus)
        made = ensure_column(frozen, host.compute_column)
        say(f"{scored.what} of {split}: {'computed' if made else 'in the cache'}")
        files[scored.column] = frozen.path
    return files


def _stream(config: Config, tokenizer: Tokenizer) -> Stream:
    if config.train.max_steps is None:
        raise UserError("train.max_steps is not set: with data.cache false, the run needs it to end")
    if columns := stage_of(config).columns(config):
        raise UserError(
            f"data.cache is false, but this run keeps {columns[0].what} with the packs; leave data.cache out"
            + "".join(f", or change {key}" for key in stage_of(config).column_keys)
        )
    encoding, sources = encoding_of(config.stage, config.data, "train", tokenizer, config.eval.cluster)
    return Stream(tuple(plan_units(sources, encoding)), encoding, config.train.seed, join(config.out, "rejects"))


def step_plan(config: Config, train: str | Stream) -> StepPlan | StreamPlan:
    """Return the plan of a run's steps over prepared packs or a stream. Raises as `Config.packs_per_step`."""
    length = config.train
    if isinstance(train, Stream):
        assert length.max_steps
        return StreamPlan(config.packs_per_step(), length.max_steps)
    groups = PackStore(train).row_groups
    return StepPlan(groups, config.packs_per_step(), length.epochs, length.seed, length.max_steps)


def changed_inputs(job: Job, run: RunDirectory) -> list[str]:
    """Return the names of the job's inputs that differ from those the run began with."""
    before = run.info().get("inputs", {})
    # Compare only the folder's name, a hash: the cache may have moved.
    return [key for key, value in job.inputs.items() if _name(before.get(key)) != _name(value)]


def _name(value: str | None) -> str | None:
    return value and value.rpartition("/")[2]


def begin(job: Job, *, resume: bool) -> RunDirectory:
    """Make or reopen the run directory.

    Raises:
        UserError: the directory holds another run (see `RunDirectory.create`), or data or base have changed since.
    """
    run = RunDirectory(job.config.out)
    if resume:
        run.recover(job.config)
    if resume and (changed := changed_inputs(job, run)):
        raise UserError(
            f"{run.where}: the content of {' and '.join(changed)} has changed since the run began, or this version of "
            "minimind-ray prepares it differently; choose another --out, or restore the old content"
        )
    run.create(job.config, {"inputs": job.inputs, "baselines": dict(job.baselines)}, resume=resume)
    return run


@contextmanager
def begun(job: Job, *, resume: bool) -> Generator[None]:
    """Make or reopen the run directory. Inside, no other process can write to it.

    If a signal interrupts the work inside, such as the start of the workers, run.json gets the state "stopped".

    Raises:
        UserError: see `begin`; or another process writes to the run directory.
    """
    run = RunDirectory(job.config.out)
    with claimed(run.where):
        try:
            begin(job, resume=resume)
            yield
        except KeyboardInterrupt:
            with suppress(OSError, StoreError):
                if run.info().get("state") == "running":
                    run.update(state="stopped")
            raise


def require_gpus_here(scale: ScaleConfig) -> None:
    """Raise UserError if a run in this process asks for a GPU but torch finds none."""
    if scale.gpus_per_worker and not torch.cuda.is_available():
        raise UserError(
            f"scale.gpus_per_worker is {scale.gpus_per_worker:g}, and torch finds no GPU on this machine; set it to 0 "
            "to train on the CPU"
        )


def run_here(job: Job) -> None:
    """Run the stage in this process, without Ray. Ctrl-C stops the run after the current step, with a checkpoint."""
    context = PlainContext()
    try:
        with context.stop_on_interrupt():
            job.run(context, job.data(context))
    except Exception as error:
        RunDirectory(job.config.out).fail(str(error))
        raise
