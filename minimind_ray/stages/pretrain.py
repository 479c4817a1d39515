"""Pretraining: next-token prediction on plain text."""

from __future__ import annotations

from minimind_ray.config.schema import Config
from minimind_ray.data.plan import TrainingData
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.start import WholeModel, initial_model, load_tokenizer
from minimind_ray.train.context import Context
from minimind_ray.train.loop import fit


def pretrain(config: Config, context: Context, data: TrainingData) -> None:
    """Train all weights on every token of every document."""
    tokenizer = load_tokenizer(config)
    model = initial_model(config, tokenizer, context)
    fit(model, CausalLM(model.shape), WholeModel(model, tokenizer), config, context, data, tokenizer)
