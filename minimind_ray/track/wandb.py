"""Weights & Biases: one W&B run for each run directory, with every step in it once however often it is resumed.

What W&B keeps lies in wandb/ of the run directory, a folder for each time the run was started. The W&B run holds the
same steps as metrics.jsonl: when a run goes on, steps that W&B has are passed over, and steps that it lacks (it died
before they were on disk, or was turned on only now) are logged from the run directory. Nothing but the run itself is
sent: no machine or system data, no code, no console, no crash reports.

No failure of W&B ends a run, once the run has begun: see `_attempt`.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import in_job
from minimind_ray.config.reading import read_json
from minimind_ray.config.schema import Config

if TYPE_CHECKING:
    from wandb import Artifact, Run, Settings

CONNECT_SECONDS = 20
FINISH_SECONDS = 60
WRITE_SECONDS = 10
FOLDER = "wandb"
LONGEST_NAME = 128
Mode = Literal["off", "offline", "online", "auto"]
MODES: dict[str, Mode] = {
    "disabled": "off",
    "offline": "offline",
    "dryrun": "offline",
}  # What values of WANDB_MODE mean.
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")  # Values of WANDB_DISABLED.
FULL, LAST = 1, 4


class WandbTracker:
    """Logs metrics against tokens and steps, and samples as tables. Made by `open_tracker`, on rank 0 only.

    `stop_requested` is set when somebody presses stop in W&B.
    """

    def __init__(
        self, config: Config, info: Mapping[str, Any], mode: Literal["online", "offline"], base: Path | None
    ) -> None:
        import wandb

        self.directory, self.artifacts = Path(config.out), config.track.artifacts
        self.stop_requested = self.failed = False
        self.best: Mapping[str, Any] | None = None
        track = config.track
        self.run = wandb.init(
            id=info.get("wandb", {}).get("id") or secrets.token_hex(8),
            resume="allow",
            mode=mode,
            project=track.project,
            entity=track.entity,
            group=track.group and within_limit(track.group),
            name=within_limit(track.name or self.directory.name),
            job_type=config.stage,
            tags=track.tags,
            # W&B's filters and columns fail on names with dots, and its search does not find nested ones.
            config=flatten(
                {**config.model_dump(mode="json"), **{k: info.get(k) for k in ("inputs", "commit", "versions")}}, "_"
            ),
            dir=config.out,
            settings=self._settings(),
            reinit="create_new",
        )
        OPEN[config.out] = self.run
        # The steps that this run has already. W&B itself drops a step again only online.
        folders = "offline-run-*" if mode == "online" else "*run-*"
        files = (self.directory / FOLDER).glob(f"{folders}/run-{self.run.id}.wandb")
        self.logged = max((last_step(file) for file in files), default=0)
        if mode == "online":
            self.logged = max(self.logged, self.run.starting_step - 1)
        self.run.define_metric("step")
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        self.run.summary["state"] = "running"
        if self.artifacts:
            self._use_inputs(info, base)

    def _settings(self) -> Settings:
        import wandb

        def stop() -> None:
            self.stop_requested = True

        return wandb.Settings(
            silent=True,
            console="off",
            symlink=False,
            init_timeout=CONNECT_SECONDS,
            finish_timeout=FINISH_SECONDS,
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

    @property
    def identity(self) -> dict[str, str | None]:
        """What the run directory remembers: the run's id, without which a resume would begin a new one, and where."""
        run = self.run
        where = {"mode": "offline"} if run.offline else {"mode": "online", "entity": run.entity, "url": run.url}
        return {"id": run.id, "project": run.project, **where}

    def log(self, metrics: Mapping[str, Any], samples: Sequence[str] = ()) -> None:
        """One line of metrics.jsonl, and the texts that the model wrote after the same step."""
        self._use(partial(self._log, metrics, samples))

    def finish(self, state: str, result: Path | None = None) -> None:
        """Close the run. `state` is how it ended; `result` is the checkpoint to take from it."""
        self._use(partial(self._finish, state, result))

    def _use(self, work: Callable[[], None]) -> None:
        """Do `work`, which uses W&B, unless W&B has failed before."""
        self.failed = self.failed or not _attempt(work, NOT_LOGGED)

    def _log(self, metrics: Mapping[str, Any], samples: Sequence[str]) -> None:
        import wandb

        step: int = metrics["step"]
        if "val/loss" in metrics and (self.best is None or metrics["val/loss"] <= self.best["val/loss"]):
            self.best = metrics
        if step <= self.logged:
            return
        row = flatten(metrics, "/")
        if samples:
            row["samples"] = table = wandb.Table(columns=["step", "sample", "text"])
            for number, text in enumerate(samples, start=1):
                table.add_data(step, number, text)
        with _staging_in(self.directory / FOLDER):
            self.run.log(row, step=step, commit=True)
        self.logged = step

    def _finish(self, state: str, result: Path | None) -> None:
        self.run.summary["state"] = state
        if self.best:
            validation = {key.replace("val/", "best/"): value for key, value in self.best.items() if "val/" in key}
            self.run.summary.update({**validation, "best/step": self.best["step"], "best/tokens": self.best["tokens"]})
        with _staging_in(self.directory / FOLDER):
            if result and self.artifacts:
                self.run.log_artifact(model_artifact(result), aliases=["latest", state])
            _close(self.run, exit_code=0)

    def _use_inputs(self, info: Mapping[str, Any], base: Path | None) -> None:
        data = [url for key, url in info["inputs"].items() if key.startswith("data.") and url]
        with _staging_in(self.directory / FOLDER):
            for artifact in [*map(data_artifact, data), *([model_artifact(base)] if base else [])]:
                # `use_artifact` refuses to work offline, and online waits without limit; this is what it does first.
                self.run._log_artifact(artifact, use_after_commit=True)  # pyright: ignore[reportPrivateUsage]


