"""Preference optimisation (DPO and related losses): learn from a chosen and a rejected answer to the same prompt.

    N tokens   U tokens that go through the model   C channels   D documents   P = D / 2 pairs: document 2i is the
    chosen answer, document 2i + 1 the rejected answer

A loss compares the two answers' scores, in nats:

    sigmoid, hinge    log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens
    ipo               the same, per token
    simpo, orpo       log pi(y|x), per token; no reference model

The two documents of a pair begin with the same prompt, which goes through the model once (`pair_hidden`). This saves
time if prompts are long compared with answers. Forward and backward of the 26M model on a CPU took 28 % less time with
prompts of 24 tokens and answers of 11, and about the same time with prompts of 40 tokens and answers of 300.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ModelShape
from minimind_ray.config.stages import DpoConfig
from minimind_ray.data.batch import Batch
from minimind_ray.data.columns import Column
from minimind_ray.data.pack import Pack
from minimind_ray.model.attention import Layout
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import sequence_log_probs

REFERENCE = Column("reference", "document", "float32")
"""log pi_ref of each document's answer tokens, summed, in nats."""

PER_TOKEN = ("ipo", "simpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "orpo")
SMOOTHED = ("sigmoid", "simpo")
"""The losses that dpo.label_smoothing changes."""


def pair_log_probs(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each document's log-probability in nats, summed over its counted tokens, and their number: [D]."""
    return sequence_log_probs(model, pair_hidden(model, batch), batch)


def reference_log_probs(model: Transformer, batch: Batch) -> Tensor:
    """Return the values of the column REFERENCE if `model` is the reference model: float32 [D]."""
    return pair_log_probs(model, batch)[0].float()


def pair_hidden(model: Transformer, batch: Batch) -> Tensor:
    """Return the model's hidden states [N, C], computing the common beginning of a pair's documents only once.

    The tokens of the common beginning go through the model only in the chosen document. Attention works within
    documents and needs all N tokens, so it gets copies of the common tokens' queries, keys and values.
    """
    layout, tokens_N = Layout(batch.bounds_D1, batch.tokens_N.device), batch.tokens_N
    lengths_D = batch.bounds_D1.diff().long()
    back_D = lengths_D.roll(1)  # Distance from a rejected document's token to the same position in its chosen document.
    back_D[0::2] = 0
    back_N = back_D.repeat_interleave(lengths_D).to(tokens_N.device)
    index_N = torch.arange(len(tokens_N), device=tokens_N.device)
    differs_N = (layout.positions_N >= back_N) | (tokens_N != tokens_N[index_N - back_N])
    differs_N1 = F.pad(differs_N.cumsum(0), (1, 0))
    computed_N = differs_N1[1:] > differs_N1[index_N - layout.positions_N]  # From the first difference in the document.
    computed_U = computed_N.nonzero().squeeze(1)
    computed_U = F.pad(computed_U, (0, model.stable_size(len(computed_U)) - len(computed_U)))
    row_N = (computed_N.cumsum(0) - 1)[torch.where(computed_N, index_N, index_N - back_N)]

    def attend(_: int, q_UHK: Tensor, k_UGK: Tensor, v_UGK: Tensor) -> Tensor:
        q_NHK, k_NGK, v_NGK = (x.index_select(0, row_N) for x in (q_UHK, k_UGK, v_UGK))
        return layout.attend(q_NHK, k_NGK, v_NGK).index_select(0, computed_U)

    computed_D = torch.segment_reduce(computed_N.float(), "sum", lengths=lengths_D.to(computed_N.device)).long()
    hidden_UC = model.decode(tokens_N[computed_U], layout.positions_N[computed_U], attend, computed_D)
    return hidden_UC.index_select(0, row_N)


def sigmoid_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log sigmoid(beta (chosen - rejected)) (Rafailov et al. 2023, eq. 7), on summed log-ratios.

    With `label_smoothing` e the conservative form: (1 - e) times this plus e times the loss of the swapped pair
    (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    logit_P = beta * (chosen_P - rejected_P)
    return -(1 - label_smoothing) * F.logsigmoid(logit_P) - label_smoothing * F.logsigmoid(-logit_P)


def hinge_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta (chosen - rejected)) (SLiC, Zhao et al. 2023; on log-ratios as RSO, Liu et al. 2023)."""
    return F.relu(1 - beta * (chosen_P - rejected_P))


def ipo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """(chosen - rejected - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17, beta for tau), on log-ratios per token.

    Per token, as in trl and as the authors advise: with sums, long and short answers would need the same gap.
    """
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def simpo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) (Meng et al. 2024, eq. 6), on log-probabilities per token."""
    return sigmoid_loss(chosen_P - gamma / beta, rejected_P, beta, label_smoothing)


def orpo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """-chosen - beta log sigmoid(log odds ratio) (Hong et al. 2024, eq. 6 and 7, beta for lambda).

    On log-probabilities per token; odds(y|x) = p / (1 - p) with log p the mean over the answer's tokens. The
    likelihood term has only the chosen answer (in trl it also has the prompt, and is a mean over tokens).
    """
    log_odds_ratio_P = (chosen_P - rejected_P) - (_log1m_exp(chosen_P) - _log1m_exp(rejected_P))
    return -chosen_P - beta * F.logsigmoid(log_odds_ratio_P)


def _log1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation near 0."""
    near = x > -0.6931471805599453
    # Mask each branch's input: the infinite derivative of one branch would make the gradient of the other NaN.
    return torch.where(
        near, torch.log(-torch.expm1(x.masked_fill(~near, -0.5))), torch.log1p(-torch.exp(x.masked_fill(near, -1.0)))
    )


class Preference:
    """A preference loss, as a mean over pairs. If it needs a reference model, the column REFERENCE holds log pi_ref.

    Metrics, as means over pairs:

        reward_chosen, reward_rejected   beta times the answer's score
        margin                           reward_chosen - reward_rejected
        accuracy                         1 if the margin is positive, 0.5 if it is 0, else 0
        logp_chosen, logp_rejected       the answer's summed log-probability, in nats
        kl                               with a reference: log pi(y|x) - log pi_ref(y|x), mean over the two answers
        aux                              with experts: the routers' load-balancing loss, which training adds to the loss

    `kl` is in nats per answer. It estimates KL(pi || pi_ref) if the answers resemble the policy's own; a value below 0
    means that the policy has moved away from the data.

    Raises:
        UserError: the config asks for label smoothing with a loss that has no such form.
    """

    unit = "pair"

    def __init__(self, config: DpoConfig, shape: ModelShape) -> None:
        if config.label_smoothing and config.loss not in SMOOTHED:
            raise UserError(
                f"dpo.label_smoothing is {config.label_smoothing}, but dpo.loss {config.loss} has no such form; "
                "leave it out, or use sigmoid or simpo"
            )
        self.config = config
        self.needs_reference = config.loss not in WITHOUT_REFERENCE
        self.balances_experts = shape.num_experts > 0
        self.per_pair: tuple[str, ...] = (
            "reward_chosen",
            "reward_rejected",
            "margin",
            "accuracy",
            "logp_chosen",
            "logp_rejected",
        )
        if self.needs_reference:
            self.per_pair += ("kl",)
        self.metrics: tuple[str, ...] = (*self.per_pair, "aux") if self.balances_experts else self.per_pair

    def count(self, pack: Pack) -> float:
        """Return the number of pairs of `pack`."""
        return len(pack.lengths) // 2

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over pairs, and the metrics summed over pairs."""
        pairs = self.examples(model, batch)
        loss, sums = pairs["loss"].sum(), {name: pairs[name].detach().sum() for name in self.per_pair}
        if self.balances_experts:
            aux = model.aux_loss() * len(pairs["loss"])
            loss, sums["aux"] = loss + aux, aux.detach()
        return loss, sums

    def examples(self, model: Transformer, batch: Batch) -> dict[str, Tensor]:
        """Return each pair's `loss` without `aux`, `count` (always 1), and the metrics: float32 [P]."""
        return self.of_documents(*self.log_probs(model, batch), batch.columns)

    def log_probs(self, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each document's log-probability in nats, summed over its counted tokens, and their number: [D]."""
        return pair_log_probs(model, batch)

    def of_documents(self, logp_D: Tensor, counts_D: Tensor, columns: Mapping[Column, Tensor]) -> dict[str, Tensor]:
        """Return the same as `examples`, computed from the result of `log_probs`."""
        score_D, values = logp_D, {}
        if self.needs_reference:
            score_D = logp_D - columns[REFERENCE]
            values["kl"] = score_D.view(-1, 2).mean(1)
        if self.config.loss in PER_TOKEN:
            score_D = score_D / counts_D
        chosen_P, rejected_P = score_D.view(-1, 2).unbind(1)
        margin_P = self.config.beta * (chosen_P - rejected_P)
        return values | {
            "loss": self.losses(chosen_P, rejected_P),
            "count": torch.ones_like(margin_P),
            "reward_chosen": self.config.beta * chosen_P,
            "reward_rejected": self.config.beta * rejected_P,
            "margin": margin_P,
            "accuracy": (margin_P.sign() + 1) / 2,
            "logp_chosen": logp_D[0::2],
            "logp_rejected": logp_D[1::2],
        }

    def losses(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """Return the configured loss of each pair, from the scores in the module's docstring."""
        c = self.config
        match c.loss:
            case "sigmoid":
                return sigmoid_loss(chosen_P, rejected_P, c.beta, c.label_smoothing)
            case "hinge":
                return hinge_loss(chosen_P, rejected_P, c.beta)
            case "ipo":
                return ipo_loss(chosen_P, rejected_P, c.beta)
            case "simpo":
                return simpo_loss(chosen_P, rejected_P, c.beta, c.simpo_gamma, c.label_smoothing)
            case "orpo":
                return orpo_loss(chosen_P, rejected_P, c.beta)
