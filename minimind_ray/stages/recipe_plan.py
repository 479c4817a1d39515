"""Plan a recipe before it runs: choose its files, download missing ones, and check all its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_ray.config.paths import input_path, output_path
from minimind_ray.config.schema import Config
from minimind_ray.data.files import exists, join
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.storage import require_writable
from minimind_ray.stages.download import download, offering
from minimind_ray.stages.recipe import Recipe, TokenizerStep, stage_config
from minimind_ray.stages.start import require_sources
from minimind_ray.track.registry import check_trackers


@dataclass(frozen=True)
class RecipePlan:
    """A recipe's stages with complete, checked configs.

    `out` and `data_dir` are absolute paths or URLs. `tokenizer` is the directory of the tokenizer that is trained
    before the first stage; None if no tokenizer is trained.
    """

    recipe: Recipe
    out: str
    data_dir: str
    tokenizer: str | None
    configs: tuple[Config, ...]


def plan_recipe(
    recipe: Recipe,
    data_dir: str | Path | None,
    out: str | None,
    overrides: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    fetch: bool = False,
) -> RecipePlan:
    """Check all stages of a recipe, so that an error in the last stage shows before the first stage starts.

    `data_dir` and `out` override the recipe's. `overrides` are as in `stage_config`. With `fetch`, first download the
    files that are missing. `say` gets what is downloaded, and which file is used in place of another.

    Raises:
        UserError: see `stage_config`, `require_sources` and `download`; or a directory cannot be written to.
    """
    out = output_path(out or recipe.out or f"runs/{recipe.name}")
    data_dir = input_path(data_dir or recipe.data_dir)
    recipe = with_files_of(recipe, data_dir, say)
    made = join(out, "tokenizer") if isinstance(recipe.tokenizer, TokenizerStep) else None
    tokenizer = recipe.tokenizer if isinstance(recipe.tokenizer, str) else made
    configs = [
        resolve_paths(stage_config(recipe, i, out, tokenizer, data_dir, overrides), again=True)
        for i in range(len(recipe.stages))
    ]
    require_writable(out, *(config.data.cache_dir for config in configs))
    if fetch:
        download(recipe, configs, data_dir, say)
    with offering(recipe, configs, data_dir):
        require_sources(configs, tokenizer=made)
    for config in configs:
        check_trackers(config)
    return RecipePlan(recipe, out, data_dir, made, tuple(configs))


def with_files_of(recipe: Recipe, data_dir: str, say: Callable[[str], None]) -> Recipe:
    """Apply the recipe's section `instead`. `say` gets a sentence for each replaced file."""
    taken = {
        name: other
        for name, other in recipe.instead.items()
        if not exists(join(data_dir, name)) and exists(join(data_dir, other))
    }

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(each) for key, each in value.items()}
        if isinstance(value, list):
            return [replaced(each) for each in value]
        return taken.get(value, value) if isinstance(value, str) else value

    trained = recipe.tokenizer
    if isinstance(trained, TokenizerStep):
        trained = trained.model_copy(update={"train": replaced(trained.train)})
    steps = [step.model_copy(update={"settings": replaced(step.settings)}) for step in recipe.stages]
    for name, other in taken.items():
        say(f"data: {data_dir} has no {name}; using {other}")
    return recipe.model_copy(update={"tokenizer": trained, "settings": replaced(recipe.settings), "stages": steps})
