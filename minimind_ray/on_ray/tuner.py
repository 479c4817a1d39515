"""Run the trials of a sweep with Ray Tune.

Each trial has its own run directory. Tune starts a process for each trial and reuses it for later trials. There are
three ways to train a trial:

- With one worker, the trial's process trains. (A separate Ray Train run would take ten times as long to start.)
- With several workers, the trial's process starts a Ray Train run and waits for it.
- With `fuse`, a group's process trains many trials together. The trial's process asks the group for one validation
  after another (see fused.py).

Tune decides when each trial runs and which trials are stopped early. Tune's own files are deleted after the sweep. A
resumed sweep gives all its trials to Tune again. A finished trial only reports its old validations, so that scheduler
and searcher know its results. Each other trial continues from its last checkpoint.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, to_yaml
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.config.search import ASHA_FIRST, ASHA_KEEP, PBT_EVERY, SchedulerName
from minimind_ray.data.files import join, remove
from minimind_ray.data.storage import copy_of, flag, url_of, watch_flag
from minimind_ray.model.checkpoint import read_weights
from minimind_ray.on_ray.columns import granted_device
from minimind_ray.on_ray.fused import run_fused, start_groups
from minimind_ray.on_ray.layout import layout, trials_that_fit
from minimind_ray.on_ray.reservation import StoppedError
from minimind_ray.on_ray.session import (
    Ending,
    configure_data,
    interruptible,
    machines,
    require_cpus,
    worker_resources,
)
from minimind_ray.on_ray.trainer import STOP_FILE, format_error, train_on_ray
from minimind_ray.on_ray.waiting import print_wait_reason, trial_needs, wait_reason, workers_wait_reason
from minimind_ray.stages.run import Job
from minimind_ray.tasks.items import FILE as TASKS
from minimind_ray.tasks.items import PREFIX
from minimind_ray.train.best import best_validation
from minimind_ray.train.card import finish
from minimind_ray.train.checkpoint import read_state
from minimind_ray.train.run import VALIDATION, RunDirectory, last_sound_checkpoint, read_jsonl

# The resources of a process that only waits: 1 MiB of memory. Ray refuses a process without any resource, and the
# workers may need every CPU.
NESTED_DRIVER = {"memory": 2.0**20}

# Environment variables that Tune reads in this process. Run directories and progress lines replace Tune's loggers and
# snapshots.
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}

PAUSED = "PAUSED"
"""Tune's status of a trial that waits for its next turn."""

Point = dict[str, Any]
Event = Literal["started", "paused", "validated", "ended"]
Watch = Callable[[Path, Event, Mapping[str, Any]], None]
"""A function to call at each event of a trial, with the trial's run directory and a mapping:

- "started", also after a pause: the trial's number of `steps`, and with pbt its current `point`.
- "validated": the metrics of its best validation so far.
- "paused" and "ended": empty.
"""


class Explore(Protocol):
    """Chooses new values for some config keys in the middle of a run, for population based training (pbt)."""

    @property
    def keys(self) -> Sequence[str]:
        """The config keys whose values change."""
        ...

    def __call__(self, point: Point) -> Point:
        """Return a neighbour of `point`."""
        ...


@dataclass(frozen=True)
class Search:
    """How trials are judged and scheduled. `concurrent` is the maximum number of trials at once; None: all that fit."""

    metric: str
    mode: Literal["min", "max"]
    scheduler: SchedulerName = "none"
    concurrent: int | None = None
    explore: Explore | None = None


class Points(Protocol):
    """A searcher: proposes points, and learns from the results of ended trials."""

    count: int
    """The number of trials of the whole sweep."""

    def ask(self) -> list[Job] | None:
        """Return the jobs of the next point, one for each seed; None if there are no more points.

        The jobs' run directories are made.
        """
        ...

    def tell(self, trial: Path, value: float | None) -> None:
        """Receive the metric of the trial in the run directory `trial`; None if the trial failed."""
        ...


