"""The fixed prompts of a run, and the model's answers to them: before the first step, at each validation, at the end.

All trials of a sweep have the same prompts, and so has a run after a resume. An answer is sampled with the same random
numbers in every trial and at every step: if two answers differ, the models differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import EvalConfig
from minimind_ray.config.stages import RowKind
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.engine import generate
from minimind_ray.model.sampling import Sampling
from minimind_ray.model.transformer import Transformer

BEGINNING = 16
"""The tokens of a text's beginning that are a prompt; at most half of the text."""
LONGEST = 256
"""The most tokens of a drawn prompt. Of a longer conversation, only the last tokens are used."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of this number, without their whole parts, are spread evenly over 0 to 1 for every count of them."""
CUT, DAMAGED = "…", "\ufffd"


class Prompt(NamedTuple):
    """A prompt: its tokens, and its text for people."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Answers:
    """The `prompts` as text; `texts` are the same prompts, each with the model's answer after it."""

    prompts: list[str]
    texts: list[str]


def fixed_prompts(
    config: EvalConfig, rows: RowKind, tokenizer: Tokenizer, store: PackStore, packs: int, positions: int
) -> list[Prompt]:
    """Return `config.samples` prompts: those of `config.prompts`, repeated as necessary, or drawn from the data.

    Drawn prompts come from documents spread over the first `packs` packs of `store`. There are fewer if the data have
    fewer different prompts. A prompt leaves room for the answer within the model's number of `positions`.
    """
    room = max(1, positions - config.sample_tokens)
    if config.prompts:
        texts = [config.prompts[i % len(config.prompts)] for i in range(config.samples)]
        if rows == "text":
            ids = [[tokenizer.bos_id, *tokens] for tokens in tokenizer.encode(texts)]
        else:
            ids = [tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in texts]
        return [Prompt(tokens[-room:], text) for tokens, text in zip(ids, texts)]
    before, after = ("", "") if rows == "text" else _around_a_question(tokenizer)
    found: dict[tuple[int, ...], Prompt] = {}
    for ids in _drawn(store, rows, packs, tries=8 * config.samples):
        if len(found) == config.samples:
            break
        ids = _whole_characters(ids, tokenizer) if rows == "text" else ids
        kept = ids[-min(room, LONGEST) :]
        text = tokenizer.decode(kept, skip_special=True)
        if len(kept) < len(ids):
            text = CUT + text.lstrip(DAMAGED)
        if rows != "text":
            text = text.removeprefix(before).removesuffix(after).strip()
        found.setdefault(tuple(kept), Prompt(kept, text))
    return list(found.values())


def answers(
    model: Transformer, prompts: list[Prompt], config: EvalConfig, rows: RowKind, tokenizer: Tokenizer
) -> Answers:
    """Return the model's answers; the model is in eval mode, and the caller enables autocast.

    In stages with conversations, the answer begins on a new line. An answer that reaches `config.sample_tokens` ends
    with an ellipsis.
    """
    sampling = Sampling(
        temperature=config.temperature, max_new_tokens=config.sample_tokens, stop_ids=tuple(tokenizer.stop_ids)
    )
    texts: list[str] = []
    for prompt, written in zip(prompts, generate(model, [prompt.ids for prompt in prompts], sampling)):
        if rows == "text":
            answer = tokenizer.decode(written, skip_special=True, after=prompt.ids)
        else:
            answer = f"\n{tokenizer.answer_text(prompt.ids, written)}"
        if len(written) == config.sample_tokens:
            answer = answer.rstrip(DAMAGED) + CUT
        texts.append(prompt.text + answer)
    return Answers([prompt.text for prompt in prompts], texts)


def _drawn(store: PackStore, rows: RowKind, packs: int, tries: int) -> Iterator[list[int]]:
    """Yield the prompts of documents that are spread evenly over the packs, always the same ones."""
    for number in range(1, tries + 1):
        pack_number, place = divmod(number * GOLDEN % 1 * packs, 1)
        (pack,) = store.read([int(pack_number)])
        document = int(place * len(pack.lengths))
        if rows == "pair":
            document -= document % 2  # The chosen answer's document; both begin with the prompt.
        start, end = np.cumsum([0, *pack.lengths])[document : document + 2]
        if rows == "text":
            length = max(1, min(BEGINNING, (end - start) // 2))
        else:
            length = int(np.argmax(pack.weights[start:end] > 0))  # 0 if no token of the document counts.
        if length:
            yield pack.tokens[start : start + length].tolist()


def _whole_characters(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids without tokens at the end that are only a part of a character."""
    for length in range(len(ids), max(0, len(ids) - 4), -1):
        if not tokenizer.decode(ids[:length]).endswith(DAMAGED):
            return ids[:length]
    return ids


def _around_a_question(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the text that the chat format writes before and after the only question of a conversation."""
    question = "1"
    try:
        ids = tokenizer.prompt_ids([{"role": "user", "content": question}])
    except UserError:
        return "", ""
    before, _, after = tokenizer.decode(ids, skip_special=True).partition(question)
    return before, after
