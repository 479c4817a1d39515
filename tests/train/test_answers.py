"""The fixed prompts of a run: which ones are drawn, and how the answers are written down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import pytest

from minimind_ray.config.schema import EvalConfig
from minimind_ray.config.stages import RowKind
from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.answers import BEGINNING, CUT, LONGEST, Prompt, answers, fixed_prompts
from tests.jobs import make_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tokenizer(tmp_path_factory.mktemp("answers") / "tokenizer"))


class Packs:
    """A store of packs with these documents: token ids, and the place of the first token that counts."""

    def __init__(self, *packs: list[tuple[list[int], int]]) -> None:
        self.packs = packs

    def read(self, ids: Iterable[int]) -> list[Pack]:
        return [self.pack(id) for id in ids]

    def pack(self, id: int) -> Pack:
        documents = self.packs[id]
        weights = [[int(i >= first) for i in range(len(tokens))] for tokens, first in documents]
        tokens = np.concatenate([np.array(tokens, np.uint16) for tokens, _ in documents])
        lengths = np.array([len(tokens) for tokens, _ in documents], np.int32)
        return Pack(id, tokens, np.concatenate(weights).astype(np.uint8), lengths)


def conversation(tokenizer: Tokenizer, question: str, answer: str = "yes") -> tuple[list[int], int]:
    ids = tokenizer.prompt_ids([{"role": "user", "content": question}])
    return [*ids, *tokenizer.encode([answer])[0]], len(ids)


def drawn(rows: RowKind, tokenizer: Tokenizer, *packs: list[tuple[list[int], int]], **settings: Any) -> list[Prompt]:
    store, positions = cast(PackStore, Packs(*packs)), settings.pop("positions", 4096)
    return fixed_prompts(EvalConfig(**settings), rows, tokenizer, store, len(packs), positions)


def test_prompts_are_questions_spread_over_the_packs(tokenizer: Tokenizer) -> None:
    packs = [[conversation(tokenizer, f"river {p} {d}?") for d in range(4)] for p in range(10)]
    prompts = drawn("conversation", tokenizer, *packs, samples=5)
    assert prompts == drawn("conversation", tokenizer, *packs, samples=5)
    assert prompts[:2] == drawn("conversation", tokenizer, *packs, samples=2)
    assert len({text.split()[1] for _, text in prompts}) == 5 and all(text.startswith("river ") for _, text in prompts)
    assert all(ids == tokenizer.prompt_ids([{"role": "user", "content": text}]) for ids, text in prompts)


def test_each_prompt_is_drawn_once(tokenizer: Tokenizer) -> None:
    pack = [conversation(tokenizer, text) for text in ("fox?", "fox?", "poem?")]
    without_answer = (tokenizer.encode(["a fox"])[0], 99)
    prompts = drawn("conversation", tokenizer, pack, [without_answer], samples=8)
    assert sorted(text for _, text in prompts) == ["fox?", "poem?"]
    assert drawn("conversation", tokenizer, [without_answer], samples=8) == []


def test_the_prompt_of_a_pair_is_that_of_its_chosen_document(tokenizer: Tokenizer) -> None:
    pack = [conversation(tokenizer, f"{d % 2}?") for d in range(6)]  # The parts of a pair differ, to tell them apart.
    assert [text for _, text in drawn("pair", tokenizer, pack, samples=3)] == ["0?"]


def test_the_prompt_of_a_text_is_its_beginning_in_whole_characters(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["river 月 sees the bridge. " * 4])
    ((found, text),) = drawn("text", tokenizer, [(ids, 1)], samples=2)
    assert found == ids[:BEGINNING] and text == tokenizer.decode(found)
    (short,) = tokenizer.encode(["fox sees poem"])
    ((found, text),) = drawn("text", tokenizer, [(short, 1)], samples=1)
    assert found == short[: len(short) // 2]
    (parts,) = tokenizer.encode(["a鑫"])
    assert len(parts) >= 4  # The character is not in the vocabulary.
    ((found, text),) = drawn("text", tokenizer, [(parts, 1)], samples=1)
    assert text == "a"


def test_a_long_prompt_keeps_its_end_and_leaves_room_for_the_answer(tokenizer: Tokenizer) -> None:
    document = conversation(tokenizer, "river " * 2 * LONGEST + "fox?")
    ((ids, text),) = drawn("conversation", tokenizer, [document], samples=1)
    assert ids == document[0][: document[1]][-LONGEST:] and text.startswith(CUT) and text.endswith("fox?")
    ((ids, _),) = drawn("conversation", tokenizer, [document], samples=1, positions=100, sample_tokens=30)
    assert len(ids) == 70
    ((ids, text),) = drawn("text", tokenizer, samples=1, prompts=["river " * 200], positions=100, sample_tokens=30)
    assert len(ids) == 70 and text == "river " * 200


def test_given_prompts_are_repeated(tokenizer: Tokenizer) -> None:
    prompts = drawn("text", tokenizer, samples=3, prompts=["fox", "月"])
    assert [text for _, text in prompts] == ["fox", "月", "fox"]
    assert prompts[0].ids == [tokenizer.bos_id, *tokenizer.encode(["fox"])[0]]
    chat = drawn("conversation", tokenizer, samples=1, prompts=["fox"])
    assert chat[0].ids == tokenizer.prompt_ids([{"role": "user", "content": "fox"}])


def test_an_answer_without_its_end_shows_it(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, (cut,) = tokenizer.encode(["poem"])[0], tokenizer.encode(["poem 鑫"])
    cut = cut[:-1]  # The last character is not whole.
    monkeypatch.setattr("minimind_ray.train.answers.generate", lambda *_: [whole, cut])
    config = EvalConfig(sample_tokens=len(cut))
    assert len(whole) < len(cut)
    prompts = drawn("text", tokenizer, samples=2, prompts=["fox "])
    model = cast(Transformer, None)
    assert answers(model, prompts, config, "text", tokenizer).texts == ["fox poem", "fox poem …"]
    found = answers(model, prompts, config, "conversation", tokenizer)
    assert found.texts == ["fox \npoem", "fox \npoem …"] and found.prompts == ["fox ", "fox "]
