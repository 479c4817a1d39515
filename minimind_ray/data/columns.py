"""Columns: values that a frozen model computes for the data, once. They are stored in files beside the packs.

The values of a column go from its file through packs into batches. Only the objective that declares a column knows its
meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """One value for each document or each token. `dtype` is NumPy's name of the type, such as float32.

    In a pack, the value of a token belongs to the prediction of this token, like its loss weight. In a batch, the value
    therefore stands at the position whose target is this token. The first token of a document is never predicted, so
    its value is not used.
    """

    name: str
    axis: Literal["token", "document"]
    dtype: str

    def __post_init__(self) -> None:
        assert self.name not in ("tokens", "weights", "lengths", "step", "rank", "id"), "a pack has these already"
