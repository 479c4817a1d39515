"""Turn rows into documents: the tokens that a stage learns from, with a loss weight for each token.

    stage      a row is          tokens that carry loss
    pretrain   a text            all tokens but the first
    sft, lora  a conversation    each assistant turn's answer and its end token (see chat_format)
    dpo        a pair            as in a conversation, but only in the turns that chosen and rejected do not share

`data.formats` turns rows into texts, conversations and pairs. A row that cannot be used becomes a Reject, which says
which field is wrong. Rows that are only too long are counted separately.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.config.stages import STAGES, StageName
from minimind_ray.data.chat_format import Rendering
from minimind_ray.data.clusters import cluster_of
from minimind_ray.data.fields import BadRowError
from minimind_ray.data.formats import Conversation, Item, Pair, Prompt, Rated, RowReader
from minimind_ray.data.pack import Document, Group
from minimind_ray.data.records import Reject, Row
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.data.turns import Turn

ROWS_AT_ONCE = 512  # rows to tokenize in one call, which uses all cores
RENDERED_AT_ONCE = 32  # rows to render in one exchange with the process of a chat template
LENGTH_STEP = 64  # tokens; lengths of rows that are too long are counted in bins of this width
MOST_NAMED = 10  # the most ignored fields that a summary names
LEAST_QUESTION = 16  # tokens at the end of a question that stay when its beginning is cut


@dataclass(slots=True)
class Tally:
    """Counts of encoding: rows kept and rejected, documents split or cut at max_seq_len, and tokens cut off.

    `too_long` counts the rows that were left out only because of their length, by length in tokens, rounded up to a
    multiple of LENGTH_STEP. `shortened` counts conversations and pairs that lost turns or the beginning of a question.
    """

    kept: int = 0
    rejected: int = 0
    split: int = 0
    cut: int = 0
    cut_tokens: int = 0
    shortened: int = 0
    too_long: Counter[int] = field(default_factory=Counter[int])

    @property
    def left_out(self) -> int:
        """The number of rows that are left out because they are too long."""
        return self.too_long.total()


class TooLong(NamedTuple):
    """A row that is left out because cutting would leave no part of its answer. `tokens` is its length."""

    tokens: int


class _Draft(NamedTuple):
    """A checked row: its content, its conversations as the chat template writes them, and its cluster."""

    row: Row
    item: str | Conversation | Pair
    conversations: tuple[Rendering, ...]
    cluster: int


StartedRenderings = tuple[Callable[[], Rendering], ...]


class _Started(NamedTuple):
    """A row that was read. Each function in `conversations` returns a conversation as the chat template writes it."""

    row: Row
    item: str | Conversation | Pair
    conversations: StartedRenderings


class Whole(NamedTuple):
    """A row, its content, and its documents before any is cut."""

    row: Row
    item: str | Conversation | Pair
    group: Group


class RowEncoder:
    """Turns the rows of one stage into documents.

    `tally` counts kept, rejected and changed rows. `reader` records the rows' formats and ignored fields. `cluster` is
    `eval.cluster`. Documents get their clusters only with `clusters`, which a validation set needs.

    Raises:
        UserError: the tokenizer's chat template is missing, or answers cannot be found in its texts.
    """

    def __init__(
        self,
        stage: StageName,
        tokenizer: Tokenizer,
        config: DataConfig,
        cluster: str | None = None,
        *,
        clusters: bool = False,
    ) -> None:
        self.stage: StageName = stage
        self.kind = STAGES[stage].rows
        self.tokenizer, self.config = tokenizer, config
        self.cluster, self.clusters = cluster, clusters
        self.tally = Tally()
        self.reader = RowReader(self.kind, config, tokenizer.writes, cluster)
        self.longest = longest_document(stage, config)
        if self.kind != "text":
            tokenizer.require_conversations()

    def encode(self, rows: Iterable[Row | Reject]) -> Iterator[Group | Reject]:
        """Yield the documents of each row, in the order of the rows.

        A group has one document, or the two of a pair (chosen, rejected). Rejects among the rows pass through.
        `data.long_documents` decides about a text longer than `data.max_seq_len`: it is cut, or split into consecutive
        documents which share one token, so that every token is predicted exactly once. `data.long_conversations`
        decides about conversations and pairs. Each document of a pair takes half a pack at most.

        Raises:
            UserError: a file holds two formats; a row does not have the field of `eval.cluster`.
        """
        for whole in self.whole_documents(rows):
            yield from self.limit(whole)

    def remarks(self) -> list[str]:
        """Return sentences for the user about rows left out or shortened so far, and about ignored fields."""
        tally = self.tally
        ignored = self.reader.ignored
        return remarks(self.stage, self.config, tally.kept, tally.shortened, tally.too_long, ignored, self.cluster)

    def whole_documents(self, rows: Iterable[Row | Reject]) -> Iterator[Whole | Reject]:
        """The first half of `encode`: each row with its documents of any length."""
        remaining = iter(rows)
        while chunk := list(islice(remaining, ROWS_AT_ONCE)):
            batches = (chunk[start : start + RENDERED_AT_ONCE] for start in range(0, len(chunk), RENDERED_AT_ONCE))
            drafts = [draft for batch in batches for draft in self._drafts(batch)]
            encoded = iter(self._documents([draft for draft in drafts if not isinstance(draft, Reject)]))
            for draft in drafts:
                yield draft if isinstance(draft, Reject) else next(encoded)

    def limit(self, whole: Whole | Reject) -> Iterator[Group | Reject]:
        """The second half of `encode`: split, cut, shorten or leave out long documents, and count these changes."""
        outcome = whole if isinstance(whole, Reject) else self._limited(whole)
        if isinstance(outcome, Reject):
            self.tally.rejected += 1
            yield outcome
        elif isinstance(outcome, TooLong):
            self.tally.too_long[-(-outcome.tokens // LENGTH_STEP) * LENGTH_STEP] += 1
        else:
            self.tally.kept += 1
            yield from outcome

    def _limited(self, whole: Whole) -> list[Group] | Reject | TooLong:
        if self._fits(whole):
            return [whole.group]
        if self.kind == "text" and self.config.long_documents == "split":
            self.tally.split += 1
            return [(part,) for part in _split(whole.group[0], self.longest)]
        group = whole.group
        if self.kind != "text" and self.config.long_conversations == "cut_prompt":
            group = self._shortened(whole)
        excess = [len(d.tokens) - self.longest for d in group if len(d.tokens) > self.longest]
        kept = tuple(Document(d.tokens[: self.longest], d.weights[: self.longest], d.cluster) for d in group)
        if problem := self._lost(group, kept):
            if self.config.long_conversations == "refuse":
                return Reject(whole.row.file, whole.row.line, problem)
            return TooLong(max(len(d.tokens) for d in whole.group))
        self.tally.cut += len(excess)
        self.tally.cut_tokens += sum(excess)
        self.tally.shortened += group is not whole.group
        return [kept]

    def _lost(self, group: Group, kept: Group) -> str | None:
        """Return why the kept part of a row teaches nothing; None if it teaches something."""
        for whole, document in zip(group, kept, strict=True):
            if not document.weights.any():
                first = int(np.argmax(whole.weights))
                return f"the answer begins at token {first}, but only {self.longest} tokens are kept"
        if self.kind == "pair" and np.array_equal(kept[0].tokens, kept[1].tokens):
            return f"chosen and rejected are the same in the {self.longest} tokens that are kept"
        return None

    def _shortened(self, whole: Whole) -> Group:
        """Return a shorter row: cut its oldest exchanges, then the beginning of its question, until the row fits.

        Return the row unchanged if no loss would be left, or if the chat template refuses the shorter row.
        """
        try:
            shorter = self._with_shorter_question(self._without_oldest(whole))
        except BadRowError:
            return whole.group
        return shorter.group if all(d.weights.any() for d in shorter.group) else whole.group

    def _without_oldest(self, whole: Whole) -> Whole:
        """Return the row with as many of its last exchanges as fit, but at least the last one."""
        cuts = _cuts(whole.item)
        if not cuts:
            return whole

        def without(place: int) -> Whole:
            return self._again(whole, _without(whole.item, *cuts[place]))

        # Begin at the end and double the number of exchanges each time, so as not to render a long row many times.
        short, width = len(cuts) - 1, 1
        while short and self._fits(without(short)):
            long = max(0, short - width)
            if not self._fits(without(long)):
                place = bisect_left(range(long, short), True, key=lambda place: self._fits(without(place)))
                return without(long + place)
            short, width = long, 2 * width
        return without(short)

    def _fits(self, whole: Whole) -> bool:
        return max(len(d.tokens) for d in whole.group) <= self.longest

    def _with_shorter_question(self, whole: Whole) -> Whole:
        """Cut tokens from the question's beginning until the row fits, but keep LEAST_QUESTION of its tokens."""
        question = _first_question(whole.item)
        ids = self.tokenizer.encode([question])[0] if question else []
        while (excess := max(len(d.tokens) for d in whole.group) - self.longest) > 0 and len(ids) > LEAST_QUESTION:
            ids = ids[min(excess, len(ids) - LEAST_QUESTION) :]
            text = self.tokenizer.decode(ids).lstrip("\ufffd")
            whole = self._again(whole, _with_question(whole.item, text))
        return whole

    def _again(self, whole: Whole, item: Conversation | Pair) -> Whole:
        """Encode `item`, a shorter version of a row that was encoded before. It keeps the cluster of the whole row.

        Raises:
            BadRowError: the chat template refuses the shorter row.
        """
        conversations, cluster = _renderings(self._start_rendering(item)), whole.group[0].cluster
        (outcome,) = self._documents([_Draft(whole.row, item, conversations, cluster)])
        if isinstance(outcome, Reject):
            raise BadRowError(outcome.reason)
        return outcome

    def _drafts(self, rows: Sequence[Row | Reject]) -> list[_Draft | Reject]:
        started = [row if isinstance(row, Reject) else self._start(row) for row in rows]
        return [row if isinstance(row, Reject) else self._finish(row) for row in started]

    def _start(self, row: Row) -> _Started | Reject:
        try:
            item = _usable(self.reader.read(row))
            return _Started(row, item, self._start_rendering(item))
        except (BadRowError, RecursionError, UnicodeEncodeError) as error:
            return _rejected(row, error)

    def _finish(self, started: _Started) -> _Draft | Reject:
        row, item, _ = started
        try:
            conversations = _renderings(started.conversations)
            for text in [item] if isinstance(item, str) else [rendering.text for rendering in conversations]:
                if not text.isascii():
                    text.encode()
        except (BadRowError, RecursionError, UnicodeEncodeError) as error:
            return _rejected(row, error)
        if isinstance(item, Pair) and conversations[0].text == conversations[1].text:
            return Reject(row.file, row.line, "chosen and rejected are the same")
        return _Draft(row, item, conversations, cluster_of(row, item, self.cluster) if self.clusters else 0)

    def _start_rendering(self, item: str | Conversation | Pair) -> StartedRenderings:
        if isinstance(item, str):
            return ()
        sides = [item] if isinstance(item, Conversation) else [item.chosen, item.rejected]
        with _template_errors():
            return tuple(self.tokenizer.start_rendering(side.messages, side.tools) for side in sides)

    def _documents(self, drafts: list[_Draft]) -> Iterator[Whole | Reject]:
        return self._text_documents(drafts) if self.kind == "text" else self._chat_documents(drafts)

    def _text_documents(self, drafts: list[_Draft]) -> Iterator[Whole]:
        flat: list[int] = []
        ends: list[int] = []
        for ids in self.tokenizer.encode([str(draft.item) for draft in drafts]):
            flat.append(self.tokenizer.bos_id)
            flat += ids
            flat.append(self.tokenizer.eos_id)
            ends.append(len(flat))
        # Call numpy once for all texts. Copy each document, so that it does not keep the others' memory alive.
        tokens, weights, start = np.array(flat, np.int32), np.ones(len(flat), np.uint8), 0
        weights[[0, *ends[:-1]]] = 0
        for draft, end in zip(drafts, ends, strict=True):
            document = Document(tokens[start:end].copy(), weights[start:end].copy(), draft.cluster)
            yield Whole(draft.row, draft.item, (document,))
            start = end

    def _chat_documents(self, drafts: list[_Draft]) -> Iterator[Whole | Reject]:
        encoded = iter(self.tokenizer.encode_conversations([r for draft in drafts for r in draft.conversations]))
        for row, item, conversations, cluster in drafts:
            assert not isinstance(item, str)
            documents: list[Document] = []
            reasons: list[str] = []
            for found, learned in zip(list(islice(encoded, len(conversations))), _loss_flags(item), strict=True):
                if isinstance(found, UserError):
                    reasons.append(str(found))
                else:
                    documents.append(_chat_document(*found, learned, cluster))
            yield Reject(row.file, row.line, reasons[0]) if reasons else Whole(row, item, tuple(documents))


