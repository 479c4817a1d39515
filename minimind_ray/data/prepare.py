"""Prepare a dataset: encode source files into packs, and do each piece of work only once.

Each source is cut into units: .jsonl and .txt files at a line end after every 8 MB, Parquet files at row groups. Other
files are a single unit.
The cache holds each unit's result under a key: a hash of the unit's bytes, the tokenizer, the settings and
ENCODING_VERSION. So a second run finds everything in the cache, a changed file needs only its changed units encoded
again, a killed run continues where it was, and two runs at the same time can only write the same files.

    <cache>/units/<key>.parquet, .rejects.jsonl, .json    packs, rejected rows and counts of a unit; .json is last
    <cache>/units/<key>.clusters.parquet                  the clusters of a unit's documents, for validation only
    <cache>/sources/<key>.json                            the units of a file, so that it is not hashed again
    <cache>/datasets/<key>/                               see store.py
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig, FormatName
from minimind_ray.config.section import Section
from minimind_ray.config.stages import STAGES, StageName
from minimind_ray.data.clusters import CLUSTER, clusters_file, clusters_name, clusters_table, count_clusters
from minimind_ray.data.clusters import SCHEMA as CLUSTER_SCHEMA
from minimind_ray.data.columns import Column
from minimind_ray.data.encode import RowEncoder, remarks
from minimind_ray.data.files import TEMPORARY, absolute, atomic_output, exists, join, locate, one_line
from minimind_ray.data.formats import count_ignored, is_meaningful, mixed
from minimind_ray.data.pack import Group, pack_groups, pack_schema, packs_table
from minimind_ray.data.records import (
    CHUNK,
    Damage,
    Part,
    Reject,
    Row,
    Source,
    current_version,
    discover,
    parse_row,
    read_raw,
)
from minimind_ray.data.store import FORMAT, ROW_GROUP, Manifest, UnitStats, read_manifest
from minimind_ray.data.tokenizer import Tokenizer

UNIT_BYTES = 8 << 20
STALE_SECONDS = 24 * 3600
FRESH_SECONDS = 2
ENCODING_VERSION = 1
"""Part of every key of the cache. Raise it when the same files, tokenizer and settings give different packs or counts
than before; tests/data/test_encoding_version.py fails until you do. A new version prepares all data again, and runs
that began with an older version cannot be resumed. Reworded comments, errors and reject reasons need no new version."""

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a source to encode, with the key of its result and its size in bytes."""

    source: Source
    part: Part
    key: str
    size: int


