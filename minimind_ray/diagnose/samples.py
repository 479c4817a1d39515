"""Rules about the texts that the model writes: they repeat, or end at once."""

from __future__ import annotations

import re
import statistics

from minimind_ray.diagnose.facts import Facts
from minimind_ray.diagnose.finding import Finding

WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W\d_]+|\d|[^\w\s]")
"""A word, a Chinese, Japanese or Korean character, a digit or a mark: the units in which repetition is counted."""
GRAM = 4
LEAST_WORDS = 24
"""Shorter texts have too few n-grams."""


def samples_repeat(facts: Facts) -> Finding | None:
    """Find samples most of whose n-grams occurred before in the same sample."""
    shares = [share for sample in facts.samples if (share := repeated_share(sample.text)) is not None]
    # Of the corpus's poems and the demo's texts, 99 % have under 0.1. A loop that fills half a text has 0.5.
    if len(shares) < 2 or statistics.median(shares) < 0.3:
        return None
    evidence = {
        "share": statistics.median(shares), "samples": len(shares), "step": facts.samples_step, "gram": GRAM,
        "temperature": facts.number("eval.temperature"),
    }  # fmt: skip
    return Finding("samples_repeat", "warning", evidence, (facts.samples_step,), "generation.repetition_penalty", 1.1)


def samples_end_at_once(facts: Facts) -> Finding | None:
    """Find samples of which half or more, and at least two, are empty: one may be chance."""
    known = [sample for sample in facts.samples if sample.prompt is not None or not sample.text.strip()]
    empty = sum(not WORD.search(sample.text) for sample in known)
    if empty < 2 or 2 * empty < len(facts.samples):
        return None
    evidence = {"empty": empty, "samples": len(facts.samples), "step": facts.samples_step}
    return Finding("samples_end_at_once", "error", evidence, (facts.samples_step,))


def repeated_share(text: str) -> float | None:
    """Return the share of a text's n-grams that occurred earlier in the text; None for a short text."""
    words = WORD.findall(text.lower())
    if len(words) < LEAST_WORDS:
        return None
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)
