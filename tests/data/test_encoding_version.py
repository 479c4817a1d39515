"""Encoding does not change without a new ENCODING_VERSION: rows of every format to packs, by hash.

The tokenizer has no merges, only bytes and control tokens, so that it is the same everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimind_ray.config.schema import DataConfig
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.prepare import ENCODING_VERSION, Prepared, Split, prepare
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS, Tokenizer, train_tokenizer

pytestmark = pytest.mark.unit

VERSION = 1

SYSTEM = {"role": "system", "content": "Answer in one word."}
USER, ANSWER = {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2. 是2。"}
THOUGHT = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}
WRONG = {"role": "assistant", "content": "It is 3."}
LONG = [turn for i in range(6) for turn in ({"role": "user", "content": f"And {i} + {i}?"}, ANSWER)]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "content": "2"}
SAID = [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "It is 2."}]
SPOKEN = "\n\nHuman: What is 1 + 1?\n\nAssistant:"

TEXTS = [{"text": f"{'the fox and the river ' * (i % 7)}{i} 月"} for i in range(40)]
MESSAGES = [
    {"messages": [USER, ANSWER]},
    {"messages": [SYSTEM, USER, ANSWER, USER, THOUGHT]},
    {"messages": LONG},
    {"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]},
    {"messages": [USER, {**ANSWER, "content": "<|im_end|> 2 <think>"}]},
    {"messages": [USER]},
]
PAIRS = [
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
    {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WRONG]},
    {"prompt": "What is 1 + 1?", "chosen": "It is 2.", "rejected": "It is 3."},
    {"chosen": [*LONG, USER, ANSWER], "rejected": [*LONG, USER, WRONG]},
    {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
]
SPOKEN_PAIRS = [{"chosen": f"{SPOKEN} It is 2.", "rejected": f"{SPOKEN} It is 3."}]
OPENAI_PAIRS = [{"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [WRONG]}]
ALPACA = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2", "history": [["Add 0 and 1.", "1"]], "system": "Be brief."}
]
COMPLETIONS = [{"prompt": "What is 1 + 1?", "completion": "It is 2."}, {"prompt": [USER], "completion": [ANSWER]}]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


CASES: dict[str, tuple[str, str, bytes, dict[str, Any]]] = {
    "texts": ("pretrain", "x.jsonl", lines(TEXTS), {}),
    "texts cut": ("pretrain", "x.jsonl", lines(TEXTS), {"long_documents": "truncate"}),
    "texts held out": ("pretrain", "x.jsonl", lines(TEXTS), {"val_fraction": 0.3}),
    "an array": ("pretrain", "x.json", json.dumps(TEXTS).encode(), {}),
    "compressed": ("pretrain", "x.jsonl.gz", gzip.compress(lines(TEXTS)), {}),
    "a table": ("pretrain", "x.csv", b"text,id\none,1\n\"two, three\",2\n", {}),
    "lines": ("pretrain", "x.txt", "one\n\ntwo 月\n".encode(), {}),
    "a whole file": ("pretrain", "x.txt", "one\n\ntwo 月\n".encode(), {"text_files": "whole"}),
    "messages": ("sft", "x.jsonl", lines(MESSAGES), {}),
    "messages for adapters": ("lora", "x.jsonl", lines(MESSAGES), {}),
    "messages shortened": ("sft", "x.jsonl", lines(MESSAGES), {"long_conversations": "cut_prompt"}),
    "messages refused": ("sft", "x.jsonl", lines(MESSAGES), {"long_conversations": "refuse", "max_seq_len": 40}),
    "messages at full length": ("sft", "x.jsonl", lines(MESSAGES), {"max_seq_len": 512, "pack_tokens": 1024}),
    "sharegpt": ("sft", "x.jsonl", lines([{"conversations": SAID}]), {}),
    "alpaca": ("sft", "x.jsonl", lines(ALPACA), {}),
    "completions": ("sft", "x.jsonl", lines(COMPLETIONS), {}),
    "renamed fields": (
        "sft", "x.jsonl", lines([{"q": "1 + 1?", "a": "2"}]), {"fields": {"prompt": "q", "completion": "a"}},
    ),
    "pairs": ("dpo", "x.jsonl", lines(PAIRS), {}),
    "pairs shortened": ("dpo", "x.jsonl", lines(PAIRS), {"long_conversations": "cut_prompt"}),
    "pairs in one text": ("dpo", "x.jsonl", lines(SPOKEN_PAIRS), {}),
    "OpenAI's pairs": ("dpo", "x.jsonl", lines(OPENAI_PAIRS), {}),
}  # fmt: skip

HASHES = {
    "texts": "4065e7da2073baa8",
    "texts cut": "16a9bf9de9d52b2e",
    "texts held out": "fa971c303459391b",
    "an array": "4065e7da2073baa8",
    "compressed": "4065e7da2073baa8",
    "a table": "940222a1d2f5b6fd",
    "lines": "917c5cdab41ad5bd",
    "a whole file": "0ceefda990dbc4e0",
    "messages": "ed36a9a8b0966f9a",
    "messages for adapters": "ed36a9a8b0966f9a",
    "messages shortened": "5722e5615ec766fd",
    "messages refused": "407ae8c60e0659c0",
    "messages at full length": "df899cece4ef3d1e",
    "sharegpt": "df32dc1ac053d76e",
    "alpaca": "f4032185a4c39dc0",
    "completions": "e850dc0a55cd7432",
    "renamed fields": "c612b7467fa852ac",
    "pairs": "2ebb20c0fa280514",
    "pairs shortened": "6b64930cab140b66",
    "pairs in one text": "6a3b9ad7f8281ed4",
    "OpenAI's pairs": "da98c8f0539c5334",
}

CLUSTER_HASHES = {
    "texts": "16bf8f096f9763b0",
    "messages": "e6a0b3e05f6d4d6a",
    "messages shortened": "a82e9cde1df41133",
    "pairs": "d447d65f9060a5a5",
    "pairs shortened": "4862a4ef440965a1",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([], len(SPECIAL_TOKENS) + len(MARKUP_TOKENS) + 256)


def packs_hash(store: PackStore) -> str:
    """The hash of all packs in their order, and of what was counted."""
    digest = hashlib.sha256()
    for pack in store:
        for values, kind in ((pack.tokens, np.int64), (pack.weights, np.uint8), (pack.lengths, np.int64)):
            digest.update(values.astype(kind).tobytes() + b"|")
    counts = ("rows", "kept", "rejected", "held_out", "documents", "split", "cut", "left_out", "shortened")
    digest.update(json.dumps([store.manifest.total(count) for count in counts]).encode())
    return digest.hexdigest()[:16]


def prepared(tmp_path: Path, tokenizer: Tokenizer, case: str, split: Split) -> Prepared:
    stage, name, content, settings = CASES[case]
    (tmp_path / name).write_bytes(content)
    files: dict[str, Any] = {split: str(tmp_path / name)}
    base: dict[str, Any] = {"max_seq_len": 128, "pack_tokens": 256, "val_fraction": 0.0, "max_reject_fraction": 1.0}
    config = DataConfig(**files, cache_dir=str(tmp_path / "cache"), **{**base, **settings})
    return prepare(stage, config, split, tokenizer)


@pytest.mark.parametrize("case", CASES)
def test_encoding_changes_only_with_its_version(tmp_path: Path, tokenizer: Tokenizer, case: str) -> None:
    found = packs_hash(PackStore(prepared(tmp_path, tokenizer, case, "train").path))
    assert (ENCODING_VERSION, found) == (VERSION, HASHES[case]), (
        "encoding changed: raise ENCODING_VERSION and this hash"
    )


@pytest.mark.parametrize("case", CLUSTER_HASHES)
def test_clusters_change_only_with_the_version(tmp_path: Path, tokenizer: Tokenizer, case: str) -> None:
    val = prepared(tmp_path, tokenizer, case, "val")
    ids = [cluster for pack in PackStore(val.path, val.columns) for cluster in pack.columns[CLUSTER].tolist()]
    found = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    assert (ENCODING_VERSION, found) == (VERSION, CLUSTER_HASHES[case]), "raise ENCODING_VERSION and this hash"
