"""Generation against transformers, and the choice of tokens by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.checkpoint import save_model
from minimind_ray.model.generate import Past, choose, generate, stream
from minimind_ray.model.transformer import Transformer

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 80, "max_position_embeddings": 512,
}  # fmt: skip
PROMPTS = [[5, 9, 1], [17], [3, 3, 60, 2, 8, 41, 7, 90, 11], [12, 13]]


def make(**fields: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelShape(**BASE, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"qk_norm": False}, {"num_experts": 4, "moe_intermediate_size": 32}])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(fields: dict[str, Any], penalty: float, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make(**fields)
    save_model(model, None, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected: list[list[int]] = [
        theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=penalty, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    ours = generate(model, PROMPTS, max_new_tokens=24, temperature=0, repetition_penalty=penalty)
    assert ours == expected
    assert list(stream(model, PROMPTS[2], max_new_tokens=24, temperature=0, repetition_penalty=penalty)) == ours[2]

    eos = expected[2][5]
    until_eos = [ids[: ids.index(eos)] if eos in ids else ids for ids in expected]
    assert (
        generate(model, PROMPTS, max_new_tokens=24, temperature=0, repetition_penalty=penalty, stop_ids=[eos])
        == until_eos
    )


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = make()
    texts = [generate(model, PROMPTS, max_new_tokens=16, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "allowed"),
    [
        (1.0, 1.0, 0, {0, 1, 2, 3}),
        (1.0, 1.0, 2, {1, 3}),
        (1.0, 0.5, 0, {3}),  # 3 alone has probability 0.5
        (1.0, 0.51, 0, {1, 3}),
        (1.0, 0.0, 0, {3}),
        (0.01, 1.0, 0, {3}),
        (1e-40, 1.0, 0, {3}),
        (1e-320, 0.9, 2, {3}),
        (0, 1.0, 0, {3}),
    ],
)
def test_choice_by_hand(temperature: float, top_p: float, top_k: int, allowed: set[int]) -> None:
    logits_BV = torch.tensor([0.125, 0.25, 0.125, 0.5]).log().expand(400, 4)
    chosen = choose(logits_BV, temperature, top_p, top_k, torch.Generator().manual_seed(0))
    assert set(chosen.tolist()) == allowed


def test_draws_follow_the_probabilities() -> None:
    logits_BV = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20000, 4)
    chosen = choose(logits_BV, 1.0, 1.0, 0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(chosen.bincount() / 20000, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": False}, {"num_experts": 4, "moe_intermediate_size": 32}])
def test_a_conversation_goes_on_as_if_all_of_it_were_read_anew(fields: dict[str, Any]) -> None:
    model, past = make(**fields), Past()
    read: list[int] = []
    decode = model.decode
    model.decode = lambda tokens_N, *rest: read.append(len(tokens_N)) or decode(tokens_N, *rest)  # type: ignore[method-assign]
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "repetition_penalty": 1.2, "seed": 3}

    def answer(prompt: list[int], new: int) -> list[int]:
        """Both ways; `new` tokens of the prompt go through the model."""
        expected = list(stream(model, prompt, **settings))
        read.clear()
        found = list(stream(model, prompt, past=past, **settings))
        assert found == expected
        assert read[0] == new
        return found

    first = [5, 9, 1, 22]
    said = answer(first, 4)
    # The last token that was drawn has not been read yet.
    second = [*first, *said, 7, 8]
    again = answer(second, 3)
    answer([*second, *again[:3], 60], 1)
    answer([*second[:6], 2, 2, 2], 3)  # Turned back to an earlier point.
    answer(second[:6], 1)  # Only the last token is read again.
    answer([1, 2], 2)  # Nothing in common.
