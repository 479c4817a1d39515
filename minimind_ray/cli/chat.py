"""`minimind-ray chat MODEL`: talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_ray.cli import options
from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    from minimind_ray.stages.conversation import Conversation

COMMANDS = "/reset  forget the conversation     /adapter DIR  apply an adapter to MODEL     /adapter off     /quit"


def chat(
    model: options.Model,
    adapter: options.Adapter = None,
    system: Annotated[str | None, typer.Option(help="text of the system turn", show_default=False)] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="a second model; its answers are shown beside")
    ] = None,
    temperature: options.Temperature = 0.8,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    max_new_tokens: options.MaxNewTokens = 512,
    seed: options.Seed = 0,
    precision: options.Precision = "auto",
) -> None:
    """Talk with a model, or with two at once. Reads a terminal or a pipe, in which each line is a turn.

    Commands: /reset, /adapter DIR, /adapter off, /quit. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from functools import partial

    from minimind_ray.config.reading import require_text
    from minimind_ray.model.lora import is_adapter
    from minimind_ray.model.sampling import Sampling
    from minimind_ray.stages.conversation import Conversation
    from minimind_ray.stages.use import base_of, open_trained
    from minimind_ray.train import interrupts
    from minimind_ray.train.run import resolve_model

    interrupts.uninstall()  # Ctrl-C stops an answer; every other signal ends the chat.
    require_text(system or "", "--system")

    opened = partial(open_trained, precision=precision)
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed=(seed,))
    talks = {model: Conversation(opened(model, adapter=adapter), sampling, system)}
    if compare is not None:
        if compare == model:
            raise UserError(f"--compare {compare} is the same model: give another model")
        talks[compare] = Conversation(opened(compare), sampling, system)
    for name, talk in talks.items():
        if talk.trained.continues_texts:
            print(
                f"{name} was only pretrained and cannot hold conversations; use minimind-ray generate", file=sys.stderr
            )
    if sys.stdin.isatty():
        print(f"{COMMANDS}\nCtrl-C stops an answer, Ctrl-D leaves")

    def change_adapter(name: str) -> None:
        if name == "off":
            directory = resolve_model(model)
            talks[model].hand_to(opened(base_of(directory) if is_adapter(directory) else directory))
        else:
            talks[model].hand_to(opened(model, adapter=name))

    for line in turns():
        if line.partition(" ")[0] == "/quit":
            return
        take_turn(line, talks, change_adapter)


def take_turn(line: str, talks: dict[str, Conversation], change_adapter: Callable[[str], None]) -> None:
    """Carry out a command, or print the answers to a user's turn. Errors are printed, and the chat continues.

    `change_adapter` applies the adapter of this name to the first model; "off" removes the adapter.
    """
    command, _, argument = line.partition(" ")
    try:
        if command == "/reset":
            for talk in talks.values():
                talk.reset()
        elif command == "/adapter" and argument.strip():
            change_adapter(argument.strip())
        elif command.startswith("/"):
            print(COMMANDS)
        else:
            line.encode()
            answer(talks, line)
    except KeyboardInterrupt:
        print()
    except UnicodeEncodeError:
        print("error: this is not UTF-8 text", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)


def turns() -> Iterator[str]:
    """Yield the lines that the user types, without blank lines, up to the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]  # input() edits lines with it

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
