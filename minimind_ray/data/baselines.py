"""Facts about a run's prepared data, with which its loss can be judged: the unigram loss, bytes per token, and counts.

They are computed once, when a run's data is ready, and stored in run.json. `minimind-ray diagnose` reads them there,
because the prepared data may be gone by then.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer

MOST_TOKENS = 1 << 20
"""How many tokens of a set are read, at least one row group: reading and counting them takes about 0.05 s."""
COUNTS = (
    "rows", "kept", "documents", "tokens", "counted_tokens", "split", "cut", "cut_tokens", "left_out", "shortened",
)  # fmt: skip


def baselines(train: str | None, val: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return facts about the prepared sets at these paths. `train` is None if the packs are made during training.

    uniform: ln V, the loss of a model that gives each token of the vocabulary the same probability, in nats.
    unigram: the loss of a model that knows only how often each token occurs in `train`, in nats per counted token of
        `val` (of `train` without `val`); None without `train`.
    bytes_per_token: bytes of text that a token stands for, without control tokens; None if all are control tokens.
    unknown: the fraction of text tokens that are the tokenizer's token for unknown text.
    train, val: counts of rows, documents and tokens, see `UnitStats`.
    """
    return _baselines(train, val, _Tokens(tokenizer))


class _Tokens:
    """A tokenizer as a key of a cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.key = tokenizer, tokenizer.fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokens) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=64)  # The trials of a sweep have the same data.
def _baselines(train: str | None, val: str | None, key: _Tokens) -> dict[str, Any]:
    size = key.tokenizer.vocab_size
    stores = {name: PackStore(path) for name, path in (("train", train), ("val", val)) if path}
    samples = {name: _sample(store) for name, store in stores.items()}
    scored = _counts(samples.get("val") or samples["train"], size)
    unigram = _unigram(_counts(samples["train"], size), scored) if train else None
    every = next(iter(samples.values()))
    all_V = np.bincount(np.concatenate([pack.tokens for pack in every]), minlength=size)
    bytes_V = key.tokenizer.token_bytes()
    text = int(all_V[bytes_V > 0].sum())
    unknown = key.tokenizer.unknown_id
    missing = 0 if unknown is None else int(all_V[unknown])
    counts = {name: {count: store.manifest.total(count) for count in COUNTS} for name, store in stores.items()}
    return {
        "uniform": math.log(size),
        "unigram": unigram,
        "bytes_per_token": float(all_V @ bytes_V) / text if text else None,
        "unknown": missing / max(1, text + missing),
        **counts,
    }


def _sample(store: PackStore) -> list[Pack]:
    """Return packs of a store: all, or row groups from its beginning to its end, at equal distances."""
    starts = np.cumsum([0, *store.row_groups])
    per_group = store.n_tokens / len(store.row_groups)
    groups = min(len(store.row_groups), max(1, int(MOST_TOKENS / per_group)))
    chosen = np.unique(np.linspace(0, len(store.row_groups) - 1, groups).astype(int))
    return [pack for group in chosen for pack in store.read(range(starts[group], starts[group + 1]))]


def _counts(packs: list[Pack], size: int) -> np.ndarray:
    """Return how often each token carries loss: int64 [V]."""
    return np.bincount(np.concatenate([pack.tokens[pack.weights > 0] for pack in packs]), minlength=size)


def _unigram(train_V: np.ndarray, scored_V: np.ndarray) -> float | None:
    """Return the mean loss of the tokens `scored_V` by the frequencies of `train_V`, with add-one smoothing."""
    log_V = np.log((train_V + 1) / (train_V.sum() + len(train_V)))
    return float(-(scored_V @ log_V) / scored_V.sum()) if scored_V.sum() else None
