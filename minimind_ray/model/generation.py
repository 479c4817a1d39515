"""A model's own settings of generation, which generate, chat and Python use if the user gives no other.

They are in the file generation_config.json of a model or an adapter, with the names of transformers. There
`do_sample: false` means temperature 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import read_json
from minimind_ray.config.schema import GenerationConfig

FILE = "generation_config.json"
DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0}
"""The settings of a model whose file does not name them."""


def read_generation(directory: str | Path) -> GenerationConfig:
    """Return the settings in the directory's generation_config.json; without the file, no setting is set.

    Raises:
        UserError: the file cannot be read, or a setting is not a number within its bounds.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return GenerationConfig()
    content = read_json(path)
    values = {key: content[key] for key in GenerationConfig.model_fields if key in content}
    if content.get("do_sample") is False:
        values["temperature"] = 0
    try:
        return GenerationConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name, reason = first["loc"][0], f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise UserError(f"{path}: {name}: {reason}, not {first['input']!r}: correct it, or remove the line") from None


def write_generation(directory: Path, settings: GenerationConfig, ids: Mapping[str, Any] | None = None) -> None:
    """Write generation_config.json with the settings that are set and the tokenizer's control `ids`."""
    values = settings.given
    if values.get("temperature") == 0:
        # transformers refuses temperature 0, and warns of settings that have no effect without sampling.
        values = {key: value for key, value in values.items() if key not in ("temperature", "top_p", "top_k")}
        values["do_sample"] = False
    elif values.keys() & {"temperature", "top_p", "top_k"}:
        values["do_sample"] = True
    text = json.dumps({**(ids or {}), **values}, indent=2) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")
