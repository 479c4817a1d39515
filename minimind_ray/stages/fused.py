"""Decide whether runs can be trained together in one process, and prepare such a run (see train/fused.py).

The runs must share everything except their adapters: stage, base, data format and precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from minimind_ray.config.schema import Config
from minimind_ray.config.stages import STAGES
from minimind_ray.model.checkpoint import load_shape
from minimind_ray.stages.run import Job
from minimind_ray.stages.stage import stage_of
from minimind_ray.stages.start import initial_model, load_tokenizer, require_base
from minimind_ray.stages.weights import Adapter
from minimind_ray.train.fused import DocumentObjective, FusedContext, Member
from minimind_ray.train.loop import TrainingRun
from minimind_ray.train.optim import build_adamw

SHARED = ("init_from", "data.tokenizer", "lora.targets", "train.precision", "train.compile")


def obstacle(configs: Sequence[Config]) -> str | None:
    """Return why runs of these configs cannot be trained together; None if they can.

    The configs may differ in the adapters' rank and scale, in all settings of optimizer, schedule, length, seed and
    batch, and in the preference loss.
    """
    first = configs[0]
    if not all(config.trains_adapter for config in configs):
        return f"only adapters can share a base: {_adapting()}"
    for config in configs:
        if config.scale.most > 1:
            return "a trial has more than one worker"
        if config.lora.dropout or config.lora.dora:
            return "lora.dropout and lora.dora do not work for many adapters at once"
    if first.scale.gpus_per_worker and any(config.train.deterministic for config in configs):
        return "train.deterministic works only for a single run"
    for key in SHARED:
        if any(attrgetter(key)(config) != attrgetter(key)(first) for config in configs):
            return f"{key} is not the same in all trials"
    if len({tuple(stage_of(config).columns(config)) for config in configs}) > 1:
        return f"{' and '.join(stage_of(first).column_keys)} asks for a frozen model in some trials and not in others"
    shape = load_shape(require_base(first))
    if shape.num_experts:
        return "experts would see the tokens of all trials, so a trial's load balance would depend on the others"
    if shape.dropout:
        return "model.dropout does not work for many adapters at once"
    if not isinstance(stage_of(first).objective(first, shape), DocumentObjective):
        return f"the loss of stage {first.stage} needs more than each document's log-probability"
    return None


def _adapting() -> str:
    """Return, for a message, the runs that train adapters."""
    always = [f"stage {record.name}" for record in STAGES.values() if record.adapters == "always"]
    by_key = [f"{r.name} with {r.adapters}" for r in STAGES.values() if r.adapters not in ("always", "never")]
    return ", or ".join((*always, *by_key))


def member(job: Job, context: FusedContext) -> Member:
    """Prepare a run to be trained with others, from its last checkpoint or from the start.

    Raises:
        UserError: the stage could not be run by itself either.
    """
    config, base = job.config, job.base
    assert base
    tokenizer = load_tokenizer(config, base.local())
    model = initial_model(config, tokenizer, context, base.local())
    weights = Adapter(model, config, base)
    objective = stage_of(config).objective(config, model.shape)
    assert isinstance(objective, DocumentObjective)
    optimizer = build_adamw(model, config.optim)
    run = TrainingRun(model, objective, optimizer, weights, config, context, job.data(context), tokenizer)
    return Member(model, objective, optimizer, config.optim, context, run)
