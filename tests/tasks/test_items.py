"""The table of items."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.tasks.items import Item, metrics_of, mode_of, read_items, scores_of, write_items

pytestmark = pytest.mark.unit


def items() -> list[Item]:
    first = [Item("arc", i, i // 2, "acc", float(i == 1), 1.0, f"q{i}", "a", "b") for i in (1, 0, 2)]
    second = [Item("wiki", i, i, "bits_per_byte", 3.0 * i, 2.0, "", "", "text") for i in range(2)]
    return first + [item._replace(metric="acc_norm", value=1.0) for item in first] + second


def test_items_come_back_as_written(tmp_path: Path) -> None:
    write_items(tmp_path / "t.parquet", items())
    table = read_items(tmp_path / "t.parquet")
    assert metrics_of(table) == {"arc": ["acc", "acc_norm"], "wiki": ["bits_per_byte"]}
    scores = scores_of(table, "arc")
    assert scores.item_E.tolist() == [0, 1, 2]
    assert scores.cluster_E.tolist() == [0, 0, 1]
    assert scores.value_E.tolist() == [0, 1, 0]
    assert scores_of(table, "arc", "acc_norm").mean == 1
    assert scores_of(table, "wiki").mean == 3 / 4
    assert (mode_of("acc"), mode_of("bits_per_byte")) == ("max", "min")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_items(tmp_path / "t.parquet", items())
    table = read_items(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no results of task piqa, only of arc, wiki"):
        scores_of(table, "piqa")
    with pytest.raises(UserError, match="no metric f1, only acc, acc_norm"):
        scores_of(table, "arc", "f1")
    with pytest.raises(UserError, match="cannot be read"):
        read_items(tmp_path / "none.parquet")
