"""Reference log-probabilities by Ray Data: each process holds the base model and takes row groups as they come."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from ray.util.annotations import RayDeprecationWarning

from minimind_ray.data.store import PackStore
from minimind_ray.model.checkpoint import load_shape
from minimind_ray.on_ray.session import alone, machines, require_cpus
from minimind_ray.on_ray.waiting import lacking, rows_of, telling
from minimind_ray.stages.reference import Reference, ReferenceModel, compute_here, dtype_here
from minimind_ray.train.context import default_device, resolve_precision
from minimind_ray.train.throughput import training_flops_per_token

SMALL_FLOPS = 1e12  # A core's work of some seconds: no more than to start a process that holds a model.


SCORING = "computing reference log-probabilities needs"


def granted_device() -> torch.device:
    """The GPU that Ray gave this process, else the CPU: one that none asked for would be many processes' at once."""
    return default_device() if ray.get_gpu_ids() else torch.device("cpu")


def dtype_on_ray(precision: str, gpus: float) -> torch.dtype:
    """As `stages.reference.ResolveDtype`; where workers may run on other machines than this, one of those is asked."""
    if precision != "auto" or alone():
        return dtype_here(precision, gpus)
    require_cpus(1, gpus, "computing reference log-probabilities")
    ask = ray.remote(num_cpus=1, num_gpus=gpus)(lambda: resolve_precision(precision, granted_device()))
    with telling(lambda: lacking(SCORING, {"CPU": 1, "GPU": gpus})):
        return ray.get(ask.remote())


class _Scorer:
    def __init__(self, reference: Reference) -> None:
        self.score = ReferenceModel(reference, granted_device())
        self.store = PackStore(reference.store)
        sizes = self.store.row_groups
        self.starts = np.cumsum([0, *sizes])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        groups = [range(self.starts[g], self.starts[g + 1]) for g in batch["id"]]
        return {"values": [[self.score(pack).tolist() for pack in self.store.read(group)] for group in groups]}


def compute_on_ray(reference: Reference) -> Iterator[np.ndarray]:
    """Each pack's log-probabilities in the order of the packs, as `stages.reference.ComputeReference`.

    What is small for a CPU, or has a GPU that it did not ask for, is computed in this process, where there is one
    machine.
    """
    flops = PackStore(reference.store).n_tokens * training_flops_per_token(load_shape(reference.base), 0) / 3
    if alone() and not reference.gpus and (flops < SMALL_FLOPS or default_device().type == "cuda"):
        yield from compute_here(reference)
        torch.cuda.empty_cache()  # For the workers, which come after.
        return
    require_cpus(1, reference.gpus, "computing reference log-probabilities")
    groups = len(PackStore(reference.store).row_groups)
    have = machines().resources()
    processes = int(have["GPU"] / reference.gpus) if reference.gpus else int(have["CPU"]) - 1
    with warnings.catch_warnings():  # The option has no other name yet, though Ray says so.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        scored = _scored(reference, groups, processes)
    for row in rows_of(scored, SCORING, {"CPU": 1, "GPU": reference.gpus}):
        for values in row["values"]:
            yield np.asarray(values, np.float32)


def _scored(reference: Reference, groups: int, processes: int) -> ray.data.Dataset:
    # Items that lie here, not a range: its tasks would wait for CPUs that other programs' scorers hold, and theirs for
    # the CPUs of these.
    items = ray.data.from_items([{"id": group} for group in range(groups)], override_num_blocks=groups)
    return items.map_batches(
        _Scorer,
        batch_size=1,
        num_cpus=1,
        num_gpus=reference.gpus or None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(groups, processes))),
        fn_constructor_args=(reference,),
        # Ray writes to the terminal that restarts may fail, for every actor with arguments.
        ray_remote_args_fn=lambda: {"max_restarts": 0},
    )
