"""Sweeps before they run: what is refused, what is shared, budgets, cost, directories."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.cli.tune import plan_of, run_plan
from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.search import SearchConfig, read_sweep_file, search_config
from minimind_ray.data.tokenizer import train_tokenizer
from minimind_ray.on_ray.layout import Layout
from minimind_ray.stages.columns import compute_here
from minimind_ray.stages.run import Host, Job, run_here
from minimind_ray.sweep.axes import parse_axis, plan_trials
from minimind_ray.sweep.calibrate import calibrate, measure, shortened
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.estimate import BESIDE_TRIALS, RAY_TRAIN, RAY_TRIALS, Pace, Paces, estimate
from minimind_ray.sweep.plan import (
    REFERENCES,
    UNITS,
    Preparation,
    SweepPlan,
    check_free,
    create_sweep,
    create_trial,
    plan_sweep,
    train_tokens,
    within_budget,
)
from minimind_ray.sweep.resume import (
    check_same_inputs,
    chosen_points,
    continue_sweep,
    record_resume,
    reopen_sweep,
    resumed_plan,
    seeds_commands,
    with_seeds,
)
from minimind_ray.sweep.table import More
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.train.evaluate import Evaluation
from minimind_ray.train.validation import Validation
from tests.jobs import make_config, make_job, rows_of, start, write_jsonl
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.slow


def planned(
    directory: Path, axes: dict[str, Any], search: dict[str, Any] | None = None, stage: str = "pretrain", **set_: Any
) -> SweepPlan:
    base = make_config(directory, stage, 60, **{"eval__samples": 0, **set_})
    return plan_sweep(
        directory / "sweep", base, [parse_axis(k, v) for k, v in axes.items()], SearchConfig(**(search or {}))
    )


def test_a_first_sweep_has_the_same_bound_on_seeds_as_a_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--seeds 100001: give at most 100 seeds a point"):
        planned(tmp_path, {"optim.lr": "1e-4,1e-3"}, {"seeds": 100001})


def test_trials_lie_in_the_sweep_and_share_its_group(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-4,1e-3"}, {"seeds": 2})
    assert plan.count == 4
    assert [t.config.out for t in plan.trials][0] == str(tmp_path / "sweep/trials/lr=1e-4,seed=0")
    assert {t.config.track.group for t in plan.trials} == {"sweep"}
    named = planned(tmp_path, {}, track__group="mine")
    assert named.trials[0].config.track.group == "mine"


@pytest.mark.parametrize(
    ("stage", "axes", "search", "settings", "words"),
    [
        ("pretrain", {}, {"metric": "val/accuracy"}, {}, "pretrain has no val/accuracy; its metrics are val/loss"),
        ("dpo", {}, {"metric": "val/bits_per_byte"}, {}, "dpo has no val/bits_per_byte"),
        ("pretrain", {}, {}, {"data__val_fraction": 0.0}, "validation data"),
        ("pretrain", {}, {}, {"data__cache": False, "train__max_steps": 5}, "data.cache is false"),
        ("lora", {"lora.rank": "2,4"}, {"scheduler": "pbt"}, {}, "lora.rank cannot be an axis with pbt"),
        ("pretrain", {}, {"scheduler": "pbt"}, {}, "pbt needs an axis"),
        ("pretrain", {"data.train": "a.jsonl,b.jsonl"}, {}, {}, "so data.val must be set"),
        ("pretrain", {"optim.lr": "1e-4,1e-3"}, {"scheduler": "pbt"}, {"scale__workers": 2}, "--workers 1"),
        ("pretrain", {"optim.lr": "1e-4,1e-3"}, {"scheduler": "pbt"}, {"checkpoint__every": 50}, "checkpoint.every"),
        ("pretrain", {"optim.lr": "1e-4,1e-3"}, {"searcher": "optuna"}, {}, "needs --trials"),
        ("pretrain", {}, {"searcher": "optuna", "trials": 3}, {}, "needs an axis"),
        ("pretrain", {"lora.rank": "4,8"}, {}, {}, "lora.rank has no effect, .* trains no adapter"),
        ("sft", {"dpo.beta": "0.1,0.2"}, {}, {}, "dpo.beta has no effect, .* not for sft"),
        ("dpo", {"lora.rank": "4,8"}, {}, {}, "lora.rank has no effect, .* set dpo.lora too"),
        ("dpo", {"schedule.decay": "0.1,0.2"}, {}, {}, "schedule.decay has no effect, .* cosine has no such part"),
        ("dpo", {"dpo.simpo_gamma": "0.5,1", "dpo.loss": "ipo,hinge"}, {}, {}, "dpo.simpo_gamma has no effect"),
        ("dpo", {"dpo.label_smoothing": "0,0.1"}, {}, {"dpo__loss": "ipo"}, "dpo.label_smoothing has no effect"),
        ("pretrain", {"train.epochs": "1,2"}, {}, {"train__max_steps": 5}, "train.epochs has no effect"),
        ("pretrain", {"model.norm_topk_prob": "true,false"}, {}, {}, "the model has no experts"),
        ("pretrain", {"checkpoint.keep": "1,2"}, {}, {}, "checkpoint.keep cannot be an axis: it does not change"),
        ("pretrain", {"track.name": "a,b"}, {}, {}, "track.name cannot be an axis: it does not change"),
        ("pretrain", {"optim.lr": "1e-4,1e-3"}, {}, {"checkpoint__every": 50}, "saves a checkpoint at each validation"),
        ("pretrain", {"data.cache": "true,false"}, {}, {}, "data.cache cannot be an axis"),
        (
            "pretrain",
            {"optim.lr": "log(1e-4,1e-3)"},
            {"searcher": "optuna", "scheduler": "pbt"},
            {},
            "pbt",
        ),
        ("pretrain", {"model.dropout": "uniform(0,2)"}, {"searcher": "optuna", "trials": 3}, {}, "model.dropout"),
    ],
)
def test_refused_before_anything_starts(
    tmp_path: Path, stage: str, axes: dict[str, str], search: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        planned(tmp_path, axes, search, stage, **settings)
    assert not (tmp_path / "sweep").exists()


def test_an_axis_that_other_axes_give_a_use_is_taken(tmp_path: Path) -> None:
    for axes in (
        {"dpo.simpo_gamma": "0.5,1", "dpo.loss": "sigmoid,simpo"},
        {"schedule.decay": "0.1,0.2", "schedule.name": "wsd"},
        {"lora.rank": "2,4", "dpo.lora": "true,false"}, {"dpo.label_smoothing": "0,0.1"},
    ):  # fmt: skip
        assert planned(tmp_path, axes, stage="dpo").trials


def test_equal_trials_are_left_out_and_counted(tmp_path: Path) -> None:
    axes = {"dpo.simpo_gamma": "0.5,1", "dpo.loss": "sigmoid,simpo", "optim.lr": "1e-4,1e-3"}
    plan = planned(tmp_path, axes, {"seeds": 2}, "dpo")
    losses = [(trial.point["dpo.loss"], trial.point["dpo.simpo_gamma"]) for trial in plan.trials if trial.seed == 0]
    assert losses == [("sigmoid", 0.5), ("sigmoid", 0.5), ("simpo", 0.5), ("simpo", 0.5), ("simpo", 1), ("simpo", 1)]
    assert len({trial.id for trial in plan.trials}) == plan.count == 12
    assert plan.remark == (
        "left out 4 of 16 trials: they differ from others only in dpo.simpo_gamma, which has no effect on them"
    )
    drawn = {"dpo.loss": "sigmoid,simpo", "dpo.simpo_gamma": "uniform(0.5,1)"}
    assert planned(tmp_path, drawn, {"trials": 3}, "dpo").count == 4
    whole = planned(tmp_path, {"dpo.loss": "sigmoid,simpo"}, stage="dpo")
    assert (whole.count, whole.remark) == (2, None)


def test_optuna_counts_points_with_equal_runs_once(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    plan = planned(
        tmp_path, {"dpo.lora": "true,false", "lora.rank": "2,4,8"},
        {"searcher": "optuna", "trials": 5, "seeds": 2}, "dpo",
    )  # fmt: skip
    assert (plan.points, plan.count) == (4, 8)
    assert plan.remark == "the axes have 4 different points, fewer than --trials 5: each is tried once"


def test_the_workers_of_a_trial_share_its_gpus(tmp_path: Path) -> None:
    def gpus(**given: Any) -> float:
        plan = plan_of({"stage": "pretrain", "out": str(tmp_path), **given})
        assert all(trial.config.scale == plan.base.scale for trial in plan.trials)
        return plan.base.scale.gpus_per_worker

    assert gpus(gpus_per_trial=0.25) == 0.25
    assert gpus(gpus_per_trial=1.0, workers="4") == 0.25
    assert gpus(gpus_per_trial=4.0, set_=["scale.workers=2"]) == 2.0
    assert gpus(set_=["scale.gpus_per_worker=0.5"]) == 0.5
    with pytest.raises(UserError, match="gpus_per_worker is 1.5: give a whole number, or a fraction below 1"):
        gpus(gpus_per_trial=3.0, workers="2")


def test_what_the_command_line_says_of_an_axis(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("stage: dpo\naxes: {dpo.beta: [0.1, 0.2], optim.lr: [1.0e-5, 1.0e-4]}\n")

    def axes(**given: Any) -> dict[str, Any]:
        return {axis.key: axis.to_json() for axis in plan_of({"sweep": file, "out": str(tmp_path), **given}).axes}

    assert axes() == {"dpo.beta": [0.1, 0.2], "optim.lr": [1e-5, 1e-4]}
    assert axes(beta="0.3,0.4") == {"dpo.beta": [0.3, 0.4], "optim.lr": [1e-5, 1e-4]}
    assert axes(set_=["dpo.beta=0.3"]) == axes(beta="0.3") == {"optim.lr": [1e-5, 1e-4]}
    with pytest.raises(UserError, match="dpo.beta: given as an axis twice"):
        axes(beta="0.3,0.4", axis_=["dpo.beta=0.5,0.6"])
    with pytest.raises(UserError, match="dpo.beta: given as a single value and as an axis"):
        axes(beta="0.3", axis_=["dpo.beta=0.5,0.6"])


def test_optuna_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'minimind-ray\[optuna\]'"):
        planned(tmp_path, {"optim.lr": "log(1e-4,1e-3)"}, {"searcher": "optuna", "trials": 3})


def test_metric_of_a_stage() -> None:
    assert SearchConfig().judged_by("sft") == ("val/loss", "min")
    assert SearchConfig().judged_by("dpo") == ("val/accuracy", "max")
    assert SearchConfig(metric="val/margin").judged_by("dpo") == ("val/margin", "max")
    assert SearchConfig(metric="val/loss", mode="max").judged_by("dpo") == ("val/loss", "max")


def test_wrong_searches_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scheduler: .*asha.*'ashaa'"):
        search_config({"scheduler": "ashaa"})
    file = tmp_path / "sweep.yaml"
    for content, words in (
        ("stage: dpo\nseed: 3\n", "sweep.yaml: seed: no such setting of a sweep; valid: scheduler"),
        ("axes: {}\n", "sweep.yaml: stage: field required"),
        ("stage: dpo\nseeds: 0\n", "sweep.yaml: seeds: .*greater than 0, not 0"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            read_sweep_file(file)


def base_model(directory: Path) -> str:
    job = make_job(directory, rows=60, eval__samples=0, train__max_steps=2)
    start(job)
    run_here(job)
    return job.config.out


def test_what_trials_share_is_made_once(tmp_path: Path) -> None:
    init_from = base_model(tmp_path)
    axes = {"dpo.beta": "0.05,0.1", "optim.lr": "1e-6,1e-5"}
    plan = planned(tmp_path, axes, {"seeds": 2}, "dpo", init_from=init_from)
    computed: list[str] = []

    def counting(reference: Any) -> Any:
        computed.append(reference.path)
        return compute_here(reference)

    preparation = Preparation(plan.base, Host(compute_column=counting))
    jobs = [preparation.job(trial.config) for trial in plan.trials]
    assert len(jobs) == 8 and len({(job.train, job.val) for job in jobs}) == 1
    assert len(computed) == 2  # Of the training and of the validation data.
    assert preparation.counts == {
        "prepared datasets": 2, "pieces of them encoded for this sweep": 2,
        "sets of reference log-probabilities": 2, "of these sets computed for this sweep": 2,
    }  # fmt: skip
    # The order of the data is the seed's, the same for all points.
    orders = {(job.config.train.seed, tuple(job.plan.ids(0).tolist())) for job in jobs}
    assert len(orders) == 2
    again = Preparation(plan.base, Host(compute_column=counting))
    [again.job(trial.config) for trial in plan.trials]
    assert again.counts[REFERENCES] == again.counts[UNITS] == 0
    # Another data section is another dataset to train on; trials are validated on the base's, to be comparable.
    other = planned(tmp_path, {"data.max_seq_len": "128,64"}, None, "dpo", init_from=init_from)
    longer, same = (again.job(trial.config) for trial in other.trials)
    assert longer.train != same.train == jobs[0].train
    assert (longer.val, longer.val_columns) == (same.val, same.val_columns) == (jobs[0].val, jobs[0].val_columns)
    assert again.counts["prepared datasets"] == 3


def test_trials_on_data_made_in_different_ways_are_compared(tmp_path: Path) -> None:
    axes = {"data.max_seq_len": "16,64", "data.pack_tokens": "128,256"}
    plan = planned(tmp_path, axes, train__max_steps=1)
    jobs = prepared(plan)
    create_sweep(plan, jobs, {})
    for job in jobs:
        run_here(job)
    assert len({job.train for job in jobs}) == 4
    rows = compare([read_sweep(plan.path)]).rows
    assert len(rows) == 4 and all(row.verdict for row in rows)


def test_tokenizers_cannot_be_compared(tmp_path: Path) -> None:
    train_tokenizer([row["text"] for row in rows_of("pretrain", 50, seed=2)], vocab_size=350).save(tmp_path / "second")
    plan = planned(tmp_path, {"data.tokenizer": [str(tmp_path / "tokenizer"), str(tmp_path / "second")]})
    with pytest.raises(UserError, match="the trials' tokenizers differ"):
        prepared(plan)


def prepared(plan: SweepPlan) -> list[Job]:
    preparation = Preparation(plan.base, Host())
    return [preparation.job(trial.config) for trial in plan.trials]


def test_validation_data_that_hold_no_row_are_refused_before_the_reference_is_computed(tmp_path: Path) -> None:
    axes = {"dpo.beta": "0.05,0.1"}
    plan = planned(tmp_path, axes, None, "dpo", init_from=base_model(tmp_path), data__val_fraction=1e-6)
    preparation = Preparation(plan.base, Host(compute_column=lambda frozen: pytest.fail("computed")))
    with pytest.raises(UserError, match="no row is left for it"):
        preparation.job(plan.trials[0].config)


def test_validation_data_that_hold_no_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row is left for it: give data.val, or raise data.val_fraction 1e-06"):
        prepared(planned(tmp_path, {"optim.lr": "1e-4,1e-3"}, data__val_fraction=1e-6))


def test_what_a_stage_refuses_is_told_of_every_point(tmp_path: Path) -> None:
    base = make_job(tmp_path, rows=60, train__max_steps=1)
    start(base)
    run_here(base)
    plan = planned(tmp_path, {"lora.targets": [["q_proj"], ["nonsense"]]}, stage="lora", init_from=base.config.out)
    preparation = Preparation(plan.base, Host())
    preparation.job(plan.trials[0].config)
    with pytest.raises(UserError, match="nonsense"):
        preparation.job(plan.trials[1].config)


def test_a_sweep_that_ends_before_its_first_trial_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    plan = planned(tmp_path, {"optim.lr": "1e-4,1e-3"}, {"searcher": "optuna", "trials": 2})
    create_sweep(plan, [], {})
    for name in ("on_ray.session.start_ray", "on_ray.session.stop_ray"):
        monkeypatch.setattr(f"minimind_ray.{name}", lambda *cpus: None)
    monkeypatch.setattr("minimind_ray.sweep.run.run_sweep", lambda *plan, **options: "out of time")
    run_plan(reopen_sweep(plan.path), resume=True)
    assert f"out of time; continue with: minimind-ray tune --resume {plan.path}\n" in capsys.readouterr().out


def test_a_sweep_that_was_not_made_whole_is_begun_anew(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-4,1e-3"})
    preparation = Preparation(plan.base, Host())
    jobs = [preparation.job(trial.config) for trial in plan.trials]
    create_sweep(plan, jobs, {})
    # It was interrupted while the second was made, at any point.
    (plan.path / "sweep.json").unlink()
    second = Path(jobs[1].config.out)
    info = second / "run.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "state": "running"}))
    create_sweep(plan, jobs, {})
    (second / "run.json").unlink()
    (second / "config.yaml").unlink()
    assert len(reopen_sweep(plan.path).trials) == 1
    assert [trial.state for trial in read_sweep(plan.path).trials] == ["waiting", "waiting"]
    (plan.path / "sweep.json").unlink()
    create_sweep(plan, jobs, {})
    assert len(reopen_sweep(plan.path).trials) == 2
    # What is no trial of a sweep is left alone.
    mine = tmp_path / "other" / "trials" / "mine"
    mine.mkdir(parents=True)
    create_sweep(replace(plan, path=tmp_path / "other", trials=()), [], {})
    assert mine.exists()


def test_tokens_are_those_of_the_run(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=60, eval__samples=0, train__epochs=2, out=str(tmp_path / "run"))
    start(job)
    run_here(job)
    assert train_tokens(job) == json.loads((tmp_path / "run/run.json").read_text())["tokens"]


def test_budget_of_tokens(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-4,1e-3", "train.epochs": "4,8"}, schedule__warmup=2)
    jobs = prepared(plan)
    total = sum(map(train_tokens, jobs))
    assert within_budget(jobs, total) == jobs
    shorter = within_budget(jobs, total // 2)
    assert total * 0.4 < sum(map(train_tokens, shorter)) <= total // 2
    for before, after in zip(jobs, shorter, strict=True):
        assert after.plan.steps == after.config.train.max_steps == before.plan.steps // 2
        assert after.config.optim == before.config.optim
    with pytest.raises(UserError, match="of which 2 are warm-up"):
        within_budget(jobs, total // 50)


def test_a_sweep_can_be_reopened(tmp_path: Path) -> None:
    base = make_job(tmp_path, rows=60, train__max_steps=1)
    start(base)
    run_here(base)
    axes = {"optim.lr": "1e-3,1e-4", "lora.targets": ["square", ["q_proj", "v_proj"]]}
    plan = planned(tmp_path, axes, {"seeds": 2}, "lora", init_from=base.config.out)
    check_free(plan.path)
    jobs = prepared(plan)
    create_sweep(plan, jobs, {"prepared datasets": 2})
    assert {trial.state for trial in read_sweep(plan.path).trials} == {"waiting"}
    assert reopen_sweep(plan.path) == plan
    # What a resume is told holds from then on, and work that it did again adds up.
    resumed = replace(plan, search=search_config({**plan.search.model_dump(), "concurrent": 3}))
    record_resume(resumed, {"prepared datasets": 2, "pieces of them encoded for this sweep": 1})
    assert reopen_sweep(plan.path) == resumed
    record_resume(resumed, {"prepared datasets": 2, "pieces of them encoded for this sweep": 1})
    shared = read_sweep(plan.path).info.shared
    assert shared == {"prepared datasets": 2, "pieces of them encoded for this sweep": 2}
    # Wherever it lies by now.
    moved = plan.path.rename(tmp_path / "moved")
    outs = {trial.config.out for trial in reopen_sweep(moved).trials}
    assert outs == {str(moved / "trials" / trial.id) for trial in plan.trials}
    moved.rename(plan.path)
    with pytest.raises(UserError, match="already holds a sweep: continue it with minimind-ray tune --resume"):
        check_free(plan.path)
    with pytest.raises(UserError, match="holds no sweep"):
        reopen_sweep(tmp_path)
    check_same_inputs(jobs[0])
    write_jsonl(tmp_path / "lora.jsonl", rows_of("lora", 50, seed=1))
    with pytest.raises(UserError, match="data.train and data.val changed since the sweep began"):
        check_same_inputs(prepared(plan)[0])


def test_trials_that_are_not_on_the_axes_are_named(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-4"})
    create_sweep(plan, prepared(plan), {})
    file = plan.path / "sweep.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "axes": {"optim.lr": ["1e-3", "1e-4"]}}))
    with pytest.raises(UserError, match="a trial's optim.lr is 0.001, which is not on the axis in sweep.json"):
        reopen_sweep(plan.path)


def test_cost_by_hand(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-4", "train.max_steps": "10,20"}, eval__every=5)
    jobs = prepared(plan)
    low = Pace(alone=2.0, process=3.0, start=1.0, step=0.5, validation=2.0, checkpoint=0.0)
    high = Pace(alone=3.0, process=4.0, start=2.0, step=1.0, validation=2.0, checkpoint=1.0)
    found = estimate(jobs, Paces(low, high), SearchConfig(), Layout(at_once=2, groups=0, size=1))
    assert found.steps == 2 * (10 + 20)
    # 10 steps take 1 + 5 + 2 validations, 20 take 1 + 10 + 4. The last trial of 20 waits for the first.
    assert found.low == pytest.approx(BESIDE_TRIALS * 2 + RAY_TRIALS * 3 + 19 + 19, rel=0.02)
    # 10 steps take 2 + 10 + 2 validations with checkpoints, 20 take 2 + 20 + 4.
    assert found.high == pytest.approx(BESIDE_TRIALS * 3 + RAY_TRIALS * 4 + 34 + 34, rel=0.02)
    assert found.price(per_hour=36) == pytest.approx((2 * found.low / 100, 2 * found.high / 100))
    assert found.tokens == sum(map(train_tokens, jobs))
    parameters = 6 * 3e5  # Of the tiny model there are a little fewer.
    assert 0.3 * parameters < found.flops / found.tokens < parameters
    # Trials that share a process also share its place.
    assert estimate(jobs, Paces(low, high), SearchConfig(), Layout(4, 2, 2)).places == 2
    # With several workers, Ray Train starts them for each trial.
    scale = jobs[0].config.scale.model_copy(update={"workers": 2})
    wide = [job.with_config(job.config.model_copy(update={"scale": scale})) for job in jobs]
    more = estimate(wide, Paces(low, high), SearchConfig(), Layout(2, 0, 1))
    assert more.low == pytest.approx(found.low + 2 * RAY_TRAIN * 3, rel=0.02)


def test_calibration_measures_in_processes_and_leaves_nothing(tmp_path: Path) -> None:
    [job] = prepared(planned(tmp_path, {}, train__max_steps=3))
    before = set(tmp_path.iterdir())
    paces = calibrate([[job], [job]])
    for pace in (paces.low, paces.high):
        assert 0 < pace.step < 30 and 0 < pace.validation < 30 and 0 < pace.start < 30 and 0.5 < pace.process < 120
    assert 0 < paces.high.checkpoint < 30
    assert paces.low.step <= paces.high.step and paces.low.process <= paces.high.process
    assert set(tmp_path.iterdir()) == before


def test_calibration_ends_with_the_error_of_its_process(tmp_path: Path) -> None:
    [job] = prepared(planned(tmp_path, {}, train__max_steps=3))
    with pytest.raises(UserError, match="gone: no prepared dataset"):
        calibrate([[replace(job, val=str(tmp_path / "gone"))]])


# A validation after every third step and after the last.
@pytest.mark.parametrize(("steps", "validations"), [(1, 1), (8, 3)])
def test_calibration_measures_trials_that_share_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, validations: int
) -> None:
    monkeypatch.setattr("minimind_ray.sweep.calibrate.CALIBRATION_SECONDS", 600)  # On a busy machine, too.
    base = make_job(tmp_path, train__max_steps=1)
    start(base)
    run_here(base)
    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-4"}, stage="lora", init_from=base.config.out, train__max_steps=steps)
    jobs = [shortened(job, tmp_path / job.config.out.rpartition("/")[2]) for job in prepared(plan)]
    times = measure(jobs)
    assert len(times.validations) == len(times.checkpoints) == validations
    assert all(0 < seconds < 30 for seconds in (times.start, *times.steps, *times.validations))


def test_calibration_validates_though_it_stops_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [job] = prepared(planned(tmp_path, {}, train__max_steps=400))
    found: list[int] = []

    def slowly(validation: Validation) -> Evaluation:
        found.append(1)
        time.sleep(0.5)
        return plain(validation)

    plain = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", slowly)
    monkeypatch.setattr("minimind_ray.sweep.calibrate.CALIBRATION_SECONDS", 0.6)
    times = measure([shortened(job, tmp_path / "run")])
    assert all(0.5 < seconds < 5 for seconds in times.validations)
    assert 1 <= len(found) <= 3


def test_paths_on_an_axis_are_those_of_where_the_sweep_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(tmp_path, {"init_from": ["runs/a", "runs/b"]}, stage="sft")
    assert [trial.config.init_from for trial in plan.trials] == [str(tmp_path / "runs" / name) for name in "ab"]
    assert plan.trials[0].point == {"init_from": "runs/a"}


def test_shipped_sweeps_are_valid(tmp_path: Path) -> None:
    files = sorted((Path(__file__).parents[2] / "experiments/sweeps").glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        sweep = read_sweep_file(file)
        base = load_config(sweep.stage, trees={str(file): sweep.settings})
        search = SearchConfig.model_validate(
            {name: getattr(sweep, name) for name in SearchConfig.model_fields if name in sweep.model_fields_set}
        )
        plan = plan_sweep(tmp_path, base, [parse_axis(k, v) for k, v in sweep.axes.items()], search)
        assert plan.count > 1


def files_of(plan: SweepPlan) -> dict[str, tuple[str, str]]:
    """The config and trial.json of each trial, wherever the sweep lies."""
    paths = sorted((plan.path / "trials").glob("*/"))
    texts = {path.name: (path / "config.yaml", path / "trial.json") for path in paths}
    return {
        name: (config.read_text().replace(str(plan.path), ""), trial.read_text())
        for name, (config, trial) in texts.items()
    }


def test_added_seeds_are_those_of_a_sweep_that_begins_with_them(tmp_path: Path) -> None:
    axes = {"optim.lr": "1e-3,1e-4", "optim.weight_decay": "0,0.1"}
    plan = planned(tmp_path, axes, {"seeds": 1}, track__group="g")
    create_sweep(plan, prepared(plan), {})
    larger = with_seeds(reopen_sweep(plan.path), 3)
    assert larger.count == 12 and larger.search.seeds == 3
    assert continue_sweep(larger, prepared(larger), {}) == 8
    begun = replace(planned(tmp_path, axes, {"seeds": 3}, track__group="g"), path=tmp_path / "begun")
    begun = replace(begun, trials=tuple(map(begun.in_place, begun.trials)))
    create_sweep(begun, prepared(begun), {})
    assert files_of(larger) == files_of(begun)
    assert reopen_sweep(plan.path) == larger
    assert read_sweep(plan.path).info.seeds == 3
    # Repeating the command adds nothing.
    assert with_seeds(larger, 3) == larger
    with pytest.raises(UserError, match="--seeds 2: there are 3 seeds already"):
        with_seeds(larger, 2)


def test_seeds_are_added_to_chosen_points_and_after_an_interruption(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-4", "optim.weight_decay": "0,0.1"}, {"seeds": 1})
    create_sweep(plan, prepared(plan), {})
    larger = with_seeds(reopen_sweep(plan.path), 2, ["lr=1e-4,weight_decay=0.1", "optim.lr=0.001"])
    added = [trial.id for trial in larger.trials[4:]]
    assert added == ["lr=0.001,weight_decay=0,seed=1", "lr=0.001,weight_decay=0.1,seed=1",
                     "lr=1e-4,weight_decay=0.1,seed=1"]  # fmt: skip
    # The process ended when it had made one of them.
    record_resume(larger, {})
    create_trial(larger.trials[4], prepared(larger)[4], 4)
    again = reopen_sweep(plan.path)
    assert again == larger
    assert continue_sweep(again, prepared(again), {}) == 2
    for texts in ("lr=1e-4, weight_decay = .1", ["lr=0.00010,weight_decay=1e-1"], ["optim.lr=1E-4,weight_decay=0.10"]):
        assert chosen_points(again, texts) == [{"optim.lr": 1e-4, "optim.weight_decay": 0.1}]
    with pytest.raises(UserError, match="--seeds 100001: give at most 100 seeds a point"):
        with_seeds(again, 100001)
    # Later, all points get as many.
    every = with_seeds(again, 3)
    assert every.count == 12 and not every.more_seeds
    assert with_seeds(again, 2).count == 8
    for texts, words in (
        (["lr=7"], "--points lr=7: the sweep has no such point"),
        (["beta=0.1"], "the sweep's axes are lr, weight_decay"),
        (["fourth"], "expected best, second, third"),
        (["best"], "--points best: only 0 points of the sweep have results so far"),
    ):
        with pytest.raises(UserError, match=words):
            with_seeds(again, 3, texts)


def test_seeds_of_a_budgeted_sweep_keep_its_length(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-4"}, {"seeds": 1, "budget_tokens": 5000}, train__epochs=8)
    jobs = prepared(plan)
    create_sweep(plan, within_budget(jobs, 5000), {})
    larger = with_seeds(reopen_sweep(plan.path), 2)
    steps = {trial.config.train.max_steps for trial in larger.trials}
    assert len(larger.trials) == 4 and len(steps) == 1 and None not in steps
    assert larger.search.budget_tokens == 10000


def test_seeds_cannot_be_added_with_pbt_or_without_saying_how_many(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"optim.lr": "1e-3,1e-4"}, {"scheduler": "pbt"})
    create_sweep(plan, prepared(plan), {})
    with pytest.raises(UserError, match="cannot add seeds to a sweep with pbt"):
        resumed_plan(plan.path, {"seeds": 2})
    with pytest.raises(UserError, match="give --seeds, too"):
        resumed_plan(plan.path, {"points": ["best"]})
    with pytest.raises(UserError, match="leave --lr out"):
        resumed_plan(plan.path, {"lr": 1e-3})
    assert resumed_plan(plan.path, {"concurrent": 2}).search.concurrent == 2


def test_points_are_chosen_by_their_rank(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", axes={"dpo.beta": "0.02,0.05,0.1,0.3"}, seed_noise=0.0)
    rows = compare([read_sweep(sweep)]).rows
    base = load_config("dpo", overrides={"data.train": "data/train.jsonl", "data.tokenizer": "tokenizer"})
    axes = (parse_axis("dpo.beta", "0.02,0.05,0.1,0.3"),)
    plan = SweepPlan(sweep, base, axes, SearchConfig(seeds=2), tuple(plan_trials(base, axes, seeds=2)))
    chosen = chosen_points(plan, ["best,second"])
    assert chosen == chosen_points(plan, "best, second") == chosen_points(plan, [" second ,best"])
    for wrong in (1, [1]):
        with pytest.raises(UserError, match=r"points \[1\]: give texts"):
            chosen_points(plan, wrong)  # type: ignore[arg-type]
    assert sorted(p["dpo.beta"] for p in chosen) == sorted(row.point["dpo.beta"] for row in rows[:2])
    last = rows[3].point["dpo.beta"]
    both = chosen_points(plan, [f"best,beta={last}"])
    assert sorted(p["dpo.beta"] for p in both) == sorted([rows[0].point["dpo.beta"], last])


def test_the_command_for_more_seeds_names_the_pair(tmp_path: Path) -> None:
    comparison = compare([read_sweep(make_sweep(tmp_path / "sweep"))])
    labels = [row.label for row in comparison.rows]
    more = [
        More((labels[0], labels[1]), 5, None, "", 720.0, 0.27),
        More((labels[0], labels[4]), 9, 500, "", 60.0, None),
        More((labels[0], labels[2]), None, 500, "more seeds are not enough", None, None),
        More((labels[0], labels[3]), 4, None, "", None, None),
    ]
    first, second = seeds_commands(replace(comparison, more=more), "my sweeps/dpo")
    assert first == (
        f"5 seeds of {labels[0]} and {labels[1]}, 12:00 more training for 0.27: "
        "minimind-ray tune --resume 'my sweeps/dpo' --seeds 5 --points best,second"
    )
    point = comparison.rows[4].point
    values = f"beta={point['dpo.beta']:g},lr={point['optim.lr']:g}".replace("e-0", "e-")
    assert second.endswith(
        f"1:00 more training: minimind-ray tune --resume 'my sweeps/dpo' --seeds 9 --points best,{values}"
    )
