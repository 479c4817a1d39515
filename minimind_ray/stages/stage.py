"""What a stage does: the object that each `stages/<name>.py` exports as STAGE. What it declares is its record."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from minimind_ray.config.schema import Config, ModelShape
from minimind_ray.config.stages import STAGES, StageRecord
from minimind_ray.data.batch import Batch
from minimind_ray.data.columns import Column
from minimind_ray.data.plan import StepSource
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.context import Context
from minimind_ray.train.step import Objective


@dataclass(frozen=True)
class Use:
    """Which runs have a use for a setting (a dotted key, or a section with its dot), and what to say to the others.

    With `shared` a run without the use ignores the setting, because settings may be common to many runs. An axis of a
    sweep is refused all the same, because its trials would be equal.
    """

    key: str
    used: Callable[[Config], bool]
    otherwise: Callable[[Config], str]
    shared: bool = False


@dataclass(frozen=True)
class Scored:
    """A column that the run's base computes for the data before training.

    score: the column's values for a batch, [D] or [N] by its axis. `what` names them in messages, in the plural.
    """

    column: Column
    score: Callable[[Transformer, Batch], Tensor]
    what: str


@dataclass(frozen=True)
class Policy:
    """The model in training, for step sources that sample from it."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    context: Context


def no_columns(config: Config) -> Sequence[Scored]:
    """The columns of a stage that needs no frozen model."""
    return ()


def packs_as_they_are(packs: StepSource, policy: Policy) -> StepSource:
    """The source of a stage that learns from its data alone."""
    return packs


@dataclass(frozen=True)
class Stage:
    """A stage: its record, and functions of a run's config.

    objective: what the run minimises. Raises UserError where the config asks for something that does not exist.
    columns: what a frozen model says of the data, for this objective; `column_keys` are the settings that decide it.
    source: the steps that the run trains on, made from the packs of its data.
    uses: rules about the stage's own settings.
    """

    record: StageRecord
    objective: Callable[[Config, ModelShape], Objective]
    columns: Callable[[Config], Sequence[Scored]] = no_columns
    column_keys: Sequence[str] = ()
    source: Callable[[StepSource, Policy], StepSource] = packs_as_they_are
    uses: Sequence[Use] = ()


def stage_of(config: Config) -> Stage:
    """The stage that the config names."""
    return find_stage(config.stage)


def find_stage(name: str) -> Stage:
    """The stage of this name; its file is imported only now."""
    assert name in STAGES
    return importlib.import_module(f"minimind_ray.stages.{name}").STAGE
