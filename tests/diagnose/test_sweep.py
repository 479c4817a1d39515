"""Findings about a sweep itself, and those of its trials together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minimind_ray.diagnose.sweep import diagnose_sweep, next_value
from minimind_ray.display.findings import print_sweep_findings, print_sweep_line, sweep_json
from minimind_ray.sweep.trials import read_sweep
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.slow


def found(path: Path) -> dict[str, Any]:
    return {finding.rule: finding for finding in diagnose_sweep(read_sweep(path)).own}


def best_at(lr: float) -> Any:
    """The loss of a point, lowest at this learning rate."""
    return lambda point: 3 + 0.3 * math.log10(point["optim.lr"] / lr) ** 2


def sft_sweep(path: Path, rates: str, **settings: Any) -> Path:
    return make_sweep(
        path,
        stage="sft",
        axes={"optim.lr": rates},
        **{"quality": best_at(1e-4), "examples": 10, "steps": 20, **settings},
    )


def test_a_best_value_at_the_edge_names_the_next_one(tmp_path: Path) -> None:
    edge = found(sft_sweep(tmp_path / "edge", "1e-6,1e-5,1e-4"))["sweep_edge"]
    assert edge.setting == "optim.lr" and edge.value == pytest.approx(1e-3)
    assert "sweep_edge" not in found(sft_sweep(tmp_path / "inside", "1e-5,1e-4,1e-3"))
    assert "sweep_edge" not in found(sft_sweep(tmp_path / "two", "1e-5,1e-4"))


@pytest.mark.parametrize(
    ("values", "edge", "beyond"),
    [([1e-5, 1e-4, 1e-3], 1e-3, 1e-2), ([0.0, 0.1, 0.2], 0.2, 0.3), ([2, 4, 8], 8, 16), ([138, 139, 140], 138, 137)],
)
def test_the_next_value_continues_the_axis(values: list[float], edge: float, beyond: float) -> None:
    assert next_value(values, edge) == pytest.approx(beyond)


def test_seeds_are_one_or_differ_as_much_as_the_points(tmp_path: Path) -> None:
    assert "sweep_one_seed" in found(sft_sweep(tmp_path / "one", "1e-5,1e-4,1e-3", seeds=1))
    equal = sft_sweep(tmp_path / "equal", "1e-5,1e-4,1e-3", seeds=3, quality=lambda point: 3.0, seed_noise=0.2)
    assert "sweep_noise" in found(equal)
    assert not {"sweep_noise", "sweep_one_seed"} & found(sft_sweep(tmp_path / "far", "1e-5,1e-4,1e-3", seeds=3)).keys()


def test_trials_with_the_same_finding_are_one_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sft_sweep(tmp_path / "s", "1e-5,1e-4,1e-3", failed=0)
    for run in sorted(path.glob("trials/*/run.json"))[2:4]:
        info = json.loads(run.read_text())
        run.write_text(json.dumps({**info, "baselines": {"bytes_per_token": 1.0, "unknown": 0.0, "uniform": 8.8}}))
    sweep = read_sweep(path)
    result = diagnose_sweep(sweep)
    assert {group.finding.rule: len(group.trials) for group in result.groups} == {
        "loss_not_finite": 1, "tokenizer_misfit": 2,
    }  # fmt: skip
    assert [finding.rule for finding in result.own] == ["sweep_failed"]
    content = sweep_json(result, "en")
    assert content["trials"] == 6 and [len(each["trials"]) for each in content["of_trials"]] == [1, 2]
    console = Console(width=200)
    for language, group in (("en", "tokenizer does not fit: 2 of 6 trials"), ("zh", "6 个试验中的 2 个")):
        print_sweep_findings(result, console, language)
        assert group in capsys.readouterr().out
    print_sweep_line(sweep, console)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.startswith("findings: failed trials, loss not finite (1 of 6 trials)")