def _rejected(row: Row, error: Exception) -> Reject:
    match error:
        case UnicodeEncodeError():
            reason = "the text holds half a surrogate pair, which is not a character"
        case RecursionError():
            reason = "objects are nested too deeply"
        case _:
            reason = str(error)
    return Reject(row.file, row.line, reason)


def _renderings(started: StartedRenderings) -> tuple[Rendering, ...]:
    with _template_errors():
        return tuple(finish() for finish in started)


@contextmanager
def _template_errors() -> Generator[None]:
    """Turn a UserError of the chat template into a BadRowError, so that only this row is rejected."""
    try:
        yield
    except UserError as error:
        raise BadRowError(str(error)) from error


def _chat_document(ids: list[int], spans: list[tuple[int, int]], learned: list[bool], cluster: int) -> Document:
    weights = np.zeros(len(ids), np.uint8)
    for (start, end), counts in zip(spans, learned, strict=True):
        weights[start:end] = counts
    return Document(np.array(ids, np.int32), weights, cluster)


def _usable(item: Item) -> str | Conversation | Pair:
    """Check that the item has something to learn from, and return it.

    Raises:
        BadRowError: no assistant turn carries loss; a pair's two sides answer different prompts.
    """
    assert not isinstance(item, Prompt | Rated)
    if isinstance(item, Conversation):
        _require_answers(item.turns, "the conversation")
    elif isinstance(item, Pair):
        _require_answers(item.chosen.turns, "chosen")
        _require_answers(item.rejected.turns, "rejected")
        _require_same_prompt(item)
    return item


