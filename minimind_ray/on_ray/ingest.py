"""Bring prepared packs to Ray Train workers with Ray Data, in the plan's exact order.

One row of the dataset is one worker's share of one step, so Ray Data's cost per row is paid once per step. Row
`step * workers + rank` goes to worker `rank`: blocks have one row, their order is preserved, and Ray Data's splitter
gives the blocks to the workers in turn. Ray does not promise this, so each row has its step and rank, and the worker
checks them.

Functions that run in Ray Data's tasks take no `Job`: unpickling a job imports torch, which takes a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from minimind_ray.data.columns import Column
from minimind_ray.data.pack import Pack, pack_from_row
from minimind_ray.data.plan import StepPlan
from minimind_ray.data.store import ROW_GROUP, PackStore
from minimind_ray.data.stream import Stream

if TYPE_CHECKING:
    from minimind_ray.stages.run import Job

STEPS_PER_TASK = 64  # Most runs then need few processes, and long runs have enough tasks to stream.


def own_steps(job: Job, start: int) -> int:
    """Return how many steps from `start` the workers read themselves, while Ray Data's processes start.

    These processes start one after another and take some five seconds. For a stream the number is 0: its packs are
    known only after all earlier packs were made.
    """
    return 0 if isinstance(job.train, Stream) else min(job.config.data.direct_steps, job.plan.steps - start)


def step_dataset(job: Job, start: int, workers: int) -> ray.data.Dataset:
    """Return the shares of all `workers` in the steps from `start`; the module's docstring gives the order of rows."""
    return stream_dataset(job, workers) if isinstance(job.train, Stream) else prepared_dataset(job, start, workers)


def stream_dataset(job: Job, workers: int) -> ray.data.Dataset:
    """Return the shares of a stream from its first step. Tasks encode units in parallel; the order is preserved."""
    stream, plan = job.train, job.plan
    assert isinstance(stream, Stream)
    # Request enough epochs for all steps: tasks start only as packs are used up, so surplus epochs cost little. Assume
    # that a token takes at most 32 bytes, or twice its size in the first piece (where rows are cut or held out, or
    # contain other fields). If this is still too few, the training loop reports that the data ended.
    per_token = max(32.0, 2 * stream.bytes_per_token)
    fewest = max(1, int(sum(unit.size for unit in stream.units) / (per_token * stream.encoding.config.pack_tokens)))
    epochs = 1 + -(-plan.steps * plan.packs_per_step // fewest)
    units = len(stream.units) * epochs
    # Ray's type annotations allow neither fn_kwargs nor a function for a single batch format.
    return (
        ray.data.range(units, override_num_blocks=units)
        .map_batches(_make_packs, batch_size=1, fn_kwargs={"stream": stream})  # pyright: ignore[reportArgumentType]
        .repartition(target_num_rows_per_block=plan.packs_per_step, strict=True)
        .map_batches(
            _share_out,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"workers": workers},
        )
        .repartition(target_num_rows_per_block=1)
    )


def _make_packs(batch: dict[str, np.ndarray], stream: Stream) -> Iterator[pa.Table]:
    for number in batch["id"].tolist():
        epoch, place = divmod(number, len(stream.units))
        packs = stream.unit_tables(stream.order(epoch)[place])
        while several := list(islice(packs, ROW_GROUP)):
            yield pa.concat_tables(several)


def _share_out(step: pa.Table, workers: int) -> Iterator[pa.Table]:
    step = step.combine_chunks()
    packs = [pack_from_row(step, row, row) for row in range(len(step))]
    for rank in range(workers):
        yield share_table(None, rank, packs[rank::workers])


def prepared_dataset(job: Job, start: int, workers: int) -> ray.data.Dataset:
    """Return the shares of prepared packs. Tasks read each pack by its number."""
    rows, per_task = (job.plan.steps - start) * workers, STEPS_PER_TASK * workers
    numbers = ray.data.range(rows, override_num_blocks=-(-rows // per_task))
    # Each table that a task yields becomes a block, so no second task has to cut blocks into rows.
    numbers.context.target_max_block_size = 1
    arguments = {
        "train": job.train,
        "columns": job.train_columns,
        "plan": job.plan,
        "workers": workers,
        "start": start,
    }
    return numbers.map_batches(_read_shares, batch_size=per_task, fn_kwargs=arguments)  # pyright: ignore[reportArgumentType]


def _read_shares(
    batch: dict[str, np.ndarray], train: str, columns: Mapping[Column, str], plan: StepPlan, workers: int, start: int
) -> Iterator[pa.Table]:
    store = PackStore(train, columns)
    for row in batch["id"].tolist():
        step, rank = start + row // workers, row % workers
        yield share_table(step, rank, store.read(plan.ids(step, rank, workers).tolist()))


def share_table(step: int | None, rank: int, packs: list[Pack]) -> pa.Table:
    """Return one row: step (None in a stream, whose tasks do not know it), rank, and the packs' columns as lists."""

    def lists(arrays: list[np.ndarray], kind: pa.DataType) -> list[Any]:
        return pa.array([arrays], pa.list_(pa.list_(kind)))

    tokens = pa.uint32() if any(p.tokens.dtype == np.uint32 for p in packs) else pa.uint16()
    columns = {
        "step": pa.array([step], pa.int64()),
        "rank": pa.array([rank]),
        "id": pa.array([[p.id for p in packs]], pa.list_(pa.int64())),
        "tokens": lists([p.tokens for p in packs], tokens),
        "weights": lists([p.weights for p in packs], pa.uint8()),
        "lengths": lists([p.lengths for p in packs], pa.int32()),
    }
    for column in packs[0].columns if packs else ():
        columns[column.name] = lists([p.columns[column] for p in packs], pa.from_numpy_dtype(column.dtype))
    return pa.table(columns)


def read_shares(shard: Iterable[Any], job: Job, start: int, rank: int) -> Iterator[list[Pack]]:
    """Yield this rank's packs of each step from `start`, from its shard of a `step_dataset`.

    In a stream, packs before `start` are made again and skipped.
    """
    streaming = isinstance(job.train, Stream)
    rows = islice(shard, start if streaming else 0, None)
    for step, row in zip(range(start, job.plan.steps), rows):
        found, expected = (row["step"][0].as_py(), row["rank"][0].as_py()), (None if streaming else step, rank)
        assert found == expected, f"Ray Data dealt (step, rank) {found} where {expected} was due"
        names = [name for name in row.column_names if name not in ("step", "rank", "id")]
        packs = pa.table({name: row[name].combine_chunks().values for name in names})
        # In a stream, packs are numbered within their step.
        first = step * job.plan.packs_per_step if streaming else 0
        ids = enumerate(row["id"][0].as_py())
        yield [pack_from_row(packs, i, first + id, job.train_columns) for i, id in ids]
