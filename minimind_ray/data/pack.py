"""Put documents into packs, and write packs as tables.

A document is a sequence of tokens with a loss weight for each token. A group is one document, or the two documents of a
preference pair, which must share a pack. A pack is one row of a prepared dataset: groups one after another, with at
most `data.pack_tokens` tokens in total. Packing does not pad or cut documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minimind_ray.data.columns import Column

if TYPE_CHECKING:
    import pyarrow as pa


class Document(NamedTuple):
    """`tokens` int32 [L]; `weights` uint8 [L]: 1 if predicting the token carries loss (never the first token).

    `cluster` is the document's cluster in a validation set, and 0 where clusters are not needed (see clusters.py).
    """

    tokens: np.ndarray
    weights: np.ndarray
    cluster: int = 0


Group = tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Pack:
    """Documents one after another: `tokens` [T], `weights` uint8 [T], `lengths` int32 [D].

    `id` is the pack's place in its prepared dataset. `columns` holds arrays [T] or [D], by the column's axis. In
    preference data documents 2i and 2i+1 are chosen and rejected.
    """

    id: int
    tokens: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    columns: Mapping[Column, np.ndarray] = field(default_factory=dict[Column, np.ndarray])

    @property
    def counted(self) -> int:
        """Tokens that carry loss."""
        return int(self.weights.sum())


def pack_groups(groups: Iterable[Group], pack_tokens: int, window: int = 1024) -> Iterator[list[Group]]:
    """Put groups into packs by best-fit bin packing, over a sliding window of groups.

    Takes `window` groups at a time. Places first the groups longer than an eighth of a pack, longest first, then the
    others in their order. Each group goes into the open pack that it fills best, or into a new pack. (Sorting all
    groups by length would not fill packs better, and would put groups of one length, often of one kind, into the same
    step.)

    Yields a pack when it is full. After each window, also yields the packs that are too full for the window's shortest
    group, and the fullest packs beyond `window / 8`. The others stay open for the next window, so memory does not grow
    with the data. The order depends only on the input.

    Raises:
        ValueError: a group is longer than a pack.
    """
    open_by_room: dict[int, list[list[Group]]] = {}  # free tokens -> the open packs with exactly this many
    rooms: list[int] = []  # the keys of `open_by_room`, sorted
    remaining = iter(groups)
    while batch := [(sum([len(d.tokens) for d in group]), group) for group in islice(remaining, window)]:
        lengths = [length for length, _ in batch]
        if max(lengths) > pack_tokens:
            raise ValueError(f"a group of {max(lengths)} tokens does not fit a pack of {pack_tokens}")
        batch.sort(key=lambda item: item[0] if 8 * item[0] > pack_tokens else 0, reverse=True)
        for length, group in batch:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                pack, room = [group], pack_tokens - length
            else:
                packs = open_by_room[rooms[place]]
                pack, room = packs.pop(), rooms[place] - length
                pack.append(group)
                if not packs:
                    del open_by_room[rooms.pop(place)]
            if room == 0:
                yield pack
            elif room in open_by_room:
                open_by_room[room].append(pack)
            else:
                open_by_room[room] = [pack]
                insort(rooms, room)
        shortest, too_many = min(lengths), sum(map(len, open_by_room.values())) - window // 8
        while rooms and (rooms[0] < shortest or too_many > 0):
            closing = open_by_room.pop(rooms.pop(0))
            too_many -= len(closing)
            yield from closing
    for room in rooms:
        yield from open_by_room[room]


def pack_schema(vocab_size: int) -> pa.Schema:
    """Return the schema of prepared packs. Tokens take two bytes if the vocabulary is small enough, else four."""
    import pyarrow as pa

    return pa.schema(
        {
            "tokens": pa.list_(pa.uint16() if vocab_size <= 65536 else pa.uint32()),
            "weights": pa.list_(pa.uint8()),
            "lengths": pa.list_(pa.int32()),
        }
    )


def packs_table(packs: Sequence[Sequence[Group]], vocab_size: int) -> pa.Table:
    """Return a table with one row for each pack of `pack_groups`."""
    import pyarrow as pa

    documents = [[d for group in pack for d in group] for pack in packs]
    columns = {
        "tokens": [[d.tokens for d in pack] for pack in documents],
        "weights": [[d.weights for d in pack] for pack in documents],
        "lengths": [[np.array([len(d.tokens) for d in pack])] for pack in documents],
    }
    schema = pack_schema(vocab_size)
    return pa.Table.from_arrays([list_column(columns[f.name], f.type.value_type) for f in schema], schema=schema)


def list_column(rows: list[list[np.ndarray]], value_type: pa.DataType) -> pa.ListArray:
    """Join each row's arrays to one list, without a Python object for each value. Returns a list for each row."""
    import pyarrow as pa

    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([sum([len(part) for part in row]) for row in rows], out=offsets[1:])
    parts = [part for row in rows for part in row]
    values = np.concatenate(parts) if parts else np.zeros(0)
    return pa.ListArray.from_arrays(offsets, pa.array(values.astype(value_type.to_pandas_dtype())))


def pack_from_row(table: pa.Table, row: int, id: int, columns: Iterable[Column] = ()) -> Pack:
    """Return one row of a table as a Pack with these columns, without a copy. `id` is its place in the dataset."""

    def values(name: str) -> np.ndarray:
        return table[name][row].values.to_numpy()

    return Pack(
        id=id,
        tokens=values("tokens"),
        weights=values("weights"),
        lengths=values("lengths"),
        columns={column: values(column.name) for column in columns},
    )