def _require_answers(turns: list[Turn], where: str) -> None:
    if not any(turn.message["role"] == "assistant" for turn in turns):
        raise BadRowError(f"{where} has no assistant turn")
    if not any(turn.learned for turn in turns):
        raise BadRowError(f"{where} has no assistant turn that carries loss")


def _require_same_prompt(pair: Pair) -> None:
    shared = pair.shared
    if pair.chosen.turns == pair.rejected.turns and pair.chosen.tools == pair.rejected.tools:
        raise BadRowError("chosen and rejected are the same")
    ends = {"chosen": pair.chosen.turns[shared:], "rejected": pair.rejected.turns[shared:]}
    for key, turns in ends.items():
        if not any(turn.learned for turn in turns):
            raise BadRowError(f"{key} has no answer after the turns that both share")
    if pair.chosen.tools != pair.rejected.tools or any(t[0].message["role"] != "assistant" for t in ends.values()):
        raise BadRowError("chosen and rejected answer different prompts")
    if not shared:
        raise BadRowError("chosen and rejected have no turn before the answers")


def _loss_flags(item: Conversation | Pair) -> list[list[bool]]:
    """Return for each side which assistant turns carry loss. Turns that both sides of a pair share carry no loss."""
    sides, shared = ([item], 0) if isinstance(item, Conversation) else ([item.chosen, item.rejected], item.shared)
    return [
        [turn.learned and i >= shared for i, turn in enumerate(side.turns) if turn.message["role"] == "assistant"]
        for side in sides
    ]


