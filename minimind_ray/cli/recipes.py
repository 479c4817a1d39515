"""`minimind-ray recipes`: list the recipes, configs and sweeps that come with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from minimind_ray.config.shipped import Kind


def recipes() -> None:
    """List the recipes, the configs of stages and the sweeps that come with minimind-ray, and how to use them."""
    from minimind_ray.config.shipped import USES, shipped

    for kind, use in USES.items():
        print(f"{kind}s, for {use.format('NAME')}", *_lines(kind), "", sep="\n")
    print(
        "A file NAME or NAME.yaml in the working directory, or in experiments/ there, is used in place of the shipped "
        f"file.\nminimind-ray init DIR copies all of them for you to edit. They lie in {shipped('experiments')}"
    )


def _lines(kind: Kind) -> list[str]:
    from minimind_ray.config.shipped import experiments

    width = max(len(each.name) for each in experiments())
    return [f"  {each.name:<{width}}  {each.about}" for each in experiments() if each.kind == kind]


def recipe_names() -> list[str]:
    """Return the shipped recipes' names, for a shell's completion."""
    from minimind_ray.config.shipped import experiments

    return [each.name for each in experiments() if each.kind == "recipe"]


def require_recipe(recipe: str | None) -> str:
    """Return the recipe. If none was given, print the recipes with a line each, and exit as after a usage error."""
    if recipe is not None:
        return recipe
    print("which recipe? minimind-ray run RECIPE", *_lines("recipe"), sep="\n", file=sys.stderr)
    raise typer.Exit(2)


def take(kind: Kind, given: str | Path) -> Path:
    """Return the file for a name or a path that the user gave. For a name, print which file was taken.

    Raises:
        UserError: see `find`.
    """
    from minimind_ray.config.shipped import find

    found = find(kind, given)
    if found.note:
        print(found.note, flush=True)
    return found.path
