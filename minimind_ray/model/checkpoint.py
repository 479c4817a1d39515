"""Save and load models as Hugging Face directories, which transformers, vLLM and llama.cpp read without conversion.

    config.json               the shape, in the form of one of the `families`
    generation_config.json    the tokenizer's control ids, and the model's own settings of generation
    model.safetensors         float32 weights
    tokenizer.json, tokenizer_config.json

`load_model` also reads 16-bit weights, and shards with a model.safetensors.index.json.

Loading reads only JSON and safetensors, so it never runs code from a directory. It compares config.json with the
headers of the weight files before it allocates memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import read_json, require_own
from minimind_ray.config.schema import GenerationConfig, ModelShape
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.families import config_of, family_of, read_shape
from minimind_ray.model.families.family import ConfigFile
from minimind_ray.model.generation import write_generation
from minimind_ray.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")


class Entry(NamedTuple):
    """One tensor in an open weight file: its dtype and size by the file's header."""

    file: Any
    dtype: str
    size: tuple[int, ...]


def save_model(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: str | Path,
    weights: Mapping[str, Tensor] | None = None,
    generation: GenerationConfig | None = None,
) -> None:
    """Write the model, and the tokenizer if given, as a directory that `load_model` and transformers read.

    `weights`, if given, are written instead of the model's parameters: a copy of them by name, float32, on the CPU.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    ids: dict[str, int | list[int]] = {}
    if tokenizer:
        stops = list(tokenizer.stop_ids)
        ids = {
            "bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops,
            "pad_token_id": tokenizer.pad_id,
        }  # fmt: skip
        tokenizer.save(folder)
    config = json.dumps({**config_of(model.shape), **ids}, indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    write_generation(folder, generation or GenerationConfig(), ids)
    if weights is None:
        weights = {name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters()}
    stored = family_of(model.shape).to_stored(weights, model.shape)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})


def load_shape(directory: str | Path) -> ModelShape:
    """Return the shape that config.json describes.

    Raises:
        UserError: the file is missing, its architecture belongs to no family, or a field is missing or impossible.
    """
    return read_shape(ConfigFile(Path(directory) / "config.json"))


def load_model(
    directory: str | Path, device: torch.device | str = "cpu", weights: Mapping[str, Tensor] | None = None
) -> Transformer:
    """Return the model of a directory, float32, on `device`. Pass its `weights` if they are in memory already.

    Raises:
        UserError: config.json or the weights cannot be read, or do not fit each other.
    """
    shape = load_shape(directory)
    if weights is None:  # Before the model is made: a config.json with absurd sizes is an error here, not later.
        weights = _read_weights(Path(directory), shape)
    with torch.device("meta"):
        model = Transformer(shape)
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def load_weights(model: Transformer, directory: str | Path) -> None:
    """Put the weights of a directory into a model of the same shape.

    Raises:
        UserError: the weights cannot be read or do not fit the model.
    """
    model.load_state_dict(_read_weights(Path(directory), model.shape))


def check_model(directory: str | Path) -> None:
    """Check that the weights fit config.json, from their files' headers. Raises as `load_model`."""
    _fitting(Path(directory), load_shape(directory))


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Return a directory's weights by name, float32. Raises as `load_model`."""
    return _read_weights(Path(directory), load_shape(directory))


def model_fingerprint(directory: str | Path) -> str:
    """Return the SHA-256 (hex) over the shape and all tensors' names, dtypes, sizes and bytes.

    It does not depend on how the weights are split into files.

    Raises:
        UserError: config.json or the weights cannot be read.
    """
    # Without defaults: a field that a later version adds must not change the hashes of today's models.
    digest = hashlib.sha256(load_shape(directory).model_dump_json(exclude_defaults=True).encode())
    for name, entry in sorted(_read_headers(Path(directory)).items()):
        digest.update(json.dumps([name, entry.dtype, entry.size]).encode())
        digest.update(entry.file.get_tensor(name).flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_weights(folder: Path, shape: ModelShape) -> dict[str, Tensor]:
    """Return all weights as float32, after checking that their headers fit the shape."""
    weights = {name: entry.file.get_tensor(name).float() for name, entry in _fitting(folder, shape).items()}
    return family_of(shape).from_stored(weights, shape)


def _fitting(folder: Path, shape: ModelShape) -> dict[str, Entry]:
    """Return the entries of all weights. Raises UserError if a tensor is missing, unknown, or of a wrong size."""
    entries = _read_headers(folder)
    if shape.tie_word_embeddings:
        entries.pop("lm_head.weight", None)  # A second copy of the tied matrix, ignored.
    names: set[str] = set()
    problems: list[str] = []
    # Stops at the third problem, so that a config.json with absurdly many layers costs no time.
    for name, size in family_of(shape).tensors(shape):
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
        elif entry.size != size:
            problems.append(f"{name} is {list(entry.size)}, not {list(size)}")
        elif entry.dtype not in DTYPES:
            problems.append(f"{name} is {entry.dtype}, not {', '.join(DTYPES)}")
        names.add(name)
        if len(problems) == 3:
            break
    else:
        problems += [f"{name} is unknown" for name in sorted(entries.keys() - names)[: 3 - len(problems)]]
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
    return entries


def _read_headers(folder: Path) -> dict[str, Entry]:
    """Return every tensor of the directory's weight files by name; their bytes are read later.

    Raises:
        UserError: there are no weights, the weights need pickle, or a file or the index is broken.
    """
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        files = _shards(folder)
    elif found := sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")]):
        raise UserError(
            f"{found[0]}: pickled weights can run code and are not read; save the model as safetensors "
            "(transformers: save_pretrained)"
        )
    else:
        raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX}; name a Hugging Face model directory")
    entries: dict[str, Entry] = {}
    for path in files:
        require_own(path)
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        for name in file.keys():  # noqa: SIM118 (an open file is not a mapping)
            if name in entries:
                raise UserError(f"{path}: {name} is in another shard too")
            header = file.get_slice(name)
            entries[name] = Entry(file, header.get_dtype(), tuple(header.get_shape()))
    return entries


def _shards(folder: Path) -> list[Path]:
    """Return the files that the index names. Raises UserError if a file is not inside the directory."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: weight_map is missing or not an object")
    names = sorted({str(name) for name in cast("dict[str, Any]", weight_map).values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path}: {name!r} is not the name of a safetensors file in the same directory")
    return [folder / name for name in names]
