"""A mixture of SwiGLU experts in place of the feed-forward network, as Qwen3-MoE and MiniMind have it.

N tokens   C channels   E experts   X experts per token   D documents
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_ray.config.schema import ModelShape


class MixtureOfExperts(nn.Module):
    """Each token goes to the `num_experts_per_tok` experts its router scores highest, weighted by those scores.

    And to every shared expert, of which a model of MiniMind-2 may have some, with weight 1 (Dai et al. 2024, eq. 9).
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
        """The weighted sum of the chosen experts' outputs."""
        probabilities_NE = self.gate(x_NC).float().softmax(-1)
        scores_NX, chosen_NX = probabilities_NE.topk(self.shape.num_experts_per_tok, dim=-1)
        if self.shape.norm_topk_prob:
            scores_NX = scores_NX / scores_NX.sum(-1, keepdim=True)

        self.routed = probabilities_NE, chosen_NX

        # Tokens sorted by expert, so that each expert sees its own as one block.
        order = chosen_NX.flatten().argsort(stable=True)
        rows = order // self.shape.num_experts_per_tok
        counts = chosen_NX.flatten().bincount(minlength=self.shape.num_experts).tolist()
        blocks = x_NC[rows].split(counts)
        y = torch.cat([expert(block) for expert, block in zip(self.experts, blocks)])
        weighted = y * scores_NX.flatten()[order].unsqueeze(-1).to(y.dtype)
        out_NC = torch.zeros_like(x_NC, dtype=y.dtype).index_add(0, rows, weighted)
        for index in range(self.shape.n_shared_experts):
            out_NC = out_NC + self.shared_experts[index](x_NC)
        return out_NC

    def aux_loss(self, lengths_D: Tensor) -> Tensor:
        """The load-balancing loss of the last forward pass's tokens (Fedus et al. 2021, eq. 4-6), a mean over them.

        coef · E · Σ_e (choices of expert e per token) · (mean router probability of e); in MiniMind-2's shape of each
        document, and of its choices each counts 1 / X (Dai et al. 2024, eq. 12-14). `lengths_D` are the documents'.
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
