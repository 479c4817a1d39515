"""Run Ray Train's controller in the process that starts the run, instead of in an actor.

An actor's process would have to start and import torch before the first worker could start, which takes a third of a
run's start. And the run would depend on one more process. This module replaces the few parts of Ray Train 2.60 that
require the controller to be an actor. It also replaces the actor that synchronizes Ray Train's workers.

The module is used only if `versions.private_parts` is true. Otherwise a plain TorchTrainer runs, which takes twice as
long to its first step.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, state, worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util.placement_group import PlacementGroup

from minimind_ray.on_ray.session import is_single_node


class _NoCollectives:
    """Stands in for Ray Train's synchronization actor: our workers use torch's collectives."""

    @classmethod
    def options(cls, **options: Any) -> type[_NoCollectives]:
        """Return this class; Ray Train calls it as if it were the actor's class."""
        return cls

    @classmethod
    def remote(cls, **arguments: Any) -> type[_NoCollectives]:
        """Return this class; Ray Train calls it to start the actor."""
        return cls


# Ray Train looks up both names in their modules at each use.
worker_group.SynchronizationActor = _NoCollectives
state._shutdown_sync_actor = lambda actor: None  # pyright: ignore[reportPrivateUsage]


@dataclass
class Reserved(ScalingConfig):
    """Workers that run in the first bundles of an existing placement group."""

    group: PlacementGroup | None = None


class _Workers(WorkerGroup):
    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> DefaultPlacementGroupHandle:
        return DefaultPlacementGroupHandle(scaling_config.group)

    def _start(self) -> None:
        """Start as Ray Train does, but free the workers if the start fails (the end of Ray's actor would free them)."""
        try:
            super()._start()
        except BaseException:
            if self._worker_group_state:
                self._worker_group_state.shutdown()
                self._clear_state()
                for callback in self._callbacks:
                    callback.after_worker_group_abort(self._worker_group_context)
            raise

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        """Use no runtime_env; it would make Ray start each worker twice. Workers have the job's variables."""
        return {}

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """Do as Ray Train does, but without handles of the synchronization actor and of the controller.

        Workers would ask the controller only about reports with files.
        """
        starts = []
        for rank, worker in enumerate(workers):
            own = {name: values[rank] for name, values in train_context_args.items()}
            starts.append(
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **own,
                )
            )
        ray.get(starts)
        self._decorate_worker_log_file_paths(workers)


class _OneMachine(FixedScalingPolicy):
    """A scaling policy that does not announce the workers' resources to Ray Data and the autoscaler.

    On one machine the announcement would only change how many tasks Ray Data queues. And the actor that receives it
    would have to start before the workers.
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Do nothing; called by Ray Train."""

    def _maybe_send_resource_request(self) -> None: ...


class _Controller(TrainController):
    worker_group_cls = _Workers


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller runs in `fit`, in any thread. The caller handles interrupts.

    `shares`: Ray Data must know the workers' resources even on one machine, because its tasks wait for each other.
    Workers can neither report to Ray Train nor ask it for preemption notices; see `private_ray.draining`.
    """

    shares = False

    def _create_default_callbacks(self) -> list[Any]:
        """Return Ray Train's callbacks without the cleaner of placement groups, and without datasets if there are none.

        `session.free_left_groups` replaces the cleaner.
        """
        unwanted: list[type] = [PlacementGroupCleanerCallback]
        if not self.datasets:
            unwanted.append(DatasetsCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, tuple(unwanted))]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Result:
        if is_single_node() and not self.shares:
            controller_init_kwargs["scaling_policy"] = _OneMachine(self.scaling_config)
        controller = _Controller(**controller_init_kwargs)
        try:
            asyncio.run(controller.run())
            return controller.get_result()
        finally:
            # There is no controller actor to take its children down, so kill the dataset manager here.
            for callback in controller_init_kwargs["callbacks"]:
                if isinstance(callback, DatasetsCallback):
                    provider: Any = callback._dataset_shard_provider  # pyright: ignore[reportPrivateUsage]
                    if provider and ray.is_initialized():
                        ray.kill(provider._dataset_manager)
