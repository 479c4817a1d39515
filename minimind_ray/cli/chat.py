"""`minimind-ray chat MODEL`: talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli import options
from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    from minimind_ray.model.sampling import Sampling
    from minimind_ray.stages.conversation import Conversation
    from minimind_ray.stages.use import Trained

COMMANDS = """\
/reset              begin a new conversation
/set NAME VALUE     change a setting, as in /set temperature 0.2
/system TEXT        change the system turn; without TEXT, remove it
/save FILE.jsonl    append the conversation to a file, as a row for sft
/adapter DIR        apply an adapter to MODEL; /adapter off removes it
/help, /quit        Ctrl-C stops an answer, Ctrl-D leaves"""
SETTINGS = {
    "temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "max_new_tokens": int, "seed": int,
}  # fmt: skip
LONGEST = 512
"""The default of max_new_tokens."""


def chat(
    model: options.Model,
    adapter: options.Adapter = None,
    system: Annotated[str | None, typer.Option(help="text of the system turn", show_default=False)] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="a second model; its answers are shown beside")
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    max_new_tokens: Annotated[int | None, options.max_new_tokens(LONGEST)] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            show_default=False,
            help="the same seed gives the same answers; default: other answers after each /reset",
        ),
    ] = None,
    precision: options.Precision = "auto",
) -> None:
    """Talk with a model, or with two at once. Reads a terminal or a pipe, in which each line is a turn.

    Commands: /set, /system, /save, /reset, /adapter, /help, /quit. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from functools import partial

    from minimind_ray.config.reading import require_text
    from minimind_ray.model.lora import is_adapter
    from minimind_ray.stages.use import base_of, open_trained
    from minimind_ray.train import interrupts
    from minimind_ray.train.run import resolve_model

    interrupts.uninstall()  # Ctrl-C stops an answer; every other signal ends the chat.
    require_text(system or "", "--system")
    if compare == model:
        raise UserError(f"--compare {compare} is the same model: give another model")
    given = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    opened = partial(open_trained, precision=precision)
    directory = resolve_model(model)
    base, first = model, opened(model, adapter=adapter)
    if adapter is None and is_adapter(directory):
        base, adapter = str(base_of(directory)), model
    chat = Chat(base, adapter, lambda name: opened(base, adapter=name), given)
    chat.begin(model, first, system)
    if compare is not None:
        chat.begin(compare, opened(compare), system)
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{chat.describe()}\n{COMMANDS}")
    with remembered_lines() if terminal else nullcontext():
        for line in turns():
            if line.partition(" ")[0] == "/quit":
                return
            chat.take_turn(line)


