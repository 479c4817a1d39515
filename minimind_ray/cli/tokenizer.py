"""`minimind-ray tokenizer train`: train a tokenizer on files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

HELD_OUT_EVERY, MOST_HELD_OUT = 50, 10_000

app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)


@app.command()
def train(
    files: Annotated[list[str], typer.Argument(help="paths, globs, folders or URLs of any stage's data")],
    out: Annotated[str, typer.Option(help="directory to write, or its URL")],
    vocab_size: Annotated[int, typer.Option(help="number of tokens, including 36 control tokens and 256 bytes")] = 6400,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="most bytes of text to train on")] = None,
) -> None:
    """Train a byte-level BPE tokenizer with MiniMind's control tokens, and measure it on held-out rows."""
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.paths import output_path
    from minimind_ray.data.files import exists, join
    from minimind_ray.data.storage import require_writable

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if exists(join(output_path(out), name)):
            raise UserError(f"{out} holds a tokenizer already: remove it, or give another directory")
    require_writable(output_path(out))
    make(files, out, vocab_size, max_bytes)


def make(files: list[str], out: str, vocab_size: int, max_bytes: int | None) -> None:
    """Train and measure a tokenizer. Replace an existing tokenizer in `out`.

    Raises:
        UserError: the files hold no text, or `vocab_size` is too small.
    """
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.paths import input_path, output_path
    from minimind_ray.data.fields import BadRowError
    from minimind_ray.data.formats import texts_of
    from minimind_ray.data.records import Reject, discover, read_rows
    from minimind_ray.data.storage import copy_of, mirror_of
    from minimind_ray.data.tokenizer import train_tokenizer

    out, files = output_path(out), [input_path(file) for file in files]
    held_out: list[str] = []
    used = bad = 0

    def texts() -> Iterator[str]:
        nonlocal used, bad
        rows = (row for source in discover(files) for row in read_rows(source))
        for i, row in enumerate(rows, 1):
            try:
                written = [] if isinstance(row, Reject) else texts_of(row.value)
            except BadRowError:
                written = []
            bad += not written
            if i % HELD_OUT_EVERY == 0 and len(held_out) < MOST_HELD_OUT:
                held_out.extend(written)
                continue
            for text in written:
                used += len(text.encode())
                yield text
            if max_bytes is not None and used >= max_bytes:
                return

    tokenizer = train_tokenizer(texts(), vocab_size)
    if not used:
        raise UserError(f"{', '.join(files)}: no text to train on; `minimind-ray data inspect` says why")
    tokenizer.save(copy_of(out))
    if mirror := mirror_of(out):
        mirror.put("tokenizer.json", "tokenizer_config.json")
    print(f"{out}: {tokenizer.vocab_size:,} tokens, trained on {used / 1e6:.1f} MB")
    if bad:
        print(f"{bad:,} rows could not be read and were left out; `minimind-ray data inspect` says why")
    if tokenizer.vocab_size < vocab_size:
        print(f"fewer tokens than --vocab-size {vocab_size:,}: there was too little text for more")
    if not held_out:
        print(f"not measured: with fewer than {HELD_OUT_EVERY} rows, no row was held out")
        return
    tokens = sum(map(len, tokenizer.encode(held_out)))
    chars, size = sum(map(len, held_out)), sum(len(text.encode()) for text in held_out)
    print(
        f"a token stands for {chars / tokens:.2f} characters, or {size / tokens:.2f} bytes, in {len(held_out):,} "
        "held-out texts"
    )


@app.callback()
def group() -> None:
    """Make tokenizers."""
