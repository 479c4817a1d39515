"""Packs made while they are read and kept nowhere: `data.cache` false.

For data too large to keep twice, or read once. Epoch after epoch, the units of the source files in an order that the
seed and the epoch set, each unit's packs as `pack_groups` gives them. How many packs there will be is not known
beforehand, so `train.max_steps` says where to end.
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

HEAD = 1 << 16  # bytes at a file's start in which its first row is looked for


@dataclass(frozen=True)
class StreamPlan:
    """As many steps as were asked for, each of `packs_per_step` packs."""

    packs_per_step: int
    steps: int
    packs_per_epoch: None = None  # Not known beforehand.

    def epoch(self, step: int) -> None:
        """Not known: epochs end inside steps."""


@dataclass(frozen=True)
class Stream:
    """The source files' units and how they are encoded; rejected rows go to a file per unit in folder `rejects`.

    `bytes_per_token`: what a token takes in the source, by the first piece (see `Stream.check_first`).
    """

    units: tuple[Unit, ...]
    encoding: Encoding
    seed: int
    rejects: str
    bytes_per_token: float = 4.0

    @property
    def key(self) -> str:
        """A hash of the units' content and how they are encoded."""
        return hashlib.blake2b("".join(unit.key for unit in self.units).encode(), digest_size=20).hexdigest()

    def order(self, epoch: int) -> list[int]:
        """The units as this epoch reads them."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.units)).tolist()

    def unit_tables(self, index: int) -> Iterator[pa.Table]:
        """One unit's packs, each a table of one row as a prepared dataset has them.

        Raises:
            UserError: more bad rows in the unit than one and `data.max_reject_fraction`; the file is damaged there.
        """
        for pack in pack_groups(self._groups(self.units[index]), self.encoding.config.pack_tokens):
            yield packs_table([pack], self.encoding.tokenizer.vocab_size)

    def _groups(self, unit: Unit) -> Iterator[Group]:
        seen, rejects = Seen(), list[Reject]()
        outcomes, encoder = unit_groups(unit, self.encoding, seen)
        if unit.part.start and unit.source.by_lines:  # A file's pieces have one format, that of its first row.
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
                stream.write("".join(lines).encode())  # An epoch later the same once more.
        damaged = [unit.source.path] * seen.damaged
        require_undamaged(damaged, "train", self.rejects, self.encoding.config)
        # A piece may be a file's last line: that one row of it is bad says nothing about the data.
        fraction = self.encoding.config.max_reject_fraction
        if len(rejects) > (max(1, fraction * seen.rows) if fraction else 0):
            raise UserError(
                f"{rejects[0].file}:{rejects[0].line}: {rejects[0].reason}; {len(rejects):,} of {seen.rows:,} rows of "
                "this piece cannot be used, more than data.max_reject_fraction allows; mend them, or raise the limit"
            )

    def check_first(self) -> tuple[Stream, str]:
        """Read the first unit of the first epoch, so that data of another kind are refused before training.

        The stream with what was learned of it, and the piece's rows in words.

        Raises:
            UserError: more bad rows in it than one and `data.max_reject_fraction`; the file is damaged there.
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
                pass  # It writes them down, and judges.
        tally = encoder.tally
        left_out = f" + {tally.left_out:,} too long" if tally.left_out else ""
        rows = (
            f"{seen.rows:,} rows = {tally.kept:,} kept + {rejected:,} rejected{left_out} + "
            f"{seen.held_out:,} held out in the first piece"
        )
        rows = "\n  ".join([rows, *encoder.remarks()])
        # Of less than a pack there is nothing to learn.
        known = tokens >= self.encoding.config.pack_tokens
        return replace(self, bytes_per_token=unit.size / tokens) if known else self, rows

    def packs(self) -> Iterator[Pack]:
        """All packs, epoch after epoch without end, numbered through.

        Raises:
            UserError: there are none.
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
    """This rank's packs of each step from `start` on; what comes before is made again and passed over."""
    packs = islice(stream.packs(), start * plan.packs_per_step, None)
    for _ in range(start, plan.steps):
        yield list(islice(packs, plan.packs_per_step))[rank::world_size]
