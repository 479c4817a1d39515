"""Axes: what text means, what is refused before anything starts, and ids and draws that stay."""

import math

import numpy as np
import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.sweep.axes import (
    Drawn,
    Grid,
    check_axes,
    parse_assignment,
    parse_axis,
    plan_trials,
    points_on,
    short_names,
    untried_point,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("key", "spec", "axis"),
    [
        ("dpo.beta", "0.05,0.1", Grid("dpo.beta", (0.05, 0.1))),
        ("optim.lr", "1e-5, 1e-4", Grid("optim.lr", (1e-5, 1e-4))),
        ("schedule.name", "cosine,wsd", Grid("schedule.name", ("cosine", "wsd"))),
        ("train.compile", "true,false", Grid("train.compile", (True, False))),
        ("lora.targets", "[q_proj, v_proj],all-linear", Grid("lora.targets", (["q_proj", "v_proj"], "all-linear"))),
        ("lora.rank", [2, 4], Grid("lora.rank", (2, 4))),
        ("lora.rank", 2, Grid("lora.rank", (2,))),
        ("optim.lr", "log(1e-6,1e-4)", Drawn("optim.lr", "log", 1e-6, 1e-4)),
        ("optim.clip", " uniform( 0, 2 ) ", Drawn("optim.clip", "uniform", 0, 2)),
        ("lora.rank", "int(1,64)", Drawn("lora.rank", "int", 1, 64)),
    ],
)
def test_forms(key: str, spec: object, axis: object) -> None:
    assert parse_axis(key, spec) == axis
    assert parse_axis(key, parse_axis(key, spec).to_json()) == axis
    if isinstance(spec, str):
        assert parse_assignment(f"{key}={spec}") == axis


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim.lr", "key=values"),
        ("optim.lr=", "needs values"),
        ("optim.lr=1,,2", "needs values|not an axis"),
        ("optim.lr=log(1e-6)", "two numbers"),
        ("optim.lr=log(1e-6,1_0)", "two numbers"),
        ("optim.lr=log(0,1)", "above 0"),
        ("optim.lr=log(2,1)", "less than"),
        ("optim.lr=uniform(0,.inf)", "finite"),
        ("lora.rank=int(1.5,3)", "whole"),
        ("optim.lr=normal(0,1)", "normal is not a kind of axis"),
        ("train.seed=0,1", "--seeds"),
        ("stage=sft,dpo", "one stage"),
        ("scale.workers=1,2", "the same resources"),
        ("eval.max_tokens=100,200", "the same validation"),
        ("data.val=a,b", "the same validation data"),
        ("optim.lr=[1", "not an axis"),
        ("optim={lr: 1e-3}", "is a group of keys"),
    ],
)
def test_wrong_text(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("texts", "draws", "words"),
    [
        (["optim.lrr=1,2"], None, "did you mean optim.lr"),
        (["lora.rank=2,-4"], None, "lora.rank .*greater than 0"),
        (["schedule.name=cosine,cos"], None, "'cos'"),
        (["model.dropout=uniform(0,1.5)"], 1, "model.dropout .*less than 1"),
        (["lora.rank=log(1,64)"], 4, "valid integer"),
        (["batch.tokens=8192,9000"], None, "8192 and 12288"),
        (["optim.lr=log(1e-6,1e-4)"], None, "--trials"),
        (["dpo.beta=0.1,0.2"], 4, "--trials needs a drawn axis"),
        (["dpo.beta=0.1,1e-1"], None, "twice"),
        (["dpo.beta=0.1", "dpo.beta=0.2"], None, "dpo.beta: given as an axis twice"),
        (["lora.rank=int(1,3)"], 4, "only 3 different"),
    ],
)
def test_refused_before_anything_starts(texts: list[str], draws: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_trials(load_config("dpo"), [parse_assignment(t) for t in texts], draws=draws)


def plan(*texts: str, **options: int) -> list:
    return plan_trials(load_config("dpo"), [parse_assignment(t) for t in texts], **options)


def test_grid_times_draws_times_seeds() -> None:
    trials = plan("dpo.beta=0.05,0.1", "optim.lr=log(1e-6,1e-4)", "lora.rank=int(1,64)", draws=3, seeds=2)
    assert len(trials) == 2 * 3 * 2 == len({t.id for t in trials})
    assert [t.seed for t in trials] == [0] * 6 + [1] * 6
    assert [t.point for t in trials[:6]] == [t.point for t in trials[6:]]
    # Every combination of the grid meets the same draws.
    assert [t.point["optim.lr"] for t in trials[:3]] == [t.point["optim.lr"] for t in trials[3:6]]
    for t in trials:
        assert 1e-6 <= t.point["optim.lr"] <= 1e-4
        assert t.point["optim.lr"] == float(f"{t.point['optim.lr']:.4g}")
        assert isinstance(t.point["lora.rank"], int)
        assert (t.config.dpo.beta, t.config.optim.lr) == (t.point["dpo.beta"], t.point["optim.lr"])
        assert t.config.train.seed == t.seed


def test_draws_depend_on_seed_and_key_alone() -> None:
    draws = [t.point["optim.lr"] for t in plan("optim.lr=log(1e-6,1e-4)", draws=40)]
    assert draws == [t.point["optim.lr"] for t in plan("optim.lr=log(1e-6,1e-4)", draws=40)]
    more = plan("dpo.beta=uniform(0.01,0.5)", "optim.lr=log(1e-6,1e-4)", draws=50)
    assert draws == [t.point["optim.lr"] for t in more[:40]]
    assert draws != [t.point["optim.lr"] for t in plan("optim.lr=log(1e-6,1e-4)", draws=40, sweep_seed=1)]
    # Uniform in the logarithm: as many below the geometric mean as above, within chance (p < 1e-4).
    assert 8 <= sum(math.log10(x) < -5 for x in draws) <= 32


def test_ids_are_readable_stable_and_file_safe() -> None:
    trials = plan("dpo.beta=0.05", "optim.lr=1e-5,1e-4", seeds=2)
    assert [t.id for t in trials] == [
        "beta=0.05,lr=1e-5,seed=0",
        "beta=0.05,lr=1e-4,seed=0",
        "beta=0.05,lr=1e-5,seed=1",
        "beta=0.05,lr=1e-4,seed=1",
    ]
    assert [t.id for t in plan(seeds=2)] == ["seed=0", "seed=1"]
    paths = plan("data.train=a/b.jsonl,a-b.jsonl," + "x" * 300)
    assert len({t.id for t in paths}) == 3
    for t in paths:
        assert len(t.id) < 255
        assert "/" not in t.id
    assert short_names(["dpo.beta", "optim.lr", "schedule.name"]) == {
        "dpo.beta": "beta", "optim.lr": "lr", "schedule.name": "schedule",
    }  # fmt: skip
    assert set(short_names(["lora.dropout", "model.dropout"]).values()) == {"lora.dropout", "model.dropout"}


def test_seeds_follow_the_base_seed() -> None:
    base = load_config("dpo", overrides={"train.seed": 5})
    assert [t.seed for t in plan_trials(base, [], seeds=2)] == [5, 6]
    with pytest.raises(UserError, match="at least 1 seed"):
        plan_trials(base, [], seeds=0)


def test_a_value_must_be_possible_with_some_other_value() -> None:
    base = load_config("dpo", overrides={"data.pack_tokens": 640, "data.max_seq_len": 320, "batch.tokens": 1280})
    lengths, packs = parse_axis("data.max_seq_len", "int(128,1024)"), parse_axis("data.pack_tokens", "320,640,1280")
    check_axes(base, [lengths, packs])
    with pytest.raises(UserError, match="data.pack_tokens is 640, less than data.max_seq_len 1024"):
        check_axes(base, [lengths])
    with pytest.raises(UserError, match="optim.lr: the axis has 0.1 twice"):
        check_axes(base, [parse_axis("optim.lr", "0.1,1e-1")])


def test_an_untried_point_is_found_as_long_as_there_is_one() -> None:
    axes = [parse_axis("optim.lr", "1e-3,1e-4"), parse_axis("lora.rank", "int(1,50)")]
    assert points_on(axes) == 100 and points_on([*axes, parse_axis("dpo.beta", "uniform(0.1,1)")]) == math.inf
    tried: set[str] = set()
    rng = np.random.default_rng(0)
    while point := untried_point(axes, lambda point: repr(point) in tried, rng):
        assert repr(point) not in tried
        tried.add(repr(point))
    assert len(tried) == 100
