"""`minimind-ray run RECIPE`: run several stages, one after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli.flags import added, key_options, with_options
from minimind_ray.cli.missing import recipe_command
from minimind_ray.cli.recipes import recipe_names, require_recipe, take

if TYPE_CHECKING:
    from rich.console import Console

    from minimind_ray.config.schema import Config
    from minimind_ray.stages.recipe import TokenizerStep


RunCommand = with_options(lambda: key_options(only=["workers"]))


def run(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="a recipe's file or name, such as zero; see minimind-ray recipes",
            show_default=False,
            autocompletion=recipe_names,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="directory of the recipe's data; default: as the recipe says")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="directory or URL for all stages; default: runs/<recipe's name>")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="[STAGE.]KEY=VALUE", help="any config key, for all stages or for STAGE"),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="fetch missing data files, as the recipe says")] = False,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Ray Train workers, or this process alone")] = True,
) -> None:
    """Run a recipe's stages. Skips finished stages that are unchanged, and continues an interrupted stage."""
    from minimind_ray.config.flags import overrides_of
    from minimind_ray.config.load import parse_override

    recipe = require_recipe(recipe)
    overrides = {**dict(map(parse_override, set_ or [])), **overrides_of(added(context))}
    run_recipe(take("recipe", recipe), data_dir, out, overrides, ray=ray, fetch=download, suggest=True)


def run_recipe(
    path: Path,
    data_dir: str | Path | None,
    out: str | None,
    overrides: dict[str, Any],
    *,
    ray: bool,
    fetch: bool = False,
    suggest: bool = False,
) -> None:
    """Run a recipe file. Print for each stage whether it is run, resumed or skipped, and why.

    With `fetch`, first download the files that are missing. With `suggest`, an error about missing inputs ends with a
    command that would work. Stops after a stage that was interrupted.
    """
    from rich.console import Console

    from minimind_ray.config.errors import UserError
    from minimind_ray.on_ray.host import host
    from minimind_ray.stages.recipe import TokenizerStep, read_recipe
    from minimind_ray.stages.recipe_plan import plan_recipe

    console = Console(highlight=False, markup=False, soft_wrap=True)
    recipe = read_recipe(path)
    try:
        plan = plan_recipe(recipe, data_dir, out, overrides, console.print, fetch=fetch)
    except UserError as error:
        if suggest and (command := recipe_command(recipe, data_dir, overrides)):
            raise UserError(f"{error}; with what is here: {command}") from None
        raise
    if isinstance(plan.recipe.tokenizer, TokenizerStep) and plan.tokenizer:
        _make_tokenizer(plan.recipe.tokenizer, plan.tokenizer, plan.data_dir, console)
    with host([config.scale for config in plan.configs], ray=ray) as (work, run_job):
        for step, config in zip(recipe.stages, plan.configs):
            console.rule(f"{recipe.name}: {step.name}", align="left")
            if not _run_stage(config, work, run_job, console):
                console.print(f"stopped; the same command continues with {step.name}")
                raise typer.Exit(130)


def _run_stage(config: Config, work: Any, run_job: Any, console: Console) -> bool:
    """Run a stage unless it is finished. Returns whether it is finished now."""
    from minimind_ray.display.findings import print_run_findings
    from minimind_ray.display.progress import print_result, watching
    from minimind_ray.stages.recipe import decide, set_aside
    from minimind_ray.stages.run import begun, prepare_job
    from minimind_ray.train.run import RunDirectory

    job = prepare_job(config, work, console.print)
    run = RunDirectory(config.out)
    decision = decide(job)
    console.print(f"{decision.action}: {decision.why}")
    if decision.action == "skip":
        return True
    if decision.action == "redo":
        console.print(f"the earlier run was moved to {set_aside(run)}")
    with begun(job, resume=decision.action == "resume"), watching(job, console):
        run_job(job)
    print_result(run.where, console)
    print_run_findings(run.where, console)
    return run.info()["state"] == "finished"


def _make_tokenizer(step: TokenizerStep, where: str, data_dir: str, console: Console) -> None:
    from minimind_ray.cli import tokenizer
    from minimind_ray.data.records import discover
    from minimind_ray.data.shipped import copy_to_storage
    from minimind_ray.data.storage import copy_of, mirror_of

    paths = [step.train] if isinstance(step.train, str) else step.train
    files = [path if "://" in path else copy_to_storage(f"{data_dir}/{path}") for path in paths]
    sources = [[source.path, source.size, source.version] for source in discover(files)]
    made_from = {"sources": sources, "vocab_size": step.vocab_size, "max_bytes": step.max_bytes}
    mirror, directory = mirror_of(where), copy_of(where)
    if mirror:
        mirror.pull()
    record = directory / "made_from.json"
    if record.exists() and json.loads(record.read_text()) == made_from:
        console.print(f"tokenizer: {where} exists and its sources are unchanged")
        return
    tokenizer.make(files, where, step.vocab_size, step.max_bytes)
    record.write_text(json.dumps(made_from, indent=2))
    if mirror:
        mirror.put(record.name)
