"""Runs of one stage that share everything but their adapters, trained together (see train/fused.py)."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from minimind_ray.config.schema import Config
from minimind_ray.model.checkpoint import load_shape
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.objectives.preference import WITHOUT_REFERENCE, Preference
from minimind_ray.stages.lora import Adapter
from minimind_ray.stages.run import Job
from minimind_ray.stages.start import initial_model, load_tokenizer, require_base
from minimind_ray.train.fused import FusedContext, Member
from minimind_ray.train.loop import TrainingRun
from minimind_ray.train.optim import build_adamw

SHARED = ("init_from", "data.tokenizer", "lora.targets", "train.precision", "train.compile")


def obstacle(configs: Sequence[Config]) -> str | None:
    """Why runs of these configs cannot be trained together; None when they can.

    What may differ: rank and scale, the whole of optimizer, schedule, length, seed and batch, and how pairs are judged.
    """
    first = configs[0]
    if not all(config.trains_adapter for config in configs):
        return "only adapters can share a base: stage lora, or dpo with dpo.lora"
    for config in configs:
        if config.scale.most > 1:
            return "a trial has more than one worker"
        if config.lora.dropout or config.lora.dora:
            return "lora.dropout and lora.dora are not there for many adapters at once"
    if first.scale.gpus_per_worker and any(config.train.deterministic for config in configs):
        return "train.deterministic is for runs alone"
    for key in SHARED:
        if any(attrgetter(key)(config) != attrgetter(key)(first) for config in configs):
            return f"{key} is not the same in all trials"
    if len({config.dpo.loss in WITHOUT_REFERENCE for config in configs}) > 1:
        return "dpo.loss has a reference in some trials and none in others"
    shape = load_shape(require_base(first))
    if shape.num_experts:
        return "experts see the tokens of all trials, and their balance would depend on the others"
    if shape.dropout:
        return "model.dropout is not there for many adapters at once"
    return None


def member(job: Job, context: FusedContext) -> Member:
    """A run that is to be trained with others, from its last checkpoint or the start.

    Raises:
        UserError: as the stage alone.
    """
    config = job.config
    tokenizer = load_tokenizer(config)
    model = initial_model(config, tokenizer, context)
    weights = Adapter(model, config)
    objective = CausalLM(model.shape) if config.stage == "lora" else Preference(config.dpo, model.shape)
    optimizer = build_adamw(model, config.optim)
    run = TrainingRun(model, objective, optimizer, weights, config, context, job.data(context), tokenizer)
    return Member(model, objective, optimizer, config.optim, context, run)
