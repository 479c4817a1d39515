"""Collect what `push` uploads to the hub: the chosen checkpoint of a run, or a model directory, with its model card.

Only the files that make the model are taken: safetensors, JSON, the tokenizer and README.md of the directory itself.
The folder resume/ with the optimizer's state, and all logs, stay here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import input_path
from minimind_ray.config.reading import read_json, read_text
from minimind_ray.data.hub import hub_ref
from minimind_ray.data.redact import holds_secret
from minimind_ray.data.storage import CARD
from minimind_ray.model.checkpoint import check_model
from minimind_ray.model.lora import CONFIG as ADAPTER_CONFIG
from minimind_ray.model.lora import is_adapter
from minimind_ray.train.card import BASE, BASE_NAME, PLACEHOLDER, Place, card, locate
from minimind_ray.train.run import RunDirectory, resolve_model

PUSHED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
NOT_PUSHED = ("optimizer*", "trainer_state*", "training_args*", "scheduler*", ".*")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: each file by its name there, as a local path or as content. `notes` are for the user."""

    directory: Path
    files: Mapping[str, Path | bytes]
    notes: list[str]

    @property
    def card(self) -> str:
        """The text of the model card."""
        content = self.files[CARD]
        assert isinstance(content, bytes)
        return content.decode()

    def sizes(self) -> dict[str, int]:
        """Return each file's size in bytes."""
        return {n: len(c) if isinstance(c, bytes) else c.stat().st_size for n, c in self.files.items()}


def collect(model: str, repo: str, base: str | None = None) -> Upload:
    """Return what to upload of a run, a checkpoint or a model directory to the repository `repo`.

    `base` is the name on the hub of the base of an adapter.

    Raises:
        UserError: there is no model, it is damaged, a name is not OWNER/NAME, `base` is given for a whole model, or the
            model's README.md holds what looks like a token.
    """
    for name in (repo, base):
        if name is not None and not NAME.fullmatch(name):
            raise UserError(f"{name} is not a name of the hub: write OWNER/NAME, such as me/my-model")
    directory = resolve_model(model)
    place = Place(RunDirectory(directory), "") if hub_ref(model) else locate(input_path(model))
    adapter = is_adapter(directory)
    if base and not adapter:
        raise UserError(f"--base {base}: {model} is a whole model, which needs no base; leave --base out")
    if not adapter:
        check_model(directory)
    files: dict[str, Path | bytes] = {
        file.name: file
        for file in sorted(directory.iterdir())
        if file.is_file()
        and any(fnmatch(file.name, pattern) for pattern in PUSHED)
        and not any(fnmatch(file.name, pattern) for pattern in NOT_PUSHED)
    }
    notes = list(_state(place))
    if adapter:
        files[ADAPTER_CONFIG], note = _adapter_config(directory, base)
        notes += note
    files[CARD] = _card(directory, place, repo, base).encode()
    return Upload(directory, files, notes)


def _state(place: Place) -> Iterator[str]:
    """Yield a sentence if the model is a checkpoint of a run that has not finished."""
    if not place.checkpoint:
        return
    info, state = place.run.info(), place.run.state()
    if state not in ("finished", "early-stopped"):
        at = f" at step {info['steps']:,} of {info.get('planned_steps', 0):,}" if "steps" in info else ""
        yield f"the run is {state}{at}; its checkpoint {place.checkpoint.rpartition('/')[2]} is pushed"


def _adapter_config(directory: Path, base: str | None) -> tuple[bytes, list[str]]:
    """Return adapter_config.json without a path of this machine, and a note for the user if it then names no base."""
    content = read_json(directory / ADAPTER_CONFIG)
    named = content.get("base_model_name_or_path")
    notes: list[str] = []
    if base:
        content |= {"base_model_name_or_path": base, "revision": None}
    elif not (isinstance(named, str) and NAME.fullmatch(named) and not Path(named).exists()):
        content |= {"base_model_name_or_path": None}
        notes.append("the adapter's base is not on the hub, so the upload names no base: push the base, and add --base")
    return (json.dumps(content, indent=2) + "\n").encode(), notes


def _card(directory: Path, place: Place, repo: str, base: str | None) -> str:
    """Return the model's own README.md, or a new card, with the names of the repository and the base filled in."""
    file = directory / CARD
    text = read_text(file) if file.exists() else card(place)
    if base and not re.search(r"^base_model:", text, re.MULTILINE):
        text = text.replace("---\n", f"---\nbase_model: {base}\nbase_model_relation: adapter\n", 1)
    text = text.replace(PLACEHOLDER, repo)
    if base:
        text = text.replace(BASE_NAME, base).replace(f" {BASE} ", f" hf://{base} ")
    if holds_secret(text):
        raise UserError(f"{file} holds what looks like a token or key: remove it, or delete the file to get a new card")
    return text
