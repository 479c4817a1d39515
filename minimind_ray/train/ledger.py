"""Record which packs a run has trained on, so that `verify` can check that each epoch used each pack exactly once.

Checkpoints store the record as text. `0-1023 1030 1040-1047*2` means: packs 0 to 1023 and pack 1030 once, packs 1040 to
1047 twice.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from minimind_ray.config.errors import UserError

WORD = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?(?:\*(\d{1,9}))?", re.ASCII)
MAX_PACKS = 100_000_000  # In an epoch. Without a limit, a damaged file could make `parse_counts` fill the memory.


class Ledger:
    """Counts how often each pack was trained on in each epoch, over all workers and over all resumes.

    `epochs` are the counts so far, as `gather` returned them. `packs_per_epoch` is None for a stream: its packs have
    consecutive numbers, as if they were in one epoch.

    Raises:
        ValueError: `gather` cannot have returned these arguments.
    """

    def __init__(
        self, packs_per_step: int, packs_per_epoch: int | None, epochs: Mapping[str, str] | None = None
    ) -> None:
        if not (is_count(packs_per_step) and (packs_per_epoch is None or is_count(packs_per_epoch))):
            raise ValueError(f"{packs_per_step!r} packs per step, {packs_per_epoch!r} per epoch: not numbers above 0")
        self.packs_per_step, self.packs_per_epoch = packs_per_step, packs_per_epoch
        self.counts_of = {int(epoch): parse_counts(text) for epoch, text in (epochs or {}).items()}
        self.since: dict[int, list[int]] = defaultdict(list)

    def add(self, epoch: int | None, packs: Iterable[int]) -> None:
        """Count packs that this worker has trained on."""
        self.since[epoch or 0] += packs

    def gather(self) -> dict[str, Any]:
        """Add up the counts of all workers. Return them as JSON values, which `Ledger(**…)` reads; on every worker."""
        workers: list[Any] = [self.since]
        if dist.is_initialized():
            workers = [None] * dist.get_world_size()
            dist.all_gather_object(workers, self.since)
        for epoch in sorted({epoch for worker in workers for epoch in worker}):
            packs = [pack for worker in workers for pack in worker.get(epoch, ())]
            before = self.counts_of.get(epoch, np.zeros(0, np.int64))
            after = np.bincount(packs, minlength=len(before))
            after[: len(before)] += before
            self.counts_of[epoch] = after
        self.since = defaultdict(list)
        epochs = {str(epoch): counts_text(counts) for epoch, counts in sorted(self.counts_of.items())}
        return {"packs_per_step": self.packs_per_step, "packs_per_epoch": self.packs_per_epoch, "epochs": epochs}

    def problem(self, step: int) -> str | None:
        """Check that each pack due up to `step` was trained on exactly once. Return the first problem, or None."""
        per_epoch, due = self.packs_per_epoch, step * self.packs_per_step
        if per_epoch is None:
            expected = {0: due}
        else:
            done, rest = divmod(step, -(-per_epoch // self.packs_per_step))
            expected = dict.fromkeys(range(done), per_epoch) | {done: rest * self.packs_per_step}
        for epoch in sorted({*expected, *self.counts_of}):
            counts = self.counts_of.get(epoch, np.zeros(0, np.int64))
            if len(again := np.flatnonzero(counts > 1)):
                return f"epoch {epoch + 1}: pack {again[0]} was trained on {counts[again[0]]} times"
            most = expected.get(epoch, 0) if per_epoch is None else per_epoch
            if len(counts) > most:
                return f"epoch {epoch + 1}: pack {len(counts) - 1} was trained on, and there are {most}"
            if (found := np.count_nonzero(counts)) != expected.get(epoch, 0):
                return f"epoch {epoch + 1}: {found} packs were trained on, not {expected.get(epoch, 0)}"
        return None


def is_count(value: Any) -> bool:
    """Whether a value is a whole number above 0."""
    return type(value) is int and value > 0


def counts_text(counts: np.ndarray) -> str:
    """Return `counts`, int64 [packs], as text; see the module's docstring."""
    starts = np.flatnonzero(np.diff(counts, prepend=0))
    ends = [*starts[1:], len(counts)]
    words = [
        (f"{start}-{end - 1}" if end > start + 1 else f"{start}") + (f"*{counts[start]}" if counts[start] > 1 else "")
        for start, end in zip(starts, ends)
        if counts[start]
    ]
    return " ".join(words)


def parse_counts(text: str) -> np.ndarray:
    """Return the counts from a text that `counts_text` made: int64 [last pack + 1].

    Raises:
        UserError: `counts_text` did not write this text.
    """
    runs: list[tuple[int, int, int]] = []
    for word in text.split():
        if not (found := WORD.fullmatch(word)) or int(found[2] or found[1]) >= MAX_PACKS:
            raise UserError(f"the ledger of packs in resume/state.json is damaged: {word[:40]} is not a range of packs")
        runs.append((int(found[1]), int(found[2] or found[1]), int(found[3] or 1)))
    counts = np.zeros(1 + max((last for _, last, _ in runs), default=-1), np.int64)
    for first, last, times in runs:
        counts[first : last + 1] += times
    return counts