def open_tracker(
    config: Config,
    info: Mapping[str, Any],
    *,
    metrics: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    base: Path | None = None,
) -> WandbTracker | None:
    """The tracker that `track.wandb` asks for; None when it is off, or when W&B cannot even log offline.

    `info` is the run's run.json, `metrics` and `samples` are the lines of metrics.jsonl and samples.jsonl that the run
    goes on from, `base` is the model directory it started from. With `auto`, WANDB_MODE and WANDB_DISABLED decide where
    they are set; else W&B is online with a key, offline without one, and offline, with a word on stderr, when it
    refuses an environment variable or cannot be reached.

    Raises:
        UserError: `track.wandb` is online, and there is no key, or W&B refuses it or cannot be reached, or refuses an
            environment variable.
    """
    mode = _settle_mode(config)
    if mode == "off":
        return None
    tracker = None if mode == "offline" else _open_online(config, info, base)
    tracker = tracker or _open_offline(config, info, base)
    if tracker is None:
        return None
    texts = {line["step"]: line["samples"] for line in samples}
    for line in metrics:
        tracker.log(line, texts.get(line["step"], ()))
    return tracker


def check_tracking(config: Config) -> None:
    """Check W&B's environment variables and key before a run is made, where this machine trains it.

    A cluster's machines have an environment of their own: the run checks it there.

    Raises:
        UserError: `track.wandb` is online, and W&B has no key or refuses an environment variable.
    """
    if os.environ.get("RAY_ADDRESS") or in_job():
        return
    if _settle_mode(config) == "online":
        _require_key()


def _require_key() -> None:
    import wandb

    try:
        there = _has_key()
    except Exception as error:
        raise UserError(NOT_ONLINE.format(_unusable(error))) from None
    finally:
        wandb.teardown()
    if not there:
        raise UserError(NO_KEY)


def _settle_mode(config: Config) -> Mode:
    """The mode by `track.wandb` and the environment, from which variables that W&B would refuse are removed.

    What is refused is said on stderr, and the mode is then offline.

    Raises:
        UserError: `track.wandb` is online, and W&B refuses a variable.
    """
    _own_environment()
    mode: Mode = config.track.wandb
    if mode == "auto" and os.environ.get("WANDB_DISABLED", "").lower() in YES:
        return "off"
    if mode == "auto":
        mode = MODES.get(os.environ.get("WANDB_MODE", ""), "auto")
    if mode == "off" or not (refused := _refused_variables()):
        return mode
    problem = "; ".join(f"W&B refuses the environment variable {name}: {why}" for name, why in refused.items())
    if mode == "online":
        raise UserError(NOT_ONLINE.format(problem))
    print(f"{problem}; logging offline", file=sys.stderr)
    for name in refused:
        del os.environ[name]
    os.environ["WANDB_MODE"] = "offline"  # For the run itself, and for workers on this machine.
    return "offline"


