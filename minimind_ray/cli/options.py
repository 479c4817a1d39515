"""Options that several commands which use a model share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="run directory, model directory, or adapter directory")]
Adapter = Annotated[str | None, typer.Option(metavar="DIR", help="LoRA adapter, or its run, to put on MODEL")]
Precision = Annotated[
    Literal["auto", "bfloat16", "float32"], typer.Option(help="of matrix products; auto: bfloat16 where there is any")
]

Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="keep the likeliest tokens that reach this probability")]
TopK = Annotated[int, typer.Option(min=0, help="keep so many tokens; 0: all")]
RepetitionPenalty = Annotated[float, typer.Option(min=0.01, help="over 1: tokens already there become less likely")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="the same seed draws the same answers")]


def require_new(path: Path) -> None:
    """Check that a command may write there.

    Raises:
        UserError: it is a URL, or something is there already, other than an empty directory.
    """
    from minimind_ray.config.errors import UserError

    require_local(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already: remove it, or write to another place")


def require_local(path: Path) -> None:
    """Check that a path to write to was not given as a URL, which a Path shows as s3:/bucket.

    Raises:
        UserError: it was.
    """
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.paths import STORES

    if path.parts and path.parts[0].endswith(":") and path.parts[0][:-1].lower() in (*STORES, "http", "https", "file"):
        place = "/".join(path.parts[1:]).rpartition("@")[2]
        raise UserError(f"{path.parts[0]}//{place} is a URL, and this command writes to local files: name a local path")


def printable(text: str) -> str:
    """A model's text for a terminal: control characters, which could steer it, made visible."""
    return text.translate(_CONTROL)


_CONTROL = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
