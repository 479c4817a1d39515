"""Sweep directories in every state, and damaged files by name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.data.claim import claimed
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.trials import read_sweep, read_sweeps, read_validation
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.unit


def small(tmp_path: Path, **options: object) -> Path:
    return make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.2"}, examples=6, steps=10, **options)  # type: ignore[arg-type]


def test_every_state(tmp_path: Path) -> None:
    path = small(tmp_path, quality=lambda point: point["dpo.beta"], failed=1, stopped=2, running=3)
    waiting = path / "trials" / "beta=0.2,seed=9"
    waiting.mkdir()
    (waiting / "trial.json").write_text(json.dumps({"id": waiting.name, "point": {"dpo.beta": 0.2}, "seed": 9}))
    with claimed(path):
        trials = {t.id: t for t in read_sweep(path).trials}
    assert {t.id: t.state for t in trials.values()} == {
        "beta=0.1,seed=0": "finished", "beta=0.2,seed=0": "failed", "beta=0.1,seed=1": "early-stopped",
        "beta=0.2,seed=1": "running", "beta=0.2,seed=9": "waiting",
    }  # fmt: skip
    gone = next(t for t in read_sweep(path).trials if t.id == "beta=0.2,seed=1")
    assert (gone.state, gone.error) == ("stopped", "its process is gone")
    failed, running = trials["beta=0.2,seed=0"], trials["beta=0.2,seed=1"]
    assert failed.error and "nan" in failed.error
    assert failed.validation is None and failed.result is None
    assert (running.steps, running.tokens) == (4, 4 * 32768)
    assert 4 * (1.5 + 0.5) <= running.seconds <= 4 * (1.7 + 0.5)  # A step and a validation, each time.
    finished = trials["beta=0.1,seed=0"]
    assert finished.result == finished.path / "checkpoints/step-00000010"
    assert finished.validation and "margin" in finished.validation.columns
    assert finished.best("val/loss") == pytest.approx(finished.validation.columns["loss"].mean())


def test_a_sweep_under_two_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path)
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert len(read_sweeps(["s", "s/", path, f"{path}/../s", "link"])) == 1
    other = make_sweep(tmp_path / "t", axes={"dpo.beta": "0.1"}, examples=6, steps=10)
    assert [sweep.path for sweep in read_sweeps([other, "s/", "t"])] == [tmp_path / "t", tmp_path / "s"]


def test_a_sweep_under_two_urls_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind_ray.sweep.trials.read_sweep", lambda path: path)
    assert len(read_sweeps(["s3://bucket/s", "s3://bucket/s/"])) == 1


def test_examples_are_sorted(tmp_path: Path) -> None:
    path = small(tmp_path)
    file = next(path.glob("trials/*/validation.parquet"))
    table = pq.read_table(file)
    pq.write_table(table.take(pa.array(np.arange(6)[::-1])), file)
    validation = next(t.validation for t in read_sweep(path).trials if t.path == file.parent)
    assert validation and validation.example_E.tolist() == list(range(6))
    assert validation.columns["loss"].tolist() == table["loss"].to_pylist()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("sweep.json", "{", "not valid JSON"),
        ("sweep.json", "{}", "stage"),
        ("trials/beta=0.1,seed=0/trial.json", "[1]", "not a JSON object"),
        ("trials/beta=0.1,seed=0/trial.json", '{"id": "a", "point": {"x": 1}, "seed": 0}', "another sweep"),
        ("trials/beta=0.1,seed=0/run.json", '{"state": "odd"}', "state"),
        ("trials/beta=0.1,seed=0/metrics.jsonl", '{"step": 1, "tokens": 2}\n{oops}\n', "jsonl:2: not valid JSON"),
        ("trials/beta=0.1,seed=0/metrics.jsonl", '{"step": 1}\n', "jsonl:1: tokens: field required"),
        ("trials/beta=0.1,seed=0/samples.jsonl", "3\n", "jsonl:1: not a JSON object"),
        ("trials/beta=0.1,seed=0/validation.parquet", "PAR1", "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: str, words: str) -> None:
    path = small(tmp_path)
    (path / file).write_text(content)
    with pytest.raises(UserError, match=words) as raised:
        read_sweep(path)
    assert str(path / file).rsplit(":", 1)[0] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_line_that_is_still_being_written(tmp_path: Path) -> None:
    path = small(tmp_path)
    with (path / "trials/beta=0.1,seed=0/metrics.jsonl").open("a") as f:
        f.write('{"step": 11, "tok')
    assert read_sweep(path).trials[0].metrics[-1]["step"] == 10


def test_where_pbt_has_moved_a_trial(tmp_path: Path) -> None:
    path = small(tmp_path, seeds=1)
    trial = path / "trials" / "beta=0.1,seed=0"
    line = {"step": 4, "from": "beta=0.2,seed=0", "checkpoint": "step-00000004", "point": {"dpo.beta": 0.2}}
    (trial / "lineage.jsonl").write_text(json.dumps(line) + "\n")
    comparison = compare([read_sweep(path)])
    status = {row.label: row.status for row in comparison.rows}
    assert status == {"beta 0.1": "finished, moved to beta 0.2", "beta 0.2": "finished"}
    assert any("pbt moved points" in note for note in comparison.notes)
    (trial / "lineage.jsonl").write_text('{"step": 4}\n')
    with pytest.raises(UserError, match=r"lineage.jsonl:1: point"):
        read_sweep(path)


def test_a_warning_is_no_damage(tmp_path: Path) -> None:
    path = small(tmp_path)
    file = path / "trials/beta=0.1,seed=0/metrics.jsonl"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), "warning": "the warm-up is longer"}), *others]) + "\n")
    assert len(read_sweep(path).trials[0].metrics) == 10


def test_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="minimind-ray tune"):
        read_sweep(tmp_path)
    path = small(tmp_path)
    (path / "trials" / "stray").mkdir()
    with pytest.raises(UserError, match=r"stray/trial.json: cannot be read"):
        read_sweep(path)
    (path / "trials").rename(path / "elsewhere")
    with pytest.raises(UserError, match="no trial"):
        read_sweep(path)


def test_validation_of_other_columns(tmp_path: Path) -> None:
    path = small(tmp_path)
    file = path / "trials/beta=0.1,seed=0/validation.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["loss"]), file)
    with pytest.raises(UserError, match="no column 'loss'"):
        read_sweep(path)
    pq.write_table(pa.concat_tables([table, table]), file)
    with pytest.raises(UserError, match="twice"):
        read_sweep(path)
    pq.write_table(table.slice(0, 0), file)
    with pytest.raises(UserError, match="holds no example"):
        read_sweep(path)


def test_clusters_of_the_examples(tmp_path: Path) -> None:
    file = small(tmp_path) / "trials/beta=0.1,seed=0/validation.parquet"
    table, large = pq.read_table(file), 2**63 - 1  # float64 cannot hold this number.
    validation = read_validation(file)
    assert validation and validation.cluster_E.tolist() == validation.example_E.tolist()
    clusters = [large, 3, large, 3, large, 0]
    pq.write_table(table.append_column("cluster", pa.array(clusters)).take(pa.array(np.arange(6)[::-1])), file)
    validation = read_validation(file)
    assert validation and validation.cluster_E.tolist() == clusters and "cluster" not in validation.columns
    pq.write_table(table.append_column("cluster", pa.array([None, *clusters[1:]])), file)
    with pytest.raises(UserError, match="cluster has nulls"):
        read_validation(file)
