"""Fetch the data files and the tokenizer that a recipe names but that are not here, from where its `download` says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.data.hub import data_set, download_file, fetch_tokenizer, file_sizes, hub_ref, pin, size_text
from minimind_ray.data.storage import is_url
from minimind_ray.stages.recipe import Recipe


def missing_files(recipe: Recipe, configs: Sequence[Config], data_dir: str) -> list[str]:
    """Return the names of the recipe's data files that are not in `data_dir` and can be downloaded."""
    if not recipe.download or is_url(data_dir):
        return []
    found = dict.fromkeys(place for config in configs for place in config.data.locations)
    names = [Path(place) for place in found if not is_url(place) and not set("*?[").intersection(place)]
    root = Path(data_dir)
    return [path.relative_to(root).as_posix() for path in names if path.is_relative_to(root) and not path.exists()]


def missing_tokenizer(recipe: Recipe, configs: Sequence[Config]) -> Path | None:
    """Return the recipe's tokenizer directory if a stage uses it, it is not here, and it can be downloaded."""
    if not recipe.download or not recipe.download.tokenizer or not isinstance(recipe.tokenizer, str):
        return None
    used = str(Path(recipe.tokenizer).absolute()) in [config.data.tokenizer for config in configs]
    return Path(recipe.tokenizer) if used and not Path(recipe.tokenizer).exists() else None


@contextmanager
def offering(recipe: Recipe, configs: Sequence[Config], data_dir: str) -> Generator[None]:
    """Add to a UserError from inside the block how to download what is missing, if it can be downloaded."""
    try:
        yield
    except UserError as error:
        names: list[str] = missing_files(recipe, configs, data_dir)
        if tokenizer := missing_tokenizer(recipe, configs):
            names.append(f"{tokenizer}/")
        if not names:
            raise
        raise UserError(f"{error}; add --download to fetch {', '.join(names)} from the Hugging Face Hub") from None


def download(recipe: Recipe, configs: Sequence[Config], data_dir: str, say: Callable[[str], None]) -> None:
    """Download what is missing. `say` gets how much that is, before anything is fetched.

    A download that was cut continues when this is called again.

    Raises:
        UserError: the hub lacks a file, refuses it, or cannot be reached; or there is too little space on the disk.
    """
    tokenizer, names = missing_tokenizer(recipe, configs), missing_files(recipe, configs, data_dir)
    if recipe.download and names:
        source = data_set(recipe.download.data)
        commit, sizes = file_sizes(source, names)
        total = sum(sizes.values())
        each = ", ".join(f"{name} ({size_text(size)})" for name, size in sizes.items())
        say(f"downloading {size_text(total)} from {source} to {data_dir}: {each}")
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(data_dir).free
        if free < total:
            raise UserError(f"{data_dir}: {size_text(free)} are free on the disk, fewer than the {size_text(total)}")
        for name in names:
            download_file(commit, name, Path(data_dir))
    if recipe.download and recipe.download.tokenizer and tokenizer:
        found = hub_ref(recipe.download.tokenizer)
        if found is None:
            raise UserError(
                f"download.tokenizer {recipe.download.tokenizer} is not a model of the hub: hf://OWNER/NAME"
            )
        say(f"downloading the tokenizer of {(pinned := pin(found))} to {tokenizer}")
        others = shutil.ignore_patterns("config.json", "generation_config.json", "adapter_config.json", "model.*")
        shutil.copytree(fetch_tokenizer(pinned), tokenizer, ignore=others)
