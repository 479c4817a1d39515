"""Read packs from a prepared dataset, and define the order in which an epoch reads them.

    <cache>/datasets/<key>/manifest.json    which units make up the dataset, and its totals
    <cache>/datasets/<key>/rejects.jsonl    the rows that could not be used: file, line, reason
    <cache>/units/<key>.parquet             the packs of one unit: a piece of a source file, shared between datasets

Each row of a unit's file (a shard) is a pack. Its columns are lists: `tokens` uint16 or uint32, `weights` uint8,
`lengths` int32. The manifest names units by their hash, so it cannot name files outside its cache. The other parts of
the manifest are checked when they are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import Field, ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import FormatName
from minimind_ray.config.section import Section
from minimind_ray.config.stages import StageName
from minimind_ray.data.columns import Column
from minimind_ray.data.files import atomic_output, join, locate, one_line
from minimind_ray.data.pack import Pack, pack_from_row, pack_schema
from minimind_ray.data.storage import is_url, read_from

FORMAT = 4
ROW_GROUP = 64
WINDOW = 16

Count = Annotated[int, Field(ge=0)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class UnitStats(Section):
    """The counts of one encoded unit. `row_groups` counts the packs in each row group of its shard.

    Each row is kept, rejected, left out because it is too long, or held out because it belongs to the other split.
    """

    key: Key
    rows: Count
    kept: Count
    rejected: Count
    held_out: Count
    damaged: Count = Field(description="1 if the file is damaged in this unit")
    documents: Count
    tokens: Count
    counted_tokens: Count = Field(description="tokens that carry loss")
    split: Count = Field(description="texts split at max_seq_len")
    cut: Count = Field(description="documents cut at max_seq_len")
    cut_tokens: Count = Field(description="tokens that were cut off")
    left_out: Count = Field(description="conversations and pairs left out because they are too long")
    shortened: Count = Field(description="conversations and pairs that lost turns or the beginning of a question")
    too_long: dict[int, Count] = Field(description="the rows left out, by their length in tokens, rounded up")
    ignored: dict[str, Count] = Field(description="rows that have a field which nothing reads, by field")
    row_format: FormatName | None = Field(description="the format of the first row that has one")
    format_line: Count = Field(description="the line of this row, counted from the unit's first line")
    row_groups: tuple[Annotated[int, Field(gt=0, le=ROW_GROUP)], ...]
    bytes: Count = Field(description="size of the shard")


class Manifest(Section):
    """The units of a prepared dataset in the order of its sources, and the inputs that they were made from."""

    format: Literal[4]
    stage: StageName
    split: Literal["train", "val"]
    tokenizer: str = Field(description="the tokenizer's fingerprint")
    pack_tokens: Annotated[int, Field(gt=0)]
    sources: dict[str, int] = Field(description="path or URL, and its size")
    units: tuple[UnitStats, ...]

    def total(self, count: str) -> int:
        """Return the sum of a count over all units."""
        return sum(getattr(unit, count) for unit in self.units)

    @property
    def formats(self) -> list[FormatName]:
        """The formats of the rows, in the order of the files."""
        return list(dict.fromkeys(unit.row_format for unit in self.units if unit.row_format))

    @property
    def n_packs(self) -> int:
        """Packs in all units."""
        return sum(sum(unit.row_groups) for unit in self.units)


class PackStore:
    """Random access to the packs of a prepared dataset. Reading in `epoch_order` is fast.

    Caches the row groups read last, so a pass in epoch order reads each row group once. `row_groups` counts the packs
    in each row group. Pass `path` to other processes, not the store. Requests to a failing object store are retried.

    Raises:
        UserError: the manifest or (at its first read) a shard is missing or broken. The message names the file and says
            how to repair it.
    """

    def __init__(self, path: str, columns: Mapping[Column, str] | None = None) -> None:
        self.path = path
        self.columns = dict(columns or {})
        self.manifest = read_manifest(path)
        self._filesystem, root = locate(path)
        # An OSError means damage only on a disk: an object store may work again later.
        self._damage = (pa.ArrowException,) if is_url(path) else (OSError, pa.ArrowException)
        cache = root.rstrip("/").rsplit("/", 2)[0]
        units = self._units = self.manifest.units
        self._shards = [join(cache, "units", f"{unit.key}.parquet") for unit in units]
        self._groups = [(shard, group) for shard, unit in enumerate(units) for group in range(len(unit.row_groups))]
        self.row_groups = tuple(packs for unit in units for packs in unit.row_groups)
        self._starts = [0, *accumulate(self.row_groups)]
        self.n_packs = self._starts[-1]
        self.n_documents = self.manifest.total("documents")
        self.n_tokens = self.manifest.total("tokens")
        self._group = lru_cache(WINDOW)(self._read_group)
        self._shard = lru_cache(WINDOW)(self._open_shard)
        self._column_files = {
            column: read_from(url, partial(self._open_column, url)) for column, url in self.columns.items()
        }

    def read(self, ids: Iterable[int]) -> list[Pack]:
        """Return the packs with these ids, in this order."""
        packs: list[Pack] = []
        for pack in ids:
            if not 0 <= pack < self.n_packs:
                raise IndexError(f"pack {pack} of {self.n_packs}")
            group = bisect_right(self._starts, pack) - 1
            packs.append(self._packs_of(group)[int(pack) - self._starts[group]])
        return packs

    def __iter__(self) -> Iterator[Pack]:
        for group in range(len(self._groups)):
            yield from self._packs_of(group)

    def _packs_of(self, group: int) -> list[Pack]:
        return read_from(self.path, partial(self._group, group))

    def _open_shard(self, shard: int) -> pq.ParquetFile:
        path, unit = self._shards[shard], self._units[shard]
        info = self._filesystem.get_file_info(path)
        if info.type != fs.FileType.File:
            raise UserError(f"{path}: this shard of {self.path} is missing; prepare again")
        if info.size != unit.bytes:
            raise _broken(path, f"it has {info.size} bytes, but the manifest says {unit.bytes}")
        file = _open_parquet(self._filesystem, path, self._damage)
        if _row_groups(file) != unit.row_groups:
            raise _broken(path, "its row groups differ from the manifest")
        return file

    def _open_column(self, url: str) -> pq.ParquetFile:
        filesystem, path = locate(url)
        file = _open_parquet(filesystem, path, self._damage)
        if _row_groups(file) != self.row_groups:
            raise _broken(url, f"its row groups differ from {self.path}")
        return file

    def _read_group(self, group: int) -> list[Pack]:
        shard, local = self._groups[group]
        path = self._shards[shard]
        table = _read_lists(self._shard(shard), path, local, SHARD_SCHEMAS, self._damage)
        for column, url in self.columns.items():
            file = self._column_files[column]
            values = _read_lists(file, url, group, (column_schema(column),), self._damage)
            table = table.append_column(column.name, values[column.name])
        packs = [pack_from_row(table, row, self._starts[group] + row, self.columns) for row in range(len(table))]
        for pack in packs:
            if not len(pack.lengths) or pack.lengths.min() < 1 or pack.lengths.sum() != len(pack.tokens):
                raise _broken(path, f"the document lengths of pack {pack.id} do not add up to its tokens")
            if len(pack.weights) != len(pack.tokens):
                raise _broken(path, f"pack {pack.id} has {len(pack.tokens)} tokens, but {len(pack.weights)} weights")
            for column, values in pack.columns.items():
                if len(values) != len(pack.lengths if column.axis == "document" else pack.tokens):
                    raise _broken(self.columns[column], f"pack {pack.id} needs one value for each {column.axis}")
        return packs


SHARD_SCHEMAS = (pack_schema(2**16), pack_schema(2**32))


def column_schema(column: Column) -> pa.Schema:
    """Return the schema of a column's file: one list of values for each pack."""
    return pa.schema({column.name: pa.list_(pa.from_numpy_dtype(column.dtype))})


