"""Log-likelihoods in groups equal those of one text at a time."""

from __future__ import annotations

import random

import pytest
import torch

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.transformer import Transformer
from minimind_ray.tasks import likelihood
from minimind_ray.tasks.likelihood import Query, log_likelihoods

pytestmark = pytest.mark.unit


def make(positions: int = 64, **fields: object) -> Transformer:
    torch.manual_seed(0)
    shape = ModelShape.model_validate(
        {
            "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": positions,
            **fields,
        }
    )  # fmt: skip
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def one_by_one(model: Transformer, query: Query) -> tuple[float, bool]:
    ids = torch.tensor([*query.context, *query.continuation])[-(model.shape.max_position_embeddings + 1) :]
    with torch.no_grad():
        hidden_NC = model(ids[:-1], torch.tensor([0, len(ids) - 1], dtype=torch.int32))
        logp_NV = model.project(hidden_NC).log_softmax(-1)[-len(query.continuation) :]
    targets_N = ids[-len(query.continuation) :]
    chosen = logp_NV.gather(1, targets_N.unsqueeze(1)).double().sum()
    return float(chosen), bool((logp_NV.argmax(-1) == targets_N).all())


def queries(r: random.Random) -> list[Query]:
    """Questions with choices of a single token, with longer choices, and with one choice, in a random order."""
    found: list[Query] = []
    for i in range(40):
        context = tuple(r.randrange(50) for _ in range(r.randint(1, 40)))
        longest = (1, 8, 8, 30)[i % 4]
        for _ in range(1 if i % 5 == 4 else 4):
            found.append(Query(context, tuple(r.randrange(50) for _ in range(r.randint(1, longest)))))
    r.shuffle(found)
    return found


@pytest.mark.parametrize("fields", [{}, {"num_experts": 3, "moe_intermediate_size": 8}], ids=["dense", "experts"])
def test_groups_give_the_likelihoods_of_single_texts(fields: dict[str, object]) -> None:
    model, asked = make(positions=48, **fields), queries(random.Random(0))
    calls: list[tuple[int, int]] = []
    found = log_likelihoods(model, asked, lambda done, total: calls.append((done, total)))
    for query, (log_prob, greedy) in zip(asked, found, strict=True):
        expected, is_greedy = one_by_one(model, query)
        assert log_prob == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy
    assert calls[-1] == (len(asked), len(asked))


def test_the_greedy_continuation_is_recognised() -> None:
    model, context, ids = make(), (3, 4, 5), list[int]()
    for _ in range(5):
        tokens = torch.tensor([*context, *ids])
        with torch.no_grad():
            hidden_NC = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
        ids.append(int(model.project(hidden_NC[-1:]).argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 50]
    assert [each.greedy for each in log_likelihoods(model, [Query(context, tuple(x)) for x in (ids, other)])] == [
        True, False,
    ]  # fmt: skip


def test_a_context_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four choices of three tokens after ten tokens: 10 + 4 · 2 tokens, not 4 · 12. Single tokens cost nothing."""
    model, read = make(), list[int]()
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda tokens, *rest: read.append(len(tokens)) or decode(tokens, *rest))
    context = tuple(range(10))
    log_likelihoods(model, [Query(context, (i, i, i)) for i in range(4)])
    log_likelihoods(model, [Query(context, (i,)) for i in range(4)])
    assert read == [18, 10]


def test_long_texts_without_a_context_are_read_one_by_one() -> None:
    """In one document they would all be looked at, only to be masked."""
    groups = likelihood._groups([Query((1,), tuple(range(400))) for _ in range(3)])
    assert [len(group.queries) for group in groups] == [1, 1, 1]
    groups = likelihood._groups([Query((1,), (2, 3)) for _ in range(30)])
    assert [len(group.queries) for group in groups] == [30]


def test_many_choices_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "MOST_BRANCHES", 20)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 120)
    model = make()
    asked = [Query((1, 2, 3), (i, i + 1, i + 2, i + 3)) for i in range(20)]
    for query, (log_prob, _) in zip(asked, log_likelihoods(model, asked), strict=True):
        assert log_prob == pytest.approx(one_by_one(model, query)[0], abs=1e-4)


def test_a_continuation_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a continuation has 9 tokens, the model 8 positions"):
        log_likelihoods(make(positions=8), [Query((1,), (1,) * 9)])