@dataclass(frozen=True)
class Encoding:
    """The settings of all units of a dataset. `split` None: the dataset contains every row.

    `cluster` is `eval.cluster`. `clusters` says whether the clusters of documents are stored, too.
    """

    stage: StageName
    config: DataConfig
    tokenizer: Tokenizer
    split: Split | None
    cluster: str | None = None
    clusters: bool = False

    def key(self, *content: object) -> str:
        """Return the cache key of the result of a unit with this content."""
        config = self.config
        options = (
            config.max_seq_len, config.pack_tokens, config.long_documents, config.long_conversations,
            config.format, sorted(config.fields.items()), sorted(config.ignore),
        )  # fmt: skip
        if self.cluster and is_meaningful(self.cluster):  # Without eval.cluster, rows with this field may be refused.
            options += (self.cluster,)
        split = (self.split, config.val_fraction) if self.split else None
        return _hash([ENCODING_VERSION, self.stage, self.tokenizer.fingerprint, options, split, content])

    def holds_out(self, content: bytes) -> bool:
        """Whether the row with this content belongs to the other split. Its duplicates belong to the same split."""
        if self.split is None:
            return False
        place = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
        return (place < self.config.val_fraction) != (self.split == "val")


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of preparing: rows and source bytes read so far, and all bytes to read."""

    rows: int
    done: int
    total: int


RunUnits = Callable[[Sequence[Unit], Encoding], Iterable[UnitStats]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared dataset at `path` (for a PackStore), with the numbers of units encoded now and found in the cache.

    `cluster` is `eval.cluster`.
    """

    path: str
    manifest: Manifest
    config: DataConfig
    cluster: str | None
    made: int
    reused: int
    seconds: float

    @property
    def rejects(self) -> str:
        """The file that lists the rejected rows: file, line, reason."""
        return join(self.path, "rejects.jsonl")

    @property
    def columns(self) -> dict[Column, str]:
        """The files of the columns that were made with the packs: the clusters of a validation set."""
        return {CLUSTER: clusters_file(self.path, self.cluster)} if self.manifest.split == "val" else {}

    @property
    def fullness(self) -> float:
        """How full the packs are: tokens over capacity, 0 to 1."""
        return self.manifest.total("tokens") / max(1, self.manifest.n_packs * self.manifest.pack_tokens)

    def summary(self) -> str:
        """Return a summary in a few lines."""
        total = self.manifest.total
        formats = f" ({', '.join(self.manifest.formats)})" if self.manifest.formats else ""
        cut = f", {total('cut'):,} cut by {total('cut_tokens'):,} tokens" if total("cut") else ""
        left_out = f" + {total('left_out'):,} too long" if total("left_out") else ""
        rejects = f"; see {self.rejects}" if total("rejected") else ""
        made = f"{self.made} {'piece' if self.made == 1 else 'pieces'} encoded, " if self.made else "nothing to do, "
        return "\n".join(
            [
                f"{self.manifest.split}: {total('rows'):,} rows{formats} = {total('kept'):,} kept + "
                f"{total('rejected'):,} rejected{left_out} + {total('held_out'):,} held out{rejects}",
                f"  {total('documents'):,} documents{cut}, {total('tokens'):,} tokens, {self.manifest.n_packs:,} packs "
                f"{self.fullness:.0%} full ({made}{self.reused} found in the cache, {self.seconds:.1f} s)",
                *(f"  {remark}" for remark in self.remarks()),
            ]
        )

    def remarks(self) -> list[str]:
        """Return sentences for the user about left out and shortened rows, ignored fields, and clusters."""
        total, units = self.manifest.total, self.manifest.units
        too_long = sum((Counter(unit.too_long) for unit in units), Counter[int]())
        ignored = Counter[str]()
        for unit in units:
            for field, rows in unit.ignored.items():
                count_ignored(ignored, field, rows)
        counts = total("kept"), total("shortened"), too_long, ignored
        lines = remarks(self.manifest.stage, self.config, *counts, self.cluster)
        for clusters in map(count_clusters, self.columns.values()):
            if clusters != total("kept"):
                noun = STAGES[self.manifest.stage].clusters(self.cluster)
                lines.append(f"{total('kept'):,} rows have {clusters:,} different {noun}, which `compare` resamples")
        return lines


