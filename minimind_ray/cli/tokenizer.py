"""`minimind-ray tokenizer train`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)


@app.command()
def train(
    files: Annotated[list[str], typer.Argument(help="paths, globs, folders or URLs of any stage's data")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    vocab_size: Annotated[int, typer.Option(help="tokens, the 36 control tokens and 256 bytes among them")] = 6400,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="train on so much text at most")] = None,
) -> None:
    """Train a byte-level BPE tokenizer with MiniMind's control tokens; report how it does on rows held out."""
    from minimind_ray.config.errors import UserError
    from minimind_ray.data.encode import row_texts
    from minimind_ray.data.records import Row, discover, read_rows
    from minimind_ray.data.tokenizer import train_tokenizer

    held_out: list[str] = []
    used = 0

    def texts() -> Iterator[str]:
        nonlocal used
        rows = (row for source in discover(files) for row in read_rows(source) if isinstance(row, Row))
        for i, row in enumerate(rows):
            for text in row_texts(row.value):
                if i % 50 == 49:
                    held_out.append(text)
                elif max_bytes is None or used < max_bytes:
                    used += len(text.encode())
                    yield text
                else:
                    return

    tokenizer = train_tokenizer(texts(), vocab_size)
    if not used:
        raise UserError(f"{', '.join(files)}: no text to train on; rows need text, conversations, messages or chosen")
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size:,} tokens, trained on {used / 1e6:.1f} MB")
    if tokenizer.vocab_size < vocab_size:
        print(f"fewer than the {vocab_size:,} asked for: there was too little text to merge more")
    tokens = sum(map(len, tokenizer.encode(held_out)))
    if tokens:
        chars, size = sum(map(len, held_out)), sum(len(text.encode()) for text in held_out)
        print(f"on {len(held_out):,} texts held out: {chars / tokens:.2f} chars, {size / tokens:.2f} bytes per token")


@app.callback()
def group() -> None:
    """Make tokenizers."""
