"""The run directory: all files of one run, on a local disk or at a URL in an object store (data/storage.py).

    config.yaml          the resolved config
    run.json             command line, versions, git commit, data fingerprints, state, and the path of the result
    writer.json          the process that is writing here now (data/claim.py)
    metrics.jsonl        one line per step, with the result of its validation
    samples.jsonl        the model's answers to fixed prompts, before the first step (0) and at each validation
    validation.parquet   the validation of the result, one row per example
    tasks.parquet        the benchmarks of the result, one row per item and metric; only with eval.tasks
    checkpoints/         step-00000100/: a Hugging Face model directory with a folder resume/
    wandb/, …            a folder of each tracker, see track/; what a resume needs of it is in run.json

The training loop writes here on rank 0. Other commands (list, show, compare, generate) only read.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import to_yaml
from minimind_ray.config.paths import input_path, masked
from minimind_ray.config.reading import parse_json, read_json
from minimind_ray.config.schema import Config
from minimind_ray.data.claim import find_writer, require_free
from minimind_ray.data.files import writing_to
from minimind_ray.data.hub import HubRef, fetch, hint, hub_ref, pin
from minimind_ray.data.storage import DIRECT, MARK, StoreError, mirror_of, url_of
from minimind_ray.train.resume import differences, refusal

CHECKPOINT_SUMS = MARK
VALIDATION = "validation.parquet"
UNFINISHED = ".writing-"
GONE = "stopped (its process is gone)"
START = {"step": 0, "tokens": 0}
"""The line that trackers get with the sample texts of the model before the first step."""
LONGEST_LINE = 1 << 14
"""Maximum length of a line of metrics.jsonl, in bytes."""


class RunDirectory:
    """The files of one run. Only rank 0 writes, inside `writing`.

    `where` is the run's path or URL. `path` is a local directory. For a URL it is a local copy, into which a method
    fetches the files that it needs. Methods that use the object store may raise StoreError.
    """

    def __init__(self, path: str | Path, *, writes: bool = False) -> None:
        self.where, self.mirror = url_of(path), mirror_of(path, "work" if writes else "read")
        self.path = self.mirror.path if self.mirror else Path(path)
        self.writes = writes
        self._unwritten: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def create(self, config: Config, facts: dict[str, Any], *, resume: bool) -> None:
        """Make the directory for a new run, or with `resume` reopen the directory of the same run.

        Raises:
            UserError: the directory holds a run although `resume` is off, or holds no run although `resume` is on, or
                holds a run with other settings.
        """
        self.check(config, resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.yaml", to_yaml(config))
        self.update(
            state="running", command=list(map(masked, sys.argv)), versions=versions(), commit=git_commit(), **facts
        )

    def check(self, config: Config, *, resume: bool) -> None:
        """Raise the errors of `create` without writing anything."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"out {self.where} is a file: name a directory")
        require_free(self.where)
        holds_run = self.file("config.yaml").exists()
        if holds_run and not resume:
            raise UserError(f"{self.where} already holds a run: add --resume to continue it, or choose another --out")
        if resume and not holds_run:
            raise UserError(f"{self.where} holds no run to resume: leave --resume out to start one")
        if resume and (why := refusal(self.where, self.file("config.yaml"), config)):
            raise UserError(why)

    def changes(self, config: Config) -> list[str]:
        """Return the keys in which `config` differs from the run in the directory."""
        return list(differences(self.file("config.yaml"), config))

    def recover(self, config: Config) -> None:
        """Send files that an earlier run of the same config on this machine could not send to a failing store."""
        own = RunDirectory(self.where, writes=True)
        if not own.mirror or not (own.path / "config.yaml").exists() or differences(own.path / "config.yaml", config):
            return
        here = [path.name for path in own.checkpoints() if sound(path)]
        if here and here[-1] > max((path.name for path in self.checkpoints()), default=""):
            own.mirror.resend()

    def file(self, name: str) -> Path:
        """Return the local path of a file; first fetch the file from the store, unless this process writes the run."""
        if self.mirror and (not self.writes or name in DIRECT):
            return self.mirror.pull_file(name)
        return self.path / name

    def live_file(self, name: str, since: float) -> Path:
        """Like `file`, but prefer the writing process's own copy if that process runs on this machine.

        So a user can watch a run even while the store fails. `since` is in seconds since 1970. A file older than
        `since` was left by an earlier process and is not used.
        """
        if self.mirror:
            own = RunDirectory(self.where, writes=True).path / name
            with suppress(FileNotFoundError):
                if own.stat().st_mtime >= since:
                    return own
        return self.file(name)

    def write(self, name: str, text: str) -> None:
        """Replace a file of the directory atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, text)
        if self.mirror:
            self.mirror.put(name)

    def writing(self) -> AbstractContextManager[None]:
        """Inside, the files that rank 0 writes are sent to the store; on exit all are sent. See `Mirror.syncing`."""
        return self.mirror.syncing() if self.mirror else nullcontext()

    def open(self) -> None:
        """Fetch all files, in order to change them."""
        if self.mirror:
            self.mirror.open()

    def send(self) -> None:
        """Send all written files to the store now."""
        if self.mirror and self.writes:
            self.mirror.push_with_retry()

    def changed(self) -> None:
        """Send all written files to the store soon, in the background."""
        if self.mirror:
            self.mirror.changed()

    def pop_warning(self) -> str | None:
        """Return a warning about the store since the last call, if there is one."""
        return self.mirror and self.mirror.pop_warning()

    @property
    def poll_seconds(self) -> float:
        """Seconds between two looks for changes that another process made."""
        return 5.0 if self.mirror else 0.2

    def info(self) -> dict[str, Any]:
        """Return the content of run.json; empty if the file is missing. Raises UserError if it cannot be read."""
        path = self.file("run.json")
        return read_json(path) if path.exists() else {}

    def state(self) -> str | None:
        """Return the run's state from run.json, or GONE if the state is "running" but no process writes the run."""
        state = self.info().get("state")
        if state != "running":
            return state
        return state if find_writer(self.where) else GONE

    def update(self, **facts: Any) -> None:
        """Add `facts` to run.json. All files written before are sent to the store first."""
        self.send()
        info = {**self.info(), **facts, "updated": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write("run.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")

    def fail(self, error: str, **facts: Any) -> None:
        """Note in run.json that the run failed. Ignore errors of disk and store: the caller reports `error` itself."""
        with suppress(OSError, StoreError):
            self.update(state="failed", error=error, **facts)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add one line to a .jsonl file of the run. If the disk is full, keep the line and write it with the next."""
        with self._lock:
            text = json.dumps(line, ensure_ascii=False) + "\n"
            self._unwritten[name] = self._unwritten.get(name, b"") + text.encode()
        with suppress(OSError):
            self.write_lines()
            if self.mirror and not self.writes:
                self.mirror.put(name)

    def write_lines(self) -> None:
        """Write the lines that `append` could not write. Raises OSError if the disk is full; then no line is cut."""
        with self._lock:
            for name, lines in list(self._unwritten.items()):
                path = self.path / name
                with writing_to(path), path.open("ab", buffering=0) as f:
                    size, done = f.tell(), 0
                    try:
                        while done < len(lines):
                            done += f.write(lines[done:])
                    except OSError:
                        f.truncate(size)
                        raise
                del self._unwritten[name]

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl, without an incomplete last line."""
        return read_jsonl(self.file("metrics.jsonl"))

    def last_metrics(self) -> bytes | None:
        """Return the last complete line of metrics.jsonl, or None. Reads only the end of the file.

        Raises OSError if the file cannot be read; a failing store is not retried.
        """
        try:
            if self.mirror and not self.writes:
                end = self.mirror.tail("metrics.jsonl", LONGEST_LINE)
            else:
                with (self.path / "metrics.jsonl").open("rb") as f:
                    f.seek(max(0, f.seek(0, os.SEEK_END) - LONGEST_LINE))
                    end = f.read()
        except FileNotFoundError:
            return None
        whole = end[: end.rfind(b"\n") + 1].splitlines()
        return whole[-1] if whole else None

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of samples.jsonl, without an incomplete last line."""
        return read_jsonl(self.file("samples.jsonl"))

    def lines(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Yield the lines of metrics.jsonl, each with the sample texts of the same step. START is before the others."""
        texts = {line["step"]: line["samples"] for line in self.samples()}
        if START["step"] in texts:
            yield START, texts[START["step"]]
        for line in self.metrics():
            yield line, texts.get(line["step"], [])

    def forget_after(self, step: int) -> None:
        """Delete the records of all steps after the first `step` steps, so that a resumed run logs no step twice.

        Also delete checkpoints of later steps, which were found damaged, and unfinished files of killed processes.
        """
        for directory in self.checkpoints():
            if directory.name > f"step-{step:08d}":
                shutil.rmtree(directory)
        for directory in self.path.glob(f"checkpoints/{UNFINISHED}*"):
            shutil.rmtree(directory, ignore_errors=True)
        for file in self.path.glob(f"{UNFINISHED}*"):
            file.unlink(missing_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [line for line in read_jsonl(path) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        if self.mirror and not self.writes:
            marks = [name for name in self.mirror.files("checkpoints") if name.endswith(f"/{CHECKPOINT_SUMS}")]
            there = sorted(self.path / name.removesuffix(f"/{CHECKPOINT_SUMS}") for name in marks)
            for path in set(folder.glob("step-????????")) - set(there):
                shutil.rmtree(path, ignore_errors=True)
            return there
        return sorted(folder.glob("step-????????"))

    def holds_last_checkpoint(self) -> bool:
        """Whether the run's newest checkpoint is there and undamaged."""
        checkpoints = self.checkpoints()
        return bool(checkpoints) and sound(self.fetch(checkpoints[-1]))

    def resume_point(self) -> str:
        """Return where a resume would begin, as a clause for a message. Raises StoreError."""
        if checkpoints := self.checkpoints():
            return f"training continues from checkpoint {checkpoints[-1].name}"
        return "there is no checkpoint, so training starts at the first step"

    def fetch(self, checkpoint: Path, *, resume: bool = True) -> Path:
        """Fetch one of `checkpoints` from the store, with or without its folder resume/. Return its local path."""
        if self.mirror and not self.writes:
            name = str(checkpoint.relative_to(self.path))
            self.mirror.pull(name, lambda file: resume or not file.startswith(f"{name}/resume/"))
        return checkpoint

    def checkpoint_path(self, name: str) -> Path:
        """Return the path of the checkpoint with this name."""
        return self.path / "checkpoints" / name

    def save_checkpoint(
        self,
        name: str,
        write: Callable[[Path], None],
        results: Mapping[str, Callable[[Path], None] | None] = MappingProxyType({}),
    ) -> None:
        """Let `write` fill a temporary directory, add checksums of its files, and move the directory into place.

        `results` writes the checkpoint's results, such as validation.parquet, by the names of the files in the run's
        directory; None removes a file. If any part fails, the run's files do not change.
        """
        # Unique names: a node that Ray has given up may still be writing the same checkpoint.
        target, own = self.checkpoint_path(name), uuid4().hex[:8]
        temporary = target.with_name(f"{UNFINISHED}{name}-{own}")
        written = {file: self.path / f"{UNFINISHED}{own}-{file}" for file, content in results.items() if content}
        try:
            (temporary / "resume").mkdir(parents=True)
            write(temporary)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            self.write_lines()
            sums = {str(p.relative_to(temporary)): file_sha256(p) for p in files}
            write_atomically(temporary / CHECKPOINT_SUMS, json.dumps(sums, indent=2))
            for file, path in written.items():
                if content := results[file]:
                    content(path)
                files.append(path)
            for p in (*files, temporary / CHECKPOINT_SUMS):
                with p.open("rb") as f:
                    os.fsync(f.fileno())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for path in written.values():
                path.unlink(missing_ok=True)
            raise
        # The results go first: if the run is killed before the checkpoint follows, it writes both again after a resume.
        for file in results:
            if file in written:
                written[file].replace(self.path / file)
            else:
                (self.path / file).unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)

    def prune(self, keep: int, best: str | None) -> None:
        """Delete all checkpoints except the last `keep` and the checkpoint named `best`."""
        for path in self.checkpoints()[:-keep]:
            if path.name != best:
                shutil.rmtree(path)


def damage(checkpoint: Path) -> list[str]:
    """Return the ways in which a checkpoint differs from the files that were saved; empty for a sound checkpoint."""
    file = checkpoint / CHECKPOINT_SUMS
    if not file.exists():
        return [f"{file} is missing: not a checkpoint of a run, or an incomplete checkpoint"]
    try:
        sums = read_json(file)
    except UserError as error:
        return [str(error)]
    wrong: list[str] = []
    for name, value in sums.items():
        target = checkpoint / name
        if not inside(name) or target.is_symlink():
            wrong.append(f"{name} is outside the checkpoint")
        elif not target.is_file():
            wrong.append(f"{name} is missing")
        elif file_sha256(target) != value:
            wrong.append(f"{name} differs from the file that was saved")
    return wrong


def sound(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint exists and has the checksum with which it was saved."""
    return not damage(checkpoint)


def last_sound_checkpoint(run: RunDirectory) -> Path | None:
    """Return the newest undamaged checkpoint, fetched to this machine. Name newer, damaged checkpoints on stderr."""
    checkpoints = run.checkpoints()
    for checkpoint in reversed(checkpoints):
        if sound(run.fetch(checkpoint)):
            return checkpoint
        print(f"{checkpoint} is damaged (its checksums do not match), so it is skipped", file=sys.stderr)
    if checkpoints:
        print(f"{run.where}: no sound checkpoint is left, so training starts at the first step", file=sys.stderr)
    return None


def resolve_model(path: str | Path, *, resume: bool = False) -> Path:
    """Return the model directory at `path`: `path` itself, or the result of the run at `path`.

    At a URL, return a local copy; with `resume` the copy includes the checkpoint's folder resume/. A relative path that
    does not exist here is looked up in the storage (see config/paths.py). A model of the hub (see `hub_ref`) is
    downloaded.

    Raises:
        UserError: `path` is neither a model directory nor a run with a checkpoint; or see `hub.fetch`.
        StoreError: the object store fails.
    """
    if ref := hub_ref(path):
        return _from_hub(pin(ref))
    run = RunDirectory(input_path(path))
    if run.mirror and "checkpoints" in run.path.parts[-2:-1]:  # Fetch config.yaml too, which names the stage.
        checkpoint, run = run.path, RunDirectory(run.where.rsplit("/", 2)[0])
        run.file("config.yaml")
        run.fetch(checkpoint, resume=resume)
    elif run.mirror:
        run.mirror.pull(wanted=lambda name: "/" not in name)
        checkpoint = run.path
    else:
        checkpoint = run.path
    if (checkpoint / "config.json").exists() or (checkpoint / "adapter_config.json").exists():
        return checkpoint
    checkpoints = run.checkpoints()
    if result := run.info().get("result"):
        if not (isinstance(result, str) and inside(result)):
            raise UserError(f"{path}/run.json: its result {result!r} is not a path inside the run directory")
        if (run.path / result) in checkpoints:
            return run.fetch(run.path / result, resume=resume)
    if checkpoints:
        return run.fetch(checkpoints[-1], resume=resume)
    if run.file("sweep.json").exists():
        raise UserError(f"{path} is a sweep, not a model: name one of its trials; minimind-ray compare shows the best")
    raise UserError(
        f"{path} is not a model: expected config.json and model.safetensors, or a run with a checkpoint{hint(path)}"
    )


def _from_hub(ref: HubRef) -> Path:
    """Return the directory of a model of the hub. Its family is checked before its weights are downloaded."""

    def check(folder: Path) -> None:
        if not (folder / "config.json").exists():
            return
        from minimind_ray.model.families import read_shape  # It imports torch, which commands such as runs do not need.
        from minimind_ray.model.families.family import ConfigFile

        try:
            read_shape(ConfigFile(folder / "config.json"))
        except UserError as error:
            raise UserError(f"{ref}: {str(error).removeprefix(f'{folder}/')}") from None

    return fetch(ref, check)


def inside(name: str) -> bool:
    """Whether a relative path stays inside its directory."""
    return not (Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name)


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("minimind-ray", "torch", "ray", "tokenizers", "pyarrow", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Return the git commit of the working directory, with + if files have changed; None outside a repository."""
    try:
        commit, status = (
            subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if status else "")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a run's .jsonl file, which may still be growing; nothing if the file is missing.

    Raises:
        UserError: a line is not a JSON object with a step.
    """
    if not path.exists():
        return
    # A line with invalid UTF-8 is not JSON either; `parse_json` reports it with its line number.
    with path.open(encoding="utf-8", errors="surrogateescape") as f:
        for number, line in enumerate(f, 1):
            if line.endswith("\n"):
                content = parse_json(line, f"{path}:{number}")
                if type(content.get("step")) is not int:
                    raise UserError(f"{path}:{number}: expected an object with a step")
                yield content


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path` atomically: a reader sees either the old text or the new text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing_to(path):
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
