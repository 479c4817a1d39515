"""The marker of a config key that has a short option on the command line, such as `--lr` for `optim.lr`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """Put on a field of the schema by `Annotated[…, Flag("--lr")]`.

    `vary`: `tune` accepts several values, which make an axis. `verbatim`: the text itself is the value; it is not
    parsed as YAML. `note`: a text for the help, after the key.
    """

    name: str
    vary: bool = False
    verbatim: bool = False
    note: str = ""

    @property
    def parameter(self) -> str:
        """The option as a Python name, such as `max_seq_len`."""
        return self.name.removeprefix("--").replace("-", "_")
