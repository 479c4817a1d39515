"""A conversation with a model that streams its answers piece by piece, for `chat` and the server."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.data.chat_template import Message
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.engine import Engine, stream
from minimind_ray.model.sampling import Sampling
from minimind_ray.stages.use import Trained

REPLACEMENT = "\ufffd"


class Conversation:
    """The turns so far, and the model that answers."""

    def __init__(self, trained: Trained, sampling: Sampling, system: str | None = None) -> None:
        self.sampling = sampling
        self.messages: list[Message] = []
        self.system = system
        self.hand_to(trained)
        self.reset()

    def hand_to(self, trained: Trained) -> None:
        """Use another model, or the same model with another adapter, for the next answers."""
        self.trained = trained
        self._engine = Engine(trained.model, 1, reuse=True)

    def reset(self) -> None:
        """Forget all turns except the system's."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def change_system(self, text: str | None) -> None:
        """Replace the text of the system's turn, and keep the other turns. None removes the system's turn."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.system = text
        self.reset()
        self.messages += turns

    def answer(self, text: str) -> Generator[str]:
        """Yield the answer to a user's turn, in pieces of whole characters.

        When the iterator ends or is closed, both turns are added to the conversation, with the pieces yielded so far.

        Raises:
            UserError: the conversation leaves no room for an answer, or the chat template refuses it.
        """
        turn: Message = {"role": "user", "content": text}
        tokenizer = self.trained.tokenizer
        prompt = tokenizer.prompt_ids([*self.messages, turn])
        sampling = replace(
            self.sampling,
            max_new_tokens=self.trained.room(prompt, self.sampling.max_new_tokens),
            stop_ids=tuple(tokenizer.stop_ids),
            seed=(*self.sampling.seed, len(self.messages)),  # A different seed for each turn, the same in every run.
        )
        given = ""
        try:
            with self.trained.autocast(), closing(stream(self._engine, prompt, sampling)) as ids:
                for piece in without_lead(whole_characters(tokenizer, ids, prompt), tokenizer.answer_lead):
                    given += piece
                    yield piece
        finally:
            self.messages += [turn, {"role": "assistant", "content": given}]


def save_conversation(messages: Sequence[Message], path: Path) -> None:
    """Append a conversation to a .jsonl file, as a row that sft and lora read.

    Raises:
        UserError: the file's name has another ending, there is no answer yet, a turn is empty, or the file cannot be
            written.
    """
    from minimind_ray.data.fields import BadRowError
    from minimind_ray.data.formats import RowReader
    from minimind_ray.data.records import Row

    if path.suffix != ".jsonl":
        raise UserError(f"{path}: give a file whose name ends with .jsonl")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("there is no answer to save yet: ask a question first")
    row = {"conversations": list(messages)}
    try:
        RowReader("conversation", DataConfig()).read(Row(str(path), 1, row))
    except BadRowError as error:
        raise UserError(f"the conversation cannot be saved as a row for training: {error}") from None
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        with path.open("a+b") as file:
            file.seek(-1 if file.tell() else 0, os.SEEK_END)
            file.write((b"" if file.read(1) in (b"", b"\n") else b"\n") + line.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def without_lead(pieces: Iterable[str], lead: str) -> Iterator[str]:
    """Yield the pieces of a text as they come, without `lead` if the text begins with it."""
    start = ""
    started = False
    for piece in pieces:
        start += piece
        if not started and len(start) < len(lead) and lead.startswith(start):
            continue
        yield from filter(None, [start if started else start.removeprefix(lead)])
        start, started = "", True


def whole_characters(tokenizer: Tokenizer, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of ids as they come. A character whose bytes span several ids is yielded with the last of them.

    All pieces joined equal the result of `decode` for all ids at once. `after` are the ids before them.
    """
    # The last ids. The window starts one id early, because an id's text may have other spacing at the start of a text.
    window = list(after[-1:])
    shown = len(tokenizer.decode(window, skip_special=True))  # Characters of the window's text that were yielded.
    text = ""
    for id in ids:
        window.append(id)
        text = tokenizer.decode(window, skip_special=True)
        whole = text.rstrip(REPLACEMENT)  # A text that ends inside a character ends with this symbol.
        if len(whole) > shown:
            yield whole[shown:]
            shown = len(whole)
        if whole == text:
            window = [id]
            text = tokenizer.decode(window, skip_special=True)
            shown = len(text)
    if text[shown:]:
        yield text[shown:]
