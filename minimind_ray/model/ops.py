"""Compute the operations between matrix products with few passes over memory. Their gradients are written by hand.

    N tokens   C channels   F feed-forward   H heads   K head size   R = K / 2 rotary pairs   M rows   V vocabulary

The operations are norms, rotary positions, SwiGLU and log-probabilities. On a CPU with fast matrix units they take more
of a step's time than the products. Each operation is a `Function` whose forward and backward are one `kernel` each, a
pure function of tensors. After `compile_kernels` each kernel is one compiled loop; before, it runs eagerly. Kernels do
not depend on weights or layers, so all layers share them.

Norms, rotations and log-probabilities compute in float32; SwiGLU computes in the dtype of its inputs. Results that are
inputs of a matrix product have the dtype of matrix products: autocast's if autocast is on, otherwise the input's.
"""
# pyright: reportIncompatibleMethodOverride=false
# (torch declares backward(ctx, *grads), and every Function names its own gradients.)

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from minimind_ray.config.errors import UserError


class Kernel:
    """A function of tensors that `compile_kernels` compiles into one loop."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.eager = self.compiled = function

    def __call__(self, *args: Any) -> Any:
        """Return the function's result; use the compiled version, if there is one, for large tensors."""
        large = max(x.numel() for x in args if isinstance(x, Tensor)) >= SMALL
        return (self.compiled if large else self.eager)(*args)


SMALL = 2**15
"""Kernels run eagerly on tensors with fewer values, because a compiled call would cost more than it saves."""

KERNELS: list[Kernel] = []


def kernel(function: Callable[..., Any]) -> Kernel:
    """Turn a function into a `Kernel` (a decorator)."""
    KERNELS.append(Kernel(function))
    return KERNELS[-1]


def compile_kernels(device: torch.device) -> None:
    """Let this process compile every kernel at its first use, for any number of tokens.

    Raises:
        UserError: the compiler does not work here for `device`.
    """
    if compiled():
        return
    from torch.compiler import config  # Changing it imports the compiler, which takes seconds.

    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_cache_directory())
    # A process that trains many models, as in a sweep, compiles each kernel for each width.
    config.recompile_limit = max(64, config.recompile_limit)
    try:
        torch.compile(torch.square, dynamic=True)(torch.ones(2, device=device))
    except Exception as error:  # The compiler raises exceptions of many classes.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile is true, but torch.compile fails here ({type(error).__name__}: {reason}); it needs a C++ "
            "compiler such as g++ and Python's headers: install them, or set train.compile false"
        ) from error
    # On a GPU, let the compiler treat the width as fixed, so that a row stays in registers. But it infers the dynamic
    # sizes from the first inputs, which differ after a resume; deterministic runs must not depend on these inputs.
    learns = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    dynamic = None if learns else True
    for each in KERNELS:
        each.compiled = torch.compile(each.eager, dynamic=dynamic)
    if device.type == "cuda":  # The compiled versions take four times the time of reading and writing the data.
        from minimind_ray.model import gpu_kernels

        _norm_rotate.compiled = gpu_kernels.norm_rotate
        _norm_rotate_backward.compiled = gpu_kernels.norm_rotate_backward


