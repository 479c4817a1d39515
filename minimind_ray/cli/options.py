"""Options and checks shared by the commands that use a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="run, model or adapter directory, or a model of the hub")]
Adapter = Annotated[str | None, typer.Option(metavar="DIR", help="LoRA adapter, or its run, to apply to MODEL")]
Precision = Annotated[
    Literal["auto", "bfloat16", "float32"],
    typer.Option(help="precision of matrix products; auto: bfloat16 if supported"),
]


def _setting(help: str, otherwise: str, **bounds: float) -> Any:
    """Return an option whose default is the model's own setting; None if the user does not give it."""
    default = f"default: as the model's generation_config.json says, else {otherwise}"
    return typer.Option(help=f"{help}; {default}", show_default=False, **cast("Any", bounds))


Temperature = Annotated[float | None, _setting("0: always take the likeliest token", "0.8", min=0)]
TopP = Annotated[
    float | None, _setting("sample from the likeliest tokens with this total probability", "0.95", min=0, max=1)
]
TopK = Annotated[int | None, _setting("sample from this many likeliest tokens; 0: all", "0", min=0)]
RepetitionPenalty = Annotated[
    float | None, _setting("above 1: tokens of the text so far become less likely", "1", min=0.01)
]


def max_new_tokens(otherwise: int) -> Any:
    """Return the option --max-new-tokens of a command whose own default is `otherwise`."""
    return _setting("longest answer, in tokens", str(otherwise), min=1)


Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="the same seed gives the same answers")]


def require_new(path: Path) -> None:
    """Check that a command may create this file or directory.

    Raises:
        UserError: the path is a URL, or exists and is not an empty directory.
    """
    from minimind_ray.config.errors import UserError

    require_local(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already: remove it, or give another path")


def require_local(path: Path) -> None:
    """Check that an output path is not a URL, which a Path shows as s3:/bucket.

    Raises:
        UserError: the path is a URL.
    """
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.paths import STORES

    if path.parts and path.parts[0].endswith(":") and path.parts[0][:-1].lower() in (*STORES, "http", "https", "file"):
        place = "/".join(path.parts[1:]).rpartition("@")[2]
        raise UserError(f"{path.parts[0]}//{place} is a URL, but this command writes local files: give a local path")


def printable(text: str) -> str:
    """Return the text for a terminal, with visible symbols in place of control characters."""
    return text.translate(_CONTROL)


_CONTROL = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