def _own_environment() -> None:
    """Before W&B is imported: what it would take from the environment, and shall not."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # Unset, as a shell has it; W&B itself would refuse it.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Not W&B's own process of a parent: there the run would be in use for ever, should this process be killed.
    os.environ.pop("WANDB_SERVICE", None)


def _refused_variables() -> dict[str, str]:
    """Environment variables that would make `wandb.init` fail, with the reason. No reason cites a key."""
    refused: dict[str, str] = {}
    checked = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    if checked.get("WANDB_DISABLED", NO[0]).lower() not in (*YES, *NO):
        refused["WANDB_DISABLED"] = "it is neither true nor false"
    # Importing W&B takes a second: not for variables that are as they should be.
    harmless = (
        "WANDB_ERROR_REPORTING",
        "WANDB_DISABLED",
        *(["WANDB_MODE"] if checked.get("WANDB_MODE") in MODES else []),
    )
    if set(checked) <= set(harmless):
        return refused
    import wandb
    from pydantic import ValidationError

    for name, value in checked.items():
        try:
            wandb.Settings(resume="allow").update_from_env_vars({name: value})
        except ValidationError as error:
            refused[name] = _one_line(error.errors()[0]["msg"])
        except Exception as error:
            refused[name] = _one_line(error)
    return refused


def _has_key() -> bool:
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))
    return wandb.login(prompt=False, verify=False)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _unusable(error: Exception) -> str:
    return f"W&B cannot be used: {_one_line(error) or type(error).__name__}"


NOT_ONLINE = "track.wandb is online, but {}; or set track.wandb to offline and send the run later"
NO_KEY = NOT_ONLINE.format("there is no key: run `wandb login` or set WANDB_API_KEY")
NOT_LOGGED = "the run is no longer logged to it, and goes on"


def _attempt(work: Callable[[], object], consequence: str) -> bool:
    """Do `work`, which uses W&B; where it fails, say so and the `consequence` on stderr, and return False."""
    try:
        work()
    except Exception as error:
        print(f"{_unusable(error)}; {consequence}", file=sys.stderr)
        return False
    return True


def _open_online(config: Config, info: Mapping[str, Any], base: Path | None) -> WandbTracker | None:
    """None when `track.wandb` is auto and W&B has no key or cannot be used."""
    asked_for = config.track.wandb == "online"
    try:
        if _has_key():
            return WandbTracker(config, info, "online", base)
    except Exception as error:
        problem = _unusable(error)
        if asked_for:
            raise UserError(NOT_ONLINE.format(problem)) from None
        print(f"{problem}; logging offline", file=sys.stderr)
        return None
    if asked_for:
        raise UserError(NO_KEY)
    return None


def _open_offline(config: Config, info: Mapping[str, Any], base: Path | None) -> WandbTracker | None:
    opened: list[WandbTracker] = []
    _attempt(lambda: opened.append(WandbTracker(config, info, "offline", base)), NOT_LOGGED)
    return opened[0] if opened else None


OPEN: dict[str, Run] = {}
"""The W&B runs of this process by run directory; runs that are trained together are open together."""


@contextmanager
def mark_failure(directory: str) -> Generator[None]:
    """Close the W&B run that an exception leaves open in a run directory, as failed."""
    try:
        yield
    except BaseException:
        if run := OPEN.get(directory):
            _attempt(partial(_close_as_failed, run), NOT_LOGGED)
        raise
    finally:
        OPEN.pop(directory, None)


def _close_as_failed(run: Run) -> None:
    run.summary["state"] = "failed"
    _close(run, exit_code=1)


def _close(run: Run, exit_code: int) -> None:
    try:
        run.finish(exit_code)
    except TimeoutError:
        command = f"wandb sync --include-online {shlex.quote(run.settings.sync_dir)}"
        print(f"W&B did not take all of the run in {FINISH_SECONDS} s; this sends the rest: {command}", file=sys.stderr)
    if run.offline:
        _wait_until_written(Path(run.settings.sync_file))


def _wait_until_written(file: Path) -> None:
    """W&B's `finish` returns while its own process still writes; this process may be killed as soon as it is done."""
    deadline = time.monotonic() + WRITE_SECONDS
    last = b""
    while not (last and parse_record(last).HasField("exit")) and time.monotonic() < deadline:
        time.sleep(0.005)
        for data, _ in log_records(file.read_bytes()):
            last = data