def _cache_directory() -> Path:
    """Return the folder for compiled code. It is in the user's home: other users could write to a shared folder.

    There is a folder for each kind of processor and number of threads. Compiled code depends on them, torch's cache
    keys do not include them, and machines of different kinds may share a home.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    about = f"{features} {torch.backends.cpu.get_cpu_capability()} {torch.__version__} {torch.get_num_threads()}"
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    try:
        directory = Path.home() / ".cache" / "minimind_ray" / "inductor" / name
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # There is no home, or it is not writable.
        directory = Path(tempfile.mkdtemp(prefix="minimind-ray-"))
    return directory


def compiled() -> bool:
    """Whether this process compiles its kernels."""
    return any(each.compiled is not each.eager for each in KERNELS)


def run_eagerly() -> None:
    """Undo `compile_kernels`: run kernels without compiling."""
    for each in KERNELS:
        each.compiled = each.eager


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with `x`: autocast's if autocast is on, otherwise that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Several products with the same input


class _Linears(Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, *weights: Tensor) -> Any:
        dtype = product_dtype(x_NC)
        x, *cast = (t.to(dtype) for t in (x_NC, *weights))
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *cast)
        ctx.dtypes = [t.dtype for t in (x_NC, *weights)]
        return tuple(F.linear(x, weight) for weight in cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        needed, dtypes = ctx.needs_input_grad, ctx.dtypes
        grad_x = None
        if needed[0]:
            grad_x = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:]):
                grad_x.addmm_(grad, weight)
            grad_x = grad_x.to(dtypes[0])
        return grad_x, *((g.t() @ x).to(d) if n else None for g, n, d in zip(grads, needed[1:], dtypes[1:]))


def has_bias(linear: nn.Linear) -> bool:
    """Whether a projection has a bias. (torch's type annotation does not say that `bias` may be None.)"""
    return cast("Tensor | None", linear.bias) is not None


def linears(x_NC: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """Return each module's output for x. For projections without biases, the products also sum the gradient of x."""
    # Without gradients, use autocast, which caches the cast weights between calls.
    if torch.is_grad_enabled() and all(type(m) is nn.Linear and not has_bias(m) for m in modules):
        return _Linears.apply(x_NC, *(module.weight for module in modules))
    return tuple(module(x_NC) for module in modules)


# Residual sum and RMSNorm: y = x + delta, y / sqrt(mean(y²) + eps) · weight (Zhang & Sennrich 2019, eq. 4)


@kernel
def _add_norm(x_NC: Tensor, delta_NC: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Any:
    y_NC = x_NC + delta_NC
    scale_N1 = torch.rsqrt(y_NC.square().mean(-1, keepdim=True) + eps)
    return y_NC, (y_NC * scale_N1 * weight_C).to(dtype), scale_N1


@kernel
def _add_norm_backward(
    grad_y_NC: Tensor, grad_out_NC: Tensor, y_NC: Tensor, scale_N1: Tensor, weight_C: Tensor, dtype: torch.dtype
) -> Any:
    grad_out_NC = wide(grad_out_NC)
    normed_NC = y_NC * scale_N1
    grad_weight_C = (grad_out_NC * normed_NC).sum(0)
    grad_NC = grad_out_NC * weight_C
    grad_NC = (grad_NC - normed_NC * (grad_NC * normed_NC).mean(-1, keepdim=True)) * scale_N1 + grad_y_NC
    return grad_NC, grad_NC.to(dtype), grad_weight_C


class _AddNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, delta_NC: Tensor, weight_C: Tensor, eps: float) -> Any:
        y_NC, out_NC, scale_N1 = _add_norm(x_NC, delta_NC, weight_C, eps, product_dtype(x_NC))
        ctx.save_for_backward(y_NC, scale_N1, weight_C)
        ctx.delta_dtype = delta_NC.dtype
        return y_NC, out_NC

    @staticmethod
    def backward(ctx: Any, grad_y_NC: Tensor, grad_out_NC: Tensor) -> Any:
        y_NC, scale_N1, weight_C = ctx.saved_tensors
        grads = _add_norm_backward(grad_y_NC, grad_out_NC, y_NC, scale_N1, weight_C, ctx.delta_dtype)
        return *grads, None


def add_norm(x_NC: Tensor, delta_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the residual stream x + delta, and its RMSNorm for the next product."""
    return _AddNorm.apply(x_NC, delta_NC, weight_C, eps)


# RMSNorm per head and rotary positions (Su et al. 2021, eq. 34), pairs (i, i + K/2) as Hugging Face has them


@kernel
def _rotate(x_NHK: Tensor, cos_NR: Tensor, sin_NR: Tensor, scale: float) -> Any:
    a_NHR, b_NHR = wide(x_NHK).chunk(2, dim=-1)
    cos_N1R, sin_N1R = cos_NR.unsqueeze(1) * scale, sin_NR.unsqueeze(1) * scale
    return torch.cat((a_NHR * cos_N1R - b_NHR * sin_N1R, b_NHR * cos_N1R + a_NHR * sin_N1R), -1).to(x_NHK.dtype)


@kernel
def _norm_rotate(x_NHK: Tensor, weight_K: Tensor, cos_NR: Tensor, sin_NR: Tensor, eps: float, scale: float) -> Any:
    wide_NHK = wide(x_NHK)
    scale_NH1 = torch.rsqrt(wide_NHK.square().mean(-1, keepdim=True) + eps)
    a_NHR, b_NHR = (wide_NHK * scale_NH1 * weight_K).chunk(2, dim=-1)
    cos_N1R, sin_N1R = cos_NR.unsqueeze(1) * scale, sin_NR.unsqueeze(1) * scale
    out_NHK = torch.cat((a_NHR * cos_N1R - b_NHR * sin_N1R, b_NHR * cos_N1R + a_NHR * sin_N1R), -1)
    return out_NHK.to(x_NHK.dtype), scale_NH1


@kernel
def _norm_rotate_backward(
    grad_out_NHK: Tensor, x_NHK: Tensor, weight_K: Tensor, scale_NH1: Tensor, cos_NR: Tensor, sin_NR: Tensor,
    scale: float,
) -> Any:  # fmt: skip
    a_NHR, b_NHR = wide(grad_out_NHK).chunk(2, dim=-1)
    cos_N1R, sin_N1R = cos_NR.unsqueeze(1) * scale, sin_NR.unsqueeze(1) * scale
    grad_NHK = torch.cat((a_NHR * cos_N1R + b_NHR * sin_N1R, b_NHR * cos_N1R - a_NHR * sin_N1R), -1)
    normed_NHK = wide(x_NHK) * scale_NH1
    grad_weight_K = (grad_NHK * normed_NHK).sum((0, 1))
    grad_NHK = grad_NHK * weight_K
    grad_NHK = (grad_NHK - normed_NHK * (grad_NHK * normed_NHK).mean(-1, keepdim=True)) * scale_NH1
    return grad_NHK.to(x_NHK.dtype), grad_weight_K


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, cos_NR: Tensor, sin_NR: Tensor, scale: float) -> Any:
        ctx.save_for_backward(cos_NR, sin_NR)
        ctx.scale = scale
        return _rotate(x_NHK, cos_NR, sin_NR, scale)

    @staticmethod
    def backward(ctx: Any, grad_out_NHK: Tensor) -> Any:
        cos_NR, sin_NR = ctx.saved_tensors
        return _rotate(grad_out_NHK, cos_NR, -sin_NR, ctx.scale), None, None, None


class _NormRotate(Function):
    @staticmethod
    def forward(
        ctx: Any, x_NHK: Tensor, weight_K: Tensor, cos_NR: Tensor, sin_NR: Tensor, eps: float, scale: float
    ) -> Any:
        out_NHK, scale_NH1 = _norm_rotate(x_NHK, weight_K, cos_NR, sin_NR, eps, scale)
        ctx.save_for_backward(x_NHK, weight_K, scale_NH1, cos_NR, sin_NR)
        ctx.scale = scale
        return out_NHK

    @staticmethod
    def backward(ctx: Any, grad_out_NHK: Tensor) -> Any:
        return *_norm_rotate_backward(grad_out_NHK, *ctx.saved_tensors, ctx.scale), None, None, None, None


def rotate(x_NHK: Tensor, rotary: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    """Return `scale` · x with each pair rotated by its position's angle. `rotary` is cosine and sine, [N, R] each."""
    return _Rotate.apply(x_NHK, *rotary, scale)


def norm_rotate(
    x_NHK: Tensor, weight_K: Tensor, eps: float, rotary: tuple[Tensor, Tensor], scale: float = 1.0
) -> Tensor:
    """Like `rotate`, but first apply RMSNorm to each head."""
    return _NormRotate.apply(x_NHK, weight_K, *rotary, eps, scale)


# SwiGLU (Shazeer 2020, eq. 6): silu(gate) · up


@kernel
def _swiglu(gate_NF: Tensor, up_NF: Tensor) -> Any:
    return F.silu(gate_NF) * up_NF


@kernel
def _swiglu_backward(grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> Any:
    return torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_NF * F.silu(gate_NF)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Any:
        ctx.save_for_backward(gate_NF, up_NF)
        return _swiglu(gate_NF, up_NF)

    @staticmethod
    def backward(ctx: Any, grad_out_NF: Tensor) -> Any:
        return _swiglu_backward(grad_out_NF, *ctx.saved_tensors)


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Return silu(gate) · up."""
    return _SwiGLU.apply(gate_NF, up_NF)


# Log-probability of one class per row


@kernel
def _log_probs(logits_MV: Tensor, targets_M: Tensor) -> Any:
    largest_M1 = logits_MV.amax(-1, keepdim=True)
    exp_MV = (wide(logits_MV) - largest_M1).exp()
    sum_M = exp_MV.sum(-1)
    targets_M1 = targets_M.unsqueeze(1)
    log_probs_M = (wide(logits_MV.gather(1, targets_M1)) - largest_M1).squeeze(1) - sum_M.log()
    return log_probs_M, exp_MV.to(logits_MV.dtype), sum_M


@kernel
def _log_probs_backward(grad_M: Tensor, exp_MV: Tensor, targets_M: Tensor, sum_M: Tensor) -> Any:
    columns_V = torch.arange(exp_MV.shape[1], device=exp_MV.device)
    target_MV = (columns_V == targets_M.unsqueeze(1)) * grad_M.unsqueeze(1)
    return (target_MV - exp_MV * (grad_M / sum_M).unsqueeze(1)).to(exp_MV.dtype)


class _LogProbs(Function):
    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, targets_M: Tensor) -> Any:
        out_M, exp_MV, sum_M = _log_probs(logits_MV, targets_M)
        ctx.save_for_backward(exp_MV, targets_M, sum_M)  # Saved, so that backward need not compute exp again.
        return out_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> Any:
        return _log_probs_backward(grad_M, *ctx.saved_tensors), None


def log_probs(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return log softmax(logits)[target] of each row, in nats, in float32 or wider."""
    return _LogProbs.apply(logits_MV, targets_M)
