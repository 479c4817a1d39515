"""A training run as its driver sees it: steps, results, reports and the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.run import Job
from minimind_ray.stages.start import load_tokenizer
from minimind_ray.stages.weights import WholeModel
from minimind_ray.train.context import PlainContext
from minimind_ray.train.loop import Report, TrainingRun
from minimind_ray.train.optim import build_adamw
from minimind_ray.train.run import RunDirectory
from minimind_ray.train.step import NonFiniteError, StepResult
from tests.jobs import make_job, start

RESULT = StepResult({"loss": 2.0}, grad_norm=1.0, count=10.0, tokens=12, stop=False)


def make_run(directory: Path, **settings: Any) -> tuple[TrainingRun, RunDirectory]:
    settings = {"eval__samples": 0, **settings}
    job = make_job(directory, eval__every=2, train__max_steps=4, track__wandb="off", **settings)
    run_directory = RunDirectory(start(job))
    return open_run(job), run_directory


def open_run(job: Job) -> TrainingRun:
    tokenizer, context = load_tokenizer(job.config), PlainContext()
    model = Transformer(job.config.model.shape(tokenizer.vocab_size))
    optimizer = build_adamw(model, job.config.optim)
    data, weights = job.data(context), WholeModel(model, tokenizer)
    return TrainingRun(model, CausalLM(model.shape), optimizer, weights, job.config, context, data, tokenizer, 0)


def drive(run: TrainingRun, results: list[StepResult | NonFiniteError], proceed: bool = True) -> list[Report]:
    """Give the run these results, one after another, or until the run ends."""
    reports: list[Report] = []
    for result in results:
        if not run.next_step():
            break
        if report := run.finish_step(result):
            reports.append(report)
            run.reported(proceed)
    return reports


def test_a_run_reports_what_it_validates_and_saves(tmp_path: Path) -> None:
    run, directory = make_run(tmp_path, checkpoint__every=3)
    with run:
        reports = drive(run, [RESULT] * 4)
        assert run.next_step() is None
    found = [(r.metrics["step"], "val/loss" in r.metrics, r.checkpoint is not None) for r in reports]
    assert found == [(2, True, False), (3, False, True), (4, True, True)]
    assert directory.info()["state"] == "finished" and directory.info()["tokens"] == 48


@pytest.mark.parametrize(("stop", "proceed", "state"), [(True, True, "stopped"), (False, False, "early-stopped")])
def test_a_run_that_ends_before_its_last_step_says_why(stop: bool, proceed: bool, state: str, tmp_path: Path) -> None:
    run, directory = make_run(tmp_path)
    result = StepResult({"loss": 2.0}, grad_norm=1.0, count=10.0, tokens=12, stop=stop)
    with run:
        drive(run, [RESULT, result], proceed)
        assert run.next_step() is None
    assert directory.info()["state"] == state and directory.info()["steps"] == 2
    assert directory.info()["planned_steps"] == 4


def test_a_step_that_is_not_finite_names_its_documents(tmp_path: Path) -> None:
    run, directory = make_run(tmp_path)
    with pytest.raises(UserError, match=r"step 1: the loss is nan .* minimind-ray diagnose \S+$"), run:
        drive(run, [NonFiniteError(0, float("nan"), 1.0)])
    assert (directory.path / "nonfinite-rank0.jsonl").read_text().count("\n") > 1


def test_a_run_answers_the_same_prompts_at_its_start_and_at_validations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run, directory = make_run(tmp_path, eval__samples=2)
    job = make_job(tmp_path, eval__samples=2, eval__every=2, train__max_steps=4, track__wandb="off")
    torch.manual_seed(0)
    run.close()  # Before the first step: the next process finds the start's answers.
    with open_run(job) as run:
        drive(run, [RESULT] * 4)
    lines = list(directory.samples())
    assert [line["step"] for line in lines] == [0, 2, 4]
    # The weights have not changed here, so the answers have not changed either.
    assert lines[0]["samples"] == lines[1]["samples"] == lines[2]["samples"] and len(lines[0]["samples"]) == 2
    assert all(text.startswith(p) for line in lines for text, p in zip(line["samples"], line["prompts"], strict=True))
    assert [(metrics["step"], len(texts)) for metrics, texts in directory.lines()] == [
        (0, 2), (1, 0), (2, 2), (3, 0), (4, 2),
    ]  # fmt: skip
