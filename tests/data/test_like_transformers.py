"""Ids of any tokenizer directory are those of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.data.tokenizer import Tokenizer
from tests.data.chat_families import FAMILIES, KINDS, write_family
from tests.data.test_chat_format import SYSTEM, TURNS, directory, encoded

pytestmark = pytest.mark.slow

PLAIN = ["The number 7 is after 6.", " 数字 7", "a  b\n\n\n  c", "\n", "▁x", "", "   ", "ﬁve é e\u0301"]
FLAGS: list[dict[str, bool]] = [
    {}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True},
]  # fmt: skip


def theirs(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def assert_same(path: Path, conversations: list[list[dict[str, Any]]]) -> None:
    ours, other = Tokenizer.load(path), theirs(path)
    for text in PLAIN:
        assert ours.encode([text])[0] == other(text, add_special_tokens=False).input_ids
    for messages in conversations:
        expected = other.apply_chat_template(messages, tokenize=True, return_dict=True).input_ids
        assert encoded(ours, messages)[0] == expected
        prompt = other.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True).input_ids
        assert ours.prompt_ids(messages[:-1]) == prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_every_family(family: str, kind: str) -> None:
    conversations = [TURNS, TURNS[:2]] + ([[SYSTEM, *TURNS]] if family != "gemma" else [])
    assert_same(directory(family, kind), conversations)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_with_control_tokens_that_swallow_white_space(kind: str, flags: dict[str, bool], tmp_path: Path) -> None:
    contents = ("<|user|>", "<|assistant|>", "<|end|>")
    assert_same(write_family(tmp_path, "phi3", kind, {c: flags for c in contents}), [TURNS, [SYSTEM, *TURNS]])


def test_ids_of_the_tokenizer_with_a_space_mark_in_the_cases(corpus: Path) -> None:
    path = corpus.parent / "cases" / "tokenizer-prefix-space"
    if not path.exists():
        pytest.skip("the case is not here")
    assert_same(path, [TURNS, [SYSTEM, *TURNS]])


@pytest.mark.parametrize("kind", ["bytes", "first", "prepend"])
def test_marks_give_the_mask_of_transformers(kind: str) -> None:
    path = directory("marked", kind)
    ours, other = Tokenizer.load(path), theirs(path)
    for messages in ([SYSTEM, *TURNS], TURNS[:2]):
        found = other.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids, spans = encoded(ours, messages)
        assert ids == found["input_ids"]
        assert [int(any(a <= i < b for a, b in spans)) for i in range(len(ids))] == found["assistant_masks"]


# Classes for which transformers builds parts of the tokenizer anew, and types of models that choose a class.
CLASSES = ["LlamaTokenizerFast", "GemmaTokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer", "CohereTokenizerFast",
           "Qwen2TokenizerFast", "Qwen3_5Tokenizer", "TokenizersBackend", "NoSuchTokenizer", None]  # fmt: skip
MODEL_TYPES = [None, "llama", "mistral", "qwen2", "gemma2"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["bytes-prefix", "prepend"])
def test_ids_of_every_class(kind: str, cls: str | None, model_type: str | None, tmp_path: Path) -> None:
    path = write_family(tmp_path / "a", "phi3", kind, tokenizer_class=cls)
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}), "utf-8")
    try:
        ours = Tokenizer.load(path)
    except UserError as error:
        assert kind == "bytes-prefix" and str(error).endswith("the unk_token <unk> of tokenizer.json is not in its "
                                                              "vocabulary; correct it")  # fmt: skip
        return
    assert_same(path, [TURNS])
    ours.save(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model_type": "qwen3"}), "utf-8")
    assert_same(tmp_path / "b", [TURNS])
    assert encoded(Tokenizer.load(tmp_path / "b"), TURNS) == encoded(ours, TURNS)


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("kind", ["first", "prepend"])
def test_ids_of_llamas_settings(kind: str, legacy: bool | None, prefix: bool | None, tmp_path: Path) -> None:
    options = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": prefix}
    assert_same(write_family(tmp_path, "llama2", kind, **options), [TURNS, [SYSTEM, *TURNS]])


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": True, **flags}  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "first"])
@pytest.mark.parametrize(
    "options",
    [
        {"added_tokens_decoder": {"4": token("<|end|>", lstrip=True, rstrip=True)}},
        {"added_tokens_decoder": {"900": token("number", special=False, normalized=True)}},
        {"extra_special_tokens": ["<x>"]},
        {"additional_special_tokens": ["<x>"]},
        {"extra_special_tokens": {"image_token": "<img>"}},
        {"image_token": "<img>", "cls_token": "<cls>"},
        {"add_bos_token": True, "add_prefix_space": True, "model_max_length": 5},
    ],
    ids=str,
)
def test_ids_with_settings_that_change_tokens(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = write_family(tmp_path, "phi3", kind, **options)
    assert_same(path, [TURNS])
    assert Tokenizer.load(path).vocab_size == len(theirs(path))


@pytest.mark.parametrize("tokens", [{"eos_token": "<|end|>"}, {"bos_token": {"content": "<|end|>"}}], ids=str)
def test_names_in_the_old_file_of_special_tokens(tokens: dict[str, Any], tmp_path: Path) -> None:
    path = write_family(tmp_path, "phi3", "bytes")
    (path / "special_tokens_map.json").write_text(json.dumps(tokens), "utf-8")
    ours, other = Tokenizer.load(path), theirs(path)
    assert (ours.bos_id, ours.eos_id) == (other.bos_token_id, other.eos_token_id)
    assert_same(path, [TURNS])


TEXT = st.lists(st.one_of(st.text(max_size=4), st.sampled_from(["\n", " ", "  ", "▁", "hello"])), max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT.map("".join), min_size=2, max_size=4))
def test_ids_of_any_text(kind: str, texts: list[str]) -> None:
    path = directory("llama3", kind)
    ours, other = loaded(path)
    assert ours.encode(texts) == [other(text, add_special_tokens=False).input_ids for text in texts]
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"a{text}"} for i, text in enumerate(texts)]
    assert encoded(ours, messages)[0] == other.apply_chat_template(messages, return_dict=True).input_ids


LOADED: dict[Path, tuple[Tokenizer, Any]] = {}


def loaded(path: Path) -> tuple[Tokenizer, Any]:
    if path not in LOADED:
        LOADED[path] = Tokenizer.load(path), theirs(path)
    return LOADED[path]
