"""Compute columns of a frozen model with Ray Data: each process loads the model and scores one row group after another.

See stages/columns.py for columns and for the same work without Ray.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from ray.util.annotations import RayDeprecationWarning

from minimind_ray.data.store import PackStore
from minimind_ray.on_ray.session import is_single_node, machines, require_cpus
from minimind_ray.on_ray.waiting import print_wait_reason, rows_of, wait_reason
from minimind_ray.stages.columns import FrozenColumn, FrozenModel, compute_here, dtype_here
from minimind_ray.train.context import default_device, resolve_precision
from minimind_ray.train.throughput import training_flops_per_token

SMALL_FLOPS = 1e12  # A few seconds of a core: about the time to start a process and load a model.


def granted_device() -> torch.device:
    """Return the GPU that Ray assigned to this process, otherwise the CPU.

    Use a GPU only if Ray assigned it; otherwise several processes would share it.
    """
    return default_device() if ray.get_gpu_ids() else torch.device("cpu")


def dtype_on_ray(precision: str, gpus: float) -> torch.dtype:
    """Return the dtype for `train.precision` (a `ResolveDtype`); on a cluster, ask a machine that can run workers."""
    if precision != "auto" or is_single_node():
        return dtype_here(precision, gpus)
    require_cpus(1, gpus, "computing columns of a frozen model")
    ask = ray.remote(num_cpus=1, num_gpus=gpus)(lambda: resolve_precision(precision, granted_device()))
    with print_wait_reason(lambda: wait_reason("computing columns of a frozen model needs", {"CPU": 1, "GPU": gpus})):
        return ray.get(ask.remote())


class _Scorer:
    def __init__(self, frozen: FrozenColumn) -> None:
        self.score = FrozenModel(frozen, granted_device())
        self.store = PackStore(frozen.store)
        sizes = self.store.row_groups
        self.starts = np.cumsum([0, *sizes])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        groups = [range(self.starts[g], self.starts[g + 1]) for g in batch["id"]]
        return {"values": [[self.score(pack).tolist() for pack in self.store.read(group)] for group in groups]}


def compute_on_ray(frozen: FrozenColumn) -> Iterator[np.ndarray]:
    """Yield each pack's values in the order of the packs (a `ComputeColumn`).

    On a single machine this process computes the column itself if the work is small, or if there is a GPU that the run
    did not ask for.
    """
    store, needs = PackStore(frozen.store), {"CPU": 1, "GPU": frozen.gpus}
    flops = store.n_tokens * training_flops_per_token(frozen.base.shape, 0) / 3
    if is_single_node() and not frozen.gpus and (flops < SMALL_FLOPS or default_device().type == "cuda"):
        yield from compute_here(frozen)
        torch.cuda.empty_cache()  # Leave the GPU's memory to the workers, which start afterwards.
        return
    require_cpus(1, frozen.gpus, f"computing {frozen.scored.what}")
    groups = len(store.row_groups)
    have = machines().resources()
    processes = int(have["GPU"] / frozen.gpus) if frozen.gpus else int(have["CPU"]) - 1
    with warnings.catch_warnings():  # Ray calls the option deprecated, but has no other name for it yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        scored = _scored(frozen, groups, processes)
    for row in rows_of(scored, f"computing {frozen.scored.what} needs", needs):
        for values in row["values"]:
            yield np.asarray(values, frozen.scored.column.dtype)


def _scored(frozen: FrozenColumn, groups: int, processes: int) -> ray.data.Dataset:
    # Make the rows in this process. The tasks of `ray.data.range` would need CPUs, and the scorers of other programs
    # may hold these CPUs while they wait for the CPUs of our scorers.
    items = ray.data.from_items([{"id": group} for group in range(groups)], override_num_blocks=groups)
    return items.map_batches(
        _Scorer,
        batch_size=1,
        num_cpus=1,
        num_gpus=frozen.gpus or None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(groups, processes))),
        fn_constructor_args=(frozen,),
        # Without this, Ray warns on the terminal that restarts of actors with arguments may fail.
        ray_remote_args_fn=lambda: {"max_restarts": 0},
    )
