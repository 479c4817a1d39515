"""The tracker for Weights & Biases. Each run directory has one W&B run, with every step once, even after resumes.
The comparison of a sweep is a W&B run of its own, in the group of the trials' runs.

A W&B run holds the same steps as metrics.jsonl. A resumed run logs again, from metrics.jsonl, every step that W&B's
server does not have. Files that waited for `wandb sync` are deleted and written anew, so that no step is missing; steps
that were sent already are left out.

W&B receives the run's config, metrics, samples, and references to its inputs and its result. It receives no system
data, code, console output or crash reports.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import shlex
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import read_json
from minimind_ray.config.schema import Config
from minimind_ray.track.tracker import SweepView, TrackedRun
from minimind_ray.track.values import Best, flatten
from minimind_ray.track.wandb_files import last_step, parts, retire, sync_command, wait_until_written, was_sent
from minimind_ray.track.wandb_mode import NO_KEY, NOT_ONLINE, check_key, has_key, settle_mode, unusable

if TYPE_CHECKING:
    from wandb import Artifact, Html, Run, Settings, Table

CONNECT_SECONDS = 20
FINISH_SECONDS = 60
LONGEST_NAME = 128


class WandbTracker:
    """Logs metrics by tokens and steps, and samples as tables; see `Tracker` for the methods."""

    title = "W&B"

    def __init__(self) -> None:
        self.stop_requested = False
        self.best = Best()
        self.unlogged: Mapping[str, Any] | None = None
        """The last line of metrics.jsonl, if it was left out because W&B has its step."""
        self.logged = -1
        """The last step that was logged to W&B."""
        self.shown = set[str]()
        """The names of the tables and pages in this part of the W&B run."""
        self.view: str | None = None
        """The URL of the saved view of a sweep's runs."""

    def check(self, config: Config) -> None:
        """Check W&B's environment variables and key; see `check_key`."""
        check_key(config)

    def send_command(self, directory: Path) -> str | None:
        """Return the command that sends the records logged offline in `directory`; None if all are sent."""
        return sync_command(directory)

    def open(self, run: TrackedRun) -> Mapping[str, Any] | None:
        """Begin or continue a W&B run. Return its `identity`; a resume needs the id to continue the same W&B run.

        With `auto`, WANDB_MODE and WANDB_DISABLED decide if they are set. Otherwise W&B is online if there is a key,
        and offline if not. If W&B refuses an environment variable or cannot be reached, it is offline, and a message on
        stderr says so.

        Raises:
            UserError: `track.wandb` is online, but there is no key, or W&B refuses the key or an environment variable,
                or W&B cannot be reached.
        """
        mode = settle_mode(run.config)
        if mode == "off":
            return None
        if mode == "offline" or not self._open_online(run):
            self._begin(run, "offline")
        self._log_earlier_lines(run)
        return self.identity

    def _log_earlier_lines(self, run: TrackedRun) -> None:
        with self._closing_at_an_error():
            for metrics, samples in run.lines():
                self.log(metrics, samples)

    @property
    def identity(self) -> dict[str, str | None]:
        """The W&B run's id, project and mode. If it is online, also its entity and URL. A sweep's run has its view."""
        run = self.run
        where = {"mode": "offline"} if run.offline else {"mode": "online", "entity": run.entity, "url": run.url}
        view = {"view": self.view} if self.view else {}
        return {"id": run.id, "project": run.project, **where, **view}

    def _open_online(self, run: TrackedRun) -> bool:
        """Begin online. Return False if `track.wandb` is auto and W&B has no key or cannot be used."""
        asked_for = run.config.track.wandb == "online"
        try:
            if has_key():
                self._begin(run, "online")
                return True
        except Exception as error:
            problem = unusable(error)
            if asked_for:
                raise UserError(NOT_ONLINE.format(problem)) from None
            print(f"{problem}; logging offline", file=sys.stderr)
            return False
        if asked_for:
            raise UserError(NO_KEY)
        return False

    def _begin(self, run: TrackedRun, mode: Literal["online", "offline"]) -> None:
        import wandb

        config, track = run.config, run.config.track
        self.tracked, self.shown = run, set()
        self.view = run.info.get("wandb", {}).get("view")
        self.seconds = math.inf if run.wait_seconds is None else run.wait_seconds
        self.directory, self.artifacts = Path(config.out), track.artifacts
        run_id = run.info.get("wandb", {}).get("id") or secrets.token_hex(8)
        earlier = parts(self.directory, run_id)
        if mode == "offline":
            self.logged = max((last_step(file) for file in earlier if was_sent(file)), default=-1)
        facts = {key: run.info.get(key) for key in ("inputs", "commit", "versions")}
        self.run: Run = wandb.init(
            id=run_id,
            resume="allow",
            mode=mode,
            project=track.project,
            entity=track.entity,
            group=track.group and within_limit(track.group),
            name=within_limit(track.name or self.directory.name),
            job_type=run.job_type or config.stage,
            tags=track.tags,
            # W&B's filters and columns fail on names with dots, and its search does not find nested names.
            config=flatten({**config.model_dump(mode="json"), **facts}, "_"),
            dir=config.out,
            settings=self._settings(),
            reinit="create_new",
        )
        with self._closing_at_an_error():
            own = Path(self.run.settings.sync_file)
            retire(file for file in earlier if file.parent.name.startswith("offline-") and file != own)
            if mode == "online":
                self.logged = self.run.starting_step - 1
            self.run.define_metric("step")
            self.run.define_metric("tokens")
            self.run.define_metric("*", step_metric="tokens")
            self.run.summary["state"] = "running"
            # Offline, W&B cannot link a run to its inputs; the W&B config has their hashes instead.
            if self.artifacts and mode == "online":
                self._use_inputs(run)

    def _settings(self) -> Settings:
        import wandb

        def stop() -> None:
            self.stop_requested = True

        return wandb.Settings(
            silent=True,
            console="off",
            symlink=False,
            init_timeout=min(CONNECT_SECONDS, self.seconds),
            finish_timeout=min(FINISH_SECONDS, self.seconds),
            finish_timeout_raises=True,
            stop_fn=stop,
            host="",
            program="",
            disable_code=True,
            disable_git=True,
            label_disable=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str] = ()) -> None:
        """Log one line of metrics.jsonl, unless W&B already has this step."""
        import wandb

        step: int = metrics["step"]
        self.best.see(metrics)
        if step <= self.logged:
            self.unlogged = metrics
            return
        self.unlogged = None
        row = flatten(metrics, "/")
        if samples:
            row["samples"] = table = wandb.Table(columns=["step", "sample", "text"])
            for number, text in enumerate(samples, start=1):
                table.add_data(step, number, text)
        with self._staging():
            self.run.log(row, step=step, commit=True)
        self.logged = step

    def log_table(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Log a W&B table, which takes a step of its own."""
        import wandb

        table = wandb.Table(columns=list(records[0]))
        for record in records:
            table.add_data(*map(_finite, record.values()))
        self._log_alone(name, table)

    def log_page(self, name: str, path: Path) -> None:
        """Log an HTML page as it is, which takes a step of its own."""
        import wandb

        page = path.read_text(encoding="utf-8")
        self._log_alone(name, wandb.Html(page, inject=False, data_is_not_path=True))

    def _log_alone(self, name: str, value: Table | Html) -> None:
        if self.run.offline and name in self.shown:
            self._renew()
        self.shown.add(name)
        with self._staging():
            self.run.log({name: value}, step=self.logged + 1, commit=True)
        self.logged += 1

    def _renew(self) -> None:
        """Begin the part that waits for `wandb sync` anew, so that older tables and pages do not pile up in it."""
        self._close("running")
        self._begin(replace(self.tracked, info={**self.tracked.info, "wandb": self.identity}), "offline")
        self._log_earlier_lines(self.tracked)

    def alert(self, title: str, text: str) -> None:
        """Send an alert by e-mail or Slack, as the user's settings at W&B say. Offline, `wandb sync` sends it."""
        self.run.alert(title=title, text=text)

    def summarize(self, facts: Mapping[str, Any]) -> None:
        """Add facts to the run's summary."""
        self.run.summary.update({name: _finite(value) for name, value in flatten(facts, "/").items()})

    def save_view(self, view: SweepView) -> str | None:
        """Save a view with the package wandb-workspaces, if it is installed and W&B is online; see wandb_views.py."""
        if not self.view and not self.run.offline and find_spec("wandb_workspaces"):
            from minimind_ray.track import wandb_views

            view = replace(view, group=within_limit(view.group))
            self.view = wandb_views.save_view(view, self.run.entity, self.run.project)
        return self.view

    def finish(self, state: str, result: Path | None = None) -> None:
        """Close the W&B run, with the last step and the best validation in its summary.

        `wandb sync` replaces the summary by that of the part it sends, so each part needs the whole summary.
        """
        if self.unlogged:
            self.summarize(self.unlogged)
        self.run.summary.update(self.best.facts())
        with self._staging():
            if result and self.artifacts:
                self.run.log_artifact(model_artifact(result), aliases=["latest", state])
            self._close(state)

    @contextmanager
    def _staging(self) -> Generator[None]:
        """Inside, W&B writes the files of tables and artifacts to the folder of this part of the run.

        There `wandb sync` finds them later, and they are deleted with the part.
        """
        if "WANDB_DATA_DIR" in os.environ:
            yield
            return
        os.environ["WANDB_DATA_DIR"] = self.run.settings.sync_dir
        try:
            yield
        finally:
            del os.environ["WANDB_DATA_DIR"]

    @contextmanager
    def _closing_at_an_error(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self._close("failed")
            raise

    def _close(self, state: str) -> None:
        self.run.summary["state"] = state
        try:
            self.run.finish(exit_code=1 if state == "failed" else 0)
        except TimeoutError:
            command = f"wandb sync --include-online {shlex.quote(self.run.settings.sync_dir)}"
            print(
                f"W&B did not receive the whole run within {min(FINISH_SECONDS, self.seconds):.0f} s; send the rest "
                f"with: {command}",
                file=sys.stderr,
            )
        if self.run.offline:
            wait_until_written(Path(self.run.settings.sync_file))

    def _use_inputs(self, run: TrackedRun) -> None:
        data = [url for key, url in run.info["inputs"].items() if key.startswith("data.") and url]
        with self._staging():
            for artifact in [*map(data_artifact, data), *([model_artifact(run.base)] if run.base else [])]:
                # `use_artifact` alone would wait without limit until W&B's server has the artifact.
                self.run.use_artifact(self.run.log_artifact(artifact).wait(CONNECT_SECONDS))


def within_limit(name: str) -> str:
    """Return a name that W&B accepts: shorten a long name, with a hash of the whole at its end to keep it distinct."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _finite(value: Any) -> Any:
    """Return None for a number that is not finite: W&B would show it, and its whole column, as text."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_artifact(url: str) -> Artifact:
    """Return an artifact that refers to a prepared dataset; its name has the hash of the content."""
    import wandb

    folder = url.rstrip("/")
    artifact = wandb.Artifact(f"data-{Path(folder).name[:16]}", type="dataset", metadata={"path": url})
    manifest = f"{folder}/manifest.json"
    artifact.add_reference(manifest if "://" in url else Path(manifest).as_uri(), checksum=False)
    return artifact


def model_artifact(directory: Path) -> Artifact:
    """Return an artifact that refers to a model directory.

    The name of a checkpoint's artifact has the id of its run, so that W&B links a run to the run it started from.
    """
    import wandb

    run = directory.parents[1] / "run.json"
    identity = read_json(run).get("wandb") if run.exists() else None
    name = identity["id"] if identity else re.sub(r"[^\w.-]", "-", directory.name)
    artifact = wandb.Artifact(f"model-{name}", type="model", metadata={"path": str(directory)})
    for file in sorted(directory.iterdir()):
        if file.is_file():
            artifact.add_reference(file.as_uri(), name=file.name)
    return artifact
