"""Find, check and hash the base, which is the model that a run starts from. This is done once, for the run's job."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from minimind_ray.config.schema import Config, GenerationConfig, ModelShape
from minimind_ray.data.hub import hub_ref
from minimind_ray.data.storage import is_url, url_of
from minimind_ray.model.checkpoint import check_model, load_shape, model_fingerprint
from minimind_ray.model.generation import read_generation
from minimind_ray.stages.start import require_base
from minimind_ray.train.run import resolve_model

_HERE: dict[str, Path] = {}
"""Local copies, by fingerprint, of the bases that this process has already fetched from an object store.

A URL would not identify a base: a process of Ray may serve several runs, and the model at a URL may change.
"""


@dataclass(frozen=True)
class Base:
    """A whole model. `where` is the path or URL of its directory; `fingerprint` is the hash of its weights.

    A model of the hub is in a directory too; `hub` is its name there, with its commit. `generation` are the settings of
    its generation_config.json.
    """

    where: str
    shape: ModelShape
    fingerprint: str
    hub: str | None = None
    generation: GenerationConfig = GenerationConfig()

    def local(self) -> Path:
        """Return the directory on this machine. A process fetches the files from an object store only once."""
        if not is_url(self.where):
            return Path(self.where)
        if self.fingerprint not in _HERE:
            _HERE[self.fingerprint] = resolve_model(self.where)
        return _HERE[self.fingerprint]


def resolve_base(config: Config) -> Base | None:
    """Return the base that `init_from` names; None for a run that starts from new weights.

    Raises:
        UserError: the stage needs a base but `init_from` is not set, or it is not a whole model, or it is broken.
    """
    if not config.init_from and not config.record.needs_base:
        return None
    base = base_at(Path(require_base(config)))
    return replace(base, hub=config.init_from) if config.init_from and hub_ref(config.init_from) else base


def base_at(path: Path) -> Base:
    """Return the whole model in a directory as a base. Raises UserError if the model is broken."""
    check_model(path)
    base = Base(url_of(path), load_shape(path), model_fingerprint(path), generation=read_generation(path))
    if is_url(base.where):
        _HERE[base.fingerprint] = path
    return base
