"""Checkpoints off the step's path: the state is copied, and a thread writes the copy while training goes on."""

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
"""Writes files into a directory."""


class Weights(Protocol):
    """How a stage's result is written and read: a whole model or an adapter."""

    def snapshot(self) -> Write:
        """Copy the weights; return what writes the copy as transformers or peft loads it. Valid until the next call."""
        ...

    def load(self, directory: Path) -> None:
        """Put the weights back that were written into `directory`."""
        ...


class HostCopy:
    """Copies tensors to this process's memory, as float32, into buffers that are kept from one copy to the next."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The copies by name; they hold until the next call."""
        for name, tensor in tensors.items():
            if name not in self.buffers:
                # A GPU copies into pinned memory at its full rate.
                self.buffers[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            self.buffers[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self.buffers[name] for name in tensors}


class CheckpointWriter:
    """Writes a run's checkpoints one at a time, and prunes after each; on rank 0 only.

    A checkpoint that the disk does not take leaves the earlier ones as they are, and training goes on to the next one;
    only when the last one is lost does the run fail. `best` is the best one that was written, with its loss.
    """

    def __init__(self, run: RunDirectory, keep: int, best: tuple[str | None, float]) -> None:
        self.run, self.keep, self.best = run, keep, best
        self.lost: str | None = None
        self._news: str | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, name: str, write: Write, best: tuple[str | None, float], validation: Write | None) -> None:
        """Begin to write a checkpoint, and with it the `validation` of the run's result if that is this one.

        What `write` reads must not change before `settle` was called.
        """
        assert self._writing is None
        self._writing = self._thread.submit(self._save, name, write, best, validation)

    def _save(self, name: str, write: Write, best: tuple[str | None, float], validation: Write | None) -> None:
        try:
            self.run.save_checkpoint(name, write, validation)
        except (OSError, SafetensorError) as error:
            self.lost = f"{name} could not be written to {self.run.path}: {error}"
            earlier = "earlier ones are kept" if self.run.checkpoints() else "the run has no earlier one"
            self._news = f"checkpoint {self.lost}; {earlier}, and training goes on to the next"
            return
        self.lost, self.best = None, best
        self.run.prune(self.keep, best[0])
        self.run.changed()

    def news(self) -> str | None:
        """What there is to tell of checkpoints and the store since the last call. Raises what went wrong otherwise."""
        if self._writing and self._writing.done():
            self.settle()
        news, self._news = self._news, None
        return news or self.run.news()

    def settle(self) -> tuple[str | None, float]:
        """Wait for the checkpoint that is being written; the best one there is then, and its loss."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()
        return self.best

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            UserError: it could not be written.
        """
        self.settle()
        self._thread.shutdown()
        if self.lost:
            raise UserError(
                f"the last checkpoint, {self.lost}: make room there and add --resume to the same command; "
                f"{self.run.resume_point()}"
            )