# Shortening


def _cuts(item: str | Conversation | Pair) -> list[tuple[int, int]]:
    """Return the spans of turns, (start, end), that may be left out: the oldest exchange, the oldest two, and so on.

    An exchange is a question and the turns up to the next question. The system turn and the last exchange always stay.
    """
    assert not isinstance(item, str)
    turns = item.turns if isinstance(item, Conversation) else item.chosen.turns[: item.shared]
    roles = [turn.message["role"] for turn in turns]
    start = int(roles[0] == "system")
    # Questions that follow each other directly belong together.
    return [(start, i) for i in range(start + 1, len(roles)) if roles[i] == "user" != roles[i - 1]]


def _without(item: str | Conversation | Pair, start: int, end: int) -> Conversation | Pair:
    if isinstance(item, Pair):
        return Pair(*(_cut(side, start, end) for side in item))
    assert isinstance(item, Conversation)
    return _cut(item, start, end)


def _cut(side: Conversation, start: int, end: int) -> Conversation:
    return side._replace(turns=[*side.turns[:start], *side.turns[end:]])


def _first_question(item: str | Conversation | Pair) -> str:
    """Return the first question, which both sides of a pair share; "" if there is no question."""
    assert not isinstance(item, str)
    turns = item.turns if isinstance(item, Conversation) else item.chosen.turns[: item.shared]
    return next((str(turn.message["content"]) for turn in turns if turn.message["role"] == "user"), "")