def run_units_here(units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
    """Encode units one after another in this process."""
    for unit in units:
        yield encode_unit(unit, encoding)


def worth_spreading(units: Sequence[Unit]) -> bool:
    """Whether encoding in other processes would save time, although they take seconds to start.

    Assumes that compressed text is a fifth as long as the text.
    """
    text = sum(5 * unit.size if unit.source.compressed else unit.size for unit in units)
    return len(units) > 1 and text > UNIT_BYTES


def prepare(
    stage: StageName,
    config: DataConfig,
    split: Split,
    tokenizer: Tokenizer,
    run_units: RunUnits = run_units_here,
    report: Callable[[Progress], None] = lambda progress: None,
    cluster: str | None = None,
) -> Prepared:
    """Make the packs of one split of the data that are not in the cache yet; for validation, also their clusters.

    With `data.val`, each split has its own files. Without it, `data.val_fraction` of the rows of `data.train` are held
    out for validation, chosen by a hash of their content. `run_units` encodes the missing units, in any order.
    `cluster` is `eval.cluster`.

    Raises:
        UserError: the sources match nothing or hold no rows; more rows are bad than `data.max_reject_fraction` allows;
            a file is damaged and that setting is below 1; a source changes meanwhile; the cache cannot be written; a
            validation row does not have the field `cluster`.
    """
    started = time.perf_counter()
    config = config.model_copy(update={"cache_dir": absolute(config.cache_dir)})
    with _cache_errors(config):
        encoding, sources = encoding_of(stage, config, split, tokenizer, cluster)
        cache = _Cache(config.cache_dir)
        units = plan_units(sources, encoding)
        by_key = {unit.key: unit for unit in units}
        found = cache.find(by_key, encoding)
        missing = [unit for key, unit in by_key.items() if key not in found]
        if missing:
            rows = done = 0
            total = sum(unit.size for unit in missing)
            report(Progress(rows, done, total))
            for stats in run_units(missing, encoding):
                rows, done = rows + stats.rows, done + by_key[stats.key].size
                report(Progress(rows, done, total))
            found = cache.find(by_key, encoding)
            if len(found) < len(by_key):
                raise UserError(
                    f"data.cache_dir {config.cache_dir}: files that other processes wrote there are missing here; "
                    "give a directory that all nodes share, or an object store"
                )
        _require_one_format(units, found)
        manifest = _manifest(encoding, split, sources, units, found)
        path = cache.publish(manifest, units)
        if encoding.clusters:
            cache.join_clusters(manifest, path, cluster)
    seconds = time.perf_counter() - started
    prepared = Prepared(path, manifest, config, cluster, len(missing), len(by_key) - len(missing), seconds)
    _check(prepared, config, [unit.source.path for unit in units if found[unit.key].damaged])
    return prepared


def find_prepared(
    stage: StageName, config: DataConfig, split: Split, tokenizer: Tokenizer, cluster: str | None = None
) -> Manifest | None:
    """Return the manifest of the dataset if it is completely in the cache, else None. Does not read the sources.

    Raises:
        UserError: the sources match nothing, or the cache cannot be read.
    """
    config = config.model_copy(update={"cache_dir": absolute(config.cache_dir)})
    with _cache_errors(config):
        encoding, sources = encoding_of(stage, config, split, tokenizer, cluster)
        cache = _Cache(config.cache_dir)
        scans = [scan for source in sources if (scan := cache.known_scan(source))]
        if len(scans) < len(sources):
            return None
        units = _units(sources, scans, encoding)
        found = cache.find((unit.key for unit in units), encoding)
        if any(unit.key not in found for unit in units):
            return None
        return _manifest(encoding, split, sources, units, found)


def _require_one_format(units: Sequence[Unit], found: dict[str, UnitStats]) -> None:
    """Check that all rows of a file have one format, across units. Encoding has checked this within each unit.

    Raises:
        UserError: two units of a file have different formats.
    """
    first: dict[str, tuple[FormatName, int]] = {}
    for unit in units:
        stats = found[unit.key]
        if stats.row_format is not None:
            here = (stats.row_format, unit.part.first_line + stats.format_line)
            before = first.setdefault(unit.source.path, here)
            if before[0] != here[0]:
                raise UserError(mixed(unit.source.path, before, here))


def _manifest(
    encoding: Encoding, split: Split, sources: Sequence[Source], units: Sequence[Unit], found: dict[str, UnitStats]
) -> Manifest:
    return Manifest(
        format=FORMAT,
        stage=encoding.stage,
        split=split,
        tokenizer=encoding.tokenizer.fingerprint,
        pack_tokens=encoding.config.pack_tokens,
        sources={source.path: source.size for source in sources},
        units=tuple(found[unit.key] for unit in units),
    )


def encoding_of(
    stage: StageName, config: DataConfig, split: Split, tokenizer: Tokenizer, cluster: str | None = None
) -> tuple[Encoding, list[Source]]:
    """Return the encoding of a split's rows, and the source files of the split.

    Raises:
        UserError: `data.train` is not set, matches nothing, or shares a file with `data.val`.
    """
    files = config.train if config.val is None or split == "train" else config.val
    if files is None:
        raise UserError("data.train is not set: give the training files, such as --train 'data/*.jsonl'")
    sources = discover(files, config.text_files)
    if split == "train" and config.val is not None:
        val = {source.path for source in discover(config.val)}
        if both := next((source.path for source in sources if source.path in val), None):
            raise UserError(
                f"{both} is in data.train and in data.val, but a model cannot be validated on its training rows; name "
                "the training files without it"
            )
    held_out = config.val is None and (split == "val" or config.val_fraction > 0)
    return Encoding(stage, config, tokenizer, split if held_out else None, cluster, split == "val"), sources


def require_undamaged(damaged: Sequence[str], split: str, rejects: str, config: DataConfig) -> None:
    """Check that no file is damaged. The rows after the damage cannot be counted, so no fraction of rows applies.

    Raises:
        UserError: a file is damaged, and `data.max_reject_fraction` is not 1.
    """
    if damaged and config.max_reject_fraction < 1:
        files = list(dict.fromkeys(damaged))
        more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
        raise UserError(
            f"data.{split}: damaged: {', '.join(files[:3])}{more}; the rows after the damage are lost ({rejects} says "
            "where and why); repair or remove these files, or set data.max_reject_fraction to 1 to use the other rows"
        )


def _check(prepared: Prepared, config: DataConfig, damaged: Sequence[str]) -> None:
    total = prepared.manifest.total
    rows, rejected = total("rows"), total("rejected")
    split = f"data.{prepared.manifest.split}"
    if rows == 0:
        raise UserError(f"{split}: no rows, only empty files, in {', '.join(list(prepared.manifest.sources)[:3])}")
    assert rows == total("kept") + rejected + total("left_out") + total("held_out"), "a row was lost"
    require_undamaged(damaged, prepared.manifest.split, prepared.rejects, config)
    if rejected > config.max_reject_fraction * rows:
        why, example, count = _commonest(prepared.rejects)
        raise UserError(
            f"{split}: {rejected:,} of {rows:,} rows cannot be used, more than data.max_reject_fraction "
            f"{config.max_reject_fraction:g} allows; {count:,} times: {why} (as in {example}); "
            f"correct the rows that {prepared.rejects} lists, or raise the limit"
        )


def _commonest(path: str) -> tuple[str, str, int]:
    """Return the most common reason, the place (file:line) of an example, and the count. Ignores numbers in reasons."""
    counts: Counter[str] = Counter()
    examples: dict[str, dict[str, Any]] = {}
    filesystem, inner = locate(path)
    with filesystem.open_input_stream(inner) as stream:
        for reject in _json_lines(stream):
            kind = re.sub(r"\d+", "#", reject["reason"])
            counts[kind] += 1
            examples.setdefault(kind, reject)
    kind, count = counts.most_common(1)[0]
    example = examples[kind]
    return example["reason"], f"{example['file']}:{example['line']}", count


# Cutting sources into units


class _Cut(Section):
    start: int
    stop: int | None
    first_line: int
    size: int
    content: str


class _Scan(Section):
    """The units that a file of this version was cut into."""

    version: str
    cuts: tuple[_Cut, ...]


def plan_units(sources: Sequence[Source], encoding: Encoding) -> list[Unit]:
    """Cut sources into units. Reads each file once, unless the cache has its units for the same size and time.

    Raises:
        UserError: a file cannot be read, or is not Parquet although its name ends with .parquet.
    """
    cache = _Cache(encoding.config.cache_dir)
    with ThreadPoolExecutor(8) as threads:
        scans = list(threads.map(cache.scan, sources))
    return _units(sources, scans, encoding)


def _units(sources: Sequence[Source], scans: Sequence[_Scan], encoding: Encoding) -> list[Unit]:
    return [
        Unit(
            source,
            Part(cut.start, cut.stop, cut.first_line),
            # The place matters: an array is an error at the beginning of a .jsonl file, but elsewhere only a bad row.
            encoding.key(source.suffix, source.whole, cut.content, cut.start == 0),
            cut.size,
        )
        for source, scan in zip(sources, scans, strict=True)
        for cut in scan.cuts
    ]


def _scan(source: Source) -> _Scan:
    filesystem, path = locate(source.path)
    try:
        with filesystem.open_input_file(path) as file:
            if source.by_lines:
                cuts = tuple(_cut_lines(file))
            elif source.suffix == ".parquet":
                cuts = tuple(_cut_row_groups(file))
            else:
                digest = _digest(file)
                cuts = (_Cut(start=0, stop=None, first_line=1, size=source.size, content=digest),) * (source.size > 0)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source.path}: cannot be read: {one_line(error)}; repair or remove it") from None
    return _Scan(version=source.version, cuts=cuts)


