"""Batched generation with a key/value cache.

    B sequences   T cached positions   V vocabulary   H query heads, G key/value heads, J = H / G   K head size
    N prompt tokens of all sequences, one after another

The prompts go through the model once, as a ragged batch; then each step is one token of every sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.attention import Layout
from minimind_ray.model.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """The ids that follow each prompt, up to `max_new_tokens` or before the first `eos_id`. The model is in eval mode.

    Temperature 0 takes the likeliest token. `top_k` (0: off) keeps so many tokens, `top_p` the likeliest that together
    reach that probability; `repetition_penalty` divides the positive logits, and multiplies the negative ones, of
    tokens already there (Keskar et al. 2019, section 4.1). The same seed and prompts give the same ids.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    steps = _steps(model, prompts, max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    for tokens in steps:
        unfinished -= {i for i in unfinished if tokens[i] == eos_id}
        if not unfinished:
            break
        for i in unfinished:
            answers[i].append(tokens[i])
    return answers


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """As `generate` for one prompt, each id as soon as it is there."""
    for (token,) in _steps(model, [prompt], max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed):
        if token == eos_id:
            return
        yield token


@torch.no_grad()
def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    seed: int,
) -> Iterator[list[int]]:
    """The next token of every sequence, again and again."""
    assert not model.training, "dropout would be on"
    assert all(prompts), "an empty prompt has no token to predict from"
    device = model.vocab_weight.device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = [len(prompt) for prompt in prompts]
    bounds_D1 = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    prompt_N = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    seen_BV = torch.zeros(len(prompts), model.shape.vocab_size, dtype=torch.bool, device=device)
    for row, (start, end) in enumerate(pairwise(bounds_D1.tolist())):
        seen_BV[row, prompt_N[start:end]] = True

    cache = Cache(model.shape, Layout(bounds_D1, device), max(lengths) + max_new_tokens)
    hidden_NC = model.decode(prompt_N, cache.layout.positions_N, cache.attend_to_prompts)
    hidden_BC = hidden_NC[bounds_D1[1:].long().to(device) - 1]
    for step in range(max_new_tokens):
        logits_BV = model.project(hidden_BC).float()
        if repetition_penalty != 1.0:
            scaled_BV = torch.where(logits_BV > 0, logits_BV / repetition_penalty, logits_BV * repetition_penalty)
            logits_BV = torch.where(seen_BV, scaled_BV, logits_BV)
        tokens_B = choose(logits_BV, temperature, top_p, top_k, generator)
        yield tokens_B.tolist()
        if step < max_new_tokens - 1:
            seen_BV.scatter_(1, tokens_B.unsqueeze(1), True)
            hidden_BC = model.decode(tokens_B, cache.advance(), cache.attend_to_all)


def choose(logits_BV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token per row: the likeliest at temperature 0, else drawn from what top_k and top_p leave."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(-1)
        # A token goes when those before it reach top_p already; the likeliest always stays.
        surplus_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= top_p
        surplus_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(surplus_BV.gather(1, order_BV.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)


class Cache:
    """Keys and values of every layer and sequence, in memory taken once for `capacity` positions."""

    def __init__(self, shape: ModelShape, layout: Layout, capacity: int) -> None:
        self.shape, self.layout, self.capacity = shape, layout, capacity
        device = layout.positions_N.device
        self.lengths_B = layout.lengths_D.to(device)
        self.rows_N = torch.arange(len(layout.lengths_D), device=device).repeat_interleave(self.lengths_B)
        self.longest = int(layout.lengths_D.max())
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend_to_prompts(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Ragged attention within the prompts; their keys and values are kept."""
        assert layer == len(self.keys)
        for x_NGK, kept in ((k_NGK, self.keys), (v_NGK, self.values)):
            _, heads, size = x_NGK.shape
            kept_BTGK = x_NGK.new_zeros(len(self.layout.lengths_D), self.capacity, heads, size)
            kept_BTGK[self.rows_N, self.layout.positions_N] = x_NGK
            kept.append(kept_BTGK)
        return self.layout.attend(q_NHK, k_NGK, v_NGK)

    def advance(self) -> Tensor:
        """Make room for one more token in every sequence; its position in each, int64 [B]."""
        positions_B = self.lengths_B
        self.lengths_B = self.lengths_B + 1
        self.longest += 1
        self.mask_B11T = (torch.arange(self.longest, device=positions_B.device) < self.lengths_B.unsqueeze(1))[
            :, None, None
        ]
        return positions_B

    def attend_to_all(self, layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> Tensor:
        """Attention of each sequence's newest token to all of that sequence."""
        rows_B = torch.arange(len(q_BHK), device=q_BHK.device)
        for x_BGK, kept in ((k_BGK, self.keys), (v_BGK, self.values)):
            kept[layer][rows_B, self.lengths_B - 1] = x_BGK
        k_BGTK, v_BGTK = (kept[layer][:, : self.longest].transpose(1, 2) for kept in (self.keys, self.values))
        # The J heads that share a key head are as J queries of it: no copy of keys and values per query head.
        q_BGJK = q_BHK.unflatten(1, (k_BGK.shape[1], -1))
        return F.scaled_dot_product_attention(q_BGJK, k_BGTK, v_BGTK, attn_mask=self.mask_B11T, scale=1.0).flatten(1, 2)
