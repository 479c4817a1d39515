"""`minimind-ray tune STAGE`: run and compare many trials of one stage."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli.flags import given, key_options, require_stage, search_options, stage_names, with_options
from minimind_ray.cli.missing import require_inputs
from minimind_ray.cli.recipes import take
from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from minimind_ray.config.flag import Flag
    from minimind_ray.sweep.forecast import Forecast
    from minimind_ray.sweep.plan import SweepPlan
    from minimind_ray.sweep.table import Comparison
    from minimind_ray.sweep.trials import Sweep

TuneCommand = with_options(
    # The sweep has its own options for the directory and the GPUs (--out, --gpus-per-trial); trials share a cache.
    lambda: [
        *search_options(without=["price_per_hour"]),
        *key_options(_panel, without=["out", "cache_dir", "gpus_per_worker"]),
    ]
)


def _panel(flag: Flag) -> str:
    return "Config keys to set or to vary: 0.05,0.1" if flag.vary else "Config keys to set"


def tune(
    context: typer.Context,
    stage: Annotated[str | None, typer.Argument(help="{stages}", autocompletion=stage_names)] = None,
    config: Annotated[
        list[str] | None, typer.Option(metavar="FILE|NAME", help="config file; a later file overrides earlier ones")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any config key")] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="a sweep's file or name, such as dpo; flags override it")
    ] = None,
    axis_: Annotated[
        list[str] | None,
        typer.Option("--axis", metavar="KEY=VALUES", help="vary any config key: 1,2 or log(1e-6,1e-4), uniform, int"),
    ] = None,
    out: Annotated[str | None, typer.Option(help="the sweep's directory or URL; default: sweeps/STAGE")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="DIR", help="continue the sweep in DIR; with --seeds, add seeds to its points")
    ] = None,
    points: Annotated[
        list[str] | None,
        typer.Option(help="with --resume and --seeds: add seeds only to these points: best,second or beta=0.1"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="prepare the data, measure a few steps, and print plan and cost")
    ] = False,
    gpus_per_trial: Annotated[
        float | None, typer.Option(help="GPUs of a trial, shared by its workers; may be a fraction: 0.25")
    ] = None,
    price_per_hour: Annotated[
        str | None, typer.Option(metavar="USD|FILE", help="price of one trial, or a cluster file with prices")
    ] = None,
) -> None:
    """Sweep over settings of one stage. Runs many trials on Ray Tune, and compares them with their uncertainty."""
    from minimind_ray.sweep.plan import check_free

    asked = given(context)
    if resume:
        from minimind_ray.sweep.resume import resumed_plan

        options = {name: value for name, value in asked.items() if name != "resume"}
        run_plan(resumed_plan(resume, {**options, **_search(asked)}), resume=True)
        return
    if points:
        raise UserError("--points chooses the points to which --resume and --seeds add seeds: give these, too")
    if not sweep:
        require_stage(stage, "tune")
    plan = plan_of(asked)
    require_inputs(plan.base, [axis.key for axis in plan.axes])
    check_free(plan.path)
    if dry_run:
        from minimind_ray.sweep.run import check_files

        check_files(plan, probe=False)
        print_plan(plan)
    else:
        run_plan(plan, resume=False)


def plan_of(asked: Mapping[str, Any]) -> SweepPlan:
    """Return the plan of the sweep that the command's given parameters describe."""
    from minimind_ray.config.load import parse_override
    from minimind_ray.sweep.axes import parse_assignment
    from minimind_ray.sweep.request import SweepRequest, settings_and_axes

    settings, axes = settings_and_axes(asked)
    sweep = asked.get("sweep")
    return SweepRequest(
        stage=asked.get("stage"), file=take("sweep", sweep) if sweep else None,
        config=[take("config", each) for each in asked.get("config", [])],
        settings={**dict(map(parse_override, asked.get("set_", []))), **settings},
        axes=[*axes, *map(parse_assignment, asked.get("axis_", []))],
        search=_search(asked), out=asked.get("out"), gpus_per_trial=asked.get("gpus_per_trial"),
    ).plan()  # fmt: skip


