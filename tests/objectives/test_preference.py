from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ModelConfig
from minimind_ray.config.stages import DpoConfig
from minimind_ray.data.batch import Batch, batch_from_packs
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives import causal_lm, preference
from minimind_ray.objectives.preference import REFERENCE, Preference, pair_hidden, pair_log_probs

pytestmark = pytest.mark.unit

V = 97
SHAPE = ModelConfig(preset="tiny").shape(V)
LENGTHS = [7, 9, 5, 6, 12, 4]  # three pairs
PROMPTS = [4, 4, 2, 2, 3, 3]  # tokens without weight at the start


def make_pack(reference: np.ndarray | None = None) -> Pack:
    """Pairs whose prompts are alike; in the last, so is the answer's first token."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, V, length) for length in LENGTHS]
    for chosen, rejected, prompt in zip(documents[0::2], documents[1::2], PROMPTS[0::2]):
        rejected[:prompt] = chosen[:prompt]
    documents[5][3] = documents[4][3]
    weights = [np.arange(length) >= prompt for length, prompt in zip(LENGTHS, PROMPTS)]
    return Pack(
        id=0,
        tokens=np.concatenate(documents).astype(np.uint16),
        weights=np.concatenate(weights).astype(np.uint8),
        lengths=np.array(LENGTHS, np.int32),
        columns={} if reference is None else {REFERENCE: reference},
    )


def make_model(seed: int = 0, **fields: Any) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(preset="tiny", **fields).shape(V))
    with torch.no_grad():  # far from uniform, so that answers differ
        model.model.embed_tokens.weight.mul_(20)
    return model


def with_reference(batch: Batch, reference_D: Tensor) -> Batch:
    return replace(batch, columns={REFERENCE: reference_D})


def plain_log_probs(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    return causal_lm.sequence_log_probs(model, model(batch.tokens_N, batch.bounds_D1), batch)


def one_by_one(model: Transformer, pack: Pack) -> list[Tensor]:
    """Each document alone, by the definition, in float64 after the logits."""
    logps = []
    for tokens, weights in zip(np.split(pack.tokens, np.cumsum(LENGTHS)), np.split(pack.weights, np.cumsum(LENGTHS))):
        if len(tokens):
            ids = torch.from_numpy(tokens.astype(np.int64))
            hidden = model(ids[:-1], torch.tensor([0, len(ids) - 1], dtype=torch.int32))
            logp = model.project(hidden).double().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            logps.append(logp[torch.from_numpy(weights[1:]) > 0].sum())
    return logps


def test_log_probs_equal_each_document_alone() -> None:
    model, pack = make_model(), make_pack()
    logp_D, counts_D = pair_log_probs(model, batch_from_packs([pack]))
    assert logp_D.dtype == torch.float32
    assert counts_D.tolist() == [length - prompt for length, prompt in zip(LENGTHS, PROMPTS)]
    torch.testing.assert_close(logp_D.double(), torch.stack(one_by_one(model, pack)), rtol=1e-5, atol=1e-5)


def test_what_a_pair_begins_with_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Tensor] = []
    decode = Transformer.decode

    def watched(self: Transformer, tokens_N: Tensor, *rest: Any) -> Tensor:
        computed.append(tokens_N)
        return decode(self, tokens_N, *rest)

    def run(hidden: Callable[[Transformer, Batch], Tensor]) -> tuple[Tensor, list[Tensor]]:
        model = make_model()
        hidden_NC = hidden(model, batch)
        (hidden_NC * torch.linspace(-1, 1, hidden_NC.numel()).view_as(hidden_NC)).sum().backward()
        return hidden_NC, [p.grad for p in model.parameters() if p.grad is not None]

    batch = batch_from_packs([make_pack()])
    monkeypatch.setattr(Transformer, "decode", watched)
    twice, twice_grads = run(lambda model, batch: model(batch.tokens_N, batch.bounds_D1))
    once, once_grads = run(pair_hidden)
    inputs = [document[:-1] for document in np.split(make_pack().tokens, np.cumsum(LENGTHS)[:-1])]
    # Of the last document everything but its last token, which is only a target, is in the one before.
    expected = [*inputs[0], *inputs[1][4:], *inputs[2], *inputs[3][2:], *inputs[4]]
    assert computed[0].tolist() == batch.tokens_N.tolist() and computed[1].tolist() == expected
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)
    for a, b in zip(once_grads, twice_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_pairs_that_have_nothing_or_all_in_common() -> None:
    tokens = [[5, 6, 7], [8, 6, 7], [1, 2, 3, 4], [1, 2, 3, 4], [9, 9], [9, 9, 9]]
    lengths = np.array([len(t) for t in tokens], np.int32)
    pack = Pack(0, np.concatenate(tokens).astype(np.uint16), np.ones(int(lengths.sum()), np.uint8), lengths)
    model, batch = make_model(), batch_from_packs([pack])
    expected = model(batch.tokens_N, batch.bounds_D1)
    torch.testing.assert_close(pair_hidden(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_probs", [pair_log_probs, plain_log_probs])
def test_positions_that_make_the_size_even_change_nothing(
    log_probs: Callable[[Transformer, Batch], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Tensor, list[Tensor]]:
        model = make_model()
        logp_D, _ = log_probs(model, batch)
        (logp_D * torch.linspace(-1, 1, len(logp_D))).sum().backward()
        return logp_D, [p.grad for p in model.parameters() if p.grad is not None]

    pack = make_pack()
    batch = batch_from_packs([pack] * 11)
    assert make_model().stable_size(len(batch.tokens_N)) > len(batch.tokens_N)
    evened, evened_grads = run()
    monkeypatch.setattr(Transformer, "stable_size", lambda self, count: count)
    exact, exact_grads = run()
    torch.testing.assert_close(evened, exact, rtol=1e-5, atol=1e-5)
    for a, b in zip(evened_grads, exact_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_document_that_is_all_answer_counts_every_position() -> None:
    pack = make_pack()
    pack = Pack(0, pack.tokens, np.ones_like(pack.weights), pack.lengths)
    _, counts_D = pair_log_probs(make_model(), batch_from_packs([pack]))
    assert counts_D.tolist() == [length - 1 for length in LENGTHS]


def test_pieces_of_the_vocabulary_projection_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, list[Tensor]]:
        model = make_model()
        logp_D, _ = pair_log_probs(model, batch_from_packs([make_pack()]))
        logp_D.square().sum().backward()
        return logp_D, [p.grad for p in model.parameters() if p.grad is not None]

    widest: list[int] = []
    project = Transformer.project

    def watched(self: Transformer, hidden_MC: Tensor) -> Tensor:
        widest.append(len(hidden_MC))
        return project(self, hidden_MC)

    whole, whole_grads = run()
    monkeypatch.setattr(causal_lm, "MAX_LOGITS", 5 * V)
    monkeypatch.setattr(Transformer, "project", watched)
    pieces, pieces_grads = run()
    assert max(widest) == 5 and len(widest) == 2 * math.ceil(25 / 5)  # each piece once more in the backward pass
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    assert len(whole_grads) == len(pieces_grads) > 0
    for a, b in zip(pieces_grads, whole_grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sigmoid_loss_is_ln_2_before_the_first_step() -> None:
    model, pack = make_model(), make_pack()
    with torch.no_grad():
        reference_D, _ = pair_log_probs(model, batch_from_packs([pack]))
    objective = Preference(DpoConfig(), SHAPE)
    loss, sums = objective(model, batch_from_packs([make_pack(reference_D.numpy())]))
    count = objective.count(pack)
    assert count == 3
    assert (loss / count).item() == pytest.approx(math.log(2), abs=1e-7)
    means = {name: value.item() / count for name, value in sums.items()}
    assert set(means) == set(objective.metrics)
    assert means["accuracy"] == 0.5  # ties
    assert means["kl"] == means["margin"] == means["reward_chosen"] == means["reward_rejected"] == 0


def test_metrics_are_what_they_say() -> None:
    model, reference_model = make_model(0), make_model(2)
    batch = batch_from_packs([make_pack()])
    reference_D = torch.stack(one_by_one(reference_model, make_pack())).float().detach()
    logp_D = torch.stack(one_by_one(model, make_pack())).detach().float()
    _, sums = Preference(DpoConfig(beta=0.3), SHAPE)(model, with_reference(batch, reference_D))
    ratio_D = logp_D - reference_D
    expected = {
        "reward_chosen": 0.3 * ratio_D[0::2].sum(),
        "reward_rejected": 0.3 * ratio_D[1::2].sum(),
        "margin": 0.3 * (ratio_D[0::2] - ratio_D[1::2]).sum(),
        "accuracy": (ratio_D[0::2] > ratio_D[1::2]).float().sum(),
        "logp_chosen": logp_D[0::2].sum(),
        "logp_rejected": logp_D[1::2].sum(),
        "kl": ratio_D.sum() / 2,
    }
    assert set(sums) == set(expected)
    assert 0 < sums["accuracy"] < 3  # the pairs are not all alike
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "simpo", "orpo"])
def test_gradients_reach_every_weight_and_a_step_raises_the_margin(loss: Any) -> None:
    # The reference is what the model is after a move towards other answers, so that no loss starts at a flat place.
    model, batch = make_model(), batch_from_packs([make_pack()])
    with torch.no_grad():
        reference_D, _ = pair_log_probs(model, batch)
    objective = Preference(DpoConfig(loss=loss), SHAPE)
    assert ("kl" in objective.metrics) == objective.needs_reference == (loss not in ("simpo", "orpo"))
    batch = with_reference(batch, reference_D) if objective.needs_reference else batch
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    value, before = objective(model, batch)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    optimizer.step()
    _, after = objective(model, batch)
    assert after["margin"] > before["margin"]


def test_experts_are_balanced_and_examples_leave_that_out() -> None:
    model, batch = make_model(num_experts=4), batch_from_packs([make_pack()])
    objective = Preference(DpoConfig(loss="simpo"), model.shape)
    loss, sums = objective(model, batch)
    assert sums["aux"] > 0
    torch.testing.assert_close(loss, objective.examples(model, batch)["loss"].sum() + sums["aux"])


@pytest.mark.parametrize("loss", ["hinge", "ipo", "orpo"])
def test_label_smoothing_is_refused_where_a_loss_has_none(loss: Any) -> None:
    with pytest.raises(UserError, match=f"dpo.label_smoothing is 0.1, but dpo.loss {loss}"):
        Preference(DpoConfig(loss=loss, label_smoothing=0.1), SHAPE)


# Losses and their gradients against trl. Scores are drawn wide and narrow, and one pair is equal.
CHOSEN_P = [-12.0, -3.5, -0.7, -40.0, -8.0]
REJECTED_P = [-10.0, -9.0, -0.6, -2.0, -8.0]
REFERENCE_D = torch.tensor([-11.0, -10.5, -4.0, -8.0, -0.9, -0.5, -30.0, -3.0, -8.0, -8.0], dtype=torch.float64)


def scores(divide_by: float = 1.0) -> tuple[Tensor, Tensor]:
    chosen_P, rejected_P = torch.tensor([CHOSEN_P, REJECTED_P], dtype=torch.float64) / divide_by
    return chosen_P.requires_grad_(), rejected_P.requires_grad_()


def values_and_gradients(loss: Callable[[Tensor, Tensor], Tensor], divide_by: float = 1.0) -> Iterator[Tensor]:
    chosen_P, rejected_P = scores(divide_by)
    loss_P = loss(chosen_P, rejected_P)
    yield loss_P.detach()
    yield from torch.autograd.grad(loss_P.sum(), (chosen_P, rejected_P))


def assert_same(ours: Iterator[Tensor], theirs: Iterator[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)


def trl_dpo(loss: str, beta: float, counts_D: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """DPOTrainer's own loss of each pair, on given summed log-probabilities of answers of `counts_D` tokens."""
    from trl.trainer.dpo_trainer import DPOTrainer

    # What the loss depends on is set; what is only logged may be anything.
    trainer = MagicMock()
    trainer.accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.label_smoothing = [loss], [1.0], beta, 0.0
    trainer.f_divergence_type, trainer.precompute_ref_logps, trainer.ld_alpha = "reverse_kl", True, None
    trainer.aux_loss_enabled = trainer.use_weighting = False

    def pair(chosen: Tensor, rejected: Tensor, reference: Tensor, counts: Tensor) -> Tensor:
        # A sequence of one prompt token and the answer, whose whole log-probability sits on its first token.
        longest = int(counts.max())
        mask = torch.arange(longest + 1).expand(2, -1) <= counts[:, None]
        mask[:, 0] = False
        log_probs = torch.zeros(2, longest, dtype=torch.float64)
        log_probs = torch.cat([torch.stack([chosen, rejected])[:, None], log_probs[:, 1:]], dim=1)
        blank = torch.zeros(2, longest)
        outputs = SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
        inputs = {
            "input_ids": torch.zeros(2, longest + 1, dtype=torch.long), "completion_mask": mask.long(),
            "attention_mask": torch.ones(2, longest + 1),
            "ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:],
        }  # fmt: skip
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    def losses(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        rows = zip(chosen_P, rejected_P, REFERENCE_D.view(-1, 2), counts_D.view(-1, 2))
        return torch.stack([pair(*row) for row in rows])

    return losses


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_losses_with_a_reference_equal_trl(loss: Any, beta: float) -> None:
    counts_D = torch.tensor([3, 2, 5, 5, 1, 4, 9, 6, 2, 3])
    objective = Preference(DpoConfig(loss=loss, beta=beta), SHAPE)

    def ours(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        ratio_D = torch.stack([chosen_P, rejected_P], 1).flatten() - REFERENCE_D
        if loss in preference.PER_TOKEN:
            ratio_D = ratio_D / counts_D
        return objective.losses(*ratio_D.view(-1, 2).unbind(1))

    assert_same(values_and_gradients(ours), values_and_gradients(trl_dpo(loss, beta, counts_D)))


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_equals_trl(label_smoothing: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    config = DpoConfig(loss="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=label_smoothing)
    trainer: Any = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo", simpo_gamma=0.7, beta=2.0,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    theirs = values_and_gradients(lambda c, r: CPOTrainer.cpo_loss(trainer, c, r)[0], divide_by=5)
    assert_same(values_and_gradients(Preference(config, SHAPE).losses, divide_by=5), theirs)


@pytest.mark.slow
def test_orpo_equals_trl() -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer: Any = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))

    def theirs(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return -chosen_P - ORPOTrainer.odds_ratio_loss(trainer, chosen_P, rejected_P)[0]

    objective = Preference(DpoConfig(loss="orpo", beta=0.4), SHAPE)
    for divide_by in (1, 40):  # answers far from certain, and near
        assert_same(values_and_gradients(objective.losses, divide_by), values_and_gradients(theirs, divide_by))


def test_orpo_is_finite_and_exact_for_answers_that_are_almost_certain() -> None:
    chosen_P = torch.tensor([-1e-6, -1e-3, -0.5, -90.0], requires_grad=True)
    rejected_P = torch.full((4,), -1.0)
    loss_P = preference.orpo_loss(chosen_P, rejected_P, 0.1)
    c, r = chosen_P.detach().double(), rejected_P.double()
    log_odds = c - torch.log(-torch.expm1(c)) - (r - torch.log(-torch.expm1(r)))
    torch.testing.assert_close(loss_P.double(), -c - 0.1 * F.logsigmoid(log_odds), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss_P.sum(), chosen_P)
    assert gradient.isfinite().all()


def test_conservative_dpo_equals_the_formula() -> None:
    config = DpoConfig(beta=0.25, label_smoothing=0.15)

    def formula(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        p_P = 1 / (1 + torch.exp(-0.25 * (chosen_P - rejected_P)))
        return -0.85 * torch.log(p_P) - 0.15 * torch.log(1 - p_P)

    assert_same(values_and_gradients(Preference(config, SHAPE).losses), values_and_gradients(formula))
