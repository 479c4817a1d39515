"""The two kinds of checkpoints that a stage saves: all weights, or only the adapters.

Both have the settings of generation of the run's config. The base's settings hold where the config sets none.
"""

from __future__ import annotations

from pathlib import Path

from minimind_ray.config.schema import Config, GenerationConfig
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_weights, save_model
from minimind_ray.model.generation import write_generation
from minimind_ray.model.lora import adapter_weights, add_lora, load_adapter, save_adapter
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.base import Base
from minimind_ray.train.writer import HostCopy, Write


class WholeModel:
    """Checkpoints of all weights, as a Hugging Face model directory."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, generation: GenerationConfig | None = None) -> None:
        self.model, self.tokenizer, self.generation, self.copy = model, tokenizer, generation, HostCopy()

    def snapshot(self) -> Write:
        """Copy the weights; return a function that writes them with config and tokenizer."""
        weights = self.copy(dict(self.model.named_parameters()))
        return lambda directory: save_model(self.model, self.tokenizer, directory, weights, self.generation)

    def load(self, directory: Path) -> None:
        """Load the weights of a checkpoint of the same model."""
        load_weights(self.model, directory)


class Adapter:
    """Checkpoints of only the adapters, as a PEFT directory that names its base by path or hub name, and by hash.

    The directory has a generation_config.json only if the run's config has such settings. Otherwise the base's holds.
    """

    def __init__(self, model: Transformer, config: Config, base: Base) -> None:
        self.model, self.base, self.copy = model, base, HostCopy()
        self.generation = base.generation.updated(config.generation) if config.generation.given else None
        add_lora(model, config.lora, seed=config.train.seed)

    def snapshot(self) -> Write:
        """Copy the adapters; return a function that writes them."""
        weights = self.copy(adapter_weights(self.model))
        base, generation = self.base, self.generation

        def write(directory: Path) -> None:
            save_adapter(self.model, directory, base.hub or base.where, base.fingerprint, weights)
            if generation:
                write_generation(directory, generation)

        return write

    def load(self, directory: Path) -> None:
        """Load the adapters of a checkpoint on the same base."""
        load_adapter(self.model, directory, self.base.fingerprint)