def _search(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the search settings among the command's parameters."""
    from minimind_ray.config.load import parse_value
    from minimind_ray.config.search import SearchConfig

    search = {name: asked[name] for name in SearchConfig.model_fields if name in asked}
    return search | ({"fuse": parse_value(search["fuse"])} if "fuse" in search else {})


def run_plan(plan: SweepPlan, *, resume: bool) -> None:
    """Run the sweep on Ray, show its progress, and print the results."""
    from functools import partial

    from rich.console import Console

    from minimind_ray.data.storage import url_of
    from minimind_ray.display.board import Board
    from minimind_ray.sweep.publish import INTERRUPTED_SECONDS, SECONDS, publish
    from minimind_ray.sweep.run import sweep_on_ray
    from minimind_ray.track.registry import send_commands
    from minimind_ray.train.run import RunDirectory

    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    ending = sweep_on_ray(plan, resume=resume, say=say, board=Board(plan, console))
    trials = list(plan.path.glob("trials/*/"))
    # With optuna, a sweep may end before its first trial.
    title = "winner" if ending == "by itself" else "best so far"
    results = print_results(plan.path, console, title) if trials else None
    if ending != "by itself":
        say(f"{ending}; continue with: minimind-ray tune --resume {quote(url_of(plan.path))}")
    if results:
        seconds = INTERRUPTED_SECONDS if ending == "interrupted" else SECONDS
        for tracker, url in publish(*results, seconds=seconds, ending=ending).items():
            say(f"view in {tracker}: {url}")
        for tracker, command in send_commands(plan.path).items():
            say(f"send it to {tracker}: {command}")
    if ending == "interrupted":
        raise typer.Exit(130)
    if any(RunDirectory(path).info().get("state") == "failed" for path in trials):
        raise typer.Exit(1)


def print_results(path: Path, console: Console, title: str) -> tuple[Sweep, Comparison]:
    """Print the table, the winner under `title`, and the next commands. Write the report. Return what was printed."""
    from functools import partial

    from minimind_ray.config.stages import STAGES
    from minimind_ray.data.storage import url_of
    from minimind_ray.display.comparison import print_comparison
    from minimind_ray.display.findings import print_sweep_line
    from minimind_ray.sweep.compare import compare
    from minimind_ray.sweep.report import write_report
    from minimind_ray.sweep.resume import seeds_commands
    from minimind_ray.sweep.trials import read_sweep

    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    sweep = read_sweep(path)
    comparison = compare([sweep])
    say("")
    print_comparison(comparison)
    for command in seeds_commands(comparison, url_of(path)):
        say(command)
    if winner := comparison.winner:
        command = "generate" if STAGES[sweep.info.stage].rows == "text" else "chat"
        longer = " --set train.max_steps=null" if winner_is_cut(winner.path) else ""
        say(f"\n{title}: {winner.id}")
        model = url_of(winner.result or winner.path)
        say(f"  model: {model}")
        say(f"  talk to it: minimind-ray {command} {quote(model)}")
        say(
            f"  train it at full length: minimind-ray train {sweep.info.stage} --config "
            f"{quote(str(winner.path / 'config.yaml'))} --out {quote(f'runs/{sweep.info.stage}-{sweep.name}')}{longer}"
        )
    print_sweep_line(sweep, console)
    say(f"report: {url_of(write_report(sweep, comparison))}")
    return sweep, comparison


def winner_is_cut(path: Path) -> bool:
    """Whether the trial had fewer steps than its epochs."""
    from minimind_ray.config.load import read_yaml

    return read_yaml(path / "config.yaml")["train"]["max_steps"] is not None


def print_plan(plan: SweepPlan) -> None:
    """Print the plan and the cost of the sweep. Prepares the data and measures the first steps of its first trials."""
    from minimind_ray.data.storage import url_of
    from minimind_ray.sweep.forecast import forecast

    found = forecast(plan, print)
    _print_trials(plan, found)
    _print_cost(plan, found)
    print(f"sweep      {url_of(plan.path)}")


def _print_trials(plan: SweepPlan, found: Forecast) -> None:
    """Print the axes, and where and how the trials run."""
    from minimind_ray.cli.plan import missing_gpus
    from minimind_ray.sweep.text import value_text

    search, scale = plan.search, plan.base.scale
    metric, mode = search.judged_by(plan.base.stage)
    for axis in plan.axes:
        spec = axis.to_json()
        text = spec if isinstance(spec, str) else ", ".join(map(value_text, spec))
        print(f"axis       {axis.key}: {text}")
    if any(axis.key.startswith("data.") for axis in plan.axes):
        data = plan.base.data
        print(
            f"validation every trial with data.max_seq_len {data.max_seq_len} and data.pack_tokens {data.pack_tokens}"
        )
    each = f"{scale.cpus_per_worker:g} CPUs and {scale.gpus_per_worker:g} GPUs"
    print(f"each on    {f'{scale.most} workers of ' if scale.most > 1 else ''}{each}{missing_gpus(scale)}")
    if found.does_not_fit:
        print(f"not here   {found.does_not_fit}")
    print(f"trials     {plan.count} ({search.seeds} seed(s)), judged by {metric} ({mode}), {search.searcher}")
    if plan.remark:
        print(f"           {plan.remark}")


def _print_cost(plan: SweepPlan, found: Forecast) -> None:
    """Print steps, tokens, FLOPs, time and price."""
    from minimind_ray.sweep.cost import terms_text
    from minimind_ray.sweep.plan import train_tokens
    from minimind_ray.sweep.text import count_text, duration_text

    search, cost, paces, first = plan.search, found.cost, found.paces, found.jobs[0]
    flops = cost.flops / len(found.jobs)
    print(
        f"a trial    {first.plan.steps:,} steps, {count_text(train_tokens(first))} tokens, {flops:.2g} FLOPs on average"
    )
    print(f"in total   {cost.steps:,} steps, {count_text(cost.tokens)} tokens, {cost.flops:.2g} FLOPs")
    if search.scheduler == "asha":
        print(f"asha       saves about {1 - cost.kept:.0%} of this (if early validations predict the final order)")
    elif search.scheduler != "none":
        print(f"{search.scheduler:<10} its savings cannot be predicted and are not counted")
    print(f"together   {f'{found.fused} in one process' if found.fused > 1 else 'no'}: {found.why_fused}")
    print(f"shared     {', '.join(f'{count} {what}' for what, count in found.shared.items() if count)}, made once")
    low, high = paces.low, paces.high
    print(
        f"time       {duration_text(cost.low)} to {duration_text(cost.high)} with {found.spread.at_once} at once "
        f"(measured here in {found.processes} process(es) at once, each on {plan.base.scale.cpus_per_worker:g} CPUs: "
        f"{low.step:.2f} to {high.step:.2f} s a step, {low.validation:.1f} to {high.validation:.1f} s a validation, "
        f"up to {high.checkpoint:.1f} s a checkpoint, {low.process + low.start:.0f} to "
        f"{high.process + high.start:.0f} s to begin)"
    )
    if search.budget_hours and cost.high > search.budget_hours * 3600:
        print(f"budget     {search.budget_hours:g} hours may end the sweep earlier; then continue with --resume")
    if search.price_per_hour is not None:
        lowest, highest = cost.price(search.price_per_hour)
        print(f"price      {lowest:.2f} to {highest:.2f}, {terms_text(cost.places, search.price_per_hour)}")
