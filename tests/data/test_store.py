from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.columns import Column
from minimind_ray.data.pack import Document, packs_table
from minimind_ray.data.store import PackStore, epoch_order, write_column

pytestmark = pytest.mark.unit

REFERENCE = Column("reference", "document", "float32")

KEYS = ["a" * 40, "b" * 40, "c" * 40]


def make_store(cache: Path, shards: list[list[int]], vocab_size: int = 6400) -> str:
    """A prepared dataset of made-up packs; `shards` holds the packs in each row group of each shard."""
    random = np.random.default_rng(0)
    units: list[dict[str, object]] = []
    (cache / "units").mkdir(parents=True)
    for key, groups in zip(KEYS, shards, strict=False):
        packs = [
            [
                (Document(random.integers(0, vocab_size, length), random.integers(0, 2, length, np.uint8)),)
                for length in random.integers(2, 20, 3)
            ]
            for _ in range(sum(groups))
        ]
        table = packs_table(packs, vocab_size)
        shard = cache / "units" / f"{key}.parquet"
        with pq.ParquetWriter(shard, table.schema) as writer:
            start = 0
            for size in groups:
                writer.write_table(table.slice(start, size))
                start += size
        documents = [document for pack in packs for group in pack for document in group]
        units.append(
            {
                "key": key, "rows": 5, "kept": 3, "rejected": 1, "held_out": 1, "damaged": 0,
                "split": 0, "cut": 0, "cut_tokens": 0, "left_out": 0, "shortened": 0, "too_long": {}, "ignored": {},
                "row_format": "text", "format_line": 0,
                "documents": len(documents), "tokens": sum(len(d.tokens) for d in documents),
                "counted_tokens": sum(int(d.weights.sum()) for d in documents),
                "row_groups": groups, "bytes": shard.stat().st_size,
            }
        )  # fmt: skip
    dataset = cache / "datasets" / "d"
    dataset.mkdir(parents=True)
    manifest = {
        "format": 4, "stage": "pretrain", "split": "train", "tokenizer": "t", "pack_tokens": 60,
        "sources": {"x.jsonl": 1}, "units": units,
    }  # fmt: skip
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    return str(dataset)


def edit_manifest(path: str, **changes: object) -> None:
    file = Path(path) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(6400, np.uint16), (151_936, np.uint32)])
def test_reads_what_was_written_in_any_order(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    store = PackStore(make_store(tmp_path, [[64, 7], [], [3]], vocab_size))
    in_order = list(store)
    assert store.row_groups == (64, 7, 3)
    assert (store.n_packs, store.n_documents) == (74, 74 * 3)
    assert [pack.id for pack in in_order] == list(range(74))
    assert store.n_tokens == sum(len(pack.tokens) for pack in in_order)
    assert store.manifest.total("counted_tokens") == sum(pack.counted for pack in in_order)
    assert {pack.tokens.dtype for pack in in_order} == {np.dtype(dtype)}
    ids = np.random.default_rng(1).permutation(74)
    for pack in store.read(ids.tolist()):
        assert np.array_equal(pack.tokens, in_order[pack.id].tokens)
        assert np.array_equal(pack.weights, in_order[pack.id].weights)
        assert np.array_equal(pack.lengths, in_order[pack.id].lengths)
        assert not pack.columns
    assert [pack.id for pack in store.read(ids.tolist())] == ids.tolist()
    with pytest.raises(IndexError):
        store.read([74])


def test_reads_each_row_group_once_in_epoch_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PackStore(make_store(tmp_path, [[1] * 20, [2] * 15, [3] * 10]))
    reads: list[int] = []
    original = pq.ParquetFile.read_row_group

    def count(self: pq.ParquetFile, i: int, **options: object) -> pa.Table:
        reads.append(i)
        return original(self, i, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    order = epoch_order(store.row_groups, seed=3, epoch=1)
    assert sorted(p.id for p in store.read(order.tolist())) == list(range(store.n_packs))
    assert len(reads) == 45


@pytest.mark.parametrize("row_groups", [[], [1], [64] * 3 + [5], [64, 64, 10] * 40, [7] * 16])
def test_epoch_order_is_a_permutation_set_by_seed_and_epoch(row_groups: list[int]) -> None:
    order = epoch_order(row_groups, seed=1, epoch=2)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(row_groups)))
    assert np.array_equal(order, epoch_order(row_groups, seed=1, epoch=2))
    if sum(row_groups) > 10:
        assert not np.array_equal(order, epoch_order(row_groups, seed=1, epoch=3))
        assert not np.array_equal(order, epoch_order(row_groups, seed=2, epoch=2))