@dataclass
class Chat:
    """A conversation with a model, or the same conversation with two, and the settings that the user gave.

    `adapter` is applied to `base`, which is the first model; `open_base` opens the base with the adapter of a name, or
    without an adapter. `given` has the user's value of each of SETTINGS, None if there is none.
    """

    base: str
    adapter: str | None
    open_base: Callable[[str | None], Trained]
    given: dict[str, Any]
    talks: dict[str, Conversation] = field(default_factory=dict)
    resets: int = 0

    def begin(self, name: str, trained: Trained, system: str | None) -> None:
        """Add a model, with a conversation that has only the system's turn."""
        from minimind_ray.stages.conversation import Conversation

        self.talks[name] = Conversation(trained, self.sampling(trained), system)
        if trained.continues_texts:
            print(
                f"{name} was only pretrained and cannot hold conversations; use minimind-ray generate", file=sys.stderr
            )

    def sampling(self, trained: Trained) -> Sampling:
        """Return the settings of the next answers. Without a seed of the user, they differ after each reset."""
        settings = dict(self.given)
        seed = settings.pop("seed")
        seeds = (seed,) if seed is not None else (0, self.resets) if self.resets else (0,)
        return trained.sampling(settings, max_new_tokens=LONGEST, seed=seeds)

    def describe(self) -> str:
        """Return a line for each model: the model, its adapter and the settings."""
        lines: list[str] = []
        for i, (name, talk) in enumerate(self.talks.items()):
            who = name if i else f"{self.base} with adapter {self.adapter}" if self.adapter else self.base
            values = {key: getattr(talk.sampling, key) for key in SETTINGS if key != "seed"}
            values |= {"seed": seed} if (seed := self.given["seed"]) is not None else {}
            lines.append(f"{who}: {', '.join(f'{key} {value:g}' for key, value in values.items())}")
        return "\n".join(lines)

    def take_turn(self, line: str) -> None:
        """Carry out a command, or print the answers to a user's turn. Errors are printed, and the chat continues."""
        command, _, argument = line.partition(" ")
        try:
            line.encode()
            if command in ("/set", "/adapter"):
                self.set(argument) if command == "/set" else self.change_adapter(argument.strip())
                if sys.stdin.isatty():
                    print(self.describe())
            elif command == "/reset":
                self.reset()
            elif command == "/system":
                for talk in self.talks.values():
                    talk.change_system(argument.strip() or None)
            elif command == "/save":
                self.save(argument.strip())
            elif command == "/help":
                print(COMMANDS)
            elif command.startswith("/"):
                raise UserError(f"there is no command {command}; /help lists the commands")
            else:
                answer(self.talks, line)
        except KeyboardInterrupt:
            print()
        except UnicodeEncodeError:
            print("error: this is not UTF-8 text", file=sys.stderr)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)

    def set(self, argument: str) -> None:
        """Change a setting, given as "NAME VALUE". Without a name, change nothing.

        Raises:
            UserError: there is no such setting, or the value is not possible.
        """
        if not argument.strip():
            return
        written, _, value = argument.strip().replace("=", " ").partition(" ")
        name = written.replace("-", "_").lower()
        if name not in SETTINGS:
            near = get_close_matches(name, SETTINGS, 1, 0.0)[0]
            raise UserError(f"there is no setting {written}; did you mean {near}? All settings: {', '.join(SETTINGS)}")
        try:
            number = SETTINGS[name](value)
        except ValueError:
            kind = "a whole number" if SETTINGS[name] is int else "a number"
            raise UserError(f"{name} is {value.strip()!r}: give {kind}, as in /set {name} 1") from None
        if name == "seed" and number < 0:
            raise UserError(f"seed is {number}: give a number of at least 0")
        before = self.given
        self.given = {**before, name: number}
        try:
            self._settle()
        except UserError:
            self.given = before
            raise

    def _settle(self) -> None:
        samplings = [self.sampling(talk.trained) for talk in self.talks.values()]
        for talk, sampling in zip(self.talks.values(), samplings):
            talk.sampling = sampling

    def reset(self) -> None:
        """Begin new conversations."""
        self.resets += 1
        for talk in self.talks.values():
            talk.reset()
        self._settle()

    def change_adapter(self, name: str) -> None:
        """Apply the adapter of this name to the first model; "off" removes the adapter.

        Raises:
            UserError: there is no such adapter, or it belongs to another model.
        """
        if not name:
            raise UserError("name an adapter, as in /adapter runs/lora, or write /adapter off")
        adapter = None if name == "off" else name
        next(iter(self.talks.values())).hand_to(self.open_base(adapter))
        self.adapter = adapter
        self._settle()

    def save(self, name: str) -> None:
        """Append the conversation with each model to a .jsonl file. Raises UserError if that is not possible."""
        from minimind_ray.config.paths import expanded
        from minimind_ray.stages.conversation import save_conversation

        if not name:
            raise UserError("name a file, as in /save talks.jsonl")
        options.require_local(Path(name))
        for talk in self.talks.values():
            save_conversation(talk.messages, expanded(name))
        print(f"saved to {name}")


@contextmanager
def remembered_lines() -> Generator[None]:
    """Inside, `input` edits lines, and the arrow keys find the lines of earlier chats. Only the user can read them."""
    import os
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "minimind-ray" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):  # A chat without a history is better than an error at its end.
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.chmod(0o600)
            readline.set_history_length(1000)
            readline.write_history_file(path)


def turns() -> Iterator[str]:
    """Yield the lines that the user types, without blank lines, up to the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print("  (Ctrl-D or /quit leaves)")
            continue
        except UnicodeDecodeError:
            print("error: this is not UTF-8 text", file=sys.stderr)
            continue
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def answer(talks: dict[str, Conversation], text: str) -> None:
    """Print the answers to a user's turn as they come: a single answer as text, two answers in columns."""
    if len(talks) == 1:
        (talk,) = talks.values()
        with closing(talk.answer(text)) as pieces:
            for piece in pieces:
                print(options.printable(piece), end="", flush=True)
        print()
    else:
        side_by_side(talks, text)


def side_by_side(talks: dict[str, Conversation], text: str) -> None:
    """Print both answers in a growing table. The two models take turns to write a piece of their answer."""
    from contextlib import ExitStack

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console()
    texts = {name: "" for name in talks}

    def table() -> Table:
        grid = Table(expand=True)
        for name in texts:
            grid.add_column(Text(name), ratio=1, overflow="fold")
        grid.add_row(*(Text(options.printable(t)) for t in texts.values()))
        return grid

    with ExitStack() as stack:
        # Each answer enters and leaves autocast, too, but the two answers do not end in the order of nested blocks.
        stack.enter_context(next(iter(talks.values())).trained.autocast())
        streams = [stack.enter_context(closing(talk.answer(text))) for talk in talks.values()]
        live = stack.enter_context(Live(table(), console=console, refresh_per_second=8, vertical_overflow="visible"))
        for pieces in zip_longest(*streams, fillvalue=""):
            for name, piece in zip(texts, pieces):
                texts[name] += piece
            live.update(table())
    if not console.is_terminal:
        print()  # Outside a terminal, rich ends the table without a new line.
