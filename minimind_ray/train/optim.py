"""The optimizer (AdamW), and gradients in one flat buffer, for `training_step`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minimind_ray.config.schema import OptimConfig

NORM_PIECE = 4096


class AdamW:
    """Torch's fused AdamW (Loshchilov & Hutter 2019) for groups of parameters, each with its own weight decay.

    `lr` is the learning rate of the next step. From the first step on, `state` has `step`, `exp_avg` and `exp_avg_sq`
    of each parameter: float32, on the parameter's device.

    The class torch.optim.AdamW gives the same bits, but imports torch's compiler, which takes seconds. This class calls
    the function that torch's class calls.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.groups, self.config, self.lr = groups, config, config.lr
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        """Update the parameters, all of which have gradients. If `found_inf`, float32 [], is 1, change nothing."""
        for group in self.groups:
            parameters: list[Tensor] = group["params"]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] |= {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            states = [self.state[p] for p in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters if p.grad is not None],  # All: this only narrows the type.
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=self.lr,
                weight_decay=group["weight_decay"],
                eps=self.config.eps,
                maximize=False,
            )


def build_adamw(model: nn.Module, config: OptimConfig) -> AdamW:
    """Return a fused AdamW for the trainable parameters. Weight decay applies to matrices, not to norms and biases."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], config)


def l2_norm(values_XP: Tensor) -> Tensor:
    """Return the L2 norm along the last axis: float64, with the shape of the other axes.

    A single float32 sum over 100M values loses up to 1.5 % on a CPU. So the squares are summed in float32 only within
    pieces of NORM_PIECE values, and the pieces are summed in float64. This is exact to about 1e-8 and takes the same
    time.
    """
    size = values_XP.shape[-1]
    whole = size // NORM_PIECE * NORM_PIECE
    pieces = [values_XP[..., :whole].unflatten(-1, (-1, NORM_PIECE)), values_XP[..., whole:].unsqueeze(-2)]
    norms = torch.cat([torch.linalg.vector_norm(piece, dim=-1) for piece in pieces], -1)
    return torch.linalg.vector_norm(norms.double(), dim=-1)


class FlatGradients:
    """All gradients as views of one buffer, so that summing over workers, clipping and zeroing are one call each.

    The sum over workers is one all-reduce of this buffer in every step. DistributedDataParallel is not used, for two
    reasons. It regroups its buckets after the first step, so the order of summation, and with it the last bits, would
    differ after a resume. And all its workers need the same number of micro-batches.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.buffer = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        start = 0
        for p in self.parameters:
            p.grad = self.buffer[start : start + p.numel()].view_as(p)
            start += p.numel()

    def zero(self) -> None:
        """Set all gradients to 0; call it before a step's first backward pass."""
        self.buffer.zero_()

    def all_reduce(self) -> None:
        """Sum the gradients over all workers, in place."""
        if dist.is_initialized():
            dist.all_reduce(self.buffer)

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global L2 norm of at most `max_norm`; 0 means no limit.

        Returns the norm before scaling, float64 [].
        """
        norm = l2_norm(self.buffer)
        if max_norm:
            self.buffer.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm
