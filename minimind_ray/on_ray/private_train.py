"""Ray Train's controller in the process that starts the run, not in an actor of its own.

An actor's process would be started, and import torch, before the first worker's could be: a third of a run's start. And
with it one more process on which the run depends goes away. What follows are the few places where Ray Train 2.60 takes
for granted that its controller is an actor, and how to do without another one, by which its workers would tell each
other things. Used only where `private_parts` says so; a plain TorchTrainer takes twice as long to its first step.
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

from minimind_ray.on_ray.session import alone


class _NoCollectives:
    """Stands in for the actor by which Ray Train's workers tell each other things: ours use torch's collectives."""

    @classmethod
    def options(cls, **options: Any) -> type[_NoCollectives]:
        """Called by Ray Train in the place of the actor's class."""
        return cls

    @classmethod
    def remote(cls, **arguments: Any) -> type[_NoCollectives]:
        """Called by Ray Train to start the actor."""
        return cls


# Both are looked up in their modules each time.
worker_group.SynchronizationActor = _NoCollectives
state._shutdown_sync_actor = lambda actor: None  # pyright: ignore[reportPrivateUsage]


@dataclass
class Reserved(ScalingConfig):
    """Workers that run in the first bundles of a placement group that is there."""

    group: PlacementGroup | None = None


class _Workers(WorkerGroup):
    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> DefaultPlacementGroupHandle:
        return DefaultPlacementGroupHandle(scaling_config.group)

    def _start(self) -> None:
        """As Ray Train's, which leaves workers that fail just after their start for its actor's end to free."""
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
        """None: its variables would cost each worker a second start, and workers have those of the job."""
        return {}

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray Train's, without handles of the actor that is not there, and of the controller, which is asked only
        for what was reported with files."""
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
    """Does not tell Ray Data and the autoscaler what the workers take: on one machine that decides nothing but how many
    tasks Ray Data lets wait, and the actor that is told would start before the workers.
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Ray Train's."""

    def _maybe_send_resource_request(self) -> None: ...


class _Controller(TrainController):
    worker_group_cls = _Workers


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller runs in `fit`, in any thread. Interrupts are the caller's to see to.

    `shares` says that Ray Data has to know what the workers take, on one machine too: its tasks wait for each other.
    Workers can neither report to Ray Train nor ask it for notices: see `private_ray.draining`.
    """

    shares = False

    def _create_default_callbacks(self) -> list[Any]:
        """Without what looks after the controller's actor, and after no datasets. Placement groups: see
        `session.free_left_groups`.
        """
        unwanted: list[type] = [PlacementGroupCleanerCallback]
        if not self.datasets:
            unwanted.append(DatasetsCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, tuple(unwanted))]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Result:
        if alone() and not self.shares:
            controller_init_kwargs["scaling_policy"] = _OneMachine(self.scaling_config)
        controller = _Controller(**controller_init_kwargs)
        try:
            asyncio.run(controller.run())
            return controller.get_result()
        finally:
            # An actor's end would be the end of what it started.
            for callback in controller_init_kwargs["callbacks"]:
                if isinstance(callback, DatasetsCallback):
                    provider: Any = callback._dataset_shard_provider  # pyright: ignore[reportPrivateUsage]
                    if provider and ray.is_initialized():
                        ray.kill(provider._dataset_manager)
