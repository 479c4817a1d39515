"""Write checkpoints without stopping training: copy the state to memory, and let a thread write the copy to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.train.run import RunDirectory

Write = Callable[[Path], None]
"""A function that writes files into a given directory."""


class Weights(Protocol):
    """The weights that a stage saves: a whole model or an adapter (see stages/weights.py)."""

    def snapshot(self) -> Write:
        """Copy the weights. Return a function that writes the copy in the format of transformers or peft.

        The copy is valid until the next call.
        """
        ...

    def load(self, directory: Path) -> None:
        """Load the weights that were written into `directory`."""
        ...


class HostCopy:
    """Copies tensors to the CPU's memory as float32. Each call reuses the buffers of the previous call."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the copies by name; they are valid until the next call."""
        for name, tensor in tensors.items():
            if name not in self.buffers:
                # A GPU copies into pinned memory at its full rate.
                self.buffers[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            self.buffers[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self.buffers[name] for name in tensors}


class CheckpointWriter:
    """Writes a run's checkpoints one after another, and deletes old checkpoints after each; on rank 0 only.

    If a checkpoint cannot be written, the earlier checkpoints stay and training continues. The run fails only if its
    last checkpoint cannot be written. `best` has the name and the loss of the best checkpoint written so far.
    """

    def __init__(self, run: RunDirectory, keep: int, best: tuple[str | None, float]) -> None:
        self.run, self.keep, self.best = run, keep, best
        self.lost: str | None = None
        self._warning: str | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self, name: str, write: Write, best: tuple[str | None, float], results: Mapping[str, Write | None]
    ) -> None:
        """Begin to write a checkpoint; call `settle` before the data that `write` reads changes.

        `results` writes the checkpoint's validation.parquet and the like (see `RunDirectory.save_checkpoint`); pass it
        if this checkpoint is the best so far.
        """
        assert self._writing is None
        self._writing = self._thread.submit(self._save, name, write, best, results)

    def _save(
        self, name: str, write: Write, best: tuple[str | None, float], results: Mapping[str, Write | None]
    ) -> None:
        try:
            self.run.save_checkpoint(name, write, results)
        except (OSError, SafetensorError) as error:
            self.lost = f"{name} could not be written to {self.run.path}: {error}"
            earlier = "earlier checkpoints are kept" if self.run.checkpoints() else "the run has no earlier checkpoint"
            self._warning = f"checkpoint {self.lost}; {earlier}, and training continues"
            return
        self.lost, self.best = None, best
        self.run.prune(self.keep, best[0])
        self.run.changed()

    def pop_warning(self) -> str | None:
        """Return a problem with a checkpoint or the object store since the last call, if there is one.

        Raises an unexpected error of the writing thread.
        """
        if self._writing and self._writing.done():
            self.settle()
        warning, self._warning = self._warning, None
        return warning or self.run.pop_warning()

    def settle(self) -> tuple[str | None, float]:
        """Wait for the checkpoint that is being written. Return the best checkpoint so far, and its loss."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()
        return self.best

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        self.settle()
        self._thread.shutdown()
        if self.lost:
            raise UserError(
                f"the last checkpoint, {self.lost}: free disk space there, and add --resume to the same command; "
                f"{self.run.resume_point()}"
            )