def read_manifest(path: str) -> Manifest:
    """Return the manifest of the prepared dataset in directory `path`.

    Raises:
        UserError: the manifest is missing or broken.
    """
    filesystem, root = locate(path)
    file = join(path, "manifest.json")

    def read() -> bytes:
        with filesystem.open_input_stream(join(root, "manifest.json"), compression=None) as stream:
            return stream.read()

    try:
        return Manifest.model_validate_json(read_from(path, read))
    except FileNotFoundError:
        raise UserError(f"{path}: no prepared dataset (no manifest.json); run `minimind-ray data prepare`") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: broken ({where}: {first['msg']}); delete {path} and prepare again") from None


def write_column(store: PackStore, column: Column, url: str, values: Iterable[np.ndarray]) -> None:
    """Write a column of all packs of a store to one Parquet file, with the same row groups as the store.

    `values` has one array for each pack, in the packs' order.
    """
    filesystem, path = locate(url)
    schema, packs = column_schema(column), iter(values)
    with atomic_output(filesystem, path) as stream, pq.ParquetWriter(stream, schema) as writer:
        for size in store.row_groups:
            lists = [np.asarray(next(packs), column.dtype) for _ in range(size)]
            writer.write_table(pa.table({column.name: lists}, schema), row_group_size=size)
    assert next(packs, None) is None, "more values than packs"


def epoch_order(row_groups: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Return the ids of all packs, int64, in the order of this epoch: a permutation that depends only on the arguments.

    The row groups are shuffled first, and then the packs within each 16 consecutive row groups. So reading stays local.
    With up to 16 row groups (1024 packs), the shuffle is complete.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    starts = [0, *accumulate(row_groups)]
    groups = random.permutation(len(row_groups)).tolist()
    windows = [
        random.permutation(np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups[i : i + WINDOW]]))
        for i in range(0, len(groups), WINDOW)
    ]
    return np.concatenate([np.empty(0, np.int64), *windows])


def _open_parquet(filesystem: fs.FileSystem, path: str, damage: tuple[type[Exception], ...]) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True)
    except damage as error:
        raise _broken(path, one_line(error)) from None


def _row_groups(file: pq.ParquetFile) -> tuple[int, ...]:
    return tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))


def _read_lists(
    file: pq.ParquetFile, path: str, group: int, schemas: tuple[pa.Schema, ...], damage: tuple[type[Exception], ...]
) -> pa.Table:
    """Read a row group and check that it has one of these schemas and no nulls.

    `damage` are the exceptions that mean a damaged file.
    """
    try:
        table = file.read_row_group(group, use_threads=False).combine_chunks()
        table.validate(full=True)
    except damage as error:
        raise _broken(path, one_line(error)) from None
    if table.schema.remove_metadata() not in schemas:
        raise _broken(path, f"its columns are {', '.join(f'{f.name} {f.type}' for f in table.schema)}")
    if any(column.null_count or column.chunk(0).values.null_count for column in table.columns):
        raise _broken(path, "it has nulls")
    return table


def _broken(path: str, why: str) -> UserError:
    return UserError(f"{path}: this prepared file was changed or is damaged ({why}); delete it and prepare again")
