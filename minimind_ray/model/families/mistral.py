"""Mistral without its sliding window: the same network as Llama, and written as Llama."""

from __future__ import annotations

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.families.family import ConfigFile, Family, Fields
from minimind_ray.model.families.llama import shape_fields as llama_fields

WINDOW = 4096
"""The window that transformers uses if config.json has no field for it. A null in config.json means no window."""


def saves(shape: ModelShape) -> bool:
    """Return False: no shape is written as Mistral."""
    return False


def shape_fields(config: ConfigFile, fields: Fields) -> Fields:
    """Return the fields of the shape that only some families have.

    Raises:
        UserError: the window is smaller than the number of positions, so that attention would not see all tokens.
    """
    window, positions = config.get("sliding_window", WINDOW), fields["max_position_embeddings"]
    if window is not None and not (isinstance(positions, int) and isinstance(window, int) and window >= positions):
        raise config.error(
            f"sliding_window is {window!r}, less than max_position_embeddings {positions!r}; attention over a window "
            "is not supported"
        )
    return llama_fields(config, fields)


MISTRAL = Family("mistral", "MistralForCausalLM", saves, shape_fields)
