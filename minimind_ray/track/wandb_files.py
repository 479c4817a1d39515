"""Read and clean up the folders that W&B writes in a run directory: one for each start of the run.

    wandb/offline-run-DATE-ID/run-ID.wandb   waits for `wandb sync`
    wandb/run-DATE-ID/run-ID.wandb           was sent while the run was training

After `wandb sync` has sent a whole file, it creates `run-ID.wandb.synced` next to the file, and never sends the file
again. If a file is incomplete because the run was killed, `wandb sync` sends the existing part and creates only
`run-ID.wandb.syncstate`. A second `wandb sync` would send the same steps again, under other step numbers.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from minimind_ray.config.trackers import TRACKER_RECORDS

FOLDER = TRACKER_RECORDS["wandb"].folder
WRITE_SECONDS = 10
STILL_SECONDS = 0.05
"""A file that has not grown for this time counts as complete."""


def parts(directory: Path, run_id: str) -> list[Path]:
    """Return the files of one W&B run in a run directory, oldest first."""
    files = (directory / FOLDER).glob(f"*run-*/run-{run_id}.wandb")
    return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def was_sent(file: Path) -> bool:
    """Whether W&B's server has all or some steps of this file."""
    return not file.parent.name.startswith("offline-") or any(file.parent.glob(f"{file.name}.sync*"))


def last_step(file: Path) -> int:
    """Return the last step in a file, 0 if the file has no step. W&B's own program reads it, which takes a second.

    Raises:
        CalledProcessError: W&B's program cannot read the file.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    last = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            record = json.loads(line)
            if record["type"] == "history":
                last = max(last, int(record["history"]["step"]["num"]))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return last


def retire(files: Iterable[Path]) -> None:
    """Prevent `wandb sync` from sending these files: delete files that were never sent, mark the others as synced."""
    for file in files:
        if was_sent(file):
            file.with_suffix(".wandb.synced").touch()
        else:
            shutil.rmtree(file.parent)


def wait_until_written(file: Path) -> None:
    """Wait until W&B's background process has written the file; it still writes after `finish`.

    This process may end right after the run, and Ray then kills W&B's process too.
    """
    deadline, size = time.monotonic() + WRITE_SECONDS, -1
    while size != (size := file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(STILL_SECONDS)


def sync_command(directory: str | Path) -> str | None:
    """Return the command that sends the offline records of a run, or of a sweep's runs; None if all are sent."""
    files = Path(directory).glob(f"**/{FOLDER}/offline-run-*/run-*.wandb")
    folders = {file.parents[1] for file in files if not file.with_suffix(".wandb.synced").exists()}
    if len(folders) <= 1:
        return f"wandb sync {shlex.quote(str(folders.pop()))}" if folders else None
    top = Path(os.path.commonpath(folders))
    patterns = {"*/" * len(folder.relative_to(top).parent.parts) for folder in folders}
    return " ".join(["wandb sync", *(f"{shlex.quote(str(top))}/{pattern}{FOLDER}" for pattern in sorted(patterns))])