def _cut_lines(file: pa.NativeFile) -> Iterator[_Cut]:
    """Cut after the first line end beyond each UNIT_BYTES. Appending to the file changes only the last piece."""
    start, line = 0, 1
    length, lines, digest = 0, 0, _blake2b()
    while chunk := file.read(CHUNK):
        while chunk:
            newline = chunk.find(b"\n", max(0, UNIT_BYTES - length - 1))
            piece, chunk = (chunk, b"") if newline < 0 else (chunk[: newline + 1], chunk[newline + 1 :])
            digest.update(piece)
            length, lines = length + len(piece), lines + piece.count(b"\n")
            if newline >= 0:
                yield _Cut(start=start, stop=start + length, first_line=line, size=length, content=digest.hexdigest())
                start, line = start + length, line + lines
                length, lines, digest = 0, 0, _blake2b()
    if length:
        yield _Cut(start=start, stop=start + length, first_line=line, size=length, content=digest.hexdigest())


def _cut_row_groups(file: pa.NativeFile) -> Iterator[_Cut]:
    content = _digest(file)
    metadata = pq.ParquetFile(file).metadata
    start, line, size, rows = 0, 1, 0, 0
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        size, rows = size + info.total_byte_size, rows + info.num_rows
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            stop = group + 1
            yield _Cut(start=start, stop=stop, first_line=line, size=size, content=f"{content}:{start}:{stop}")
            start, line, size, rows = stop, line + rows, 0, 0


