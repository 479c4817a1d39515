"""Estimate the amount of data from a sample of its rows, for `minimind-ray plan`. Prepares and writes nothing."""

from __future__ import annotations

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import zstandard

from minimind_ray.config.schema import DataConfig
from minimind_ray.config.stages import StageName
from minimind_ray.data.encode import longest_document
from minimind_ray.data.files import locate
from minimind_ray.data.inspect import RejectReason, inspect_rows
from minimind_ray.data.prepare import encoding_of
from minimind_ray.data.records import RawRow, Reject, Row, Source, parse_row, read_raw
from minimind_ray.data.tokenizer import Tokenizer

SAMPLE_SOURCES, SAMPLE_BYTES = 16, 2 << 20


@dataclass(frozen=True)
class Estimate:
    """The size of the training split, scaled up from the sample.

    `rows` counts all rows of the sources; `documents` to `packs` count only the training split. `mean_context` is the
    mean number of tokens that a token attends to. `rejected` of the `sampled` rows cannot be used.
    """

    rows: int
    documents: int
    tokens: int
    counted: int
    packs: int
    mean_context: float
    sampled: int
    rejected: int
    reasons: list[RejectReason]
    remarks: list[str]


def estimate(stage: StageName, config: DataConfig, tokenizer: Tokenizer, cluster: str | None = None) -> Estimate:
    """Encode the first rows of some source files, picked evenly from all, and scale the counts up to all bytes.

    `cluster` is `eval.cluster`.

    Raises:
        UserError: the sources match nothing or cannot be read.
    """
    encoding, sources = encoding_of(stage, config, "train", tokenizer, cluster)
    sizes: dict[str, int] = defaultdict(int)
    for source in sources:
        sizes[source.suffix] += source.size
    picks = np.linspace(0, len(sources) - 1, min(SAMPLE_SOURCES, len(sources))).astype(int)
    rows: list[Row | Reject] = []
    counts: dict[str, int] = defaultdict(int)
    stored: dict[str, float] = defaultdict(float)
    for source in (sources[i] for i in picks):
        sample = list(_first_rows(source, SAMPLE_BYTES // len(picks)))
        counts[source.suffix] += len(sample)
        stored[source.suffix] += _stored_size(source, sample)
        rows += [raw if isinstance(raw, Reject) else parse_row(source.path, raw) for raw in sample]
    total = sum(round(sizes[suffix] * counts[suffix] / stored[suffix]) for suffix in sizes if stored[suffix])
    found = inspect_rows(stage, rows, tokenizer, config, cluster, samples=0)
    held_out = config.val_fraction if encoding.split else 0.0
    longest = longest_document(stage, config)
    scale = total / max(1, len(rows)) * (1 - held_out)
    return Estimate(
        rows=total,
        documents=round(found.documents * scale),
        tokens=round(found.tokens * scale),
        counted=round(found.counted * scale),
        packs=math.ceil(found.packs * scale),
        mean_context=_mean_context(found.lengths, longest),
        sampled=len(rows),
        rejected=found.tally.rejected,
        reasons=found.reasons,
        remarks=found.remarks,
    )


def _first_rows(source: Source, size: int) -> Iterator[RawRow | Reject]:
    for row in read_raw(source):
        yield row
        size -= len(row.content) if isinstance(row, RawRow) else 0
        if size <= 0:
            return


def _stored_size(source: Source, rows: list[RawRow | Reject]) -> float:
    """Return the number of bytes that these rows take in their file."""
    if source.suffix == ".parquet":
        filesystem, path = locate(source.path)
        return (
            source.size * len(rows) / pq.read_metadata(path, filesystem=filesystem).num_rows
            if any(isinstance(row, RawRow) for row in rows)
            else 0
        )
    lines = b"".join(_written(source, row) + b"\n" for row in rows if isinstance(row, RawRow))
    if source.suffix.endswith(".gz"):
        return len(zlib.compress(lines))
    return len(zstandard.compress(lines) if source.suffix.endswith(".zst") else lines)


def _written(source: Source, row: RawRow) -> bytes:
    """Return the row approximately as its file has it, to measure its size."""
    if source.kind in (".jsonl", ".json"):
        return row.content
    return "\t".join(json.loads(row.content).values()).encode()


def _mean_context(lengths: np.ndarray, longest: int) -> float:
    """Return the mean number of tokens that a token attends to: half the mean length of a token's document.

    Documents longer than `longest` are split or cut.
    """
    kept = np.minimum(lengths, longest).astype(float)
    return float((kept**2).sum() / max(1.0, kept.sum()) / 2)
