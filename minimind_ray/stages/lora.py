"""Low-rank adapters: cross-entropy on conversations, with the base's weights left as they are."""

from __future__ import annotations

from pathlib import Path

from minimind_ray.config.schema import Config
from minimind_ray.data.plan import TrainingData
from minimind_ray.data.storage import url_of
from minimind_ray.model.checkpoint import model_fingerprint
from minimind_ray.model.lora import adapter_weights, add_lora, load_adapter, save_adapter
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.start import initial_model, load_tokenizer, require_base
from minimind_ray.train.context import Context
from minimind_ray.train.loop import fit
from minimind_ray.train.writer import HostCopy, Write


def lora(config: Config, context: Context, data: TrainingData) -> None:
    """Train adapters on the assistant turns."""
    require_base(config)
    tokenizer = load_tokenizer(config)
    model = initial_model(config, tokenizer, context)
    weights = Adapter(model, config)
    fit(model, CausalLM(model.shape), weights, config, context, data, tokenizer)


class Adapter:
    """Checkpoints of the adapters alone, as a PEFT directory that names its base by path and hash."""

    def __init__(self, model: Transformer, config: Config) -> None:
        self.model, self.base = model, require_base(config)
        self.fingerprint, self.copy = model_fingerprint(self.base), HostCopy()
        add_lora(model, config.lora, seed=config.train.seed)

    def snapshot(self) -> Write:
        """The adapters."""
        weights = self.copy(adapter_weights(self.model))
        return lambda directory: save_adapter(self.model, directory, url_of(self.base), self.fingerprint, weights)

    def load(self, directory: Path) -> None:
        """The adapters of a checkpoint on the same base."""
        load_adapter(self.model, directory, self.fingerprint)
