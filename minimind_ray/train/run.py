"""The run directory, which explains itself.

config.yaml     the resolved config
run.json        command line, versions, git commit, data fingerprints, state, and where the result is
metrics.jsonl   one line per step and one per validation
samples.jsonl   what the model wrote at each validation
validation.parquet   the validation of the result, one row per example
checkpoints/    step-00000100/: a Hugging Face model directory, and resume/ beside it
wandb/          what W&B keeps, see track/wandb.py; the W&B run's id is in run.json
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import read_yaml, to_yaml
from minimind_ray.config.reading import parse_json, read_json
from minimind_ray.config.schema import Config

CHECKPOINT_SUMS = "resume/sums.json"
# What may change between stop and resume without making it another run.
FREE_KEYS = ("scale.", "eval.", "checkpoint.", "track.", "out", "data.cache_dir")


class RunDirectory:
    """Files of one run; only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def create(self, config: Config, facts: dict[str, Any], *, resume: bool) -> None:
        """Make the directory, or with `resume` go on in one that holds the same run.

        Raises:
            UserError: the directory holds a run and `resume` is off, or holds none and `resume` is on, or holds
                a run of another config.
        """
        self.check(config, resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", to_yaml(config))
        self.update(state="running", command=sys.argv, versions=versions(), commit=git_commit(), **facts)

    def check(self, config: Config, *, resume: bool) -> None:
        """Whether `create` would be refused, without writing anything."""
        holds_run = (self.path / "config.yaml").exists()
        if holds_run and not resume:
            raise UserError(f"{self.path} already holds a run: add --resume to go on with it, or choose another --out")
        if resume and not holds_run:
            raise UserError(f"{self.path} holds no run to resume: leave --resume out to start one")
        if resume and (changed := self.changes(config)):
            raise UserError(
                f"{self.path} cannot be resumed with another {', '.join(changed)}; "
                "use the values in its config.yaml, or choose another --out"
            )

    def changes(self, config: Config) -> list[str]:
        """Keys whose values make `config` another run than the one in the directory."""
        changed = sorted(_changed_keys(read_yaml(self.path / "config.yaml"), config.model_dump(mode="json")))
        return [key for key in changed if not key.startswith(FREE_KEYS)]

    def info(self) -> dict[str, Any]:
        """What run.json says; empty without one. Raises UserError where it cannot be read."""
        path = self.path / "run.json"
        return read_json(path) if path.exists() else {}

    def update(self, **facts: Any) -> None:
        """Add to run.json."""
        info = {**self.info(), **facts, "updated": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomically(self.path / "run.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add one line to a .jsonl file of the run."""
        with (self.path / name).open("a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that is not whole yet is left out."""
        return read_jsonl(self.path / "metrics.jsonl")

    def samples(self) -> Iterator[dict[str, Any]]:
        """The whole lines of samples.jsonl."""
        return read_jsonl(self.path / "samples.jsonl")

    def forget_after(self, step: int) -> None:
        """Drop what was logged after `step` steps were done, so that a resumed run logs no step twice."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [line for line in read_jsonl(path) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-????????"))

    def checkpoint_path(self, name: str) -> Path:
        """Where the checkpoint of that name lies."""
        return self.path / "checkpoints" / name

    def save_checkpoint(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a directory, then put it in place at once, with the sums of its files."""
        target = self.checkpoint_path(name)
        temporary = target.with_name(f".writing-{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "resume").mkdir(parents=True)
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        sums = {str(p.relative_to(temporary)): file_sha256(p) for p in files}
        write_atomically(temporary / CHECKPOINT_SUMS, json.dumps(sums, indent=2))
        for p in files:
            with p.open("rb") as f:
                os.fsync(f.fileno())
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


def resolve_model(path: str | Path) -> Path:
    """The model directory that `path` means: itself, or the result of the run it is.

    Raises:
        UserError: neither.
    """
    path = Path(path)
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return path
    run = RunDirectory(path)
    if result := run.info().get("result"):
        if not (isinstance(result, str) and inside(result)):
            raise UserError(f"{path}/run.json: its result {result!r} is no place in the run's directory")
        if (path / result).is_dir():
            return path / result
    if checkpoints := run.checkpoints():
        return checkpoints[-1]
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
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _changed_keys(before: Any, after: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {*before, *after}:
            yield from _changed_keys(before.get(key), after.get(key), f"{at}.{key}" if at else key)
    elif before != after:
        yield at
