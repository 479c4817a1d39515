"""A mixture of SwiGLU experts in place of the feed-forward network, as Qwen3-MoE and MiniMind have it.

N tokens   C channels   E experts   X experts per token
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_ray.config.schema import ModelShape


class MixtureOfExperts(nn.Module):
    """Each token goes to the `num_experts_per_tok` experts its router scores highest, weighted by those scores.

    `aux_loss` is, after a forward pass, the load-balancing loss of its tokens (Fedus et al. 2021, eq. 4-6):
    coef · E · Σ_e (choices of expert e per token) · (mean router probability of e).
    """

    def __init__(self, shape: ModelShape, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(shape.num_experts))
        self.aux_loss: Tensor | None = None

    def forward(self, x_NC: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs."""
        probabilities_NE = self.gate(x_NC).float().softmax(-1)
        scores_NX, chosen_NX = probabilities_NE.topk(self.shape.num_experts_per_tok, dim=-1)
        if self.shape.norm_topk_prob:
            scores_NX = scores_NX / scores_NX.sum(-1, keepdim=True)

        load_E = F.one_hot(chosen_NX, self.shape.num_experts).sum(1).float().mean(0)
        balance = self.shape.num_experts * (load_E * probabilities_NE.mean(0)).sum()
        self.aux_loss = self.shape.router_aux_loss_coef * balance

        # Tokens sorted by expert, so that each expert sees its own as one block.
        order = chosen_NX.flatten().argsort(stable=True)
        rows = order // self.shape.num_experts_per_tok
        counts = chosen_NX.flatten().bincount(minlength=self.shape.num_experts).tolist()
        blocks = x_NC[rows].split(counts)
        y = torch.cat([expert(block) for expert, block in zip(self.experts, blocks)])
        weighted = y * scores_NX.flatten()[order].unsqueeze(-1).to(y.dtype)
        return torch.zeros_like(x_NC, dtype=y.dtype).index_add(0, rows, weighted)
