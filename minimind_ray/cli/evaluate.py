"""`minimind-ray eval MODEL FILES --stage STAGE`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli import options
from minimind_ray.cli.flags import added, config_from_flags, key_options, with_options
from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minimind_ray.config.schema import Config
    from minimind_ray.data.pack import Pack
    from minimind_ray.train.evaluate import Evaluation


EvalCommand = with_options(lambda: key_options(only=["precision", "max_seq_len", "pack_tokens"]))


def evaluate_(
    context: typer.Context,
    model: options.Model,
    files: Annotated[list[str], typer.Argument(help="paths, globs, folders or URLs")],
    stage: Annotated[str, typer.Option(help="what the rows are: pretrain, sft, lora or dpo")],
    adapter: options.Adapter = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="dpo: the model that rewards are measured against; without it, the reference's log-probabilities "
            "count as 0 and answers are compared by their plain log-probability",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="write each example's result", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="the result as a JSON object")] = False,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file, such as a run's config.yaml")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="data.…, eval.max_tokens, dpo.beta, dpo.loss")
    ] = None,
) -> None:
    """Loss, perplexity and bits per byte on files; for preference data the part of pairs ranked right.

    Everything is prepared and measured as validation during training is, so the numbers are the same.
    """
    if out is not None:
        options.require_local(out)
        if out.is_dir():
            raise UserError(f"--out {out} is a directory: name a file in it, such as {out / 'results.parquet'}")
        out.parent.mkdir(parents=True, exist_ok=True)
    resolved = config_from_flags(stage, config or [], set_ or [], {"val": files, **added(context)})
    evaluation, facts = measure(resolved, model, adapter, reference, say=(lambda line: None) if json else print)
    if out is not None:
        evaluation.write(out)
    if json:
        from json import dumps

        print(dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        shown = f"{value[0]:.4f} to {value[1]:.4f}" if isinstance(value, list) else value
        print(f"{name.replace('_', ' ')}: {f'{shown:.6g}' if isinstance(shown, float) else shown}")
    if out is not None:
        print(f"examples: {out}")


def measure(
    config: Config, model: str, adapter: str | None, reference: str | None, say: Any
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate on `data.val`; the examples, and what to tell, in order."""
    from itertools import islice

    import torch

    from minimind_ray.data.prepare import prepare
    from minimind_ray.data.shipped import resolve_paths
    from minimind_ray.data.store import PackStore
    from minimind_ray.objectives.preference import Preference
    from minimind_ray.stages.stage import stage_of
    from minimind_ray.stages.use import open_trained
    from minimind_ray.train.evaluate import evaluate, packs_within

    if reference is not None and config.record.rows != "pair":
        raise UserError(f"--reference is for preference data, but --stage is {config.stage}: leave it out")
    trained = open_trained(model, adapter=adapter, precision=config.train.precision)
    config = resolve_paths(config)
    prepared = prepare(config.stage, config.data, "val", trained.tokenizer)
    say(prepared.summary())
    if not prepared.manifest.n_packs:
        raise UserError(f"{config.data.val}: no row is left to measure on; see {prepared.rejects}")
    objective = stage_of(config).objective(config, trained.model.shape)
    count = packs_within(PackStore(prepared.path), config.eval.max_tokens)
    if count < prepared.manifest.n_packs:
        say(f"measured on the first {count:,} packs, as eval.max_tokens {config.eval.max_tokens:,} says")
    evaluation = evaluate(
        trained.model, objective, islice(_packs(config, prepared.path, reference), count),
        token_bytes_V=torch.from_numpy(trained.tokenizer.token_bytes()).to(trained.device),
        device=trained.device, dtype=trained.dtype,
    )  # fmt: skip
    means, examples = evaluation.means, evaluation.examples
    facts: dict[str, Any] = {"model": model, "examples": len(examples["example"])}
    if not isinstance(objective, Preference):
        return evaluation, {**facts, "tokens": int(examples["count"].sum()), **means}

    reward = reference is not None or not objective.needs_reference
    name = "reward_accuracy" if reward else "log_probability_accuracy"
    facts |= {name: means["accuracy"], f"{name}_95_wilson": wilson_interval(means["accuracy"], facts["examples"])}
    if reward:
        facts |= {"dpo_loss": objective.config.loss, "beta": objective.config.beta}
        told = ("loss", "margin", "reward_chosen", "reward_rejected", "kl", "logp_chosen", "logp_rejected")
    else:  # The others would be relative to a reference.
        told = ("logp_chosen", "logp_rejected")
    return evaluation, facts | {name: means[name] for name in told if name in means}


def wilson_interval(part: float, count: int, z: float = 1.959964) -> list[float]:
    """Wilson's score interval for a part of `count` independent examples, 95 % unless told (Wilson 1927)."""
    centre, spread = part + z * z / (2 * count), z * math.sqrt(part * (1 - part) / count + (z / (2 * count)) ** 2)
    return [max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))]


def _packs(config: Config, path: str, reference: str | None) -> Iterable[Pack]:
    """The prepared packs with the columns that the objective reads: of the model `reference`, or 0 without one."""
    from dataclasses import replace
    from operator import attrgetter

    import numpy as np

    from minimind_ray.data.store import PackStore
    from minimind_ray.stages.base import base_at
    from minimind_ray.stages.columns import FrozenColumn, compute_here, dtype_here, ensure_column
    from minimind_ray.stages.stage import stage_of
    from minimind_ray.stages.start import whole_model

    columns = stage_of(config).columns(config)
    if reference is None:
        zeros = [(s.column, "lengths" if s.column.axis == "document" else "tokens") for s in columns]
        return (
            replace(pack, columns={c: np.zeros(len(getattr(pack, like)), c.dtype) for c, like in zeros})
            for pack in PackStore(path)
        )
    if not columns:
        settings = " and ".join(f"{key} {attrgetter(key)(config)}" for key in stage_of(config).column_keys)
        raise UserError(f"{settings} has no reference model: leave --reference out")
    base = base_at(whole_model(reference, "--reference"))
    files = [FrozenColumn(scored, path, base, dtype_here(config.train.precision)) for scored in columns]
    for frozen in files:
        ensure_column(frozen, compute_here)
    return PackStore(path, {frozen.scored.column: frozen.path for frozen in files})
