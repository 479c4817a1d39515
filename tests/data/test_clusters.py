"""The clusters of validation rows: prepared beside the packs, and written with a run's validation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.config.stages import STAGES, StageName
from minimind_ray.data import prepare as module
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.prepare import Prepared, Split, encoding_of, plan_units, prepare
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer
from minimind_ray.stages.run import run_here
from minimind_ray.sweep.trials import read_validation
from tests.jobs import make_job, rows_of, start, write_jsonl

QUESTION = {"role": "user", "content": "What is 1 + 1?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TEXTS: list[dict[str, Any]] = [
    {"text": f"the fox and the river {i}", "passage": {"id": i % 3, "page": 1}} for i in range(9)
]
PAIRS = [
    {"prompt": [{**QUESTION, "content": f"What is {i % 4} + 1?"}], "chosen": f"It is {i}.", "rejected": f"No, {i}."}
    for i in range(12)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([row["text"] for row in TEXTS], vocab_size=320)


def clusters_of(prepared: Prepared) -> list[int]:
    """The cluster of every document."""
    store = PackStore(prepared.path, prepared.columns)
    return [cluster for pack in store for cluster in pack.columns[CLUSTER].tolist()]


class Dataset:
    """Prepares rows of a file in `directory`, which also has the cache."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self.directory, self.tokenizer = directory, tokenizer

    def config(self, rows: Sequence[dict[str, Any]], split: Split = "val", **settings: Any) -> DataConfig:
        file = write_jsonl(self.directory / "rows.jsonl", list(rows))
        files: dict[str, Any] = {split: str(file)}
        base: dict[str, Any] = {"val_fraction": 0.0, "max_seq_len": 64, "pack_tokens": 128}
        return DataConfig(cache_dir=str(self.directory / "cache"), **{**base, **files, **settings})

    def __call__(
        self,
        rows: Sequence[dict[str, Any]],
        stage: StageName = "pretrain",
        cluster: str | None = None,
        split: Split = "val",
        **settings: Any,
    ) -> Prepared:
        config = self.config(rows, split, **settings)
        return prepare(stage, config, split, self.tokenizer, cluster=cluster)


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> Dataset:
    return Dataset(tmp_path, tokenizer)


@pytest.mark.unit
def test_the_parts_of_a_split_text_are_one_cluster(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 300)
    texts = [{"text": f"{i} {'the fox and the river ' * i}"} for i in range(20)]
    prepared = dataset([*texts, texts[3]], max_seq_len=8)
    ids = clusters_of(prepared)
    assert len(prepared.manifest.units) > 5
    assert len(ids) == prepared.manifest.total("documents") > 60 and len(set(ids)) == 20
    assert all(0 <= id < 2**63 for id in ids)
    assert prepared.remarks() == ["21 rows have 20 different documents, which `compare` resamples"]
    assert not any("different" in line for line in dataset(texts, max_seq_len=8).remarks())


@pytest.mark.unit
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_every_kind_have_the_same_clusters(dataset: Dataset, tmp_path: Path, suffix: str) -> None:
    rows = [{"text": row["text"], "passage": f"p{i % 3}"} for i, row in enumerate(TEXTS)]
    file = tmp_path / f"other{suffix}"
    match suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        case ".csv":
            file.write_text("\n".join(["text,passage", *(f"{row['text']},{row['passage']}" for row in rows)]))
        case ".json":
            file.write_text(json.dumps(rows))
        case _:
            write_jsonl(file, rows)
    for cluster, count in ((None, 9), ("passage", 3)):
        ids = clusters_of(dataset(rows, cluster=cluster, val=str(file)))
        assert Counter(ids) == Counter(clusters_of(dataset(rows, cluster=cluster))) and len(set(ids)) == count


