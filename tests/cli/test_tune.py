"""What `tune --dry-run` and `compare` print about a sweep's time and price."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Models
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.slow


def seconds(text: str) -> int:
    minutes, rest = text.split(":")
    return 60 * int(minutes) + int(rest)


def test_plan_and_comparison_print_prices_in_the_same_terms(
    command: Command, models: Models, rows: Path, tmp_path: Path
) -> None:
    settings = {"data.max_seq_len": 64, "data.pack_tokens": 256, "batch.tokens": 256, "data.val_fraction": 0.2,
                "data.cache_dir": tmp_path / "cache", "model.preset": "tiny", "eval.samples": 0}  # fmt: skip
    sets = [arg for key, value in settings.items() for arg in ("--set", f"{key}={value}")]
    # 36 an hour are 0.01 a second.
    plan = command(
        "tune", "pretrain", "--dry-run", "--train", rows / "pretrain.jsonl", "--tokenizer", models.tokenizer, *sets,
        "--lr", "1e-3,3e-3", "--max-steps", "4", "--concurrent", "1", "--price-per-hour", "36", "--out", tmp_path / "s",
    )  # fmt: skip
    assert plan.code == 0, plan.err
    time = re.search(r"^time +([\d:]+) to ([\d:]+) with 1 at once \(measured here in 1 process", plan.out, re.M)
    price = re.search(r"^price +([\d.]+) to ([\d.]+), at 36 an hour for (.*)$", plan.out, re.M)
    assert time and price
    assert float(price[1]) < float(price[2])
    assert [float(price[1]), float(price[2])] == pytest.approx(
        [seconds(time[1]) / 100, seconds(time[2]) / 100], abs=0.01
    )
    assert price[3] == "1 trial place, from the sweep's start to its end"
    assert not (tmp_path / "s").exists()

    sweep = make_sweep(tmp_path / "beta", axes={"dpo.beta": "0.1,0.2"}, steps=10, price_per_hour=36)
    found = command("compare", sweep)
    assert found.code == 0, found.err
    assert (
        "Sweep beta took 20:00 and cost 24.00, at 36 an hour for each of 2 trial places, from the sweep's start to its "
        "end; a point's cost is its part of this by training time." in found.out
    )
    points = json.loads(command("compare", sweep, "--json").out)["points"]
    assert sum(point["cost"] for point in points) == pytest.approx(24)
