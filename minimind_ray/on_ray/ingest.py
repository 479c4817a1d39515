"""Prepared packs to Ray Train workers, by Ray Data, in the plan's exact order.

One row of the dataset is one worker's share of one step, so Ray Data's cost per row is paid once per step. Row
`step * workers + rank` goes to `rank`: with blocks of one row and order kept, the splitter deals blocks out in turn.
Each row carries its step and rank, and the worker checks them, since nothing in Ray promises that dealing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from minimind_ray.data.pack import Pack, pack_from_row
from minimind_ray.stages.run import Job


def step_dataset(job: Job, start: int) -> ray.data.Dataset:
    """All workers' shares of the steps from `start` on; see the module's text for the order of rows."""
    plan, workers = job.plan, job.config.scale.workers
    rows = (plan.steps - start) * workers
    # A task reads the shares of some steps; enough tasks to stream, each long enough to pay for its start.
    per_task = max(workers, min(64, -(-rows // 8)))
    return (
        ray.data.range(rows, override_num_blocks=-(-rows // per_task))
        .map_batches(
            _read_shares,
            batch_size=per_task,
            fn_kwargs={"job": job, "start": start},
        )
        .repartition(target_num_rows_per_block=1)
    )


def _read_shares(batch: dict[str, np.ndarray], job: Job, start: int) -> Iterator[pa.Table]:
    plan, workers, store = job.plan, job.config.scale.workers, job.train_store()
    for row in batch["id"].tolist():
        step, rank = start + row // workers, row % workers
        yield share_table(step, rank, store.read(plan.ids(step, rank, workers).tolist()))


def share_table(step: int, rank: int, packs: list[Pack]) -> pa.Table:
    """One row: step, rank, and the packs' columns as lists."""

    def column(arrays: list[np.ndarray], kind: pa.DataType) -> list[Any]:
        return pa.array([arrays], pa.list_(pa.list_(kind)))

    tokens = pa.uint32() if any(p.tokens.dtype == np.uint32 for p in packs) else pa.uint16()
    columns = {
        "step": pa.array([step]),
        "rank": pa.array([rank]),
        "id": pa.array([[p.id for p in packs]], pa.list_(pa.int64())),
        "tokens": column([p.tokens for p in packs], tokens),
        "weights": column([p.weights for p in packs], pa.uint8()),
        "lengths": column([p.lengths for p in packs], pa.int32()),
    }
    if packs and packs[0].reference is not None:
        columns["reference"] = column([p.reference for p in packs if p.reference is not None], pa.float32())
    return pa.table(columns)


def read_shares(shard: Iterable[Any], start: int, rank: int) -> Iterator[list[Pack]]:
    """This rank's packs of each step from `start` on, out of its shard of a `step_dataset`."""
    for offset, row in enumerate(shard):
        found, expected = (row["step"][0].as_py(), row["rank"][0].as_py()), (start + offset, rank)
        assert found == expected, f"Ray Data dealt (step, rank) {found} where {expected} was due"
        names = [name for name in row.column_names if name not in ("step", "rank", "id")]
        packs = pa.table({name: row[name].combine_chunks().values for name in names})
        yield [pack_from_row(packs, i, id) for i, id in enumerate(row["id"][0].as_py())]
