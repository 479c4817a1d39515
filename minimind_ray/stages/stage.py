"""The class `Stage`: the functions of a stage. Each `stages/<name>.py` exports a `Stage` as STAGE.

A stage's name, row kind, defaults and metrics are in its record in config/stages.py, which needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minimind_ray.config.schema import Config, ModelShape
from minimind_ray.config.stages import STAGES, StageRecord
from minimind_ray.data.batch import Batch
from minimind_ray.data.columns import Column
from minimind_ray.data.plan import StepSource
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.context import Context
from minimind_ray.train.evaluate import Evaluation
from minimind_ray.train.step import Objective


@dataclass(frozen=True)
class Use:
    """A rule about a setting that only some runs use. `key` is a dotted key, or a section with its dot.

    `used` says whether a run uses the setting. `otherwise` returns the message for a run that does not use it. If
    `shared` is true, such a run is allowed and ignores the setting, because a config may be common to many runs. But
    such a setting cannot be an axis of a sweep, because the trials would be equal.
    """

    key: str
    used: Callable[[Config], bool]
    otherwise: Callable[[Config], str]
    shared: bool = False


@dataclass(frozen=True)
class Scored:
    """A column that the run's base computes for the data before training.

    `score` returns the column's values for a batch, [D] or [N] by its axis. `what` names the values in messages, in the
    plural.
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
    """Return no columns, for a stage that needs no frozen model."""
    return ()


def packs_as_they_are(packs: StepSource, policy: Policy) -> StepSource:
    """Return the packs' own source, for a stage that samples nothing from the model."""
    return packs


def all_means(config: Config, evaluation: Evaluation, referenced: bool) -> dict[str, Any]:
    """Return the means of all metrics of an evaluation, by name."""
    return evaluation.means


@dataclass(frozen=True)
class Stage:
    """A stage: its record, and functions of a run's config.

    objective: returns the loss to minimise. Raises UserError if the config asks for an impossible loss.
    columns: returns the columns that the objective needs from a frozen model.
    column_keys: the settings that `columns` depends on.
    source: returns the source of the run's training steps, made from the packs of its data.
    uses: rules about the stage's own settings.
    report: returns the results that `eval` shows, by name in the order to show them. Its last argument says whether the
        user named a model for `columns`; without such a model, the columns are 0.
    """

    record: StageRecord
    objective: Callable[[Config, ModelShape], Objective]
    columns: Callable[[Config], Sequence[Scored]] = no_columns
    column_keys: Sequence[str] = ()
    source: Callable[[StepSource, Policy], StepSource] = packs_as_they_are
    uses: Sequence[Use] = ()
    report: Callable[[Config, Evaluation, bool], dict[str, Any]] = all_means


def stage_of(config: Config) -> Stage:
    """Return the stage that the config names."""
    return find_stage(config.stage)


def find_stage(name: str) -> Stage:
    """Return the stage of this name. Its file is imported at the first call."""
    assert name in STAGES
    stage = getattr(importlib.import_module(f"minimind_ray.stages.{name}"), "STAGE", None)
    # Other files of this folder have names, too: a stage cannot be called run, plan or base.
    assert isinstance(stage, Stage) and stage.record is STAGES[name], f"stages/{name}.py has no STAGE of this name"
    return stage
