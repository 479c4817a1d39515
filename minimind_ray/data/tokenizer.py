"""Convert text to token ids and back. Train a tokenizer, or load any Hugging Face tokenizer directory.

A tokenizer is two files: `tokenizer.json`, and `tokenizer_config.json` with the chat template. Its added tokens are of
two kinds: plain words and white space, which any text may contain, and control tokens, such as `<|im_start|>`. A user's
text can never open a turn, because a control token that a text spells out counts as plain text: `encode` never returns
a control token, and `render` puts a stand-in in place of each control token that a message spells out. (An assistant's
message may contain control tokens that are not special, such as `<think>`.) All other texts get the same ids as in
transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import parse_json
from minimind_ray.data.chat_format import ANSWER_HEADER, RESERVED, TURN_END, TURN_START, ChatFormat, Rendering
from minimind_ray.data.chat_template import CHATML, Message
from minimind_ray.data.files import writing_to
from minimind_ray.data.hub import fetch_tokenizer, hub_ref, pin
from minimind_ray.data.storage import copy_of, is_url, mirror_of
from minimind_ray.data.tokenizer_dir import MORE_TEMPLATES, NAMED_TOKENS, read_tokenizer, token_name

# MiniMind's control tokens in the order of their ids, so that each of them has the same id here as in MiniMind.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
    "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
)  # fmt: skip
MARKUP_TOKENS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    *(f"<|buffer{i}|>" for i in range(1, 10)),
)  # fmt: skip

# Added tokens that any text may contain: words that someone added to the vocabulary, and runs of white space.
WORD = re.compile(r"[\w\s▁'.,-]*")

# A stand-in is two characters: MARK, and a private-use character whose number says which string the stand-in replaces.
# A MARK in a text gets a stand-in, too. Unicode reserves this code point for a program's internal use, so texts rarely
# contain it and templates do not test for it.
MARK = "\ufdd0"
FIRST_PRIVATE = 0xF0000
MARKS = range(ord(MARK), 0x110000)  # To encode a text with stand-ins, use the first character that it does not contain.
MOST_FIELDS = 1000  # message fields that `writes` tests; it says no for all further fields
PROBE: list[Message] = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a b"}]
CUT = -1  # Stands in place of an id: the texts around it are encoded as if a control token were between them.


class Tokenizer:
    """Encodes and decodes texts and conversations.

    `definition` is the text of tokenizer.json, `settings` is the content of tokenizer_config.json, and error messages
    begin with `name`.

    Raises:
        UserError: the two do not make a tokenizer, name no end token, or give plain text the id of a control token.
    """

    def __init__(self, definition: str, settings: dict[str, Any], name: str) -> None:
        self.name = name
        self._definition = definition
        self._settings = settings
        try:
            layout = parse_json(definition, f"{name}: tokenizer.json")
            self._full = _without_extras(definition)
            added = dict(sorted(self._full.get_added_tokens_decoder().items()))
        except UserError:
            raise
        except Exception as error:  # the library raises bare exceptions
            raise UserError(f"{name}: tokenizer.json is broken ({error}); give another tokenizer directory") from error
        self._added: dict[str, int] = {token.content: id for id, token in added.items()}
        ids = self._full.get_vocab().values()
        self.vocab_size = 1 + max(ids, default=0)
        if not 0 < len(ids) <= self.vocab_size <= 2 * len(ids) + 1024:
            raise UserError(f"{name}: tokenizer.json has {len(ids)} tokens, with ids up to {self.vocab_size - 1}")
        self._words = {id: token for id, token in added.items() if not token.special and WORD.fullmatch(token.content)}
        self._control = {i: t for i, t in added.items() if i not in self._words}
        self._plain = _Relabelled(definition, {id: (token.content, token) for id, token in self._words.items()})
        normalizes = layout.get("normalizer") is not None
        self._control_is_normalized = normalizes and any(token.normalized for token in self._control.values())

        bos_id, eos_id, pad_id = (self._special_id(key) for key in ("bos_token", "eos_token", "pad_token"))
        if eos_id is None:
            raise UserError(f"{name}: tokenizer_config.json names no eos_token, which ends every document; add one")
        # Without a bos_token, documents begin with the eos_token, as in GPT-2.
        self.bos_id = eos_id if bos_id is None else bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id

        special = [token.content for token in added.values() if token.special]
        model = layout["model"]
        # The id of text that the vocabulary has no token for.
        self._unknown = model["unk_id"] if "unk_id" in model else self._added.get(model.get("unk_token"))
        if (unknown := model.get("unk_token")) and unknown not in model["vocab"]:
            raise UserError(f"{name}: the unk_token {unknown} of tokenizer.json is not in its vocabulary; correct it")
        for content in special:
            if self._added[content] in self.encode([content])[0] and self._added[content] != self._unknown:
                raise UserError(f"{name}: plain text can spell the control token {content}; use another tokenizer")
        control = [token.content for token in self._control.values()]
        stood_in_for = [MARK, *RESERVED, *control]
        self._stand_ins = {c: MARK + chr(FIRST_PRIVATE + i) for i, c in enumerate(stood_in_for)}
        self._spelled_out = {stand_in: content for content, stand_in in self._stand_ins.items()}
        self._any_token = _any_of(stood_in_for)
        self._special_token = _any_of([MARK, *RESERVED, *special])
        self._any_stand_in = _any_of(self._spelled_out)
        self._stand_in_or_control = _any_of([*self._spelled_out, *control])
        self._guarded_by_mark: dict[str, _Relabelled] = {}
        self._fields_written: dict[tuple[str, str], bool] = {}
        self._formats: dict[str, ChatFormat] = {}

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a Hugging Face tokenizer directory. `directory` may be a URL, or name a model of the hub.

        Raises:
            UserError: a file is missing or broken; or see `hub.fetch`.
            StoreError: the object store cannot be read.
        """
        if ref := hub_ref(directory):
            folder = fetch_tokenizer(pin(ref))
            if not (folder / "tokenizer.json").exists():
                raise UserError(f"{ref} has no tokenizer.json; give a repository that has one")
            return cls(*read_tokenizer(folder), str(folder))
        folder = copy_of(directory)
        if is_url(directory) and (mirror := mirror_of(directory)):
            mirror.pull(wanted=lambda name: "/" not in name or name.startswith(f"{MORE_TEMPLATES}/"))
            if not (folder / "tokenizer.json").exists():
                raise UserError(f"{directory} is not a tokenizer directory: it has no tokenizer.json")
        return cls(*read_tokenizer(folder), str(folder))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load` and transformers' AutoTokenizer read."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self._settings, ensure_ascii=False, indent=2)
        with writing_to(folder):
            (folder / "tokenizer.json").write_text(self._definition, "utf-8")
            (folder / "tokenizer_config.json").write_text(settings + "\n", "utf-8")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, dict[str, Any], str]]:
        return Tokenizer, (self._definition, self._settings, self.name)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids of texts and conversations."""
        meaning = {
            **{k: v for k, v in json.loads(self._definition).items() if k not in ("truncation", "padding")},
            "chat_template": self._templates if len(self._templates) > 1 else self._templates.get("default"),
            "names": self._names,
            "ids": [self.bos_id, self.eos_id, self.pad_id],
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def extends(self, other: Tokenizer) -> bool:
        """Whether every token of `other` has the same id in this tokenizer."""
        ids = self._full.get_vocab()
        return all(ids.get(token) == id for token, id in other._full.get_vocab().items())

    # Plain text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without start and end tokens. Spelled-out control tokens count as plain text."""
        return self._plain.encode(texts)

    def encode_written(self, texts: Sequence[str], ends: bool = True) -> list[list[int]]:
        """Return the ids of each text as transformers' `tokenizer(text)` does, for prompts of benchmarks.

        Unlike in `encode`, a control token that a text spells out is this token. With `ends`, the start and end tokens
        are added that the tokenizer's own post-processor adds; many tokenizers add none.
        """
        return [found.ids for found in self._as_written.encode_batch_fast(list(texts), add_special_tokens=ends)]

    @cached_property
    def _as_written(self) -> tokenizers.Tokenizer:
        full = tokenizers.Tokenizer.from_str(self._definition)
        full.no_truncation()
        full.no_padding()
        return full

    def prompt_text(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """Return the text of the conversation up to the beginning of the assistant's next answer.

        Raises:
            UserError: there is no chat template, or the template fails on these messages or does not write all of them.
        """
        return self._format(tools).prompt([_plain_message(message) for message in messages], tools)

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template, None if there is no template."""
        return self._templates.get("default")

    def decode(self, ids: Sequence[int], skip_special: bool = False, after: Sequence[int] = ()) -> str:
        """Return the text of the ids. Invalid UTF-8 becomes U+FFFD. `skip_special` leaves out special tokens.

        `after` holds the ids that come before `ids`, if there are any. They matter because some tokenizers drop the
        space before the first word of a text.
        """
        before = after[-1:]
        text = self._full.decode([*before, *ids], skip_special_tokens=skip_special)
        return text[len(self._full.decode(before, skip_special_tokens=skip_special)) :] if before else text

    @property
    def unknown_id(self) -> int | None:
        """The id of text that the vocabulary has no token for; None if there is a token for every text."""
        return self._unknown

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: the number of text bytes that each id stands for, 0 for control tokens. Bits per byte need it."""
        by_bytes = '"ByteLevel"' in json.dumps(json.loads(self._definition).get("decoder"))
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, id in self._full.get_vocab(with_added_tokens=False).items():
            if by_bytes:  # each byte is written as one character
                sizes[id] = len(token)
            else:  # SentencePiece writes ▁ for a space, and for example <0x0A> for a single byte.
                sizes[id] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
        for id, word in self._words.items():
            sizes[id] = len(word.content.replace("▁", " ").encode())
        sizes[list(self._control)] = 0
        return sizes

    # Conversations

    def render(self, messages: list[Message], tools: list[Any] | None = None) -> Rendering:
        """Return the conversation as the chat template writes it, for `encode_conversations`.

        Stand-ins replace the control tokens that messages and tools spell out. In an assistant's message, they replace
        special tokens only, because an assistant may write `<think>` and `<tool_call>`.

        Raises:
            UserError: there is no chat template, the template fails on these messages or does not write all of them,
                or the place of an answer is uncertain.
        """
        return self.start_rendering(messages, tools)()

    def start_rendering(self, messages: list[Message], tools: list[Any] | None = None) -> Callable[[], Rendering]:
        """Start `render`, and return a function that finishes it. Starting several conversations first saves time.

        Raises:
            UserError: there is no chat template. The returned function raises the other errors of `render`.
        """
        format = self._format(tools)
        escaped = self._escape_messages(messages), self._escape(tools, self._any_token)
        format.expect(*escaped)
        return lambda: format.render(*escaped)

    def encode_conversations(
        self, renderings: Sequence[Rendering]
    ) -> list[tuple[list[int], list[tuple[int, int]]] | UserError]:
        """Return for each conversation its ids, and the span of tokens that the assistant writes in each of its turns.

        The ids are the same as in transformers, with one exception. If one token (such as two newlines) would cover the
        end of the generation prompt and the beginning of the answer, the text is cut between them, as in generation.
        A conversation whose answers cannot be found exactly gets a UserError instead.
        """
        found = self._encode_all([r.text for r in renderings], offsets=any(r.spans is not None for r in renderings))
        return [self._with_spans(rendering, encoded) for rendering, encoded in zip(renderings, found, strict=True)]

    def prompt_ids(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the ids of the conversation up to the beginning of the assistant's next answer.

        Raises:
            UserError: there is no chat template, or the template fails on these messages or does not write all of them.
        """
        format = self._format(tools)
        text = format.prompt(self._escape_messages(messages), self._escape(tools, self._any_token))
        return self._encode_all([text], offsets=False)[0].ids

    def require_conversations(self) -> None:
        """Check that the tokens of answers can be found in the text that the chat template writes.

        Raises:
            UserError: there is no template, or answers cannot be found exactly. The message says why.
        """
        try:
            self._format(None).require_answers()
            found = self._encode_probe()
            if isinstance(found, UserError):
                raise found
        except UserError as error:
            raise UserError(
                f"{self.name}: the loss mask needs a chat template whose answers can be found, but in this one they "
                f"cannot: {error}; use another tokenizer or chat template"
            ) from None

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: `eos_id`, and the end tokens that the chat templates write after an answer."""
        ends: list[int] = []
        for tools in (None, []):
            with suppress(UserError):  # `render` and `prompt_ids` report a template that is missing or fails.
                if token := self._format(tools).end_token:
                    ends.append(self._added[token])
        return tuple(dict.fromkeys([self.eos_id, *ends]))

    def answer_text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of the answer `ids` to a prompt, without special tokens and without `answer_lead`."""
        return self.decode(ids, skip_special=True, after=prompt).removeprefix(self.answer_lead)

    @cached_property
    def answer_lead(self) -> str:
        """The white space that the chat format puts before each answer's text, such as the space after `[/INST]`."""
        try:
            found = self._encode_probe()
        except UserError:
            return ""
        if isinstance(found, UserError):
            return ""
        ids, ((start, end),) = found
        lead, _, _ = self.decode(ids[start:end], skip_special=True, after=ids[:start]).partition(PROBE[-1]["content"])
        return lead if lead.isspace() else ""

    def writes(self, field: str, role: str) -> bool:
        """Whether the chat template writes this field of this role's messages: a probe renders differently with it."""
        known = self._fields_written
        if (field, role) not in known and len(known) < MOST_FIELDS:
            known[field, role] = self._probe_field(field, role)
        return known.get((field, role), False)

    def _probe_field(self, field: str, role: str) -> bool:
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        before = {"system": [], "user": [], "assistant": PROBE[:1], "tool": [*PROBE[:1], call]}[role]
        after = PROBE if role in ("system", "user") else []
        texts: list[str] = []
        for more in ({}, {field: "a value"}):
            with suppress(UserError):
                message = {"role": role, "content": "a text", **more}
                texts.append(self._format(None).render([*before, message, *after], None).text)
        return len(set(texts)) == 2

    def _encode_probe(self) -> tuple[list[int], list[tuple[int, int]]] | UserError:
        (found,) = self.encode_conversations([self.render(PROBE)])
        return found

    def _encode_all(self, texts: Sequence[str], offsets: bool) -> list[_Encoded]:
        """Return the ids of rendered texts: control tokens where the template wrote them, plain text for stand-ins."""
        plain = [text for text in texts if MARK not in text]
        if offsets or self._control_is_normalized:
            encodings = [_Encoded(e.ids, e.offsets) for e in self._full.encode_batch(plain, add_special_tokens=False)]
        else:
            encodings = [_Encoded(e.ids) for e in self._full.encode_batch_fast(plain, add_special_tokens=False)]
        if self._control_is_normalized:  # The normalizer may turn another spelling into a control token.
            encodings = [e if self._is_safe(t, e) else self._encode_guarded(t) for t, e in zip(plain, encodings)]
        found = iter(encodings)
        return [self._encode_guarded(text) if MARK in text else next(found) for text in texts]

    def _is_safe(self, text: str, encoded: _Encoded) -> bool:
        """Whether the text spells each control token of `encoded` exactly."""
        return all(
            self._control[id].content in text[start:end]
            for id, (start, end) in zip(*encoded)
            if id in self._control and id != self._unknown
        )

    def _encode_guarded(self, text: str, cuts: Sequence[int] = ()) -> _Encoded:
        """Encode a text that has stand-ins, or that must be cut at the characters `cuts`.

        Rename the template's control tokens to strings that the text does not contain, both in the text and in a second
        tokenizer. Then no other part of the text can spell a control token.
        """
        restored = self._any_stand_in.sub(lambda match: self._spelled_out[match[0]], text)
        mark = next(character for character in map(chr, MARKS) if character not in restored)
        guarded = self._guarded(mark)
        pieces = _Pieces()
        for start, end in pairwise([0, *cuts, len(text)]):
            if start:
                pieces.put(guarded.labels[CUT], start, start)
            at = start
            for match in self._stand_in_or_control.finditer(text, start, end):
                pieces.put(text[at : match.start()], at, match.start())
                spelled = self._spelled_out.get(match[0])
                pieces.put(guarded.labels[self._added[match[0]]] if spelled is None else spelled, *match.span())
                at = match.end()
            pieces.put(text[at:end], at, end)
        encoded = guarded.encode_with_offsets("".join(pieces.texts))
        kept = [(id, pieces.origin(*span)) for id, span in zip(*encoded) if id != CUT]
        return _Encoded([id for id, _ in kept], [span for _, span in kept])

    def _guarded(self, mark: str) -> _Relabelled:
        """Return the tokenizer in which each control token is renamed to `mark` and a private-use character."""
        if mark not in self._guarded_by_mark:
            control = enumerate(self._control.items())
            labelled = {id: (mark + chr(FIRST_PRIVATE + i), token) for i, (id, token) in control}
            labelled[CUT] = mark, tokenizers.AddedToken(mark, normalized=False)
            labelled |= {id: (token.content, token) for id, token in self._words.items()}
            self._guarded_by_mark[mark] = _Relabelled(self._definition, labelled)
        return self._guarded_by_mark[mark]

    def _with_spans(
        self, rendering: Rendering, encoded: _Encoded
    ) -> tuple[list[int], list[tuple[int, int]]] | UserError:
        spans, cuts = self._find_spans(rendering, encoded)
        if cuts:
            if self._marks_starts:
                return UserError("an answer begins with white space that the tokenizer joins with the text before it")
            encoded = self._encode_guarded(rendering.text, cuts)
            spans, cuts = self._find_spans(rendering, encoded)
        if cuts or len(spans) != rendering.answers:
            return UserError(f"the chat template writes {len(spans)} of the {rendering.answers} assistant turns")
        return encoded.ids, spans

    def _find_spans(self, rendering: Rendering, encoded: _Encoded) -> tuple[list[tuple[int, int]], list[int]]:
        """Return the answers' spans in tokens, and the characters at which the text must be cut.

        Such a character is the border of an answer that one token covers from both sides.
        """
        if rendering.spans is None:
            spans = self._chatml_spans(encoded.ids)
            headers = re.finditer(re.escape(ANSWER_HEADER), rendering.text) if len(spans) != rendering.answers else ()
            return spans, [match.end() for match in headers]
        starts = [start for start, _ in encoded.offsets]
        spans = [(bisect_left(starts, start), bisect_left(starts, end)) for start, end in rendering.spans]
        borders = [
            (character, token)
            for characters, tokens in zip(rendering.spans, spans)
            for character, token in zip(characters, tokens)
        ]
        return spans, [
            character
            for character, token in borders
            # A control token may include white space from the other side of a border.
            if token and encoded.offsets[token - 1][1] > character and encoded.ids[token - 1] not in self._control
        ]

    def _chatml_spans(self, ids: list[int]) -> list[tuple[int, int]]:
        """Return each answer's span: from its header's end to its `<|im_end|>` and newline, or to the last id."""
        header, newline = self._chatml_ids
        turn_end = self._added[TURN_END]
        spans: list[tuple[int, int]] = []
        at = _find(ids, header[0], 0)
        while at < len(ids):
            start = at + len(header)
            if ids[at:start] == header:
                end = min(_find(ids, turn_end, start) + 1, len(ids))
                if ids[end : end + len(newline)] == newline:
                    end += len(newline)
                spans.append((start, end))
            at = _find(ids, header[0], at + 1)
        return spans

    @cached_property
    def _chatml_ids(self) -> tuple[list[int], list[int]]:
        """Ids of an assistant turn's header, and of the newline between two turns."""
        (encoded,) = self._encode_all([f"{TURN_END}\n{ANSWER_HEADER}"], offsets=False)
        header = encoded.ids.index(self._added[TURN_START])
        return encoded.ids[header:], encoded.ids[1:header]

    @cached_property
    def _marks_starts(self) -> bool:
        """Whether the tokenizer puts a space mark before a text that follows a control token."""
        guarded = self._guarded(MARK)
        ids, _ = guarded.encode_with_offsets(guarded.labels[CUT] + "a")
        return len(ids) != 2 or self._full.id_to_token(ids[1]) != "a"

    @cached_property
    def _templates(self) -> dict[str, str]:
        """The chat templates by name."""
        source = self._settings.get("chat_template")
        if isinstance(source, list):
            entries = [cast("dict[str, Any]", e) for e in cast("list[Any]", source) if isinstance(e, dict)]
            sources = {str(entry.get("name")): entry.get("template") for entry in entries}
        else:
            sources = {} if source is None else {"default": source}
        for template in sources.values():
            if not isinstance(template, str):
                raise UserError(f"{self.name}: chat_template in tokenizer_config.json is not a string; correct it")
        return cast("dict[str, str]", sources)

    def _format(self, tools: list[Any] | None) -> ChatFormat:
        """Return the chat template for these tools. transformers chooses the same one."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._formats:
            if name not in self._templates:
                raise UserError(f"{self.name} has no chat template; add chat_template.jinja or use another tokenizer")
            control = [token.content for token in self._control.values()]
            self._formats[name] = ChatFormat(
                self._templates[name], self._names, control, self.name, with_tools=name == "tool_use"
            )
        return self._formats[name]

    @property
    def _names(self) -> dict[str, str]:
        """The special tokens that are variables in the chat template, such as `bos_token`."""
        names = {key: token_name(self._settings, key, self.name) for key in NAMED_TOKENS}
        return {key: token for key, token in names.items() if token is not None}

    def _escape_messages(self, messages: list[Message]) -> list[Message]:
        """Return the messages with stand-ins, in the form in which transformers passes messages to templates."""
        return [
            self._escape(_plain_message(m), self._special_token if m["role"] == "assistant" else self._any_token)
            for m in messages
        ]

    def _special_id(self, key: str) -> int | None:
        token = token_name(self._settings, key, self.name)
        if token is None:
            return None
        id = self._full.token_to_id(token)
        if id is None:
            raise UserError(
                f"{self.name}: {key} is {token!r} in tokenizer_config.json, but tokenizer.json has no such token"
            )
        return id

    def _escape(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: self._stand_ins[match[0]], value)
        if isinstance(value, list):
            return [self._escape(item, pattern) for item in cast("list[Any]", value)]
        if isinstance(value, dict):
            items = cast("dict[str, Any]", value).items()
            return {self._escape(key, pattern): self._escape(item, pattern) for key, item in items}
        return value


class _Encoded(NamedTuple):
    """Ids, and the span of characters that each id stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]] = []


class _Relabelled:
    """A tokenizer with other added tokens.

    `tokens` has for each id that the methods return: its label in texts, and the added token whose options it gets.
    """

    def __init__(self, definition: str, tokens: dict[int, tuple[str, tokenizers.AddedToken]]) -> None:
        self.labels = {id: label for id, (label, _) in tokens.items()}
        self._backend = _without_extras(json.dumps({**json.loads(definition), "added_tokens": []}))
        self._backend.add_tokens([_like(token, label) for label, token in tokens.values()])
        returned = {self._backend.token_to_id(label): id for id, label in self.labels.items()}
        self._ids = {backend_id: id for backend_id, id in returned.items() if backend_id != id}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        found = [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [self._relabel(ids) for ids in found] if self._ids else found

    def encode_with_offsets(self, text: str) -> _Encoded:
        """Return the ids of the text, and the span of characters of each id."""
        found = self._backend.encode(text, add_special_tokens=False)
        return _Encoded(self._relabel(found.ids), found.offsets)

    def _relabel(self, ids: list[int]) -> list[int]:
        return [self._ids.get(id, id) for id in ids]


class _Pieces:
    """A text made of pieces. Each piece stands for a span of characters of another text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._starts: list[int] = []
        self._length = 0
        self._origins: list[tuple[int, int]] = []

    def put(self, text: str, start: int, end: int) -> None:
        """Add a piece that stands for the other text's characters from `start` to `end`."""
        if text:
            self.texts.append(text)
            self._starts.append(self._length)
            self._length += len(text)
            self._origins.append((start, end))

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """Return the span of the other text that the characters from `start` to `end` stand for."""
        first, last = bisect_right(self._starts, start) - 1, max(bisect_left(self._starts, end) - 1, 0)
        return self._place(first, start, 0), self._place(last, end, 1)

    def _place(self, piece: int, at: int, side: int) -> int:
        start, end = self._origins[piece]
        within = at - self._starts[piece]
        if len(self.texts[piece]) == end - start:  # The piece is unchanged.
            return start + within
        return end if within == len(self.texts[piece]) or (side and within) else start


def _like(token: tokenizers.AddedToken, label: str) -> tokenizers.AddedToken:
    normalized = token.normalized and label == token.content
    return tokenizers.AddedToken(
        label, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=normalized
    )


def _without_extras(definition: str) -> tokenizers.Tokenizer:
    """Load a tokenizer.json that does not truncate, pad, or add start and end tokens: chat templates write those."""
    full = tokenizers.Tokenizer.from_str(definition)
    full.no_truncation()
    full.no_padding()
    full.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return full


def _plain_message(message: Message) -> Message:
    """Return the message without fields that are None, and with its thought under both names that templates read."""
    plain = {key: value for key, value in message.items() if value is not None}
    thought = next((plain[key] for key in ("reasoning_content", "thinking", "reasoning") if key in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these strings, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


def _find(ids: list[int], id: int, start: int) -> int:
    """Return the next position of `id`, or the length of `ids`."""
    try:
        return ids.index(id, start)
    except ValueError:
        return len(ids)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) with MiniMind's control tokens and ChatML.

    Training also reads the name of every role after each text, so that roles become whole tokens even if no text
    contains their names. The same texts give the same tokenizer. Few texts may give fewer tokens than `vocab_size`.

    Raises:
        UserError: `vocab_size` is too small for the control tokens and the 256 bytes.
    """
    control = [*SPECIAL_TOKENS, *MARKUP_TOKENS]
    smallest = len(control) + 256
    if vocab_size < smallest:
        raise UserError(
            f"--vocab-size is {vocab_size}, but {len(control)} control tokens and 256 bytes need {smallest}; give more"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.train_from_iterator(
        (piece for text in texts for piece in (text, "system\nuser\nassistant\ntool\n")),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=control,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    layout = json.loads(bpe.to_str())
    for token in layout["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": TURN_START,
        "eos_token": TURN_END,
        "pad_token": SPECIAL_TOKENS[0],
        "unk_token": SPECIAL_TOKENS[0],
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    return Tokenizer(json.dumps(layout, ensure_ascii=False, indent=2), settings, "the trained tokenizer")
