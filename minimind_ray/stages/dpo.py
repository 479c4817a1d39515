"""Direct preference optimisation and its kin: chosen answers over rejected ones, all weights or adapters."""

from __future__ import annotations

from minimind_ray.config.schema import Config
from minimind_ray.data.plan import TrainingData
from minimind_ray.objectives.preference import Preference
from minimind_ray.stages.lora import Adapter
from minimind_ray.stages.start import WholeModel, initial_model, load_tokenizer, require_base
from minimind_ray.train.context import Context
from minimind_ray.train.loop import fit


def dpo(config: Config, context: Context, data: TrainingData) -> None:
    """Train on pairs; the reference's log-probabilities come with the packs (see reference.py)."""
    require_base(config)
    tokenizer = load_tokenizer(config)
    model = initial_model(config, tokenizer, context)
    weights = Adapter(model, config) if config.dpo.lora else WholeModel(model, tokenizer)
    fit(model, Preference(config.dpo, model.shape), weights, config, context, data, tokenizer)
