from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.data import prepare as module
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.prepare import Encoding, Progress, Unit, prepare, run_units_here
from minimind_ray.data.records import Part, Source
from minimind_ray.data.store import PackStore, UnitStats
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer
from minimind_ray.on_ray.prepare import run_units_on_ray

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

TEXTS = [f"the fox number {i} 月" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 2000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS]
    lines[7] = "{\n"
    path = tmp_path / "x.jsonl"
    path.write_text("".join(lines), "utf-8")
    return path


def config(cache: Path, source: Path) -> DataConfig:
    return DataConfig(train=str(source), cache_dir=str(cache), max_seq_len=32, pack_tokens=64, val_fraction=0.1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_ray_data_makes_the_same_dataset(
    tmp_path: Path, source: Path, tokenizer: Tokenizer, split: module.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Workers have another directory; a relative cache must still be the same one.
    here = prepare("pretrain", config(Path("here"), source), split, tokenizer)
    seen: list[Progress] = []
    on_ray = prepare("pretrain", config(Path("on_ray"), source), split, tokenizer, run_units_on_ray, seen.append)
    assert on_ray.made == here.made > 3
    assert on_ray.manifest == here.manifest
    assert Path(on_ray.path).name == Path(here.path).name
    assert Path(on_ray.rejects).read_bytes() == Path(here.rejects).read_bytes()
    assert set(on_ray.columns) == ({CLUSTER} if split == "val" else set())
    stores = (PackStore(prepared.path, prepared.columns) for prepared in (on_ray, here))
    for a, b in zip(*stores, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.weights.tolist() == b.weights.tolist()
        assert all(a.columns[column].tolist() == b.columns[column].tolist() for column in on_ray.columns)
    assert len(seen) == on_ray.made + 1
    assert seen[-1] == Progress(300, source.stat().st_size, source.stat().st_size)
    again = prepare("pretrain", config(tmp_path / "on_ray", source), split, tokenizer, run_units_on_ray)
    assert (again.made, again.path) == (0, on_ray.path)


def test_a_users_error_in_a_worker_arrives_as_it_is(tmp_path: Path, source: Path, tokenizer: Tokenizer) -> None:
    def changes(units: Sequence[Unit], encoding: Encoding) -> Iterator[UnitStats]:
        source.write_text('{"text": "another"}\n')
        return run_units_on_ray(units, encoding)

    with pytest.raises(UserError) as error:
        prepare("pretrain", config(tmp_path / "cache", source), "train", tokenizer, changes)
    assert str(error.value).startswith(f"{source}: it has changed while it was read")
    assert "\n" not in str(error.value)


def test_few_bytes_are_encoded_where_they_are_asked_for(
    tmp_path: Path, source: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", source.stat().st_size)
    spread = ray.data.from_items
    monkeypatch.setattr(ray.data, "from_items", None)
    assert prepare("pretrain", config(tmp_path, source), "train", tokenizer, run_units_on_ray).made == 1

    # The nodes of a cluster may not see what this process writes.
    monkeypatch.setattr("minimind_ray.on_ray.prepare.is_single_node", lambda: False)
    with pytest.raises(TypeError):
        prepare("pretrain", config(tmp_path / "cluster", source), "train", tokenizer, run_units_on_ray)
    monkeypatch.setattr(ray.data, "from_items", spread)
    assert prepare("pretrain", config(tmp_path / "cluster", source), "train", tokenizer, run_units_on_ray).made == 1


@pytest.mark.parametrize(
    ("files", "size", "spread"),
    [
        (["a.jsonl"], 10_000, False),
        (["a.jsonl", "b.jsonl"], 1_000, False),
        (["a.jsonl", "b.jsonl"], 1_001, True),
        (["a.jsonl.gz", "b.jsonl"], 400, True),
    ],
)
def test_several_units_of_much_text_are_spread(files: list[str], size: int, spread: bool) -> None:
    def unit(file: str) -> Unit:
        return Unit(Source(file, size, "", 0.0), Part(), file, size)

    assert module.worth_spreading([unit(file) for file in files]) is spread


def test_what_one_host_made_the_other_finds(tmp_path: Path, source: Path, tokenizer: Tokenizer) -> None:
    prepare("pretrain", config(tmp_path, source), "train", tokenizer, run_units_on_ray)
    assert prepare("pretrain", config(tmp_path, source), "train", tokenizer, run_units_here).made == 0
