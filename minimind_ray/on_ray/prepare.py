"""Units of source files encoded by Ray Data, on all CPUs of the cluster."""

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
from minimind_ray.on_ray.session import alone, require_cpus
from minimind_ray.on_ray.waiting import rows_of


def run_units_on_ray(units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
    """Encode units in parallel, as `data.prepare.RunUnits`: their counts, as they get done.

    Work too small to gain by it is done in this process, but only where there is one machine: a cluster's nodes may not
    see what this process writes.

    Raises:
        UserError: as `encode_unit`; or the cluster has no CPU to do it on.
    """
    if alone() and not worth_spreading(units):
        yield from run_units_here(units, encoding)
        return
    require_cpus(1, 0, "preparing data")
    # Items that lie here, not a range, which tasks of its own would have to make. And tasks, not actors: they run in
    # processes that are there already, and Ray repeats them when one dies.
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
    except UserError as error:  # As a value: raised, it would arrive wrapped in Ray's own errors and logs.
        return {"stats": [""], "error": [str(error)]}


@functools.lru_cache(maxsize=1)
def _fetch(work: ray.ObjectRef) -> tuple[Sequence[Unit], Encoding]:
    """A process keeps its tokenizer from unit to unit."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # A task has one CPU.
    gc.set_threshold(20_000)  # Rows come and go by the thousand and hold no cycles; collecting them took 7 %.
    return ray.get(work)
