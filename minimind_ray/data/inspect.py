"""Compute the numbers of `minimind-ray data inspect`: document lengths, cut and rejected rows, fullness of packs."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig, FormatName
from minimind_ray.config.stages import STAGES, StageName
from minimind_ray.data.encode import RowEncoder, Tally
from minimind_ray.data.fields import BadRowError, renamed
from minimind_ray.data.formats import FORMATS, recognise
from minimind_ray.data.pack import Document, Group, pack_groups
from minimind_ray.data.records import Reject, Row
from minimind_ray.data.tokenizer import Tokenizer

LOOK_AHEAD = 1000  # rows in which `guess_stage` looks for a known format
DECODED = 1000  # documents to decode, to measure characters per token


@dataclass(frozen=True, slots=True)
class RejectReason:
    """The number of rejects with the same reason (except for numbers in it), and the first of these rejects."""

    count: int
    first: Reject


@dataclass(frozen=True, slots=True)
class Inspection:
    """Numbers about the data of a stage.

    `lengths` int32 [documents] are in tokens, before documents are split or cut. All other fields describe the data as
    it is trained on. `counted` is the number of tokens that carry loss. `samples` are a few groups drawn from all.
    `per_token` are the characters and bytes of text for each token, measured on the first documents.
    """

    tally: Tally
    formats: list[FormatName]
    remarks: list[str]
    reasons: list[RejectReason]
    lengths: np.ndarray
    documents: int
    tokens: int
    counted: int
    packs: int
    samples: list[Group]
    per_token: tuple[float, float]

    @property
    def rows(self) -> int:
        """Rows read."""
        return self.tally.kept + self.tally.rejected + self.tally.left_out

    def fill(self, pack_tokens: int) -> float:
        """How full the packs are: tokens over capacity, 0 to 1."""
        return self.tokens / (self.packs * pack_tokens) if self.packs else 0.0


def guess_stage(rows: Iterable[Row | Reject], data: DataConfig) -> tuple[StageName, Iterator[Row | Reject]]:
    """Return a stage that learns from `data.format` or from the first row with a known format, and all rows.

    Raises:
        UserError: no stage learns from any of the first LOOK_AHEAD rows.
    """
    remaining = iter(rows)
    seen: list[Row | Reject] = []
    for row in remaining:
        seen.append(row)
        name = data.format or _recognised(row, data.fields)
        stages = [record.name for record in STAGES.values() if name and record.rows == FORMATS[name].kind]
        if stages:
            return stages[0], chain(seen, remaining)
        if len(seen) == LOOK_AHEAD:
            break
    if not seen:
        raise UserError("the files have no rows")
    first = seen[0]
    why = first.reason if isinstance(first, Reject) else f"it has {', '.join(first.value) or 'no field'}"
    raise UserError(
        f"none of the first {len(seen)} rows has a format that a stage learns from ({first.file}:{first.line}: {why}); "
        "name the stage by --stage, and the fields by data.fields, such as --set data.fields.prompt=question --set "
        "data.fields.completion=reply"
    )


def _recognised(row: Row | Reject, fields: dict[str, str]) -> FormatName | None:
    try:
        return recognise(renamed(row.value, fields)) if isinstance(row, Row) else None
    except BadRowError:
        return None


def inspect_rows(
    stage: StageName,
    rows: Iterable[Row | Reject],
    tokenizer: Tokenizer,
    config: DataConfig,
    cluster: str | None = None,
    samples: int = 3,
) -> Inspection:
    """Encode and pack all rows as training does, and return the numbers. `cluster` is `eval.cluster`.

    Raises:
        UserError: see `RowEncoder.encode`.
    """
    encoder = RowEncoder(stage, tokenizer, config, cluster)
    tally = encoder.tally
    lengths = array("i")
    reasons: dict[str, RejectReason] = {}
    drawn: list[Group] = []
    draw = random.Random(0)
    documents = tokens = counted = decoded = chars = size = 0

    def groups() -> Iterator[Group]:
        nonlocal documents, tokens, counted, decoded, chars, size
        for whole in encoder.whole_documents(rows):
            if not isinstance(whole, Reject):
                lengths.extend(len(d.tokens) for d in whole.group)
            for place, outcome in enumerate(encoder.limit(whole)):
                if isinstance(outcome, Reject):
                    alike = re.sub(r"\d+", "N", outcome.reason)
                    before = reasons.get(alike, RejectReason(0, outcome))
                    reasons[alike] = RejectReason(before.count + 1, before.first)
                    continue
                if place == 0:
                    _draw_sample(outcome, drawn, samples, tally.kept, draw)
                if documents < DECODED:
                    text = "".join(tokenizer.decode(d.tokens.tolist(), skip_special=True) for d in outcome)
                    decoded += sum(len(d.tokens) for d in outcome)
                    chars, size = chars + len(text), size + len(text.encode())
                documents += len(outcome)
                tokens += sum(len(d.tokens) for d in outcome)
                counted += sum(int(d.weights.sum()) for d in outcome)
                yield outcome

    packs = sum(1 for _ in pack_groups(groups(), config.pack_tokens))
    return Inspection(
        tally=tally,
        formats=list(dict.fromkeys(name for name, _ in encoder.reader.formats.values())),
        remarks=encoder.remarks(),
        reasons=sorted(reasons.values(), key=lambda reason: -reason.count),
        lengths=np.array(lengths, np.int32),
        documents=documents,
        tokens=tokens,
        counted=counted,
        packs=packs,
        samples=drawn,
        per_token=(chars / max(1, decoded), size / max(1, decoded)),
    )


def _draw_sample(group: Group, drawn: list[Group], samples: int, rows: int, draw: random.Random) -> None:
    """Draw samples by reservoir sampling (Vitter 1985), so that each of the `rows` is equally likely to be shown."""
    place = len(drawn) if len(drawn) < samples else draw.randrange(rows)
    if place < samples:
        drawn[place : place + 1] = [group]


def histogram(lengths: np.ndarray, bins: int = 12) -> list[tuple[int, int, int]]:
    """Return (from, to, documents) for bins of lengths. Each bin is wider than the one before by a constant factor."""
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, bins + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges, edges[1:], counts)]


def runs(document: Document, tokenizer: Tokenizer) -> Sequence[tuple[str, bool]]:
    """Return the document's text in pieces, and for each piece whether its tokens carry loss."""
    ids, weights = document.tokens.tolist(), document.weights.tolist()
    borders = [i for i in range(1, len(ids)) if weights[i] != weights[i - 1]]
    return [
        (tokenizer.decode(ids[start:end], after=ids[:start]), bool(weights[start]))
        for start, end in pairwise([0, *borders, len(ids)])
    ]
