"""Columns: values that a frozen model gave for the data, computed once and kept beside the packs.

A column travels from its file through packs into batches. Store, packs, batches and hosts do not know what it means;
the objective that declared it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """One value for each document or each token. `dtype` is NumPy's name of the type, such as float32.

    In a pack, the value of a token is about the prediction of that token, as the token's loss weight is. In a batch it
    therefore stands with the position whose target the token is. The first token of a document is never predicted, and
    its value is not used.
    """

    name: str
    axis: Literal["token", "document"]
    dtype: str

    def __post_init__(self) -> None:
        assert self.name not in ("tokens", "weights", "lengths", "step", "rank", "id"), "a pack has these already"
