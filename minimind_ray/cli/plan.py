"""`minimind-ray train STAGE --dry-run`: print the plan of a run, without Ray and without writing anything."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minimind_ray.config.schema import Config, ScaleConfig
    from minimind_ray.stages.plan import RunPlan


def print_plan(config: Config) -> None:
    """Print the plan of a run, with one fact on each line."""
    from minimind_ray.stages.plan import plan_run

    plan = plan_run(config)
    for name, text in {**_model_and_data(plan), **_cost(plan), **_remarks(plan)}.items():
        print(f"{name:<10} {text}")


def _model_and_data(plan: RunPlan) -> dict[str, str]:
    from minimind_ray.model.families import config_of
    from minimind_ray.train.throughput import parameter_counts

    config, epoch = plan.config, plan.epoch
    total, active = parameter_counts(plan.shape)
    each_worker = math.ceil(plan.packs_per_step / config.scale.most)
    return {
        "model": f"{config_of(plan.shape)['architectures'][0]}, {total:,} parameters"
        + (f", {active:,} of them active for a token" if active < total else "")
        + (f"; {plan.memory.trainable:,} are trained" if plan.memory.trainable < total else ""),
        "data": f"{epoch.tokens:,} tokens an epoch in {epoch.documents:,} documents, {epoch.counted:,} of them carry "
        f"loss; {counted(epoch.packs, 'pack')}, {plan.fullness:.0%} full ({epoch.source})",
        "steps": f"{plan.steps:,} ({plan.steps_per_epoch:,} an epoch), each {config.batch.tokens:,} tokens = "
        f"{counted(plan.packs_per_step, 'pack')} of {config.data.pack_tokens:,}, {each_worker} on each worker",
    }


def _cost(plan: RunPlan) -> dict[str, str]:
    from minimind_ray.train.run import RunDirectory

    scale, memory, run = plan.config.scale, plan.memory, RunDirectory(plan.config.out)
    return {
        "compute": f"{plan.flops / plan.steps:.2g} FLOPs a step, {plan.flops:.2g} in total, counted as for MFU",
        "memory": f"{_size(memory.total)} on each worker: {_size(memory.weights)} weights + {_size(memory.gradients)} "
        f"gradients + {_size(memory.optimizer)} AdamW + {_size(memory.activations)} activations of "
        f"{_pass(plan.config, plan.pass_tokens)} (estimated)",
        "workers": f"{scale.workers}, each with {counted(scale.cpus_per_worker, 'CPU')} and "
        f"{counted(scale.gpus_per_worker, 'GPU')}; one "
        f"more CPU for the data; matrix products in {str(plan.dtype).removeprefix('torch.')} on hardware like this"
        f"{missing_gpus(scale)}",
        "run": f"{run.where}{' (it already holds a run)' if run.file('config.yaml').exists() else ''}",
    }


def _remarks(plan: RunPlan) -> dict[str, str]:
    """Return lines that only some runs need: a too long schedule, a reference model, rows that cannot be used."""
    from minimind_ray.stages.stage import stage_of
    from minimind_ray.train.schedule import shortfall

    config, sample, lines = plan.config, plan.sample, dict[str, str]()
    if warning := shortfall(config.schedule, plan.steps):
        lines["warning"] = warning
    for scored in stage_of(config).columns(config):
        extra = "one forward pass over the data first, unless an earlier run with this data and base did it"
        lines[scored.column.name] = extra
    if sample.rejected:
        first, allowed = sample.reasons[0].first, config.data.max_reject_fraction
        lines["rejected"] = (
            f"{sample.rejected:,} of {sample.sampled:,} sampled rows, such as {first.file}:{first.line}: {first.reason}"
        )
        if sample.rejected > allowed * sample.sampled:
            lines["rejected"] += f"; data.max_reject_fraction {allowed:g} allows fewer: the run would stop"
    if sample.remarks:
        lines["rows"] = "in the sample, " + "; ".join(sample.remarks)
    return lines


def missing_gpus(scale: ScaleConfig) -> str:
    """Return a hint if the workers need GPUs, this machine has none, and RAY_ADDRESS is not set; otherwise ""."""
    import torch

    if not scale.gpus_per_worker or "RAY_ADDRESS" in os.environ or torch.cuda.is_available():
        return ""
    return "; this machine has no GPU: use a cluster that has GPUs, or set scale.gpus_per_worker to 0"


def counted(count: float, noun: str) -> str:
    """Return a count with its noun: 1 pack, 2,000 packs, 0.5 CPUs."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun if count == 1 else f'{noun}s'}"


def _pass(config: Config, tokens: int) -> str:
    if config.batch.pass_tokens != "auto":
        return f"a pass of {tokens:,} tokens"
    return "a pack" + (
        "; a GPU takes as many packs at once as fit into its memory" if config.scale.gpus_per_worker else ""
    )


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