def sync_command(directory: str | Path) -> str | None:
    """The command that sends what was logged offline in a run, or in all runs of a sweep; None when nothing waits."""
    files = Path(directory).glob(f"**/{FOLDER}/offline-run-*/run-*.wandb")
    folders = {file.parents[1] for file in files if not file.with_suffix(".wandb.synced").exists()}
    if len(folders) <= 1:
        return f"wandb sync {shlex.quote(str(folders.pop()))}" if folders else None
    top = Path(os.path.commonpath(folders))
    patterns = {"/".join("*" * len(folder.relative_to(top).parent.parts)) for folder in folders}
    return " ".join(["wandb sync", *(f"{shlex.quote(str(top))}/{p}/{FOLDER}" for p in sorted(patterns))])


def within_limit(name: str) -> str:
    """A name that W&B takes: a longer one is cut, and ends in a hash of the whole, so that names stay distinct."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def flatten(tree: Mapping[str, Any], separator: str, at: str = "") -> dict[str, Any]:
    """Nested mappings as one, with joined keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = at + key.replace(".", separator)
        flat |= flatten(value, separator, name + separator) if isinstance(value, Mapping) else {name: value}
    return flat


def last_step(path: Path) -> int:
    """The last step in a .wandb file, 0 when it has none.

    What a killed process left unfinished at its end is cut off: `wandb sync` would stop there, and send no later file.
    """
    log = path.read_bytes()
    last = whole = 0
    for data, end in log_records(log):
        whole = end
        record = parse_record(data)
        if record.HasField("history"):
            last = max(last, record.history.step.num)
    if 0 < whole < len(log):
        os.truncate(path, whole)
    return last


def log_records(log: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records of a .wandb file and where each ends: LevelDB's log format after a header of 7 bytes.

    The file is blocks of 32 KiB, header included. A block is chunks, and a record is one chunk, or a first, middle
    ones and a last. A chunk is its check sum (4 bytes), length (2), kind (1) and data; a chunk's 7 bytes never cross
    a block's end.
    """
    place, record = 7, b""
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        place += 7 + length
        if kind == 0 or place > len(log):
            return
        record += log[place - length : place]
        if kind in (FULL, LAST):
            yield record, place
            record = b""


def parse_record(data: bytes) -> Any:
    """A record as W&B's protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] generated

    return Record.FromString(data)


def data_artifact(url: str) -> Artifact:
    """A prepared dataset, by reference; its name is its content's hash."""
    import wandb

    folder = url.rstrip("/")
    artifact = wandb.Artifact(f"data-{Path(folder).name[:16]}", type="dataset", metadata={"path": url})
    manifest = f"{folder}/manifest.json"
    artifact.add_reference(manifest if "://" in url else Path(manifest).as_uri(), checksum=False)
    return artifact


def model_artifact(directory: Path) -> Artifact:
    """A model directory, by reference. A checkpoint has its run's id as its name, so that W&B links run to run."""
    import wandb

    run = directory.parents[1] / "run.json"
    identity = read_json(run).get("wandb") if run.exists() else None
    name = identity["id"] if identity else re.sub(r"[^\w.-]", "-", directory.name)
    artifact = wandb.Artifact(f"model-{name}", type="model", metadata={"path": str(directory)})
    for file in sorted(directory.iterdir()):
        if file.is_file():
            artifact.add_reference(file.as_uri(), name=file.name)
    return artifact


@contextmanager
def _staging_in(folder: Path) -> Generator[None]:
    """Let W&B keep the files of tables and artifacts with the run, where a later `wandb sync` finds them."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