class TuneContext:
    """The host of a trial's run: reports each validation to Tune and waits for Tune's verdict."""

    rank = 0
    world_size = 1

    def __init__(
        self, job: Job, search: Search, stopped: Callable[[], bool], bases: Mapping[str, ray.ObjectRef]
    ) -> None:
        self.device = granted_device()
        self.steps, self.metric, self.stopped, self.bases = job.plan.steps, search.metric, stopped, bases
        self.reads_checkpoints = search.scheduler == "pbt"
        self.reports: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self.verdicts: SimpleQueue[bool] = SimpleQueue()
        self.best: Mapping[str, Any] = {}
        self.stopping = self.closed = False

    def note(self, *lines: Mapping[str, Any]) -> None:
        """Update `best` with these validations (lines of metrics.jsonl), without a report to Tune."""
        self.best = best_validation([self.best, *lines]) or {}

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Report the run's step and its best validation so far to Tune. Return Tune's verdict: whether to continue."""
        if self.closed or self.metric not in metrics:
            return True
        self.note(metrics)
        decisive = {name: value for name, value in (self.best or metrics).items() if name.startswith(("val/", PREFIX))}
        step, tokens = metrics["step"], metrics["tokens"]
        self.reports.put({**decisive, "step": step, "tokens": tokens, "percent": 100 * step / self.steps})
        return self.verdicts.get()

    def should_stop(self) -> bool:
        """Whether the sweep was asked to stop."""
        self.stopping = self.stopping or self.stopped()
        return self.stopping

    def base_weights(self, directory: Path) -> Mapping[str, Tensor] | None:
        """Return a copy of the weights in Ray's object store; None if they are not there."""
        if str(directory) not in self.bases:
            return None
        arrays: Mapping[str, np.ndarray] = ray.get(self.bases[str(directory)])
        # Copy the arrays, because the store's memory is shared and read-only.
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def close(self) -> None:
        """Let the run end without further reports to Tune."""
        self.closed = True
        self.verdicts.put(True)