def _with_question(item: str | Conversation | Pair, text: str) -> Conversation | Pair:
    """Return the item with `text` as its first question."""
    if isinstance(item, Pair):
        return Pair(*(_asking(side, text) for side in item))
    assert isinstance(item, Conversation)
    return _asking(item, text)


def _asking(side: Conversation, text: str) -> Conversation:
    at = next(i for i, turn in enumerate(side.turns) if turn.message["role"] == "user")
    turn = side.turns[at]
    shorter = turn._replace(message={**turn.message, "content": text})
    return side._replace(turns=[*side.turns[:at], shorter, *side.turns[at + 1 :]])


def _split(document: Document, longest: int) -> Iterator[Document]:
    """Split a long document. Each part begins with the last token of the part before, without loss on that token."""
    for start in range(0, len(document.tokens) - 1, longest - 1):
        weights = document.weights[start : start + longest].copy()
        weights[0] = 0
        yield Document(document.tokens[start : start + longest], weights, document.cluster)


# Remarks for the user


def longest_document(stage: StageName, config: DataConfig) -> int:
    """Return the most tokens that a document may have. The two documents of a pair share a pack."""
    return min(config.max_seq_len, config.pack_tokens // 2) if STAGES[stage].rows == "pair" else config.max_seq_len


def remarks(
    stage: StageName,
    config: DataConfig,
    kept: int,
    shortened: int,
    too_long: Counter[int],
    ignored: Counter[str],
    cluster: str | None = None,
) -> list[str]:
    """Return sentences about rows that were too long, shortened rows, and ignored fields, if there are any.

    The field `cluster` is used by validation, so it is not named.
    """
    lines: list[str] = []
    if too_long:
        lines.append(_too_long(stage, config, kept, too_long))
    if shortened:
        lines.append(f"{_rows(shortened)} shortened to fit: cut the oldest turns or the beginning of the question")
    if ignored := Counter({field: rows for field, rows in ignored.items() if field != cluster}):
        named = [f"{field} ({_rows(rows)})" for field, rows in ignored.most_common(MOST_NAMED)]
        more = f" and {len(ignored) - MOST_NAMED:,} more" if len(ignored) > MOST_NAMED else ""
        lines.append(f"ignored fields: {', '.join(named)}{more}")
    return lines


def _too_long(stage: StageName, config: DataConfig, kept: int, too_long: Counter[int]) -> str:
    left_out, longest = too_long.total(), longest_document(stage, config)
    limit = f"data.max_seq_len {config.max_seq_len:,}"
    if longest < config.max_seq_len:
        limit = f"half of data.pack_tokens {config.pack_tokens:,}, which a pair's answers share"
    sentence = f"{left_out:,} of {_rows(kept + left_out)} left out: too long for {limit}, so that no answer is kept"
    if advised := length_for_most(kept, too_long):
        pack = f" with data.pack_tokens {2 * advised:,}" if STAGES[stage].rows == "pair" else ""
        sentence += f"; data.max_seq_len {advised:,}{pack} would keep 99 % of the rows"
    if config.long_conversations == "drop":
        sentence += "; data.long_conversations=cut_prompt shortens them instead"
    return sentence


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def length_for_most(kept: int, too_long: Counter[int], part: float = 0.99) -> int | None:
    """Return the smallest `data.max_seq_len` that would keep `part` of all rows (`kept` rows and `too_long` rows).

    Return None if that part is kept already.
    """
    wanted = part * (kept + too_long.total())
    if kept >= wanted:
        return None
    lengths = sorted(too_long)
    totals = itertools.accumulate(too_long[length] for length in lengths)
    return next(length for length, more in zip(lengths, totals) if kept + more >= wanted)
