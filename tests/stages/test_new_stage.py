"""A new stage is one record and one file: by the command line it trains, resumes, is swept and reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minimind_ray
from minimind_ray.train.run import RunDirectory
from tests.jobs import make_tokenizer, rows_of, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.long]

RECORD = '''

class ToyConfig(Section):
    """Settings of a stage that is made up."""

    power: Annotated[PositiveFloat, Movable()] = 1.0


STAGES["toy"] = StageRecord(
    name="toy", rows="text", needs_base=False, section=ToyConfig, defaults={"optim": {"lr": 2e-3}},
    metrics={"val/odd": "max", "val/loss": "min"}, judged_by="val/odd",
)
'''

STAGE = '''"""A made-up stage: cross-entropy to a power, on steps that are not made ahead of time."""

from dataclasses import dataclass

from minimind_ray.config.stages import STAGES, ToyConfig
from minimind_ray.data.plan import PackSource
from minimind_ray.objectives.causal_lm import CausalLM, token_log_probs
from minimind_ray.stages.stage import Stage


class Power:
    unit = "token"
    metrics = ("odd",)

    def __init__(self, power, shape):
        self.power, self.plain = power, CausalLM(shape)

    def count(self, pack):
        return pack.counted

    def __call__(self, model, batch):
        loss = -token_log_probs(model, model(batch.tokens_N, batch.bounds_D1), batch)
        return (loss**self.power).sum(), {"odd": loss.detach().sum()}

    def examples(self, model, batch):
        values = self.plain.examples(model, batch)
        return values | {"odd": -values["loss"]}


def source(packs, policy):
    assert policy.config.own(ToyConfig).power > 0
    return PackSource(packs.steps, prefetch=False)


def objective(config, shape):
    return Power(config.own(ToyConfig).power, shape)


STAGE = Stage(STAGES["toy"], objective, source=source, column_keys=("toy.power",))
'''


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Start of a command line of a copy of the package that has one more stage."""
    package = Path(minimind_ray.__file__).parent
    copy = shutil.copytree(package, tmp_path / "minimind_ray", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "config" / "stages.py").open("a", encoding="utf-8") as file:
        file.write(RECORD)
    (copy / "stages" / "toy.py").write_text(STAGE, encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", rows_of("pretrain", 120))
    make_tokenizer(tmp_path / "tokenizer")
    return [sys.executable, "-m", "minimind_ray"]


SETTINGS = [
    "--train", "rows.jsonl", "--tokenizer", "tokenizer", "--preset", "tiny", "--max-seq-len", "64",
    "--pack-tokens", "256", "--batch-tokens", "512", "--wandb", "off", "--precision", "float32",
    "--set", "data.val_fraction=0.1", "--set", "eval.samples=0",
]  # fmt: skip


def test_a_new_stage_trains_resumes_is_swept_and_reported(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MINIMIND_CACHE": str(tmp_path / "cache")}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *arguments], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(*arguments: str) -> str:
        process = start(*arguments)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        return output

    training = ["train", "toy", "--no-ray", *SETTINGS, "--set", "toy.power=1.5", "--max-steps", "300", "--out", "run"]
    directory = RunDirectory(tmp_path / "run")
    stopped = start(*training, "--set", "eval.every=100")
    while stopped.poll() is None and not any(directory.metrics()):
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    output = stopped.communicate()[0]
    assert stopped.returncode == 130, output
    assert directory.info()["state"] == "stopped"
    output = run(*training, "--set", "eval.every=100", "--resume")
    assert "  odd -" in output
    lines = list(directory.metrics())
    assert [line["step"] for line in lines] == list(range(1, 301)) and lines[0]["lr"] == pytest.approx(2e-3)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["val/odd"] == pytest.approx(-lines[-1]["val/loss"])
    assert directory.info()["state"] == "finished"

    run("tune", "toy", *SETTINGS, "--axis", "toy.power=1,2", "--max-steps", "4", "--out", "sweep")
    found = json.loads(run("compare", "sweep", "--json"))
    assert found["metric"] == "val/odd" and len(found["points"]) == 2
    assert "odd" in json.loads(run("eval", "run", "rows.jsonl", "--stage", "toy", "--json"))
    moving = ["--axis", "toy.power=log(1,2)", "--trials", "2", "--scheduler", "pbt"]
    run("tune", "toy", *SETTINGS, *moving, "--max-steps", "4", "--set", "eval.every=2", "--out", "moved")
    run("report", "sweep")
    assert "toy.power" in (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
