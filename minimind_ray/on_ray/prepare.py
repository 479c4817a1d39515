"""Encode source files with Ray Data, on all CPUs of the cluster (see data/prepare.py for units)."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator, Sequence

import numpy as np
import ray

from minimind_ray.config.errors import UserError
from minimind_ray.data.prepare import Encoding, Unit, encode_unit, run_units_here, worth_spreading
from minimind_ray.data.store import UnitStats
from minimind_ray.on_ray.session import is_single_node, require_cpus
from minimind_ray.on_ray.waiting import rows_of


def run_units_on_ray(units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
    """Encode units in parallel (a `RunUnits`); yield the counts of each unit when it is done.

    Small work is done in this process, but only on a single machine: the nodes of a cluster may not see this process's
    files.

    Raises:
        UserError: as `encode_unit`; or the cluster has no CPU for the tasks.
    """
    if is_single_node() and not worth_spreading(units):
        yield from run_units_here(units, encoding)
        return
    require_cpus(1, 0, "preparing data")
    # Make the rows in this process, because `ray.data.range` would need more tasks. Encode in tasks instead of actors,
    # because tasks use existing processes, and Ray repeats a task if its process dies.
    items = ray.data.from_items([{"unit": i} for i in range(len(units))], override_num_blocks=len(units))
    done = items.map_batches(
        _encode,  # pyright: ignore[reportArgumentType]  # Ray's type leaves out fn_args.
        batch_size=1,
        num_cpus=1,
        fn_args=([ray.put((units, encoding))],),
    )
    done.context.execution_options.preserve_order = False
    for row in rows_of(done, "preparing data needs", {"CPU": 1}):
        if row["error"]:
            raise UserError(row["error"])
        yield UnitStats.model_validate_json(row["stats"])


def _encode(batch: dict[str, np.ndarray], work: list[ray.ObjectRef]) -> dict[str, list[str]]:
    units, encoding = _fetch(work[0])
    (unit,) = batch["unit"]
    try:
        return {"stats": [encode_unit(units[unit], encoding).model_dump_json()], "error": [""]}
    except UserError as error:  # Return it as a value: Ray would wrap a raised error in its own and log it.
        return {"stats": [""], "error": [str(error)]}


@functools.lru_cache(maxsize=1)
def _fetch(work: ray.ObjectRef) -> tuple[Sequence[Unit], Encoding]:
    """Return the units and the encoding. The cache lets a process keep its tokenizer from unit to unit."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # A task has one CPU.
    gc.set_threshold(20_000)  # Rows are many and short-lived, without cycles; collecting garbage took 7 % of the time.
    return ray.get(work)