class _Trial(tune.Trainable):
    """Tune's side of a trial. The run trains in a thread; each `step` lets it continue to its next validation."""

    def setup(
        self,
        config: dict[str, Any],
        search: Search | None = None,
        sweep: str | None = None,
        bases: Mapping[str, ray.ObjectRef] | None = None,
        groups: Sequence[Any] = (),
    ) -> None:
        """Begin the first trial of this process. Called by Tune."""
        assert search and sweep and bases is not None
        self.search, self.stopped, self.bases = search, watch_flag(flag(sweep, STOP_FILE)), bases
        self.groups = groups
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial in this process, or the same trial with another point. Called by Tune."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        job, point = config["trial"]["job"], config["trial"]["point"]
        config_here = load_config(job.config.stage, overrides={**job.config.model_dump(), **point})
        self.job: Job = job.with_config(config_here)
        self.run = RunDirectory(self.job.config.out)
        self.context = TuneContext(self.job, self.search, self.stopped, self.bases)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.latest: dict[str, Any] = {"percent": 0.0}

    def step(self) -> dict[str, Any]:
        """Train to the next validation. Return its metrics, with `done` after the last one. Called by Tune."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="trial", daemon=True)
            self.thread.start()
        else:
            self.context.verdicts.put(True)
        report = self.context.reports.get()
        self.latest = report or self.latest
        if report and report["percent"] < 100 and not self.context.stopping:
            return report
        if report:
            self.context.close()
        self.thread.join()
        if self.error:
            raise self.error
        return {**self.latest, "done": True}

    def cleanup(self) -> None:
        """Stop the run after its last report. Called by Tune."""
        if self.thread and self.thread.is_alive():
            self.context.verdicts.put(False)
            self.thread.join()
        gc.collect()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the files from which another trial can continue (for pbt). Called by Tune.

        These are the last checkpoint, and the best checkpoint, which the last one refers to by name.
        """
        run = RunDirectory(self.job.config.out, writes=True)
        last = run.checkpoints()[-1]
        best = run.checkpoint_path(_best(last))
        (Path(checkpoint_dir) / "trial").write_text(run.where)
        (Path(checkpoint_dir) / "best.json").write_text(json.dumps(self.context.best))
        for path in {last, best}:
            shutil.copytree(path, Path(checkpoint_dir) / path.name)
        for name in (VALIDATION, TASKS):
            if (run.path / name).exists():
                shutil.copy(run.path / name, checkpoint_dir)

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Replace this trial's checkpoints by another trial's (for pbt). Called by Tune."""
        directory = Path(str(checkpoint))
        donor = (directory / "trial").read_text()
        self.context.note(json.loads((directory / "best.json").read_text()))
        run = RunDirectory(self.job.config.out, writes=True)
        if donor == run.where:
            return
        run.open()
        for path in run.checkpoints():
            shutil.rmtree(path)
        for path in directory.glob("step-????????"):
            shutil.copytree(path, run.checkpoint_path(path.name))
        # These files belong to the replaced best checkpoint. The donor's files belong to the donor's best checkpoint,
        # which may stay the best.
        for name in (VALIDATION, TASKS):
            (run.path / name).unlink(missing_ok=True)
            if (directory / name).exists():
                shutil.copy(directory / name, run.path)
        run.write("config.yaml", to_yaml(self.job.config))
        last = run.checkpoints()[-1].name
        lineage = {"step": int(last.removeprefix("step-")), "from": Path(donor).name, "checkpoint": last}
        run.append("lineage.jsonl", {**lineage, "point": self.config["trial"]["point"]})
        run.send()

    def _work(self) -> None:
        torch.set_num_threads(max(1, int(self.job.config.scale.cpus_per_worker)))
        try:
            self._train()
        except BaseException as error:
            more = "" if isinstance(error, UserError) else f"; {self.run.where}/run.json has the traceback"
            self.run.fail(f"{format_error(error)}{more}", traceback=traceback.format_exc())
            self.error = error
        finally:
            self.context.reports.put(None)

    def _train(self) -> None:
        done = is_done(self.run, self.search.scheduler)
        checkpoint = None if done else last_sound_checkpoint(self.run)
        known = math.inf if done else int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        # The run will log the lines after the checkpoint again.
        lines = [line for line in self.run.metrics() if line["step"] <= known]
        if self.search.scheduler == "pbt" and not self.context.best:
            moves = [line["step"] for line in read_jsonl(self.run.file("lineage.jsonl"))]
            self.context.note(*(line for line in lines if line["step"] > max(moves, default=0)))
        # Report the earlier validations to Tune again. (Not with pbt: there Tune itself restarts trials all the time.)
        for line in lines if self.search.scheduler != "pbt" else ():
            if not self.context.report(line, None):
                if checkpoint:
                    result = f"checkpoints/{_best(checkpoint)}"
                    finish(self.run, state="early-stopped", steps=line["step"], tokens=line["tokens"], result=result)
                return
        if done or self.context.should_stop():
            return
        self.run.update(state="running", error=None, traceback=None)
        if self.groups:
            run_fused(self.job, self.groups, self.context, self.bases)
        elif self.job.config.scale.most == 1:
            self.job.run(self.context, self.job.data(self.context))
        else:
            _run_nested(self.job, self.run, self.context, known)


def _best(checkpoint: Path) -> str:
    """Return the name of the best checkpoint that `checkpoint` refers to.

    If there is none, or it was deleted, return the name of `checkpoint` itself.
    """
    best = read_state(checkpoint)["best"]
    return best if best and checkpoint.with_name(best).exists() else checkpoint.name


def is_done(run: RunDirectory, scheduler: SchedulerName) -> bool:
    """Whether a trial has ended for good. With pbt, "early-stopped" only means that the trial waited for its turn."""
    return run.info().get("state") in (("finished",) if scheduler == "pbt" else ("finished", "early-stopped"))


def _run_nested(job: Job, run: RunDirectory, context: TuneContext, known: float) -> None:
    """Train a trial as a Ray Train run; report the validations after step `known` to Tune.

    To stop the run, this function makes the run's STOP_FILE. So the run ends by itself and frees its placement group.
    """
    configure_data()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            train_on_ray(job)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    proceed = ended = True
    # Read the lines once more after the end, because the last line may have come during the report of an earlier line.
    while thread.is_alive() or not ended:
        ended = not thread.is_alive()
        thread.join(run.poll_seconds)
        for line in list(run.metrics()):
            if proceed and line["step"] > known and context.metric in line:
                known = line["step"]
                proceed = context.report(line, None)
        if not ended and (not proceed or context.should_stop()):
            flag(run.where, STOP_FILE).touch()
    flag(run.where, STOP_FILE).unlink(missing_ok=True)
    if failure and not isinstance(failure[0], StoppedError):
        raise failure[0]
    if not proceed and run.info()["state"] == "stopped":
        run.update(state="early-stopped")


def concurrent_trials(scale: ScaleConfig) -> int:
    """Return how many trials fit on the cluster at the same time.

    Raises:
        UserError: not even one trial fits.
    """
    require_cpus(0, scale.gpus_per_worker, "a trial")
    return trials_that_fit(machines(), scale)


def nested_driver() -> dict[str, float]:
    """Return the resources of a process that only waits for a trial's workers.

    A cluster's head may offer a resource `driver` for such processes, so that they run on the head.
    """
    return {"driver": 0.001} if "driver" in ray.cluster_resources() else NESTED_DRIVER


def put_bases(jobs: Sequence[Job]) -> dict[str, ray.ObjectRef]:
    """Put the base weights of `jobs` into the object store, each base once. Return references by model directory."""
    directories = {str(job.base.local()) for job in jobs if job.base}
    return {
        directory: ray.put({name: tensor.numpy() for name, tensor in read_weights(directory).items()})
        for directory in sorted(directories)
    }


def run_trials(
    trials: Sequence[Job] | Points,
    scale: ScaleConfig,
    directory: Path,
    search: Search,
    bases: Mapping[str, ray.ObjectRef],
    *,
    fuse: int = 1,
    seconds: float | None = None,
    watch: Watch = lambda trial, event, metrics: None,
) -> Ending:
    """Run trials until each has finished, was stopped, or failed. Return how the sweep ended.

    The trials' run directories exist already. `scale` gives the resources of each trial. With `fuse` above 1, up to
    `fuse` trials are trained together on the resources of one trial.

    The first Ctrl-C, or the end of `seconds`, stops each running trial after its current step, with a checkpoint. A
    second Ctrl-C ends the sweep at once.

    Raises:
        UserError: not even one trial fits on the cluster.
    """
    os.environ.update(SETTINGS)
    # Print no traceback of a failed trial: the error is in the trial's run.json, and `watch` is called.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    stop_file, own = flag(url_of(directory), STOP_FILE), join(url_of(directory), ".ray")
    stop_file.unlink(missing_ok=True)
    count = len(trials) if isinstance(trials, Sequence) else trials.count
    spread = layout(concurrent_trials(scale), count, fuse=fuse, concurrent=search.concurrent)
    groups = start_groups(spread.groups, spread.size, url_of(directory), scale)
    trainable = tune.with_parameters(_Trial, search=search, sweep=url_of(directory), bases=bases, groups=groups)
    resources = nested_driver() if scale.most > 1 or groups else worker_resources(scale)
    watcher = _Watcher(watch, search.metric, groups)
    tuner = _tuner(
        tune.with_resources(trainable, resources), trials, search, watcher,
        at_once=spread.at_once, storage=own, stopped=stop_file.exists,
    )  # fmt: skip
    try:
        with print_wait_reason(lambda: watcher.waits_for(scale)):
            ending = interruptible(tuner.fit, stop_file.touch, math.inf if seconds is None else seconds)
        if ending == "by itself" and not stop_file.exists() and search.scheduler != "pbt":
            for trial in watcher.ended:
                _settle(RunDirectory(trial))
        return ending
    finally:
        for group in groups:
            ray.kill(group)
        stop_file.unlink(missing_ok=True)
        remove(own)


def _tuner(
    trainable: type[tune.Trainable],
    trials: Sequence[Job] | Points,
    search: Search,
    watcher: _Watcher,
    *,
    at_once: int,
    storage: str,
    stopped: Callable[[], bool],
) -> tune.Tuner:
    """Return a tuner for `trials`: it takes the jobs in order, or asks for points until the sweep is `stopped`."""
    if isinstance(trials, Sequence):
        keys = search.explore.keys if search.explore else ()
        configs = [{"job": job, "point": {key: attrgetter(key)(job.config) for key in keys}} for job in trials]
        space = {"trial": tune.grid_search(configs)}
        searcher, samples = None, 1
    else:
        space, searcher, samples = None, _Asking(trials, search, stopped), trials.count
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=search.metric,
            mode=search.mode,
            scheduler=_scheduler(search),
            search_alg=searcher,
            num_samples=samples,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=storage,
            callbacks=[watcher],
            stop=_StoppedWhileWaiting(stopped, watcher),
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _settle(run: RunDirectory) -> None:
    """Record that a trial was stopped early, if its process could not.

    Tune kills the last trials' processes some ten seconds after its verdict, perhaps before they write their state.
    """
    if run.info()["state"] == "running" and (checkpoint := last_sound_checkpoint(run)):
        state = read_state(checkpoint)
        result = f"checkpoints/{_best(checkpoint)}"
        finish(run, state="early-stopped", steps=state["step"], tokens=state["tokens"], result=result)


def _scheduler(search: Search) -> TrialScheduler:
    if search.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="percent", max_t=100, grace_period=ASHA_FIRST, reduction_factor=ASHA_KEEP
        )
    if search.scheduler == "median":
        # With an infinite `min_time_slice`, Tune pauses no trial to wait for others. A paused trial's process would be
        # left in the middle of a run.
        return MedianStoppingRule(
            time_attr="percent",
            grace_period=ASHA_FIRST,
            min_time_slice=math.inf,  # pyright: ignore[reportArgumentType]  # Ray's type leaves out fractions.
        )
    if search.scheduler == "pbt":
        assert search.explore
        return _Exchange(search.explore)
    return FIFOScheduler()


class _Exchange(PopulationBasedTraining):
    """Population based training, except that each trial keeps its own job and run directory."""

    def __init__(self, explore: Explore) -> None:
        def explored(config: dict[str, Any]) -> dict[str, Any]:
            return {"trial": {**config["trial"], "point": explore(config["trial"]["point"])}}

        super().__init__(
            time_attr="percent", perturbation_interval=PBT_EVERY, log_config=False, custom_explore_fn=explored
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Do as Tune does, but restore the trial's job if Tune gave the trial the config of a better trial."""
        job = trial.config["trial"]["job"]
        decision = super().on_trial_result(tune_controller, trial, result)
        if trial.config["trial"]["job"] is not job:
            trial.set_config({"trial": {**trial.config["trial"], "job": job}})
        return decision


