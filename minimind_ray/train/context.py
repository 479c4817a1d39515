"""Define the interface between the training loop and its host, and settle the process's precision and compilation.

The host is the environment in which a run trains. The loop knows it only as a `Context`. There are a plain process
(`PlainContext`, here), a Ray Train worker, a Ray Tune trial, and a group of trials (all three under on_ray/).
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

# CUDA reads this variable once, at the first matrix product. `train.deterministic` may be asked for only later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Context(Protocol):
    """The interface between the training loop and its host."""

    rank: int
    world_size: int
    device: torch.device
    reads_checkpoints: bool
    """Whether the host reads a checkpoint as soon as it is reported. If not, its files may be complete only later."""

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Report a validation, or a checkpoint directory, or both, to the host. Called on every rank.

        Return whether to continue training: False, on every rank, if the host stops the run early.
        """
        ...

    def should_stop(self) -> bool:
        """Whether the run should write a checkpoint and end after this step (after Ctrl-C or a preemption notice)."""
        ...

    def base_weights(self, directory: Path) -> Mapping[str, Tensor] | None:
        """Return a model directory's weights if the host has them in memory; None: read them from the directory."""
        ...


class PlainContext:
    """The host of a run in one process without Ray. See `stop_on_interrupt` for how to stop the run by a signal."""

    rank = 0
    world_size = 1
    reads_checkpoints = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or default_device()
        self.stopping = False

    def report(self, metrics: dict[str, Any], checkpoint: str | None) -> bool:
        """Do nothing: metrics.jsonl and the run directory have the report's content already."""
        return True

    def should_stop(self) -> bool:
        """Whether `stop` was called, by a signal or by the caller."""
        return self.stopping

    def base_weights(self, directory: Path) -> Mapping[str, Tensor] | None:
        """Return None: this host keeps no base weights in memory."""

    def stop_on_interrupt(self) -> AbstractContextManager[None]:
        """Inside, the first SIGINT, SIGTERM or SIGHUP asks for a stop; the second has its usual effect.

        Outside of the main thread, signals keep their usual effect.
        """
        return first_stops(self.stop)

    def stop(self) -> None:
        """Ask for a stop after the current step."""
        self.stopping = True


def keep_freed_memory() -> None:
    """Let glibc reuse the memory that a training step frees; otherwise the kernel zero-fills the same pages every step.

    Call it before the process's first matrix product; it holds for the whole process. It also limits oneDNN's cache of
    prepared matrix products (one per size, a few megabytes each) to 256 entries instead of 1024, on every C library.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28)):
            libc.mallopt(parameter, value)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def default_device() -> torch.device:
    """Return the first GPU if there is one, otherwise the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for `train.precision`; `auto` is bfloat16 if the hardware supports it.

    Raises:
        UserError: there is no such precision.
    """
    if precision != "auto":
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}: give auto, {' or '.join(PRECISIONS)}")
        return PRECISIONS[precision]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        has_bf16 = features.get("avx512_bf16", False) or features.get("amx_tile", False)
    return torch.bfloat16 if has_bf16 else torch.float32


def arithmetic(dtype: torch.dtype) -> str:
    """Describe this CPU's arithmetic: threads and instruction set. The last digits of results depend on them.

    Linux grants AMX to a process only if the signal stack of each of its threads has room for AMX's registers. Without
    the grant torch silently computes bfloat16 products with AVX-512, which rounds differently.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    if dtype is torch.bfloat16 and torch.cpu.get_capabilities().get("amx_tile", False) and _amx_granted():
        instructions += " and AMX"
    threads = torch.get_num_threads()
    return f"{threads} {'thread' if threads == 1 else 'threads'}, {instructions}"


def _amx_granted() -> bool:
    """Ask Linux to let this process use AMX; return whether Linux does.

    Torch has no public function for this. A repeated request has no effect.
    """
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # Linux on x86-64


@contextmanager
def deterministic(wanted: bool) -> Generator[None]:
    """Use torch's deterministic algorithms inside, if `wanted`."""
    before = torch.are_deterministic_algorithms_enabled()
    if before or not wanted:  # Setting it imports torch's compiler, which takes seconds.
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


LONG_RUN = {"cpu": 3e13, "cuda": 1e16}
"""Compile a run of at least so many FLOPs, about a minute of work: compiling may take ten seconds."""


def settle_compile(
    setting: Literal["auto", True, False], flops: float, device: torch.device, before: bool | None = None
) -> bool:
    """Decide whether this process compiles its kernels (see model/ops.py), and return the decision.

    `setting` is `train.compile`. With `auto`, a run of many `flops` compiles if the compiler works here. `before` is
    the decision of the run before a resume, which `auto` repeats, so that the result is the same to the bit. The
    workers agree: all of them compile, or none does.

    Raises:
        UserError: the setting is true, and the compiler does not work here.
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
                "the run was compiled when it began, but compiling fails here: from now on the run is slower, and its "
                "weights will differ in their last digits",
                file=sys.stderr,
            )
    return compiled()
