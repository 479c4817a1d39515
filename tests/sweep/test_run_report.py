"""The report of single runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from minimind_ray.cli.compare import report as report_command
from minimind_ray.config.errors import UserError
from minimind_ray.sweep import chart
from minimind_ray.sweep.run_report import different_settings, draw_curves, render_runs
from minimind_ray.sweep.runs import read_runs
from minimind_ray.tasks.items import Item, write_items
from tests.sweep.synthetic import make_sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three runs of DPO. The second has failed."""
    sweep = make_sweep(
        tmp_path_factory.mktemp("runs") / "s", axes={"dpo.beta": "0.05,0.1,0.3"}, seeds=1, steps=20, failed=1,
        samples=["<script>alert(1)</script>", "春风"],
    )  # fmt: skip
    found = [str(path) for path in sorted(sweep.glob("trials/*"))]
    for path in found:
        rows = [Item("sums", i, i, "acc", float(i % 3 > 0), 1.0, "", "", "") for i in range(30)]
        write_items(Path(path) / "tasks.parquet", rows)
    return found


def test_one_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    report_command(runs[:1])
    file = Path(runs[0]) / "report.html"
    assert capsys.readouterr().out == f"{file}\n"
    page = file.read_text()
    for words in ("20 of 20", "Training loss", "Gradient norm", "Tokens per second", "val/accuracy", "sums"):
        assert words in page
    assert "Settings that differ" not in page
    assert "verdict</th>" not in page


def test_several_runs_side_by_side(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [runs[0], runs[2]]
    report_command(chosen)
    [file] = tmp_path.iterdir()
    assert file.name == f"report-{Path(runs[0]).name}-{Path(runs[2]).name}.html" == capsys.readouterr().out.strip()
    page = file.read_text()
    assert re.search(r"<td>dpo\.beta</td><td[^>]*>0\.05</td><td[^>]*>0\.3</td>", page)
    assert "<td>out</td>" not in page
    assert "differs on these examples; one seed" in page or "not distinguishable" in page
    assert "may be due to the seed" in page
    report_command(chosen, out=tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == page


def test_nothing_runs_and_nothing_comes_from_elsewhere(runs: list[str]) -> None:
    page = render_runs(read_runs(runs))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.findall(r"(?:src|href)=", re.sub(r'xlink:href="#', "", page))
    assert "the loss is nan" in page  # The error of the failed run.
    assert "Validations cannot be compared, because" in page  # It was not validated.


def test_different_settings() -> None:
    configs = [
        {"optim": {"lr": 1e-3, "clip": 1.0}, "out": "a"},
        {"optim": {"lr": 3e-4, "clip": 1.0}, "out": "b", "x": 1},
    ]
    assert different_settings(configs) == {"optim.lr": ["0.001", "3e-4"], "x": ["null", "1"]}


def test_what_is_refused(runs: list[str], tmp_path: Path) -> None:
    sweep = str(Path(runs[0]).parents[1])
    with pytest.raises(UserError, match="is a sweep: a report is of one sweep, or of one or several runs"):
        report_command([runs[0], sweep])
    with pytest.raises(UserError, match="--watch, --port and --margin are for sweeps"):
        report_command(runs[:1], margin=0.1)
    with pytest.raises(UserError, match="--out is for runs"):
        report_command([sweep], out=tmp_path / "page.html")
    with pytest.raises(UserError, match="is named twice"):
        report_command([runs[0], runs[0]])
    with pytest.raises(UserError, match="holds neither a run nor a sweep"):
        report_command([str(tmp_path)])


@pytest.mark.parametrize("train", ["3", "{seed: x}"])
def test_a_damaged_seed_counts_as_none_given(train: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"stage: sft\ntrain: {train}\n")
    assert read_runs([str(tmp_path)])[0].files.seed == 0


def test_a_high_learning_rate_is_no_outlier(runs: list[str]) -> None:
    low, high = read_runs(runs[::2])
    low.files.metrics[:] = [{**line, "lr": 1e-4} for line in low.files.metrics]
    high.files.metrics[:] = [{**line, "lr": 1e-2} for line in high.files.metrics[:5]]
    _, axes = chart.picture(chart.WIDTH, chart.HEIGHT)
    assert draw_curves(axes, [low, high], "lr")
    assert max(np.max(line.get_ydata()) for line in axes.lines) == 1e-2


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("stage: sft\ntrain: {seed: 3}\n")
    (tmp_path / "new" / "run.json").write_text(json.dumps({"state": "stopped"}))
    page = render_runs(read_runs([str(tmp_path / "new")]))
    assert "Learning curves" not in page
    assert "Answers" not in page
