"""Rules about a run's data: the tokenizer, cut rows, validation, and waiting for data."""

from __future__ import annotations

import numpy as np

from minimind_ray.diagnose.facts import Facts
from minimind_ray.diagnose.finding import Finding
from minimind_ray.diagnose.learning import LEAST_STEPS

BYTE_VOCABULARY = 512
"""A vocabulary of this size is chosen to be bytes."""


def tokenizer_misfit(facts: Facts) -> Finding | None:
    """Find a tokenizer that cuts the text into bytes, or has no token for parts of it."""
    each, unknown, uniform = (facts.baseline(name) for name in ("bytes_per_token", "unknown", "uniform"))
    if each is None or unknown is None or uniform is None:
        return None
    # Below 1.5, a Chinese character (3 bytes) costs two tokens or more, an English word four. MiniMind's tokenizer has
    # 2.3 on classical Chinese, which is its worst case. One unknown token in 200 is one in each longer paragraph.
    cut = each < 1.5 and np.exp(uniform) > BYTE_VOCABULARY
    if not cut and unknown < 0.005:
        return None
    evidence = {"bytes": each, "unknown": unknown}
    return Finding("tokenizer_misfit", "warning", evidence, (), "data.tokenizer")


def truncated(facts: Facts) -> Finding | None:
    """Find many rows that were cut or left out because they are longer than `data.max_seq_len`."""
    documents, cut, left_out, kept = (facts.count("train", n) for n in ("documents", "cut", "left_out", "kept"))
    if not documents or cut is None or left_out is None or kept is None:
        return None
    # One row in twenty. A model learns from a cut answer that answers need no end.
    cut_share, lost_share = cut / documents, left_out / max(1.0, left_out + kept)
    if cut_share < 0.05 and lost_share < 0.05:
        return None
    evidence = {
        "cut": int(cut), "cut_share": cut_share, "left_out": int(left_out), "lost_share": lost_share,
        "length": facts.settings.get("data.max_seq_len"),
    }  # fmt: skip
    return Finding("truncated", "warning", evidence, (), "data.max_seq_len")


def no_validation(facts: Facts) -> Finding | None:
    """Find a run that never validates. Over-fitting cannot be seen in such a run."""
    if facts.steps < LEAST_STEPS or len(facts.curve("val/loss")) or facts.info.get("state") != "finished":
        return None
    return Finding("no_validation", "note", {"steps": facts.steps}, (), "data.val_fraction", 0.01)


def few_validation(facts: Facts) -> Finding | None:
    """Find a validation set so small that its results tell hardly anything."""
    documents = facts.count("val", "documents")
    if documents is None or not len(facts.curve("val/loss")):
        return None
    examples = int(documents) if facts.per_token else int(documents) // 2
    # With 20 examples, the 95 % interval of a share of one half goes from 28 % to 72 %.
    if examples >= 20:
        return None
    return Finding("few_validation", "note", {"examples": examples}, (), "data.val_fraction")


def waits_for_data(facts: Facts) -> Finding | None:
    """Find a machine that spends a good part of its time waiting for packs."""
    seconds, waiting = facts.curve("timing/seconds").values[5:], facts.curve("timing/data_seconds").values[5:]
    if len(seconds) < LEAST_STEPS or len(waiting) != len(seconds):
        return None
    share = float(waiting.sum() / seconds.sum())
    # The typical step has to wait, too: single long waits are another program's doing. A fifth of the time is worth an
    # hour's work in each day of training.
    if share < 0.2 or float(np.median(waiting / seconds)) < 0.1:
        return None
    evidence = {"share": share, "seconds": float(waiting.sum()), "steps": len(seconds)}
    return Finding("waits_for_data", "note", evidence, (), "data.cache", True)
