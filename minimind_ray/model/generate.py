"""Batched generation with a key/value cache.

    B sequences   T cached positions   V vocabulary   H query heads, G key/value heads, J = H / G   K head size
    N prompt tokens of all sequences, one after another   M tokens of one sequence after those in its cache

The prompts go through the model once, as a ragged batch; then each step is one token of every sequence. In a
conversation, where each prompt begins with what was read and written before, only what is new goes through (`Past`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """The ids that follow each prompt: `max_new_tokens`, or those before the first of `stop_ids`. The model is in eval
    mode.

    Temperature 0 takes the likeliest token. `top_k` (0: off) keeps so many tokens, `top_p` the likeliest that together
    reach that probability; `repetition_penalty` divides the positive logits, and multiplies the negative ones, of
    tokens already there (Keskar et al. 2019, section 4.1). The same seed and prompts give the same ids.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    steps = _steps(model, prompts, max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    for tokens in steps:
        unfinished -= {i for i in unfinished if tokens[i] in stop_ids}
        if not unfinished:
            break
        for i in unfinished:
            answers[i].append(tokens[i])
    return answers


class Past:
    """What a model has read and written in a conversation, for the next `stream` of the same model to go on from."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cache: Cache | None = None

    def shared(self, prompt: Sequence[int]) -> int:
        """Tokens that the prompt begins with and need not be read again; its last one always is."""
        longest = min(len(self.tokens), len(prompt) - 1)
        return next((i for i in range(longest) if self.tokens[i] != prompt[i]), longest)


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    past: Past | None = None,
) -> Iterator[int]:
    """As `generate` for one prompt, each id as soon as it is there. `past` is gone on from, and kept up to date."""
    steps = _steps(model, [prompt], max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, past)
    for (token,) in steps:
        if token in stop_ids:
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
    past: Past | None = None,
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

    capacity = max(lengths) + max_new_tokens
    if past and past.cache and (shared := past.shared(prompts[0])):
        cache = past.cache
        past.tokens = past.tokens[:shared]  # An interruption from here on leaves what is still true.
        hidden_MC = model.decode(prompt_N[shared:], cache.go_on(shared, lengths[0], capacity), cache.attend_to_past)
        hidden_BC = hidden_MC[-1:]
    else:
        cache = Cache(model.shape, Layout(bounds_D1, device), capacity)
        hidden_NC = model.decode(prompt_N, cache.layout.positions_N, cache.attend_to_prompts)
        hidden_BC = hidden_NC[bounds_D1[1:].long().to(device) - 1]
    if past:
        past.cache, past.tokens = cache, list(prompts[0])
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
            if past:
                past.tokens += tokens_B.tolist()


def choose(logits_BV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token per row: the likeliest at temperature 0, else drawn from what top_k and top_p leave."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # From the largest down: divided by next to nothing the others become -inf, and none inf.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits_BV.dtype).tiny)
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

    def go_on(self, shared: int, length: int, capacity: int) -> Tensor:
        """Forget all but the first `shared` tokens of the one sequence, make room for `capacity`; positions [M] of the
        tokens from there to `length`."""
        for kept in (self.keys, self.values):
            for layer, kept_1TGK in enumerate(kept):
                room = capacity - kept_1TGK.shape[1]
                kept[layer] = F.pad(kept_1TGK, (0, 0, 0, 0, 0, room)) if room > 0 else kept_1TGK
        self.lengths_B = torch.full_like(self.lengths_B, length)
        self.longest = length
        positions_T = torch.arange(length, device=self.lengths_B.device)
        self.mask_MT = positions_T <= positions_T[shared:].unsqueeze(1)
        return positions_T[shared:]

    def attend_to_past(self, layer: int, q_MHK: Tensor, k_MGK: Tensor, v_MGK: Tensor) -> Tensor:
        """Attention of the one sequence's newest tokens to all of it up to themselves."""
        start, end = self.longest - len(q_MHK), self.longest
        for x_MGK, kept in ((k_MGK, self.keys), (v_MGK, self.values)):
            kept[layer][0, start:end] = x_MGK
        past = (kept[layer][0, :end] for kept in (self.keys, self.values))
        q_1HMK, k_1GTK, v_1GTK = (x.transpose(0, 1).unsqueeze(0) for x in (q_MHK, *past))
        out_1HMK = F.scaled_dot_product_attention(
            q_1HMK, k_1GTK, v_1GTK, attn_mask=self.mask_MT, scale=1.0, enable_gqa=True
        )
        return out_1HMK[0].transpose(0, 1)

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
