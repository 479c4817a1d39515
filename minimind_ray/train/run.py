"""The run directory, which explains itself; on a local disk, or at a URL in an object store (data/storage.py).

config.yaml     the resolved config
run.json        command line, versions, git commit, data fingerprints, state, and where the result is
writer.json     the process that writes here, while it does (data/claim.py)
metrics.jsonl   one line per step, with what its validation found
samples.jsonl   what the model wrote at each validation
validation.parquet   the validation of the result, one row per example
checkpoints/    step-00000100/: a Hugging Face model directory, and resume/ beside it
wandb/          what W&B keeps, see track/wandb_files.py; the W&B run's id is in run.json
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import to_yaml
from minimind_ray.config.paths import input_path, masked
from minimind_ray.config.reading import parse_json, read_json
from minimind_ray.config.schema import Config
from minimind_ray.data.claim import find_writer, require_free
from minimind_ray.data.files import writing_to
from minimind_ray.data.storage import DIRECT, MARK, StoreError, mirror_of, url_of
from minimind_ray.train.resume import differences, refusal

CHECKPOINT_SUMS = MARK
VALIDATION = "validation.parquet"
UNFINISHED = ".writing-"
GONE = "stopped (its process is gone)"
LONGEST_LINE = 1 << 14
"""Bytes of a line of metrics.jsonl, at most."""


class RunDirectory:
    """Files of one run; only rank 0 writes, and begins with `writing`.

    `where` is a path or URL, `path` the directory to work in: with a URL a local copy, in which files are as they were
    last asked for. All methods ask the store and tell it; those that do raise StoreError.
    """

    def __init__(self, path: str | Path, *, writes: bool = False) -> None:
        self.where, self.mirror = url_of(path), mirror_of(path, "work" if writes else "read")
        self.path = self.mirror.path if self.mirror else Path(path)
        self.writes = writes
        self._unwritten: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def create(self, config: Config, facts: dict[str, Any], *, resume: bool) -> None:
        """Make the directory, or with `resume` go on in one that holds the same run.

        Raises:
            UserError: the directory holds a run and `resume` is off, or holds none and `resume` is on, or holds
                a run of another config.
        """
        self.check(config, resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.yaml", to_yaml(config))
        self.update(
            state="running", command=list(map(masked, sys.argv)), versions=versions(), commit=git_commit(), **facts
        )

    def check(self, config: Config, *, resume: bool) -> None:
        """Whether `create` would be refused, without writing anything."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"out {self.where} is a file: name a directory")
        require_free(self.where)
        holds_run = self.file("config.yaml").exists()
        if holds_run and not resume:
            raise UserError(f"{self.where} already holds a run: add --resume to go on with it, or choose another --out")
        if resume and not holds_run:
            raise UserError(f"{self.where} holds no run to resume: leave --resume out to start one")
        if resume and (why := refusal(self.where, self.file("config.yaml"), config)):
            raise UserError(why)

    def changes(self, config: Config) -> list[str]:
        """Keys whose values make `config` another run than the one in the directory."""
        return list(differences(self.file("config.yaml"), config))

    def recover(self, config: Config) -> None:
        """Send what a run of the same config on this machine could not, because the store was failing."""
        own = RunDirectory(self.where, writes=True)
        if not own.mirror or not (own.path / "config.yaml").exists() or differences(own.path / "config.yaml", config):
            return
        here = [path.name for path in own.checkpoints() if sound(path)]
        if here and here[-1] > max((path.name for path in self.checkpoints()), default=""):
            own.mirror.resend()

    def file(self, name: str) -> Path:
        """One of the files: as the store has it, or as the process that writes has it."""
        if self.mirror and (not self.writes or name in DIRECT):
            return self.mirror.pull_file(name)
        return self.path / name

    def live_file(self, name: str, since: float) -> Path:
        """As `file`; of a run in a store the copy of the process that writes it, if that is on this machine.

        So a run is followed while the store fails. `since` is a time in seconds since 1970: an older copy is one that
        an earlier process has left.
        """
        if self.mirror:
            own = RunDirectory(self.where, writes=True).path / name
            with suppress(FileNotFoundError):
                if own.stat().st_mtime >= since:
                    return own
        return self.file(name)

    def write(self, name: str, text: str) -> None:
        """Replace a file of the directory at once."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, text)
        if self.mirror:
            self.mirror.put(name)

    def writing(self) -> AbstractContextManager[None]:
        """While inside, what rank 0 writes comes into the store, and all of it in the end; see `Mirror.syncing`."""
        return self.mirror.syncing() if self.mirror else nullcontext()

    def open(self) -> None:
        """Have all files here, to change them."""
        if self.mirror:
            self.mirror.open()

    def send(self) -> None:
        """Bring all that was written into the store, now."""
        if self.mirror and self.writes:
            self.mirror.push_with_retry()

    def changed(self) -> None:
        """Bring all that was written into the store, soon."""
        if self.mirror:
            self.mirror.changed()

    def news(self) -> str | None:
        """What there is to tell of the store since the last call."""
        return self.mirror and self.mirror.pop_warning()

    @property
    def poll_seconds(self) -> float:
        """How often to look for news from another process."""
        return 5.0 if self.mirror else 0.2

    def info(self) -> dict[str, Any]:
        """What run.json says; empty without one. Raises UserError where it cannot be read."""
        path = self.file("run.json")
        return read_json(path) if path.exists() else {}

    def state(self) -> str | None:
        """What run.json says of the run's state; GONE where it says "running" and no process writes to it."""
        state = self.info().get("state")
        if state != "running":
            return state
        return state if find_writer(self.where) else GONE

    def update(self, **facts: Any) -> None:
        """Add to run.json, and bring into the store what it speaks of."""
        self.send()
        info = {**self.info(), **facts, "updated": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write("run.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")

    def fail(self, error: str, **facts: Any) -> None:
        """Note in run.json that the run failed, if disk and store take it: what is wrong is told in any case."""
        with suppress(OSError, StoreError):
            self.update(state="failed", error=error, **facts)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add one line to a .jsonl file of the run. What a full disk does not take waits for the next line."""
        with self._lock:
            text = json.dumps(line, ensure_ascii=False) + "\n"
            self._unwritten[name] = self._unwritten.get(name, b"") + text.encode()
        with suppress(OSError):
            self.write_lines()
            if self.mirror and not self.writes:
                self.mirror.put(name)

    def write_lines(self) -> None:
        """Write the lines that wait. Raises OSError where the disk does not take them; none is written in part."""
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
        """The lines of metrics.jsonl; a last line that is not whole yet is left out."""
        return read_jsonl(self.file("metrics.jsonl"))

    def last_metrics(self) -> bytes | None:
        """The last whole line of metrics.jsonl, None without one. Reads the end of the file only.

        Raises OSError, without asking a store again.
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
        """The whole lines of samples.jsonl."""
        return read_jsonl(self.file("samples.jsonl"))

    def forget_after(self, step: int) -> None:
        """Drop what was logged after `step` steps were done, so that a resumed run logs no step twice.

        And checkpoints of later steps, which were found damaged, and those that processes which were killed had begun
        to write.
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
        """Complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        if self.mirror and not self.writes:
            marks = [name for name in self.mirror.files("checkpoints") if name.endswith(f"/{CHECKPOINT_SUMS}")]
            there = sorted(self.path / name.removesuffix(f"/{CHECKPOINT_SUMS}") for name in marks)
            for path in set(folder.glob("step-????????")) - set(there):
                shutil.rmtree(path, ignore_errors=True)
            return there
        return sorted(folder.glob("step-????????"))

    def resume_point(self) -> str:
        """Where a resume begins, as a clause of a message. Raises StoreError."""
        if checkpoints := self.checkpoints():
            return f"training goes on from checkpoint {checkpoints[-1].name}"
        return "there is no checkpoint, so training starts at the first step"

    def fetch(self, checkpoint: Path, *, resume: bool = True) -> Path:
        """Have one of `checkpoints` here as the store has it, with or without what a resume needs; its path."""
        if self.mirror and not self.writes:
            name = str(checkpoint.relative_to(self.path))
            self.mirror.pull(name, lambda file: resume or not file.startswith(f"{name}/resume/"))
        return checkpoint

    def checkpoint_path(self, name: str) -> Path:
        """Where the checkpoint of that name lies."""
        return self.path / "checkpoints" / name

    def save_checkpoint(
        self, name: str, write: Callable[[Path], None], validation: Callable[[Path], None] | None = None
    ) -> None:
        """Let `write` fill a directory, then put it in place at once, with the sums of its files.

        `validation` writes the validation.parquet that belongs to it. When anything of it fails, all is as before.
        """
        # Names of its own: a node that was given up may still be writing the same checkpoint.
        target, own = self.checkpoint_path(name), uuid4().hex[:8]
        temporary = target.with_name(f"{UNFINISHED}{name}-{own}")
        examples = self.path / f"{UNFINISHED}validation-{own}.parquet"
        try:
            (temporary / "resume").mkdir(parents=True)
            write(temporary)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            self.write_lines()
            sums = {str(p.relative_to(temporary)): file_sha256(p) for p in files}
            write_atomically(temporary / CHECKPOINT_SUMS, json.dumps(sums, indent=2))
            if validation:
                validation(examples)
                files.append(examples)
            for p in (*files, temporary / CHECKPOINT_SUMS):
                with p.open("rb") as f:
                    os.fsync(f.fileno())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            examples.unlink(missing_ok=True)
            raise
        # Before the checkpoint: a run that is killed here writes both again.
        if validation:
            examples.replace(self.path / VALIDATION)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)

    def prune(self, keep: int, best: str | None) -> None:
        """Delete all checkpoints but the last `keep` and the one named `best`."""
        for path in self.checkpoints()[:-keep]:
            if path.name != best:
                shutil.rmtree(path)