@pytest.mark.unit
def test_pairs_with_one_prompt_are_one_cluster(dataset: Dataset) -> None:
    prepared = dataset(PAIRS, "dpo", long_conversations="cut_prompt")
    ids = clusters_of(prepared)
    assert ids[::2] == ids[1::2] and sorted(Counter(ids).values()) == [6] * 4
    assert prepared.remarks() == ["12 rows have 4 different prompts, which `compare` resamples"]


@pytest.mark.unit
def test_a_shortened_row_keeps_the_cluster_of_the_whole_row(dataset: Dataset) -> None:
    """Prompts that differ only in the part that is cut are different prompts."""
    long = [{**PAIRS[i], "prompt": [{**QUESTION, "content": f"{i % 4} {'the fox ' * 60}"}]} for i in range(12)]
    prepared = dataset(long, "dpo", long_conversations="cut_prompt")
    assert prepared.manifest.total("shortened") == 12
    assert sorted(Counter(clusters_of(prepared)).values()) == [6] * 4
    cut = dataset([{"text": f"{i % 2} {'the fox ' * 60}"} for i in range(4)], long_documents="truncate")
    assert cut.manifest.total("cut") == 4 and sorted(Counter(clusters_of(cut)).values()) == [2, 2]


@pytest.mark.unit
def test_conversations_differ_by_all_their_turns(dataset: Dataset) -> None:
    rows = [{"messages": [QUESTION, answer(text)], "id": i} for i, text in enumerate(["2", "It is 2.", "2"])]
    assert len(set(clusters_of(dataset(rows, "sft")))) == 2
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with_tool = dataset([rows[0], {**rows[0], "tools": [tool]}], "sft", max_seq_len=1024, pack_tokens=1024)
    assert len(set(clusters_of(with_tool))) == 2


@pytest.mark.unit
def test_a_field_names_the_clusters(dataset: Dataset) -> None:
    turned = [{**row, "passage": {"page": 1, "id": row["passage"]["id"]}} for row in TEXTS]
    prepared = dataset([*TEXTS, *turned], cluster="passage")
    assert len(set(clusters_of(prepared))) == 3
    assert prepared.remarks() == ["18 rows have 3 different values of passage, which `compare` resamples"]
    ignored = dataset(TEXTS, cluster="passage", ignore=["passage"])
    assert len(set(clusters_of(ignored))) == 3
    assert "ignored fields: passage (9 rows)" in dataset(TEXTS).remarks()


@pytest.mark.unit
@pytest.mark.parametrize("value", [None, "", "missing"])
def test_a_validation_row_needs_the_field(dataset: Dataset, value: str | None) -> None:
    rows = [*TEXTS[:4], {"text": "one", **({} if value == "missing" else {"passage": value})}, *TEXTS[4:]]
    with pytest.raises(UserError, match=r"rows.jsonl:5: the row has no field passage, which eval.cluster names"):
        dataset(rows, cluster="passage", max_reject_fraction=0.5)
    assert dataset(rows, cluster="passage", split="train").manifest.total("kept") == 10


@pytest.mark.unit
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_field_with_a_meaning_may_be_the_cluster(dataset: Dataset, split: Split) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": "It is.", "context": i % 2} for i in range(6)]
    with pytest.raises(UserError, match="context cannot be used"):
        dataset(rows, "sft", split=split)
    prepared = dataset(rows, "sft", "context", split)
    assert prepared.manifest.total("kept") == 6
    assert not any("ignored" in line for line in prepared.remarks())
    if split == "val":
        assert len(set(clusters_of(prepared))) == 2


@pytest.mark.unit
def test_a_field_does_not_excuse_a_row_that_contradicts_itself(dataset: Dataset) -> None:
    row = {"prompt": "Another question?", "messages": [QUESTION, answer("2")]}
    with pytest.raises(UserError, match="prompt is not in the row's turns"):
        dataset([row], "sft", "prompt")


