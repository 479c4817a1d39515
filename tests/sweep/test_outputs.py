"""One comparison in five outputs: terminal, CSV, JSON, report.html and W&B's files. They have to say the same."""

from __future__ import annotations

import csv
import html
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import wandb

from minimind_ray.cli.compare import compare as compare_command
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.export import sentences
from minimind_ray.sweep.publish import publish
from minimind_ray.sweep.report import render
from minimind_ray.sweep.table import Comparison
from minimind_ray.sweep.trials import read_sweep
from tests.sweep.synthetic import make_full_sweep, make_sweep
from tests.track.reading import summary

pytestmark = [pytest.mark.slow, pytest.mark.unit]


def documents(path: Path) -> None:
    """Make the examples of a sweep pieces of 40 documents."""
    for file in path.glob("trials/*/validation.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column("cluster", [np.arange(len(table)) % 40]), file)


def split_documents(path: Path) -> None:
    make_sweep(path, stage="pretrain", axes={"optim.lr": "1e-4,1e-3"}, seeds=2, examples=687, steps=10,
               metric="val/bits_per_byte", quality=lambda point: 3 + point["optim.lr"])  # fmt: skip
    documents(path)


BETAS = {"dpo.beta": "0.02,0.1,0.3"}
SWEEPS: dict[str, Callable[[Path], Any]] = {
    "failed and stopped": make_full_sweep,
    "one seed": lambda path: make_sweep(path, axes=BETAS, seeds=1, steps=10),
    "two seeds that differ much": lambda path: make_sweep(path, axes=BETAS, steps=10, seed_noise=3.0),
    "no prediction": lambda path: make_sweep(path, axes={"dpo.beta": "0.1,0.3"}, seeds=1, stopped=1),
    "interrupted": lambda path: make_sweep(path, axes=BETAS, running=4),
    "accuracy near 1": lambda path: make_sweep(
        path, axes=BETAS, steps=10, metric="val/accuracy", mode="max", quality=lambda point: 2.2 + point["dpo.beta"]
    ),
    "pieces of documents": split_documents,
    "too few examples": lambda path: make_sweep(path, axes=BETAS, steps=10, examples=4),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()


@pytest.mark.parametrize("kind", SWEEPS)
def test_five_outputs_say_the_same(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SWEEPS[kind](tmp_path / "s")
    sweep = read_sweep(tmp_path / "s")
    comparison = compare([sweep])
    terminal, as_json, as_csv = (printed(tmp_path / "s", capsys, **{form: True}) for form in ("table", "json", "csv"))
    parsed, records = json.loads(as_json), list(csv.DictReader(as_csv.splitlines()))
    page = html.unescape(render(sweep, comparison))
    publish(sweep, comparison)
    sent, points = summary(sweep.path), table_of(sweep.path)

    said = sentences(comparison)
    assert parsed["sentences"] == sent["sentences"] == said
    assert [sentence for sentence in said if sentence not in terminal or sentence not in page] == []
    for name in ("metric", "mode", "winner", "examples", "clusters", "cluster_noun", "may_be_best"):
        assert parsed[name] == sent[name], name
    assert parsed["margin"] == sent["equal_within"]
    headline = {f"headline/{name}": value for name, value in (parsed["headline"] or {}).items()}
    assert {name: sent[name] for name in headline} == headline

    lines = [line for line in terminal.splitlines() if line.split()[:1]]
    cells = page_rows(page)
    for number, (record, sent_point, point) in enumerate(zip(records, points, parsed["points"], strict=True)):
        assert record == {name: as_text(value) for name, value in sent_point.items()}
        assert record["verdict"] == (point["verdict"] or "not compared") == cells[number][1]
        assert (record["seeds"], record["stopped seeds"]) == (str(point["seeds"]), str(point["stopped_seeds"]))
        assert record["early step"] == as_text(point["early_step"])
        for name, interval in {
            comparison.metric: point["metric"], "difference": point["difference_to_best"],
            "against the best": point["against_the_best"],
        }.items():  # fmt: skip
            found = [record[column] for column in (name, f"{name} low", f"{name} high")]
            assert found == [as_text(interval and interval[part]) for part in ("value", "low", "high")]
        shown = shown_texts(comparison, record)
        row = [value for key, value in record.items() if key in comparison.keys]
        [line] = [line for line in lines if line.split()[: len(row)] == row]
        assert line.rstrip().endswith(record["verdict"])
        assert [text for text in shown if not re.search(rf"(?<!\S){re.escape(text)}(?!\S)", line)] == []
        assert [text for text in shown if text not in cells[number]] == []
    trials = [trial for point in parsed["points"] for trial in point["trials"]]
    failed = re.findall(r"^failed: (\S+?): ", terminal, re.M)
    assert sorted(failed) == sorted(trial["id"] for trial in trials if trial["state"] == "failed")


def printed(path: Path, capsys: pytest.CaptureFixture[str], **forms: bool) -> str:
    capsys.readouterr()
    compare_command([str(path)], json=forms.get("json", False), csv=forms.get("csv", False))
    return capsys.readouterr().out


def table_of(path: Path) -> list[dict[str, Any]]:
    """The table that W&B was sent, a dict per row."""
    [file] = path.glob("wandb/*/files/media/table/points_*.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    return [dict(zip(content["columns"], row)) for row in content["data"]]


def as_text(value: Any) -> str:
    """A value as CSV has it."""
    return "" if value is None else str(value)


def shown_texts(comparison: Comparison, record: dict[str, str]) -> list[str]:
    """The numbers of a point as the terminal and the page round them."""
    texts, digits = list[str](), comparison.digits
    for name, sign in ((comparison.metric, ""), ("difference", "+")):
        if record[name]:
            texts.append(f"{float(record[name]):{sign}.{digits}f}")
        if record[f"{name} low"]:
            texts.append(f"{float(record[f'{name} low']):.{digits}f} to {float(record[f'{name} high']):.{digits}f}")
    return texts


def page_rows(page: str) -> list[list[str]]:
    """The cells of the page's table of points; the second one of a row is its verdict."""
    body = page[page.index('<table class="points">') : page.index("</table>")].partition("<tbody>")[2]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr.*?</tr>", body, re.S)]