def test_epoch_order_stays_within_sixteen_row_groups() -> None:
    row_groups = [64] * 100
    windows = epoch_order(row_groups, seed=0, epoch=0).reshape(-1)[: 96 * 64].reshape(6, -1)
    assert all(len(set((window // 64).tolist())) == 16 for window in windows)
    # Mixed among themselves: neighbours rarely come from one row group, and the groups are not in their old order.
    assert np.mean(np.diff(windows[0] // 64) == 0) < 0.15
    assert set((windows[0] // 64).tolist()) != set(range(16))


def test_epoch_order_has_not_changed() -> None:
    """A run that is resumed with a newer version must go on in the same order."""
    assert epoch_order([3, 2, 4], seed=7, epoch=1).tolist() == ORDER


ORDER = [7, 0, 4, 8, 3, 1, 5, 6, 2]


def test_reference_log_probabilities_lie_beside_the_packs(tmp_path: Path) -> None:
    store = PackStore(make_store(tmp_path, [[4, 2], [3]]))
    path = str(tmp_path / "reference" / "weights.parquet")
    write_column(store, REFERENCE, path, (np.arange(3, dtype=np.float32) - 10 * pack.id for pack in store))
    with_reference = PackStore(store.path, {REFERENCE: path})
    for pack in with_reference.read([8, 0, 5]):
        values = pack.columns[REFERENCE]
        assert values.dtype == np.float32
        assert values.tolist() == [-10.0 * pack.id, 1 - 10.0 * pack.id, 2 - 10.0 * pack.id]
    other = PackStore(make_store(tmp_path / "other", [[4, 1]]))
    with pytest.raises(UserError, match="row groups differ from"):
        PackStore(other.path, {REFERENCE: path})


def test_a_token_column_stays_with_the_targets(tmp_path: Path) -> None:
    """File, store, packs and batch: each position of the batch has the value that was made for its target."""
    store = PackStore(make_store(tmp_path, [[4, 2], [3]]))
    told = Column("told", "token", "int64")
    path, both = str(tmp_path / "told.parquet"), str(tmp_path / "reference.parquet")
    write_column(store, told, path, (1000 * pack.id + pack.tokens.astype(np.int64) for pack in store))
    write_column(store, REFERENCE, both, (pack.lengths for pack in store))
    packs = PackStore(store.path, {told: path, REFERENCE: both}).read([8, 0])
    batch = batch_from_packs(packs)
    ids = torch.repeat_interleave(torch.tensor([8, 0]), torch.tensor([len(p.tokens) - len(p.lengths) for p in packs]))
    assert torch.equal(batch.columns[told], batch.targets_N + 1000 * ids)
    assert torch.equal(batch.columns[REFERENCE], batch.bounds_D1.diff() + 1.0)
    write_column(store, told, path, (pack.lengths for pack in store))
    with pytest.raises(UserError, match="needs one value for each token"):
        PackStore(store.path, {told: path}).read([0])


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no prepared dataset"):
        PackStore(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": [{"key": "../../../etc/passwd"}]}, r"manifest.json: broken \(units.0.key"),
        ({"units": "none"}, r"manifest.json: broken \(units"),
        ({"format": 1}, r"manifest.json: broken \(format"),
        ({"surprise": 1}, r"manifest.json: broken \(surprise"),
    ],
)
def test_a_manifest_is_not_trusted(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = make_store(tmp_path, [[2]])
    edit_manifest(path, **change)
    with pytest.raises(UserError, match=message):
        PackStore(path)


def test_a_manifest_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = make_store(tmp_path, [[2]])
    (Path(path) / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="manifest.json: broken"):
        PackStore(path)


def test_shards_that_are_not_what_the_manifest_says_are_named(tmp_path: Path) -> None:
    path = make_store(tmp_path, [[2, 2]])
    shard = tmp_path / "units" / f"{KEYS[0]}.parquet"
    written = shard.read_bytes()

    shard.unlink()
    with pytest.raises(UserError, match=r"a{40}.parquet: .*missing"):
        PackStore(path).read([0])

    shard.write_bytes(written[:-10])
    with pytest.raises(UserError, match=r"a{40}.parquet: .*bytes, but the manifest says"):
        PackStore(path).read([0])

    shard.write_bytes(b"\0" * len(written))
    with pytest.raises(UserError, match=r"a{40}.parquet: .*delete it and prepare again"):
        PackStore(path).read([0])

    shard.write_bytes(written)
    unit = json.loads((Path(path) / "manifest.json").read_text())["units"][0]
    edit_manifest(path, units=[{**unit, "row_groups": [3, 1]}])
    with pytest.raises(UserError, match="row groups differ from the manifest"):
        PackStore(path).read([0])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("lengths", pa.array([[5, 5]], pa.list_(pa.int32())), "do not add up"),
        ("lengths", pa.array([[-2, 6]], pa.list_(pa.int32())), "do not add up"),
        ("lengths", pa.array([[]], pa.list_(pa.int32())), "do not add up"),
        ("weights", pa.array([[1]], pa.list_(pa.uint8())), "4 tokens, but 1 weights"),
        ("weights", pa.array([[1, None, 1, 1]], pa.list_(pa.uint8())), "nulls"),
        ("tokens", pa.array([None], pa.list_(pa.uint16())), "nulls"),
        ("tokens", pa.array(["text"]), "its columns are"),
    ],
)
def test_packs_that_do_not_hold_together_are_named(tmp_path: Path, column: str, values: pa.Array, message: str) -> None:
    path = make_store(tmp_path, [[1]])
    shard = tmp_path / "units" / f"{KEYS[0]}.parquet"
    table = packs_table([[(Document(np.arange(4), np.ones(4, np.uint8)),)]], 6400)
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, shard)
    unit = json.loads((Path(path) / "manifest.json").read_text())["units"][0]
    edit_manifest(path, units=[{**unit, "bytes": shard.stat().st_size}])
    with pytest.raises(UserError, match=message):
        PackStore(path).read([0])
