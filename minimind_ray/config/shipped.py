"""Find the files that come with MiniMind Ray: recipes, configs of stages, sweeps, cluster files.

In a checkout they lie at the repository's top level. The build copies them to minimind_ray/shipped/ (see setup.py).
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from minimind_ray.config.errors import UserError

PACKAGE = Path(__file__).parents[1]
TOP = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent

Kind = Literal["recipe", "config", "sweep"]
USES: dict[Kind, str] = {
    "recipe": "minimind-ray run {}",
    "config": "minimind-ray train STAGE --config {}",
    "sweep": "minimind-ray tune --sweep {}",
}
FOLDERS: dict[Kind, str] = {"recipe": "experiments", "config": "experiments", "sweep": "experiments/sweeps"}


@dataclass(frozen=True)
class Experiment:
    """A shipped YAML file: its name, its kind, and the first line of its first comment."""

    name: str
    kind: Kind
    about: str
    path: Path

    @property
    def use(self) -> str:
        """The command that uses it."""
        return USES[self.kind].format(self.name).replace("STAGE", self.name)  # A config has its stage's name.


@dataclass(frozen=True)
class Found:
    """A file found by its name. `note` says which file was taken; None if the user gave the file's path."""

    path: Path
    note: str | None = None


def shipped(name: str) -> Path:
    """Return the path of a shipped file or folder, such as experiments/zero.yaml or cluster/setup.sh."""
    return TOP / name


def version() -> str:
    """Return the version of this package."""
    return metadata.version("minimind-ray")


@functools.cache
def experiments() -> tuple[Experiment, ...]:
    """Return the shipped recipes, configs and sweeps."""
    return tuple(_experiment(file) for file in sorted(shipped("experiments").rglob("*.yaml")))


def _experiment(file: Path) -> Experiment:
    text = file.read_text(encoding="utf-8")
    about = re.match(r"# *(.*)", text)
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    kind: Kind = "recipe" if "stages" in keys else "sweep" if "axes" in keys else "config"
    return Experiment(file.stem, kind, about[1].rstrip(".") if about else "", file)


def find(kind: Kind, given: str | Path) -> Found:
    """Return the file for a name or a path that the user gave.

    A name, such as zero, stands for the first of these files that exists: zero and zero.yaml in the working directory,
    zero.yaml in its folder experiments/ (for a sweep experiments/sweeps/), and the shipped file.

    Raises:
        UserError: there is no such file. The message names the nearest name and all names.
    """
    given = str(given)
    own = [each for each in experiments() if each.kind == kind]
    if not re.fullmatch(r"[\w-]+", given):
        same = next((each for each in own if each.name == Path(given).stem), None)
        if same and "://" not in given and not Path(given).exists():
            raise UserError(f"{given}: there is no such file; {same.name} comes with minimind-ray: {same.use}")
        return Found(Path(given))
    for file in (given, f"{given}.yaml", f"{FOLDERS[kind]}/{given}.yaml"):
        if Path(file).is_file():
            return Found(Path(file), f"{kind}: ./{file}")
    if same := next((each for each in own if each.name == given), None):
        return Found(same.path, f"{kind}: {given}, shipped with minimind-ray {version()}")
    names = [each.name for each in own]
    others = [f"a {each.kind} ({each.use})" for each in experiments() if each.name == given]
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"it is {' and '.join(others)}; " if others else f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{given}: there is no file {given} or {given}.yaml here, and no {kind} of this name comes with minimind-ray; "
        f"{hint}the {kind}s are {', '.join(names)}"
    )