@pytest.mark.unit
def test_packs_do_not_depend_on_clusters(dataset: Dataset, tokenizer: Tokenizer) -> None:
    train = dataset(TEXTS, split="train")
    assert not train.columns and not list(dataset.directory.rglob("*clusters*"))
    # As if an older version had prepared the validation set: the packs, but no clusters.
    config = dataset.config(TEXTS)
    val = prepare("pretrain", config, "val", tokenizer)
    before = Path(val.path)
    for file in dataset.directory.rglob("*clusters*"):
        file.unlink()
    again = prepare("pretrain", config, "val", tokenizer)
    assert (again.made, Path(again.path), len(set(clusters_of(again)))) == (1, before, 9)
    assert prepare("pretrain", config, "val", tokenizer).made == 0
    by_field = prepare("pretrain", config, "val", tokenizer, cluster="passage")
    assert (by_field.path, len(set(clusters_of(by_field)))) == (val.path, 3)
    assert len(set(clusters_of(again))) == 9
    keys = [
        [unit.key for unit in plan_units(sources, encoding)]
        for cluster in (None, "passage", "context")
        for encoding, sources in [encoding_of("pretrain", config, "val", tokenizer, cluster)]
    ]
    assert keys[0] == keys[1] != keys[2]  # With "context", rows are kept that were refused before.


@pytest.mark.unit
def test_each_kind_of_rows_has_a_noun_for_clusters() -> None:
    assert [STAGES[stage].clusters(None) for stage in ("pretrain", "sft", "dpo")] == [
        "documents", "conversations", "prompts",
    ]  # fmt: skip
    assert STAGES["dpo"].clusters("passage") == "values of passage"


@pytest.mark.slow
def test_a_run_writes_the_clusters_of_its_validation(tmp_path: Path) -> None:
    texts = [{"text": " ".join(row["text"] for row in rows_of("pretrain", 10, seed))} for seed in range(40)]
    val = str(write_jsonl(tmp_path / "val.jsonl", texts))
    job = make_job(tmp_path, rows=60, data__val=val, train__max_steps=1)
    run = start(job)
    run_here(job)
    validation = read_validation(run / "validation.parquet")
    assert validation and len(validation.example_E) > 80 and len(set(validation.cluster_E.tolist())) == 40
    assert set(validation.columns) == {"loss", "count", "bytes"}

    pairs = [row for row in rows_of("dpo", 8) for _ in range(3)]
    for i, row in enumerate(pairs):
        row["chosen"] = [row["chosen"][0], answer(f"The answer is {i}.")]
    for cluster, count in ((None, 8), ("passage", 4)):
        rows = [{**row, "passage": i % 4} for i, row in enumerate(pairs)]
        settings = {"data.val": str(write_jsonl(tmp_path / "pairs.jsonl", rows)), "eval.cluster": cluster}
        settings |= {"init_from": str(run), "out": str(tmp_path / f"dpo-{cluster}"), "train.max_steps": 1}
        job = make_job(tmp_path, "dpo", 30, **{key.replace(".", "__"): value for key, value in settings.items()})
        start(job)
        run_here(job)
        validation = read_validation(Path(job.config.out) / "validation.parquet")
        assert validation and len(validation.example_E) == 24
        assert len(set(validation.cluster_E.tolist())) == count


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_a_run_that_encodes_while_it_trains_writes_clusters(tmp_path: Path, held_out: bool) -> None:
    """Its validation set, a file or held out from the stream, is prepared with clusters like any other."""
    texts = [{"text": " ".join(row["text"] for row in rows_of("pretrain", 10, seed))} for seed in range(40)]
    val = {"data__val_fraction": 0.1} if held_out else {"data__val": str(write_jsonl(tmp_path / "val.jsonl", texts))}
    job = make_job(tmp_path, rows=300, data__cache=False, train__max_steps=1, data__max_seq_len=16, **val)
    run = start(job)
    run_here(job)
    validation = read_validation(run / "validation.parquet")
    assert validation and len(validation.example_E) > len(set(validation.cluster_E.tolist())) > 10
    if not held_out:
        assert len(set(validation.cluster_E.tolist())) == 40
