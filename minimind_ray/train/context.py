"""Where a stage runs: the few things the training loop asks of its host.

Three hosts answer: a plain process (here), a Ray Train worker and a Ray Tune trial (both under on_ray/).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.model.ops import compile_kernels, compiled, run_eagerly
from minimind_ray.train.interrupts import first_stops

# Read once, at a GPU's first matrix product, which may be long before a run asks for `train.deterministic`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Context(Protocol):
    """What the loop knows of its host."""

    rank: int
    world_size: int
    device: torch.device
    reads_checkpoints: bool
    """Whether a checkpoint must be there when it is reported; else it may still be on its way to the disk."""

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Tell the host of a validation, and of the checkpoint directory written with it, if any. On every rank.

        Whether to go on: False, on every rank, where the host finds the run not worth its cost (early stopping).
        """
        ...

    def should_stop(self) -> bool:
        """Whether the host wants the run to end after this step with a checkpoint (Ctrl-C, a spot notice)."""
        ...

    def base_weights(self, directory: Path) -> Mapping[str, Tensor] | None:
        """The weights of a model directory where the host holds them already; None: read them from the directory."""
        ...


class PlainContext:
    """One process, no Ray. `stop_on_interrupt` turns a signal into a clean stop; a second one interrupts at once."""

    rank = 0
    world_size = 1
    reads_checkpoints = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or default_device()
        self.stopping = False

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Nothing waits for it here: metrics.jsonl and the run directory have it all."""
        return True

    def should_stop(self) -> bool:
        """True after the first signal."""
        return self.stopping

    def base_weights(self, directory: Path) -> Mapping[str, Tensor] | None:
        """Holds none."""

    def stop_on_interrupt(self) -> AbstractContextManager[None]:
        """While inside, the first SIGINT, SIGTERM or SIGHUP asks for a stop, the next one has its usual effect."""
        return first_stops(self.stop)

    def stop(self) -> None:
        """Ask for a stop after the step."""
        self.stopping = True


def keep_freed_memory() -> None:
    """Let glibc keep what a CPU step frees for the next one; else the kernel zero-fills the same pages every step.

    For the whole process, before its first matrix product. Elsewhere than on glibc only one thing changes: of the
    matrix products that the CPU library sets up for every new size it keeps 256, a few megabytes each, not 1024.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28)):
            libc.mallopt(parameter, value)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what `train.precision` names; `auto` is bfloat16 where the hardware has it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # As torch's own tests ask; there is no public way.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return torch.bfloat16 if has_bf16 else torch.float32


def arithmetic(dtype: torch.dtype) -> str:
    """What the last digits of sums and products on this CPU depend on, beside versions: threads and instructions.

    Linux grants AMX to a process only if the signal stack of each of its threads has room for AMX's registers. Without
    the grant torch computes bfloat16 products with AVX-512, which rounds otherwise, and says nothing.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    # Torch has no public function that asks for the grant, or for the answer.
    if dtype is torch.bfloat16 and torch.cpu._init_amx():  # pyright: ignore[reportPrivateUsage]
        instructions += " and AMX"
    threads = torch.get_num_threads()
    return f"{threads} {'thread' if threads == 1 else 'threads'}, {instructions}"


@contextmanager
def deterministic(wanted: bool) -> Generator[None]:
    """Use torch's deterministic algorithms inside, if `wanted`."""
    before = torch.are_deterministic_algorithms_enabled()
    if before or not wanted:  # Asking torch imports its compiler, which takes seconds.
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


LONG_RUN = {"cpu": 3e13, "cuda": 1e16}
"""FLOPs of a run from which compiling pays: about a minute's. It takes some ten seconds on a machine's first run."""


def settle_compile(
    setting: Literal["auto", True, False], flops: float, device: torch.device, before: bool | None = None
) -> bool:
    """Compile what lies between the matrix products, or do not, as `train.compile` says, for the whole process.

    `auto` compiles in a run of many `flops`, where something can be compiled; a run that goes on does as it did
    `before`, so that its result is the same to the bit. All workers do the same. Returns whether they compile.

    Raises:
        UserError: the setting is true, and nothing can be compiled here.
    """
    run_eagerly()
    wanted = setting
    if setting == "auto":
        wanted = flops >= LONG_RUN.get(device.type, 0) if before is None else before
    if wanted:
        try:
            compile_kernels(device)
        except UserError:
            if setting is True:
                raise
    lacking = 0.0 if compiled() else 1.0
    if dist.is_initialized():
        everywhere = torch.tensor(lacking, device=device)
        dist.all_reduce(everywhere)
        lacking = everywhere.item()
    if lacking:
        run_eagerly()
        if before and wanted:
            print(
                "the run was compiled when it began, and cannot be here: it is slower from now on, and its weights "
                "will differ in their last digits",
                file=sys.stderr,
            )
    return compiled()