class _Asking(Searcher):
    """Offers `points` to Tune as a searcher. Ends the search when the sweep is `stopped`."""

    def __init__(self, points: Points, search: Search, stopped: Callable[[], bool]) -> None:
        super().__init__(metric=search.metric, mode=search.mode)
        self.points, self.stopped = points, stopped
        self.waiting, self.trials = list[Job](), dict[str, Path]()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its searcher to restore a sweep, which is never done here."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial. Called by Tune."""
        if self.stopped():
            return Searcher.FINISHED
        if not self.waiting:
            asked = self.points.ask()
            if asked is None:
                return Searcher.FINISHED
            self.waiting = asked
        job = self.waiting.pop(0)
        self.trials[trial_id] = copy_of(job.config.out)
        return {"trial": {"job": job, "point": {}}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the trial's metric on to the searcher. Called by Tune."""
        assert self.metric
        self.points.tell(self.trials[trial_id], None if error or not result else result.get(str(self.metric)))

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file: the run directories hold all that a resume needs. Called by Tune."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""
        raise NotImplementedError


class _Watcher(tune.Callback):
    """Passes Tune's events to `watch`, and records the failure of trials whose process died."""

    def __init__(self, watch: Watch, metric: str, groups: Sequence[Any]) -> None:
        self.watch, self.metric, self.groups = watch, metric, groups
        self.ended: list[Path] = []
        self.running: set[str] = set()
        self.ready = [group.__ray_ready__.remote() for group in groups]
        self.paused: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Not pickled: it holds a terminal."""
        return {}

    def waits_for(self, scale: ScaleConfig) -> str | None:
        """Return a sentence that says which resources the sweep waits for; None if it does not wait."""
        if self.running and (not self.ready or ray.wait(self.ready, timeout=0)[0]):
            return workers_wait_reason() if scale.most > 1 else None
        return wait_reason("a trial needs", trial_needs(scale))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial runs. Called by Tune."""
        self.running.add(trial.trial_id)
        self.paused.discard(trial.trial_id)
        job, point = trial.config["trial"]["job"], trial.config["trial"]["point"]
        self.watch(_path(trial), "started", {"steps": job.plan.steps, "point": point})

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Note trials that pbt has paused. Called by Tune, which calls nothing else at a pause."""
        for trial in trials:
            if trial.status == PAUSED and trial.trial_id not in self.paused:
                self.paused.add(trial.trial_id)
                self.running.discard(trial.trial_id)
                self.watch(_path(trial), "paused", {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass a validation on. Called by Tune."""
        if self.metric in result:  # Missing if the trial was stopped before its first validation.
            self.watch(_path(trial), "validated", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the end of a trial. Called by Tune."""
        self.running.discard(trial.trial_id)
        self.ended.append(_path(trial))
        self.watch(_path(trial), "ended", {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial failed, and record the failure if the trial's process could not. Called by Tune."""
        self.running.discard(trial.trial_id)
        run = RunDirectory(_path(trial))
        if run.info()["state"] != "failed":
            error = trial.get_error()
            run.fail(f"its process ended{f': {format_error(error)}' if error else ''}")
            for group in self.groups:
                group.leave.remote(trial.config["trial"]["job"].config.out)
        self.watch(run.path, "ended", {})


class _StoppedWhileWaiting(tune.Stopper):
    """Ends a sweep that is `stopped` while no trial is running. (A running trial stops by itself.)"""

    def __init__(self, stopped: Callable[[], bool], watcher: _Watcher) -> None:
        self.stopped, self.watcher = stopped, watcher

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: not pickled, because it holds a `_Watcher`."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: trials end by themselves. Called by Tune after each result."""
        return False

    def stop_all(self) -> bool:
        """Whether to end the sweep. Called by Tune."""
        return not self.watcher.running and self.stopped()


def _path(trial: Any) -> Path:
    return copy_of(trial.config["trial"]["job"].config.out)
