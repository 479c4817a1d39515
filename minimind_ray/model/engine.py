"""The decoding engine. It generates many answers at once, and an answer may begin or end at any step of the others.

    A answers under way   C channels   V vocabulary   N prompt tokens, one prompt after another   M tokens of one prompt

    engine = Engine(model, slots=8)
    request = engine.add(prompt, Sampling(temperature=0.7, max_new_tokens=64))
    while engine.busy:
        for event in engine.step():
            ...

Each step adds one token to every answer under way. The prompts of new requests go through the model first, all of them
as one ragged batch. The engine has no lock: call `add`, `cancel` and `step` from a single thread. The caller also
enables autocast. Put many steps into one `torch.autocast` block, because torch casts the weights once in each block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minimind_ray.model.attention import Layout
from minimind_ray.model.cache import Cache
from minimind_ray.model.sampling import Sampling, choose
from minimind_ray.model.transformer import Transformer


class Event(NamedTuple):
    """The next token of an answer.

    `log_prob` is the token's log-probability by the model itself, in nats: at temperature 1, without penalty, top_k and
    top_p. It is None if the request does not ask for it. `end` says why the answer ends with this token: "stop" for a
    stop id, "length" for the last of `max_new_tokens`; None if the answer continues.
    """

    request: int
    token: int
    log_prob: float | None
    end: Literal["stop", "length"] | None


@dataclass
class _Request:
    id: int
    tokens: list[int]
    """The prompt, and the answer so far."""
    prompt: int
    sampling: Sampling

    @property
    def written(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass
class _Slot:
    """A row of the cache, and the request that uses it."""

    request: _Request | None = None
    cached: list[int] = field(default_factory=list[int])
    """The tokens whose keys and values are in the row."""
    used: int = 0
    """The step in which the last request ended."""


class Engine:
    """Decodes with one model, at most `slots` answers at once; other requests wait. The model is in eval mode.

    With `reuse`, a prompt may share its beginning with a sequence in the cache, such as the conversation so far. Then
    only the rest of the prompt is read. The results differ by rounding from the results for a whole prompt. If the
    model's weights change, the cache is wrong: make another engine, or do not reuse.

    Raises:
        ValueError: `slots` is below 1.
    """

    def __init__(self, model: Transformer, slots: int, *, reuse: bool = False) -> None:
        assert not model.training, "dropout would be on"
        if slots < 1:
            raise ValueError(f"slots is {slots}: an engine needs at least 1")
        self.model, self.reuse = model, reuse
        self.device = model.vocab_weight.device
        self._cache = Cache(slots)
        # In the order of the cache's rows. Rows in use come first.
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting = deque[_Request]()
        self._ids, self._step = count(), 0

    def add(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Request an answer to `prompt`, and return the request's id, which its events have.

        The prompt and `max_new_tokens` together should not exceed the model's number of positions.

        Raises:
            ValueError: the prompt is empty, is longer than the model's number of positions, or has an id that is not in
                the model's vocabulary. The other requests are not affected.
        """
        self._check(prompt)
        request = _Request(next(self._ids), list(prompt), len(prompt), sampling)
        self._waiting.append(request)
        return request.id

    def _check(self, prompt: Sequence[int]) -> None:
        """Raise ValueError if the model cannot read the prompt. In a step, it would fail for all requests."""
        shape = self.model.shape
        if not prompt:
            raise ValueError("the prompt is empty: the first token of an answer needs a token before it")
        if len(prompt) > shape.max_position_embeddings:
            raise ValueError(
                f"the prompt has {len(prompt):,} tokens, but the model only {shape.max_position_embeddings:,} positions"
            )
        for token in prompt:
            if not 0 <= token < shape.vocab_size:
                raise ValueError(
                    f"the prompt has the token id {token}, but the model's ids are 0 to {shape.vocab_size - 1}"
                )

    def cancel(self, request: int) -> None:
        """End an answer without a further event. Does nothing if the answer has ended already."""
        self._waiting = deque(each for each in self._waiting if each.id != request)
        self._free([row for row, (_, each) in enumerate(self._active()) if each.id == request])

    @property
    def busy(self) -> bool:
        """Whether requests are under way or waiting."""
        return bool(self._waiting or self._active())

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Start waiting requests in free slots, and return the next token of every answer under way."""
        self._step += 1
        self._admit()
        active = self._active()
        if not active:
            return []
        self._cache.reserve(max(len(request.tokens) for _, request in active))
        logits_AV = self.model.project(torch.cat(self._read(active))).float()
        tokens, log_probs = self._choose(logits_AV, [request for _, request in active])
        events: list[Event] = []
        for (slot, request), token, log_prob in zip(active, tokens, log_probs, strict=True):
            slot.cached += request.tokens[len(slot.cached) :]
            request.tokens.append(token)
            sampling = request.sampling
            end = "length" if request.written >= sampling.max_new_tokens else None
            events.append(Event(request.id, token, log_prob, "stop" if token in sampling.stop_ids else end))
        self._free([row for row, event in enumerate(events) if event.end])
        return events

    def _active(self) -> list[tuple[_Slot, _Request]]:
        return [(slot, slot.request) for slot in self._slots if slot.request]

    def _admit(self) -> None:
        """Give waiting requests the free slots."""
        for row in range(len(self._active()), len(self._slots)):
            if not self._waiting:
                return
            prompt = self._waiting[0].tokens
            shared = self._share(row, prompt) if self.reuse else 0
            slot = self._slots[row]
            slot.cached = prompt[:shared]
            slot.request = self._waiting.popleft()

    def _share(self, row: int, prompt: list[int]) -> int:
        """Put the longest beginning of `prompt` that is in the cache into `row`; return its number of tokens.

        If the prompt continues a whole free sequence, use its row, otherwise the least recently used row.
        """
        source = max(range(len(self._slots)), key=lambda i: _shared(self._slots[i].cached, prompt))
        shared = _shared(self._slots[source].cached, prompt)
        if source < row or shared < len(self._slots[source].cached):
            target = min(range(row, len(self._slots)), key=lambda i: self._slots[i].used)
            if shared and target != source:
                self._cache.copy(source, target, shared)
                self._slots[target].cached = prompt[:shared]
        else:
            target = source
        self._swap(row, target)
        return shared

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            slots = self._slots
            self._cache.swap(one, other, max(len(slots[one].cached), len(slots[other].cached)))
            slots[one], slots[other] = slots[other], slots[one]

    def _free(self, rows: list[int]) -> None:
        """End the requests of these rows, and close the gaps that they leave."""
        for row in reversed(rows):
            slot = self._slots[row]
            slot.request, slot.used = None, self._step
            if not self.reuse:
                slot.cached = []
            self._swap(row, len(self._active()))

    def _read(self, active: list[tuple[_Slot, _Request]]) -> list[Tensor]:
        """Pass the unread tokens of all requests through the model.

        Returns the hidden states of each request's last token, in pieces [1, C] or [A, C], in the order of the rows.
        """
        decoding = sum(1 for _, request in active if request.written)
        hidden = [self._decode([request for _, request in active[:decoding]])] if decoding else []
        new = {row: active[row] for row in range(decoding, len(active))}
        whole = {row: request for row, (slot, request) in new.items() if not slot.cached}
        last_DC = dict(zip(whole, self._read_prompts(whole))) if whole else {}
        for row, (slot, request) in new.items():
            hidden.append(last_DC[row] if row in last_DC else self._read_rest(row, slot, request))
        return hidden

    def _read_prompts(self, requests: dict[int, _Request]) -> tuple[Tensor, ...]:
        """Read whole prompts into their rows as one ragged batch."""
        bounds_D1 = torch.tensor([0, *(len(each.tokens) for each in requests.values())]).cumsum(0).to(torch.int32)
        tokens_N = torch.tensor([token for each in requests.values() for token in each.tokens], device=self.device)
        layout = Layout(bounds_D1, self.device)
        attend = self._cache.attend_within(layout, list(requests))
        hidden_NC = self.model.decode(tokens_N, layout.positions_N, attend)
        return hidden_NC[bounds_D1[1:].long().to(self.device) - 1].split(1)

    def _read_rest(self, row: int, slot: _Slot, request: _Request) -> Tensor:
        """Read the part of a prompt that is not in the row's cache; return the last token's hidden state, [1, C]."""
        start, end = len(slot.cached), len(request.tokens)
        positions_M = torch.arange(start, end, device=self.device)
        tokens_M = torch.tensor(request.tokens[start:], device=self.device)
        attend = self._cache.attend_after(row, positions_M, end)
        return self.model.decode(tokens_M, positions_M, attend)[-1:]

    def _decode(self, requests: list[_Request]) -> Tensor:
        """Read the newest token of the first rows; return their hidden states, [A, C]."""
        tokens_A = torch.tensor([each.tokens[-1] for each in requests], device=self.device)
        positions_A = torch.tensor([len(each.tokens) - 1 for each in requests], device=self.device)
        attend = self._cache.attend_newest(positions_A, max(len(each.tokens) for each in requests))
        return self.model.decode(tokens_A, positions_A, attend)

    def _choose(self, logits_AV: Tensor, requests: list[_Request]) -> tuple[list[int], list[float | None]]:
        """Return the next token of every request, and its log-probability if the request asks for it (else None)."""
        samplings = [each.sampling for each in requests]
        uniforms = [each.sampling.uniform(each.written) for each in requests]
        tokens_A = choose(_penalised(logits_AV, requests), samplings, uniforms)
        log_probs: list[float | None] = [None] * len(requests)
        if any(each.log_probs for each in samplings):
            chosen_A = logits_AV.gather(1, tokens_A.unsqueeze(1)).squeeze(1) - logits_AV.logsumexp(-1)
            log_probs = [p if each.log_probs else None for p, each in zip(chosen_A.tolist(), samplings)]
        return tokens_A.tolist(), log_probs


def _shared(cached: list[int], prompt: list[int]) -> int:
    """Return the number of equal tokens at the beginning. The prompt's last token does not count: it is always read."""
    longest = min(len(cached), len(prompt) - 1)
    return next((i for i in range(longest) if cached[i] != prompt[i]), longest)