def _digest(file: pa.NativeFile) -> str:
    digest = _blake2b()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


# Encoding a unit


@dataclass(slots=True)
class Seen:
    """Counts of a unit: rows read, rows held out for the other split, and 1 if the file is damaged."""

    rows: int = 0
    held_out: int = 0
    damaged: int = 0


def unit_groups(unit: Unit, encoding: Encoding, seen: Seen) -> tuple[Iterator[Group | Reject], RowEncoder]:
    """Return a unit's rows as documents or rejects, and the encoder that counts them. Adds to the counts in `seen`."""

    def read() -> Iterator[Row | Reject]:
        for raw in read_raw(unit.source, unit.part):
            seen.rows += 1
            if isinstance(raw, Reject):
                seen.damaged += isinstance(raw, Damage)
                yield raw
            elif encoding.holds_out(raw.content):
                seen.held_out += 1
            else:
                yield parse_row(unit.source.path, raw)

    encoder = RowEncoder(
        encoding.stage, encoding.tokenizer, encoding.config, encoding.cluster, clusters=encoding.clusters
    )
    return encoder.encode(read()), encoder


def encode_unit(unit: Unit, encoding: Encoding) -> UnitStats:
    """Encode a unit into packs in the cache. The memory needed does not depend on the unit's size.

    Raises:
        UserError: the source cannot be read or has changed since it was cut; the cache cannot be written; a validation
            row does not have the field of `eval.cluster`.
    """
    cache = _Cache(encoding.config.cache_dir)
    seen = Seen()
    outcomes, encoder = unit_groups(unit, encoding, seen)
    documents = tokens = counted = 0
    row_groups: list[int] = []
    vocab_size = encoding.tokenizer.vocab_size

    def groups(rejects: pa.NativeFile) -> Iterator[Group]:
        nonlocal documents
        for item in outcomes:
            if isinstance(item, Reject):
                # Leave out the file's name and count lines from the unit's first: another file may have an equal unit.
                line = item.line - unit.part.first_line
                rejects.write(_json_line({"line": line, "reason": item.reason}))
            else:
                documents += len(item)
                yield item

    with (
        _cache_errors(encoding.config),
        cache.output(unit.key, "rejects.jsonl") as rejects,
        cache.output(unit.key, "parquet") as shard,
        cache.clusters(unit.key, encoding) as write_clusters,
    ):
        packs = pack_groups(groups(rejects), encoding.config.pack_tokens)
        with pq.ParquetWriter(shard, pack_schema(vocab_size), compression="zstd", write_statistics=False) as writer:
            while batch := list(islice(packs, ROW_GROUP)):
                table = packs_table(batch, vocab_size)
                writer.write_table(table, row_group_size=ROW_GROUP)
                write_clusters(batch)
                row_groups.append(len(batch))
                tokens += len(table["tokens"].combine_chunks().values)
                counted += int(table["weights"].combine_chunks().values.to_numpy().sum())
        size = shard.tell()
        if current_version(unit.source) != unit.source.version:
            raise UserError(f"{unit.source.path}: it has changed while it was read; run again when it is complete")
    stats = UnitStats(
        key=unit.key,
        **asdict(seen),
        **_row_counts(encoder, unit.part.first_line),
        documents=documents,
        tokens=tokens,
        counted_tokens=counted,
        row_groups=tuple(row_groups),
        bytes=size,
    )
    with _cache_errors(encoding.config), cache.output(unit.key, "json") as stream:
        stream.write(stats.model_dump_json().encode())
    return stats