def damage(checkpoint: Path) -> list[str]:
    """What is not as `save_checkpoint` wrote it, a few words each; empty for a sound checkpoint."""
    file = checkpoint / CHECKPOINT_SUMS
    if not file.exists():
        return [f"{file} is missing: no checkpoint of a run, or not all of one"]
    try:
        sums = read_json(file)
    except UserError as error:
        return [str(error)]
    wrong: list[str] = []
    for name, value in sums.items():
        target = checkpoint / name
        if not inside(name) or target.is_symlink():
            wrong.append(f"{name} leads out of the checkpoint")
        elif not target.is_file():
            wrong.append(f"{name} is missing")
        elif file_sha256(target) != value:
            wrong.append(f"{name} is not what was written")
    return wrong


def sound(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there with the sum it was written with."""
    return not damage(checkpoint)


def last_sound_checkpoint(run: RunDirectory) -> Path | None:
    """Return the newest undamaged checkpoint, fetched to this machine; name newer, damaged ones on stderr."""
    checkpoints = run.checkpoints()
    for checkpoint in reversed(checkpoints):
        if sound(run.fetch(checkpoint)):
            return checkpoint
        print(f"{checkpoint} is damaged (its sums do not hold), so it is passed over", file=sys.stderr)
    if checkpoints:
        print(f"{run.where}: no sound checkpoint is left, so training starts at the first step", file=sys.stderr)
    return None


def resolve_model(path: str | Path, *, resume: bool = False) -> Path:
    """The model directory that `path` means: itself, or the result of the run it is. At a URL, its local copy.

    A relative path that is not here is one in the storage (see config/paths.py). With `resume`, a copy has what a
    resume needs, too.

    Raises:
        UserError: neither; StoreError.
    """
    run = RunDirectory(input_path(path))
    if run.mirror and "checkpoints" in run.path.parts[-2:-1]:  # The run says which stage it was.
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
            raise UserError(f"{path}/run.json: its result {result!r} is no place in the run's directory")
        if (run.path / result) in checkpoints:
            return run.fetch(run.path / result, resume=resume)
    if checkpoints:
        return run.fetch(checkpoints[-1], resume=resume)
    if run.file("sweep.json").exists():
        raise UserError(f"{path} is a sweep, no model: name one of its trials; minimind-ray compare says which is best")
    raise UserError(
        f"{path} is no model: expected a directory with config.json and model.safetensors, or a run with a checkpoint"
    )


def inside(name: str) -> bool:
    """Whether a path that a file names stays in the directory it is relative to."""
    return not (Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name)


def versions() -> dict[str, str]:
    """Of Python, this package and what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("minimind-ray", "torch", "ray", "tokenizers", "pyarrow", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the working directory, with + when it has changes; None outside a repository."""
    try:
        commit, status = (
            subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if status else "")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a run's .jsonl file that is perhaps still being written; nothing when there is none.

    Raises:
        UserError: a line is no JSON object with a step.
    """
    if not path.exists():
        return
    # Bytes that are no UTF-8 stand only in a line that is no JSON.
    with path.open(encoding="utf-8", errors="surrogateescape") as f:
        for number, line in enumerate(f, 1):
            if line.endswith("\n"):
                content = parse_json(line, f"{path}:{number}")
                if type(content.get("step")) is not int:
                    raise UserError(f"{path}:{number}: expected an object with a step")
                yield content


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing_to(path):
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