def _penalised(logits_AV: Tensor, requests: list[_Request]) -> Tensor:
    """Return the logits with the repetition penalties of the requests that have one."""
    rows = [row for row, each in enumerate(requests) if each.sampling.repetition_penalty != 1]
    if not rows:
        return logits_AV
    logits_AV = logits_AV.clone()
    for row in rows:
        seen = torch.tensor(sorted(set(requests[row].tokens)), device=logits_AV.device)
        seen_logits, penalty = logits_AV[row, seen], requests[row].sampling.repetition_penalty
        logits_AV[row, seen] = torch.where(seen_logits > 0, seen_logits / penalty, seen_logits * penalty)
    return logits_AV


def stream(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> Generator[int]:
    """Yield the ids of the answer to a prompt, each as soon as it is generated, without the stop id.

    The engine must have no other requests. Closing the iterator cancels the answer.
    """
    request = engine.add(prompt, sampling)
    try:
        while True:
            (event,) = engine.step()
            if event.end != "stop":
                yield event.token
            if event.end:
                return
    finally:
        engine.cancel(request)


def generate(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Return the ids of the answer to each prompt, without the stop id. Answer i has the seed (*seed, i)."""
    engine = Engine(model, max(1, len(prompts)))
    numbers = [engine.add(p, replace(sampling, seed=(*sampling.seed, i))) for i, p in enumerate(prompts)]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            if event.end != "stop":
                answers[event.request].append(event.token)
    return list(answers.values())
