"""Read recipes. A recipe is a file that lists stages to run one after another, each on the result of an earlier stage.

When a recipe runs again, stages that are finished and unchanged are skipped.

    name: zero
    data_dir: dataset            # relative data paths start here
    tokenizer: {train: …, vocab_size: 6400}   # optional: train a tokenizer first; or a directory
    download:                    # optional: where `run --download` finds files that are missing
      data: hf://datasets/OWNER/NAME
      tokenizer: hf://OWNER/NAME
    instead: {new.jsonl: old.jsonl}           # optional: old.jsonl is used if only that file is in the data_dir
    settings: {…}                # for every stage
    stages:
      - name: pretrain           # its run directory is <out>/pretrain
        stage: pretrain          # default: the name
        settings: {…}            # as in a config file
      - name: sft
        init_from: pretrain      # an earlier name or a path; default: the last stage that trains a whole model
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import config_keys, load_config, merged, nearest_key, read_yaml
from minimind_ray.config.schema import Config, LoraConfig
from minimind_ray.config.section import Section
from minimind_ray.config.stages import StageName
from minimind_ray.data.claim import require_free
from minimind_ray.data.files import exists, join
from minimind_ray.stages.run import Job, changed_inputs
from minimind_ray.train.run import RunDirectory


class TokenizerStep(Section):
    """A tokenizer to train before the first stage."""

    train: str | list[str]
    vocab_size: int = 6400
    max_bytes: int = Field(200_000_000, description="most bytes of text to train on")


class Download(Section):
    """The data set of the hub that has the recipe's data files, and the model that has its tokenizer."""

    data: str
    tokenizer: str | None = None


class StageStep(Section):
    """One stage of a recipe."""

    name: str = Field(pattern=r"^[\w.-]+$")
    stage: StageName | None = None
    init_from: str | None = None
    settings: dict[str, Any] = {}


class Recipe(Section):
    """The content of a recipe file; see the module's docstring."""

    name: str
    data_dir: str = "dataset"
    out: str | None = None
    tokenizer: TokenizerStep | str | None = None
    download: Download | None = None
    instead: dict[str, str] = {}
    settings: dict[str, Any] = {}
    stages: list[StageStep] = Field(min_length=1)

    @property
    def files(self) -> list[tuple[str, ...]]:
        """The relative paths of the recipe's data, each with the file that may stand in its place."""
        data = [merged(self.settings, step.settings).get("data") or {} for step in self.stages]
        values = [each.get(split) for each in data for split in ("train", "val")]
        values += [self.tokenizer.train] if isinstance(self.tokenizer, TokenizerStep) else []
        paths = [path for value in values for path in (value if isinstance(value, list) else [value])]
        local = dict.fromkeys(path for path in paths if isinstance(path, str) and "://" not in path)
        return [(path, *([self.instead[path]] if path in self.instead else [])) for path in local]


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UserError: the file cannot be read, or a key is wrong.
    """
    tree = read_yaml(path)
    if "stages" not in tree:
        use = "tune --sweep" if "axes" in tree else "train STAGE --config"
        raise UserError(f"{path} is not a recipe, because it has no stages: give it to minimind-ray {use}")
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    names = [step.name for step in recipe.stages]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two stages are named {twice}; give each stage its own name")
    return recipe


def stage_config(
    recipe: Recipe, index: int, out: str, tokenizer: str | None, data_dir: str | Path, overrides: Mapping[str, Any]
) -> Config:
    """Return the config of the recipe's stage number `index`.

    `overrides` have dotted keys, or `name.key` for a single stage.

    Raises:
        UserError: see `load_config`.
    """
    step, config = recipe.stages[index], _own_config(recipe, index, overrides)
    init_from = _base(recipe, index, out, overrides) if config.init_from is None else config.init_from
    data = config.data.model_copy(
        update={
            "train": _under(data_dir, config.data.train),
            "val": _under(data_dir, config.data.val),
            # A stage with a base uses the base's tokenizer.
            "tokenizer": config.data.tokenizer or (None if init_from else tokenizer),
        }
    )
    return config.model_copy(update={"data": data, "init_from": init_from, "out": join(out, step.name)})


def _own_config(recipe: Recipe, index: int, overrides: Mapping[str, Any]) -> Config:
    """Return the stage's config before its position-dependent defaults (paths, tokenizer, base) are filled in."""
    step, names = recipe.stages[index], [s.name for s in recipe.stages]
    # A stage may have the name of a section: dpo.beta is a config key, dpo.optim.lr is for the stage named dpo.
    of_stages = {k: v for k, v in overrides.items() if k not in config_keys() and k.split(".")[0] in names}
    own = {k.removeprefix(f"{step.name}."): v for k, v in of_stages.items() if k.startswith(f"{step.name}.")}
    common = {k: v for k, v in overrides.items() if k not in of_stages}
    sections = {key.split(".")[0] for key in config_keys()}
    if wrong := next((k for k in common if k.split(".")[0] not in sections), None):
        raise UserError(
            f"{wrong} is neither a setting nor a stage's setting; the stages of {recipe.name} are {', '.join(names)}; "
            f"{nearest_key(wrong)}"
        )
    trees = {f"{recipe.name}, {step.name}": merged(recipe.settings, step.settings)}
    config = load_config(step.stage or step.name, trees=trees, overrides=common | own)
    if config.trains_adapter or "lora" in step.settings or any(key.startswith("lora.") for key in own):
        return config
    # The recipe's common lora section is only for stages that train adapters.
    return config.model_copy(update={"lora": LoraConfig()})


def _base(recipe: Recipe, index: int, out: str, overrides: Mapping[str, Any]) -> str | None:
    step, earlier = recipe.stages[index], recipe.stages[:index]
    if step.init_from is not None:
        return join(out, step.init_from) if step.init_from in [s.name for s in earlier] else step.init_from
    whole = [s.name for i, s in enumerate(earlier) if not _own_config(recipe, i, overrides).trains_adapter]
    return join(out, whole[-1]) if whole else None


def _under(directory: str | Path, paths: str | list[str] | None) -> str | list[str] | None:
    if isinstance(paths, list):
        return [str(_under(directory, path)) for path in paths]
    return paths if paths is None or "://" in paths else os.path.join(directory, paths)  # noqa: PTH118 (keeps globs)


@dataclass(frozen=True)
class Decision:
    """The action to take for a stage, and the reason."""

    action: Literal["start", "skip", "resume", "redo"]
    why: str


def decide(job: Job) -> Decision:
    """Decide what to do with a job, by the content of its run directory.

    Raises:
        UserError: another process writes to the run directory.
    """
    run = RunDirectory(job.config.out)
    require_free(run.where)
    info = run.info()
    if not info:
        return Decision("start", "not started yet")
    changed = run.changes(job.config)
    changed += [f"{key} (other content)" for key in changed_inputs(job, run)]
    if changed:
        return Decision("redo", f"changed: {', '.join(changed)}")
    if info["state"] == "finished":
        return Decision("skip", f"finished, {info['steps']} steps, nothing changed")
    return Decision("resume", f"its state is {run.state()}, and it is not finished: {run.resume_point()}")


def set_aside(run: RunDirectory) -> str:
    """Rename the run directory of a stage that is run again, so that no file is lost. Return the new path or URL.

    Raises:
        UserError: another process writes to the run directory.
    """
    require_free(run.where)
    number = 1
    while exists(aside := f"{run.where}.before-{number}"):
        number += 1
    if run.mirror:
        run.mirror.move(aside)
    else:
        run.path.rename(aside)
    return aside