def _row_counts(encoder: RowEncoder, first_line: int) -> dict[str, Any]:
    """Return the fields of UnitStats about a unit's rows and their format. The unit begins at `first_line`."""
    tally = encoder.tally
    row_format, line = next(iter(encoder.reader.formats.values()), (None, first_line))
    return {
        "kept": tally.kept,
        "rejected": tally.rejected,
        "left_out": tally.left_out,
        "split": tally.split,
        "cut": tally.cut,
        "cut_tokens": tally.cut_tokens,
        "shortened": tally.shortened,
        "too_long": dict(tally.too_long),
        "ignored": dict(encoder.reader.ignored),
        "row_format": row_format,
        "format_line": line - first_line,
    }


# The cache


class _Cache:
    """The files of units and datasets, each named by the hash of its inputs.

    Several processes may make the same file at the same time, without a lock: each writes a file of a random name and
    renames it at the end. The second process replaces the file by the same content.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, self._root = locate(url)

    def output(self, key: str, suffix: str) -> Any:
        """Return an atomic output for a file of the unit with this key."""
        return atomic_output(self._filesystem, join(self._root, "units", f"{key}.{suffix}"))

    @contextmanager
    def clusters(self, key: str, encoding: Encoding) -> Generator[Callable[[Sequence[Sequence[Group]]], None]]:
        """Yield a function that writes the clusters of a unit's packs, or nothing without `encoding.clusters`."""
        if not encoding.clusters:
            yield lambda packs: None
            return
        with (
            self.output(key, clusters_name(encoding.cluster)) as stream,
            pq.ParquetWriter(stream, CLUSTER_SCHEMA) as writer,
        ):
            yield lambda packs: writer.write_table(clusters_table(packs), row_group_size=ROW_GROUP)

    def join_clusters(self, manifest: Manifest, dataset: str, cluster: str | None) -> None:
        """Join the clusters of all units to the column CLUSTER of the dataset, unless its file exists."""
        path = clusters_file(dataset, cluster)
        if exists(path):
            return
        name = clusters_name(cluster)
        paths = [join(self._root, "units", f"{unit.key}.{name}") for unit in manifest.units if unit.row_groups]
        filesystem, inner = locate(path)
        with (
            ThreadPoolExecutor(8) as threads,
            atomic_output(filesystem, inner) as stream,
            pq.ParquetWriter(stream, CLUSTER_SCHEMA) as writer,
        ):
            for table in threads.map(lambda path: pq.read_table(path, filesystem=self._filesystem), paths):
                writer.write_table(table, row_group_size=ROW_GROUP)

    def find(self, keys: Iterable[str], encoding: Encoding) -> dict[str, UnitStats]:
        """Return the complete units in the cache, by key. Also remove day-old temporary files of killed processes.

        With `encoding.clusters`, a unit without the file of its clusters is not complete.
        """
        folder = join(self._root, "units")
        listing = self._filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        for info in listing:
            # Some stores give no file times.
            if info.base_name.endswith(TEMPORARY) and 0 < (info.mtime_ns or 0) < (time.time() - STALE_SECONDS) * 1e9:
                with suppress(FileNotFoundError):  # Another process may have deleted it.
                    self._filesystem.delete_file(info.path)
        sizes = {info.base_name: info.size for info in listing}
        needed = ["json", "rejects.jsonl", *([clusters_name(encoding.cluster)] if encoding.clusters else [])]
        candidates = [key for key in keys if all(f"{key}.{suffix}" in sizes for suffix in needed)]
        with ThreadPoolExecutor(8) as threads:
            stats = threads.map(lambda key: self._load(UnitStats, "units", key), candidates)
        return {unit.key: unit for unit in stats if unit and sizes.get(f"{unit.key}.parquet") == unit.bytes}

    def scan(self, source: Source) -> _Scan:
        """Return the cuts of a source, from the cache if the source has not changed."""
        scan = self.known_scan(source)
        if scan is None:
            scan = _scan(source)
            # Do not cache the cuts of a new file: it could change again within the same tick of the clock.
            if time.time() - source.modified > FRESH_SECONDS:
                path = join(self._root, "sources", f"{self._scan_key(source)}.json")
                with atomic_output(self._filesystem, path) as stream:
                    stream.write(scan.model_dump_json().encode())
        return scan

    def known_scan(self, source: Source) -> _Scan | None:
        """Return the cuts of a source from the cache; None if there are none or the source has changed."""
        scan = self._load(_Scan, "sources", self._scan_key(source))
        return scan if scan and scan.version == source.version else None

    def _scan_key(self, source: Source) -> str:
        return _hash([ENCODING_VERSION, UNIT_BYTES, source.path, source.by_lines])

    def publish(self, manifest: Manifest, units: Sequence[Unit]) -> str:
        """Write the manifest and the rejects of a dataset, if they do not exist. Returns the dataset's path."""
        content = manifest.model_dump_json().encode()
        name = _hash(content.decode())
        path = join(self.url, "datasets", name)
        folder = join(self._root, "datasets", name)
        there = self._filesystem.get_file_info(join(folder, "manifest.json")).type == fs.FileType.File
        if there and read_manifest(path) == manifest:
            return path
        with atomic_output(self._filesystem, join(folder, "rejects.jsonl")) as stream:
            for unit, stats in zip(units, manifest.units, strict=True):
                if stats.rejected:
                    self._copy_rejects(unit, stream)
        with atomic_output(self._filesystem, join(folder, "manifest.json")) as stream:
            stream.write(content)
        return path

    def _copy_rejects(self, unit: Unit, to: pa.NativeFile) -> None:
        path = join(self._root, "units", f"{unit.key}.rejects.jsonl")
        with self._filesystem.open_input_stream(path) as stream:
            for reject in _json_lines(stream):
                line = reject["line"] + unit.part.first_line
                to.write(_json_line({"file": unit.source.path, "line": line, "reason": reject["reason"]}))

    def _load(self, kind: Any, folder: str, key: str) -> Any:
        try:
            with self._filesystem.open_input_stream(join(self._root, folder, f"{key}.json")) as stream:
                return kind.model_validate_json(stream.read())
        except (FileNotFoundError, ValidationError):
            return None


@contextmanager
def _cache_errors(config: DataConfig) -> Generator[None]:
    """Turn file errors into a UserError about the cache. Errors of sources are UserErrors already."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data.cache_dir {config.cache_dir}: cannot be used: {one_line(error)}") from error


def _json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _json_lines(stream: pa.NativeFile) -> Iterator[dict[str, Any]]:
    for line in io.TextIOWrapper(stream, "utf-8"):
        yield json.loads(line)


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=20)


def _hash(value: object) -> str:
    digest = _blake2b()
    digest.update(json.dumps(value).encode())
    return digest.hexdigest()
