"""A mixture of SwiGLU experts in place of the feed-forward network, as in Qwen3-MoE and MiniMind.

N tokens   C channels   E experts   X experts per token   D documents
"""

# pyright: reportIncompatibleMethodOverride=false
# (torch declares backward(ctx, *grads), and every Function names its own gradients.)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.ops import kernel, swiglu, wide

# Tokens are sorted by expert: `order` sorts the N · X choices by expert, and `places` is its inverse. Gradients are
# gathered and not scattered, which is faster on a GPU and gives the same bits each time. The outputs of a token's X
# experts are added one by one, because the compiler makes a slow loop of a sum over X.


@kernel
def _sum_of_places(y: Tensor, places: Tensor, per_token: int) -> Any:
    first, *others = (y.index_select(0, places_N) for places_N in places.unflatten(0, (-1, per_token)).unbind(1))
    return sum(others, first)


class _Dispatch(Function):
    """Copy each token once for each of its experts, sorted by expert: [N, C] to [N · X, C]."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, order: Tensor, places: Tensor, per_token: int) -> Any:
        ctx.save_for_backward(places)
        ctx.per_token = per_token
        return x_NC.index_select(0, order // per_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return _sum_of_places(grad, places, ctx.per_token), None, None, None


@kernel
def _combine(y: Tensor, scores_NX: Tensor, places: Tensor) -> Any:
    places_NX = places.unflatten(0, scores_NX.shape)
    first, *others = (
        y.index_select(0, places_N) * scores_N.unsqueeze(1).to(y.dtype)
        for places_N, scores_N in zip(places_NX.unbind(1), scores_NX.unbind(1))
    )
    return sum(others, first)


@kernel
def _combine_backward(grad_NC: Tensor, y: Tensor, scores_NX: Tensor, order: Tensor, places: Tensor) -> Any:
    scores_1 = scores_NX.flatten().index_select(0, order).unsqueeze(1).to(y.dtype)
    grad_y = grad_NC.index_select(0, order // scores_NX.shape[1]) * scores_1
    y_NXC = y.index_select(0, places).unflatten(0, scores_NX.shape)
    return grad_y, (wide(y_NXC) * grad_NC.unsqueeze(1)).sum(-1).to(scores_NX.dtype)


class _Combine(Function):
    """Sum the outputs of each token's experts, weighted by their scores: [N · X, C] to [N, C]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scores_NX: Tensor, order: Tensor, places: Tensor) -> Any:
        ctx.save_for_backward(y, scores_NX, order, places)
        return _combine(y, scores_NX, places)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> Any:
        return *_combine_backward(grad_NC, *ctx.saved_tensors), None, None


class MixtureOfExperts(nn.Module):
    """Sends each token to the `num_experts_per_tok` experts with the highest router scores, which weight their outputs.

    Every token also goes to all shared experts with weight 1 (Dai et al. 2024, eq. 9). Only MiniMind-2 has shared
    experts.
    """

    def __init__(self, shape: ModelShape, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(shape.num_experts))
        if shape.n_shared_experts:
            self.shared_experts = nn.ModuleList(make_expert() for _ in range(shape.n_shared_experts))
        self.routed: tuple[Tensor, Tensor] | None = None

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, plus the shared experts' outputs: [N, C]."""
        probabilities_NE = self.gate(x_NC).float().softmax(-1)
        scores_NX, chosen_NX = probabilities_NE.topk(self.shape.num_experts_per_tok, dim=-1)
        if self.shape.norm_topk_prob:
            scores_NX = scores_NX / scores_NX.sum(-1, keepdim=True)

        self.routed = probabilities_NE, chosen_NX

        # Sort the tokens by expert, so that each expert gets its tokens as one block.
        order = chosen_NX.flatten().argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        experts_E1 = torch.arange(self.shape.num_experts, device=order.device).unsqueeze(1)
        counts_E = (chosen_NX.flatten() == experts_E1).sum(1)
        x = _Dispatch.apply(x_NC, order, places, self.shape.num_experts_per_tok)
        out_NC = _Combine.apply(self._experts(x, counts_E), scores_NX, order, places)
        for index in range(self.shape.n_shared_experts):
            out_NC = out_NC + self.shared_experts[index](x_NC)
        return out_NC

    def _experts(self, x: Tensor, counts_E: Tensor) -> Tensor:
        """Return the experts' outputs. `x` holds the tokens expert by expert, in the order of the experts."""
        if not self._grouped(x):
            blocks = x.split(counts_E.tolist())
            return torch.cat([expert(block) for expert, block in zip(self.experts, blocks)])
        # Leave the counts on the device; otherwise the host would have to wait for them in every layer.
        ends_E = counts_E.cumsum(0, dtype=torch.int32)

        def product(x: Tensor, name: str) -> Tensor:
            weights = [expert.get_submodule(name).get_parameter("weight").to(x.dtype) for expert in self.experts]
            return F.grouped_mm(x, torch.stack(weights).mT, offs=ends_E)

        return product(swiglu(product(x, "gate_proj"), product(x, "up_proj")), "down_proj")

    def _grouped(self, x: Tensor) -> bool:
        """Whether torch's grouped product can compute all experts at once.

        It needs bfloat16 on a Hopper GPU, and plain matrices whose rows are multiples of 16 bytes. On other GPUs torch
        has no such product for bfloat16, and each call waits for the device to get the counts.
        """
        parts = [part for expert in self.experts for part in expert.children()]
        return (
            x.is_cuda
            and x.dtype is torch.bfloat16
            and torch.cuda.get_device_capability(x.device)[0] == 9
            and all(type(part) is nn.Linear and not (part.in_features | part.out_features) % 8 for part in parts)
        )

    def aux_loss(self, lengths_D: Tensor) -> Tensor:
        """Return the load-balancing loss of the last forward pass (Fedus et al. 2021, eq. 4-6), a mean over its tokens.

        It is coef · E · Σ_e (choices of expert e per token) · (mean router probability of e). In MiniMind-2's shape the
        sum is computed for each document, and each choice counts 1 / X (Dai et al. 2024, eq. 12-14). `lengths_D` has
        the lengths of the documents.
        """
        assert self.routed, "no forward pass yet"
        probabilities_NE, chosen_NX = self.routed
        load_NE = F.one_hot(chosen_NX, self.shape.num_experts).sum(1).float()
        if self.shape.qk_norm:
            balance = (load_NE.mean(0) * probabilities_NE.mean(0)).sum()
        else:
            lengths_D = lengths_D.to(load_NE.device)
            load_DE, probabilities_DE = (
                torch.segment_reduce(x, "sum", lengths=lengths_D) for x in (load_NE, probabilities_NE)
            )
            balance_D = (load_DE * probabilities_DE).sum(1) / lengths_D.clamp(min=1)
            balance = balance_D.sum() / load_NE.sum()
        return self.shape.router_aux_loss_coef * self.shape.num_experts * balance
