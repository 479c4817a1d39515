"""Markers of config keys: `Flag` for a short option, such as `--lr` for `optim.lr`, and `Movable` for pbt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """The short option of a config key. A field of the schema has it as `Annotated[…, Flag("--lr")]`.

    `vary` says that `tune` accepts several values, which make an axis. `verbatim` says that the value is the text
    itself, not parsed as YAML. `note` is a text for the help, after the key.
    """

    name: str
    vary: bool = False
    verbatim: bool = False
    note: str = ""

    @property
    def parameter(self) -> str:
        """The option as a Python name, such as `max_seq_len`."""
        return self.name.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Movable:
    """Population based training (pbt) may change the key in the middle of a run: neither data nor tensors depend on it.

    A field of the schema has the marker as `Annotated[…, Movable()]`.
    """
