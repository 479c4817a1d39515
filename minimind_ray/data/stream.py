"""Make packs during training without storing them, if `data.cache` is false.

This is for data that is too large to store twice, or that is read only once. Each epoch reads the units of the source
files in an order that depends on the seed and the epoch, and packs each unit with `pack_groups`. The number of packs is
not known in advance, so `train.max_steps` sets the end of training. `prepare.py` is the usual way, with stored packs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice

import numpy as np
import pyarrow as pa

from minimind_ray.config.errors import UserError
from minimind_ray.data.files import atomic_output, join, locate
from minimind_ray.data.pack import Group, Pack, pack_from_row, pack_groups, packs_table
from minimind_ray.data.prepare import Encoding, Seen, Unit, require_undamaged, unit_groups
from minimind_ray.data.records import Part, Reject, read_rows

HEAD = 1 << 16  # bytes at the beginning of a file in which to look for its first row


@dataclass(frozen=True)
class StreamPlan:
    """A plan of `train.max_steps` steps with `packs_per_step` packs each."""

    packs_per_step: int
    steps: int
    packs_per_epoch: None = None  # not known in advance

    def epoch(self, step: int) -> None:
        """Return None, because epochs end in the middle of steps."""


@dataclass(frozen=True)
class Stream:
    """The units of the source files and their encoding. Rejected rows go to one file for each unit in `rejects`.

    `bytes_per_token` is the number of source bytes for each token, measured on the first unit by `check_first`.
    """

    units: tuple[Unit, ...]
    encoding: Encoding
    seed: int
    rejects: str
    bytes_per_token: float = 4.0

    @property
    def key(self) -> str:
        """A hash of the units' content and their encoding."""
        return hashlib.blake2b("".join(unit.key for unit in self.units).encode(), digest_size=20).hexdigest()

    def order(self, epoch: int) -> list[int]:
        """Return the indices of the units in the order of this epoch."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.units)).tolist()

    def unit_tables(self, index: int) -> Iterator[pa.Table]:
        """Yield the packs of a unit, each as a table with one row, as in a prepared dataset.

        Raises:
            UserError: the unit has more than one bad row and more than `data.max_reject_fraction` allows, or the file
                is damaged there.
        """
        for pack in pack_groups(self._groups(self.units[index]), self.encoding.config.pack_tokens):
            yield packs_table([pack], self.encoding.tokenizer.vocab_size)

    def _groups(self, unit: Unit) -> Iterator[Group]:
        seen, rejects = Seen(), list[Reject]()
        outcomes, encoder = unit_groups(unit, self.encoding, seen)
        if unit.part.start and unit.source.by_lines:  # All pieces of a file must have the format of its first row.
            head = Part(stop=min(unit.source.size, HEAD))
            for row in islice(read_rows(unit.source, head), 1):
                encoder.reader.note(row)
        for item in outcomes:
            if isinstance(item, Reject):
                rejects.append(item)
            else:
                yield item
        if rejects:
            lines = (json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
            filesystem, folder = locate(self.rejects)
            with atomic_output(filesystem, join(folder, f"{unit.key}.jsonl")) as stream:
                stream.write("".join(lines).encode())  # Each epoch writes the same file again.
        damaged = [unit.source.path] * seen.damaged
        require_undamaged(damaged, "train", self.rejects, self.encoding.config)
        # A unit may be just a file's last line, so one bad row says nothing about the data.
        fraction = self.encoding.config.max_reject_fraction
        if len(rejects) > (max(1, fraction * seen.rows) if fraction else 0):
            raise UserError(
                f"{rejects[0].file}:{rejects[0].line}: {rejects[0].reason}; {len(rejects):,} of {seen.rows:,} rows of "
                "this piece cannot be used, more than data.max_reject_fraction allows; correct them, or raise the limit"
            )

    def check_first(self) -> tuple[Stream, str]:
        """Read the first unit of the first epoch, so that wrong data is refused before training starts.

        Returns the stream with its `bytes_per_token`, and a text about the unit's rows for the user.

        Raises:
            UserError: as `unit_tables`.
        """
        unit, seen, rejected, tokens = self.units[self.order(0)[0]], Seen(), 0, 0
        outcomes, encoder = unit_groups(unit, self.encoding, seen)
        for item in outcomes:
            if isinstance(item, Reject):
                rejected += 1
            else:
                tokens += sum(len(document.tokens) for document in item)
        if rejected:
            for _ in self._groups(unit):
                pass  # `_groups` writes the rejects and raises if there are too many.
        tally = encoder.tally
        left_out = f" + {tally.left_out:,} too long" if tally.left_out else ""
        rows = (
            f"{seen.rows:,} rows = {tally.kept:,} kept + {rejected:,} rejected{left_out} + "
            f"{seen.held_out:,} held out in the first piece"
        )
        rows = "\n  ".join([rows, *encoder.remarks()])
        # Less than a pack is too little to measure.
        known = tokens >= self.encoding.config.pack_tokens
        return replace(self, bytes_per_token=unit.size / tokens) if known else self, rows

    def packs(self) -> Iterator[Pack]:
        """Yield the packs of one epoch after another, without end. Their ids continue from epoch to epoch.

        Raises:
            UserError: the data has no packs.
        """
        number = 0
        for epoch in count():
            for index in self.order(epoch):
                for table in self.unit_tables(index):
                    yield pack_from_row(table, 0, number)
                    number += 1
            if number == 0:
                raise UserError("data.train: no row is left to train on; `minimind-ray data inspect` says why")


def stream_steps(
    stream: Stream, plan: StreamPlan, start: int, rank: int = 0, world_size: int = 1
) -> Iterator[list[Pack]]:
    """Yield this rank's packs of each step from `start` on. Makes the packs of earlier steps again and skips them."""
    packs = islice(stream.packs(), start * plan.packs_per_step, None)
    for _ in range(start, plan.steps):
        yield list(islice(packs, plan.packs_per_step))[rank::world_size]
