"""Text to token ids and back: tokenizers trained here, and any Hugging Face tokenizer directory.

A tokenizer is two files, `tokenizer.json` and `tokenizer_config.json` (with the chat template). Control tokens (the
"added tokens": `<|im_start|>`, `<think>`, ...) come from the template alone. Where a text spells one out, it is plain
text: `encode` never yields a control token, and `render` puts a stand-in for what a message spells out, so that a
user's text can never open a turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import parse_json, read_json, read_text, require_own
from minimind_ray.data.chat_template import CHATML, ChatTemplate, Message
from minimind_ray.data.storage import copy_of, is_url, mirror_of

# MiniMind's, in the order of their ids: models and data made with one tokenizer layout stay usable with the other.
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

NO_TOKENIZER = "; it is no tokenizer directory, name one that holds tokenizer.json and tokenizer_config.json"

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ANSWER_HEADER = f"{TURN_START}assistant\n"

# A stand-in is this mark and a private character that says for what; the mark itself is stood in for too. It is a
# code point that Unicode keeps for a program's own use, so texts rarely hold it and templates never look at it.
MARK = "\ufdd0"
FIRST_PRIVATE = 0xF0000


class Tokenizer:
    """`definition` is the text of tokenizer.json, `settings` the content of tokenizer_config.json, `name` for errors.

    Raises:
        UserError: they do not make a tokenizer, name no end token, or let plain text reach a control token.
    """

    def __init__(self, definition: str, settings: dict[str, Any], name: str) -> None:
        self.name = name
        self._definition = definition
        self._settings = settings
        try:
            layout = parse_json(definition, f"{name}: tokenizer.json")
            self._full = tokenizers.Tokenizer.from_str(definition)
            # The same without added tokens: nothing in a text is matched by it.
            self._plain = tokenizers.Tokenizer.from_str(
                json.dumps({**layout, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
            )
            added: list[dict[str, Any]] = layout["added_tokens"]
        except UserError:
            raise
        except Exception as error:  # the library raises bare exceptions
            raise UserError(f"{name}: tokenizer.json is broken ({error}); give another tokenizer directory") from error
        self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
        ids = self._full.get_vocab().values()
        self.vocab_size = 1 + max(ids, default=0)
        if not 0 < len(ids) <= self.vocab_size <= 2 * len(ids) + 1024:
            raise UserError(f"{name}: tokenizer.json has {len(ids)} tokens, with ids up to {self.vocab_size - 1}")
        bos_id, eos_id, pad_id = (self._special_id(key) for key in ("bos_token", "eos_token", "pad_token"))
        if eos_id is None:
            raise UserError(f"{name}: tokenizer_config.json names no eos_token, which ends every document; add one")
        # Where there is no bos_token, documents begin with the token that ended the last, as GPT-2's do.
        self.bos_id = eos_id if bos_id is None else bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id

        special = [token["content"] for token in added if token["special"]]
        for content in special:
            if self._added[content] in self.encode([content])[0]:
                raise UserError(f"{name}: plain text can spell the control token {content}; use another tokenizer")
        stood_in_for = [MARK, *self._added]
        self._stand_ins = {c: MARK + chr(FIRST_PRIVATE + i) for i, c in enumerate(stood_in_for)}
        self._spelled_out = {stand_in: content for content, stand_in in self._stand_ins.items()}
        self._any_token = _any_of([MARK, *self._added])
        self._special_token = _any_of([MARK, *special])
        self._any_stand_in = _any_of(self._spelled_out)

        self._newline = self.encode(["\n"])[0]
        self._control = {content: [id] for content, id in self._added.items()}
        if TURN_START in self._added:
            # One unit: a header's ids are the same whatever white space the answer begins with.
            self._control[ANSWER_HEADER] = [self._added[TURN_START], *self.encode(["assistant\n"])[0]]
        swallowed = {token["content"]: (token["lstrip"], token["rstrip"]) for token in added}
        self._any_control = _any_of(self._control, swallowed)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a Hugging Face tokenizer directory, which may be a URL.

        Raises:
            UserError: a file is missing or broken; StoreError.
        """
        folder = copy_of(directory)
        if is_url(directory) and (mirror := mirror_of(directory)):
            mirror.pull(wanted=lambda name: "/" not in name)
        definition = _read(folder / "tokenizer.json")
        settings = read_json(folder / "tokenizer_config.json", NO_TOKENIZER)
        if (folder / "chat_template.jinja").exists():
            settings["chat_template"] = _read(folder / "chat_template.jinja")
        return cls(definition, settings, str(folder))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load` and transformers' AutoTokenizer read."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._definition, "utf-8")
        settings = json.dumps(self._settings, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(settings + "\n", "utf-8")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, dict[str, Any], str]]:
        return Tokenizer, (self._definition, self._settings, self.name)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides which ids a text or a conversation gets."""
        meaning = {
            **{k: v for k, v in json.loads(self._definition).items() if k not in ("truncation", "padding")},
            "chat_template": self._template_source,
            "names": self._names,
            "ids": [self.bos_id, self.eos_id, self.pad_id],
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def extends(self, other: Tokenizer) -> bool:
        """Whether every token of the other has the same id here."""
        ids = self._full.get_vocab()
        return all(ids.get(token) == id for token, id in other._full.get_vocab().items())

    # Plain text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without a start or an end; control tokens that a text spells out are not matched."""
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves out the special control tokens."""
        return self._full.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of text that each id stands for, 0 for control tokens. For bits per byte."""
        by_bytes = '"ByteLevel"' in json.dumps(json.loads(self._definition).get("decoder"))
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, id in self._full.get_vocab(with_added_tokens=False).items():
            if by_bytes:  # each byte is written as one character
                sizes[id] = len(token)
            else:  # SentencePiece's way: a mark for the space, <0x0A> for a single byte
                sizes[id] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
        sizes[list(self._added.values())] = 0
        return sizes

    # Conversations

    def render(
        self, messages: list[Message], tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the chat template writes it, for `encode_rendered`.

        What messages and tools spell out of control tokens is replaced by stand-ins; in an assistant's text only
        what is special, for an assistant does write `<think>` and `<tool_call>`.

        Raises:
            UserError: there is no chat template, or it fails on these messages.
        """
        return self._template.render(
            [self._escape(m, self._special_token if m["role"] == "assistant" else self._any_token) for m in messages],
            self._escape(tools, self._any_token),
            add_generation_prompt,
        )

    def writes(self, field: str) -> bool:
        """Whether the chat template could write this field of a message: it names it."""
        return re.search(rf"\b{re.escape(field)}\b", self._template_source or "") is not None

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered conversations: control tokens where the template put them, plain text between."""
        # Alternately plain text and a control token, beginning and ending with plain text.
        parts = [self._any_control.split(text) for text in texts]
        plain = iter(self.encode([self._restore(piece) for pieces in parts for piece in pieces[::2] if piece]))
        return [
            [
                id
                for i, piece in enumerate(pieces)
                if piece
                for id in (self._control.get(piece) or self._control[piece.strip()] if i % 2 else next(plain))
            ]
            for pieces in parts
        ]

    def prompt_ids(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Ids of the conversation up to where the assistant's next answer begins."""
        return self.encode_rendered([self.render(messages, tools, add_generation_prompt=True)])[0]

    def answer_spans(self, ids: list[int]) -> list[tuple[int, int]]:
        """Where each assistant turn's answer stands: after its header, up to its `<|im_end|>` and newline, or the end.

        Found by the header's ids, which no text can spell.
        """
        header, turn_end = self._control[ANSWER_HEADER], self._added[TURN_END]
        spans: list[tuple[int, int]] = []
        at = _find(ids, header[0], 0)
        while at < len(ids):
            start = at + len(header)
            if ids[at:start] == header:
                end = min(_find(ids, turn_end, start) + 1, len(ids))
                if ids[end : end + len(self._newline)] == self._newline:
                    end += len(self._newline)
                spans.append((start, end))
            at = _find(ids, header[0], at + 1)
        return spans

    def require_chatml(self) -> None:
        """Check that assistant turns can be found in what the chat template writes.

        Raises:
            UserError: there is no template, or its assistant turns look otherwise.
        """
        probe = self.render([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
        markers = (TURN_START in self._added, TURN_END in self._added, ANSWER_HEADER in probe, TURN_END in probe)
        if not all(markers):
            raise UserError(
                f"{self.name}: the loss mask needs a chat template that opens an assistant turn with "
                f"{ANSWER_HEADER!r} and closes it with {TURN_END!r} (ChatML); use a tokenizer that has one"
            )

    @property
    def _template_source(self) -> str | None:
        source = self._settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            entries = cast("list[Any]", source)
            named = [cast("dict[str, Any]", entry) for entry in entries if isinstance(entry, dict)]
            source = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        if source is not None and not isinstance(source, str):
            raise UserError(f"{self.name}: chat_template in tokenizer_config.json is no string; mend it")
        return source

    @cached_property
    def _template(self) -> ChatTemplate:
        source = self._template_source
        if source is None:
            raise UserError(f"{self.name} has no chat template; add chat_template.jinja or use another tokenizer")
        return ChatTemplate(source, self._names, self.name)

    @property
    def _names(self) -> dict[str, str]:
        """What the chat template knows by name."""
        names = {key: self._token(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {key: token for key, token in names.items() if token is not None}

    def _token(self, key: str) -> str | None:
        token = self._settings.get(key)
        if isinstance(token, dict):
            token = cast("dict[str, Any]", token).get("content")
        if token is not None and not isinstance(token, str):
            raise UserError(f"{self.name}: {key} in tokenizer_config.json is no string; mend it")
        return token

    def _special_id(self, key: str) -> int | None:
        token = self._token(key)
        if token is None:
            return None
        id = self._full.token_to_id(token)
        if id is None:
            raise UserError(f"{self.name}: {key} is {token!r} in tokenizer_config.json, but tokenizer.json has no such")
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

    def _restore(self, text: str) -> str:
        return self._any_stand_in.sub(lambda match: self._spelled_out[match[0]], text) if MARK in text else text


def _read(file: Path) -> str:
    require_own(file)
    return read_text(file, hint=NO_TOKENIZER)


def _any_of(contents: Iterable[str], swallowed: dict[str, tuple[bool, bool]] | None = None) -> re.Pattern[str]:
    """A pattern, as one group, for any of these, the longest first, with the white space that some swallow."""
    space = r"\s*"
    sides = swallowed or {}
    longest_first = sorted(contents, key=len, reverse=True)
    wanted = [(re.escape(c), *sides.get(c, (False, False))) for c in longest_first]
    alternatives = "|".join(f"{space * left}{c}{space * right}" for c, left, right in wanted)
    return re.compile(f"({alternatives or '(?!)'})")


def _find(ids: list[int], id: int, start: int) -> int:
    """Where `id` is next, or the length of `ids`."""
    try:
        return ids.index(id, start)
    except ValueError:
        return len(ids)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) with MiniMind's control tokens and a ChatML template.

    Each text counts as one turn of a conversation, so that roles become whole tokens in texts that never hold them.
    The same texts give the same tokenizer. Few texts may give fewer tokens than `vocab_size`.

    Raises:
        UserError: `vocab_size` has no room for the control tokens and the 256 bytes.
    """
    control = [*SPECIAL_TOKENS, *MARKUP_TOKENS]
    smallest = len(control) + 256
    if vocab_size < smallest:
        raise UserError(
            f"--vocab-size is {vocab_size}; {len(control)} control tokens and 256 bytes take {smallest}, give more"
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
