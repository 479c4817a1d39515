"""Open a trained model for use (generate, chat, serve, evaluate): from a run, a model directory, or an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import read_yaml
from minimind_ray.config.schema import GenerationConfig
from minimind_ray.config.stages import STAGES
from minimind_ray.data.hub import hub_ref
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model, model_fingerprint
from minimind_ray.model.engine import Engine
from minimind_ray.model.generation import DEFAULTS, FILE, read_generation
from minimind_ray.model.lora import adapter_base, is_adapter, load_adapter, merge_lora
from minimind_ray.model.sampling import Sampling
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.context import default_device, resolve_precision
from minimind_ray.train.run import resolve_model
from minimind_ray.train.step import autocast


@dataclass(frozen=True)
class Trained:
    """A model in eval mode with its tokenizer; an adapter is merged.

    `directory` has the model's weights; with an adapter, the base's weights. `stage` is the stage that trained the
    model, None if the model is not in a run directory. `generation` are the settings of the adapter's
    generation_config.json if it has this file, else of the model's.
    """

    model: Transformer
    tokenizer: Tokenizer
    directory: Path
    stage: str | None
    device: torch.device
    dtype: torch.dtype
    generation: GenerationConfig

    def sampling(
        self, given: Mapping[str, Any], *, max_new_tokens: int = 256, seed: tuple[int, ...] = (0,)
    ) -> Sampling:
        """Return the settings of an answer: those that are given (not None), else the model's own, else the defaults.

        `max_new_tokens` is the default of this setting.

        Raises:
            UserError: a given value is not within its bounds.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        defaults: dict[str, Any] = {**DEFAULTS, "max_new_tokens": max_new_tokens, "seed": seed}
        return Sampling(**{**defaults, **self.generation.given, **chosen})

    @property
    def continues_texts(self) -> bool:
        """Whether a stage that learns from plain texts made the model, so that the model knows no conversations."""
        record = STAGES.get(self.stage or "")
        return record is not None and record.rows == "text"

    def autocast(self) -> torch.autocast:
        """Return a context in which matrix products have the precision that `open_trained` was given."""
        return autocast(self.device, self.dtype)

    def room(self, prompt: Sequence[int], wanted: int) -> int:
        """Return how many tokens can follow a prompt, at most `wanted`.

        Raises:
            UserError: the prompt takes all positions of the model.
        """
        longest = self.model.shape.max_position_embeddings
        if len(prompt) >= longest:
            raise UserError(f"{len(prompt):,} tokens leave no room for an answer: the model's limit is {longest:,}")
        return min(wanted, longest - len(prompt))


def open_trained(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    precision: str = "auto",
) -> Trained:
    """Load the model at `path` (see `resolve_model`), and merge `adapter` into it if given.

    If `path` is itself an adapter, its base is `base`, or the base that the adapter names.

    Raises:
        UserError: there is no model at `path`, it is broken, the adapter belongs to another base, or its base is
            missing; or there is no such precision.
    """
    device = default_device()
    dtype = resolve_precision(precision, device)
    directory = resolve_model(path)
    if adapter is not None:
        adapter_dir = resolve_model(adapter)
        if is_adapter(directory):
            raise UserError(f"{path} is an adapter itself; give the base as the model to use another adapter on it")
        if not is_adapter(adapter_dir):
            raise UserError(f"{adapter} is a whole model, not an adapter; leave the base out and use it by itself")
    else:
        adapter_dir = directory if is_adapter(directory) else None
        if adapter_dir:
            directory = base_of(adapter_dir, base)
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory, device)
    if tokenizer.vocab_size > model.shape.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only "
            f"{model.shape.vocab_size:,}; replace it by the tokenizer that the model was trained with"
        )
    if adapter_dir:
        load_adapter(model, adapter_dir, model_fingerprint(directory))
        merge_lora(model)
    stage = _stage_of(adapter_dir or directory)
    generation = read_generation(adapter_dir if adapter_dir and (adapter_dir / FILE).exists() else directory)
    return Trained(model.eval(), tokenizer, directory, stage, device, dtype, generation)


def base_of(adapter: Path, base: str | Path | None = None) -> Path:
    """Return the directory of an adapter's base: `base`, or the base that the adapter names.

    Raises:
        UserError: the adapter names no base, or there is no whole model at that path.
    """
    named = base if base is not None else adapter_base(adapter).path
    where = "say where with --base, or give the base as the model and the adapter as --adapter"
    if named is None:
        raise UserError(f"{adapter} does not say which model it was trained on; {where}")
    try:
        directory = resolve_model(named)
    except UserError as error:
        if hub_ref(named):
            raise UserError(f"{adapter}: its base: {error}; or {where}") from None
        raise UserError(f"{adapter}: its base {named} is missing or not a model; {where}") from None
    if is_adapter(directory):
        raise UserError(f"{adapter}: its base {named} is an adapter, not a whole model; {where}")
    return directory


def _stage_of(directory: Path) -> str | None:
    checkpoints = directory.absolute().parent
    config = checkpoints.parent / "config.yaml"
    return read_yaml(config).get("stage") if checkpoints.name == "checkpoints" and config.exists() else None


class Answer(NamedTuple):
    """The ids that follow a prompt, without the stop id, and whether the model ended the answer itself."""

    ids: list[int]
    ended: bool


def complete(
    trained: Trained, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int
) -> Iterator[Answer]:
    """Yield the answers to all prompts, in their order. At most `batch_size` are generated at the same time.

    Answer i is sampled with the seed (*sampling.seed, i), and ends at one of the tokenizer's stop ids.

    Raises:
        UserError: a prompt leaves no room for an answer, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: give at least 1")
    engine = Engine(trained.model, max(1, min(batch_size, len(prompts))))
    answers: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        room, seed = trained.room(prompt, sampling.max_new_tokens), (*sampling.seed, i)
        stop_ids = tuple(trained.tokenizer.stop_ids)
        answers[engine.add(prompt, replace(sampling, max_new_tokens=room, stop_ids=stop_ids, seed=seed))] = []
    ends: dict[int, str] = {}
    for request, ids in answers.items():
        with trained.autocast():
            while request not in ends:
                for event in engine.step():
                    if event.end:
                        ends[event.request] = event.end
                    if event.end != "stop":
                        answers[event.request].append(event.token)
        yield Answer(ids, ends[request] == "stop")
