"""Decide whether W&B is used online, offline or not at all: from `track.wandb`, the environment and W&B's key."""

from __future__ import annotations

import os
import sys
from typing import Literal

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.track.tracker import trains_elsewhere

Mode = Literal["off", "offline", "online", "auto"]
MODES: dict[str, Mode] = {"disabled": "off", "offline": "offline", "dryrun": "offline"}
"""The mode for a value of WANDB_MODE; with another value the mode stays auto."""
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
"""The valid values of WANDB_DISABLED."""
NOT_ONLINE = "track.wandb is online, but {}; or set track.wandb to offline and send the run later"
NO_KEY = NOT_ONLINE.format("there is no key: run `wandb login` or set WANDB_API_KEY")


def check_key(config: Config) -> None:
    """Check W&B's environment variables and key, if the run trains on this machine.

    If it trains on a cluster, the run itself checks them there, because each machine has its own environment.

    Raises:
        UserError: `track.wandb` is online, but W&B has no key or refuses an environment variable.
    """
    if trains_elsewhere():
        return
    if settle_mode(config) == "online":
        _require_key()


def _require_key() -> None:
    import wandb

    try:
        there = has_key()
    except Exception as error:
        raise UserError(NOT_ONLINE.format(unusable(error))) from None
    finally:
        wandb.teardown()
    if not there:
        raise UserError(NO_KEY)


def settle_mode(config: Config) -> Mode:
    """Return the mode from `track.wandb` and the environment.

    Variables that W&B would refuse are removed from the environment and named on stderr; the mode is then offline.

    Raises:
        UserError: `track.wandb` is online, but W&B refuses a variable.
    """
    _clean_environment()
    mode: Mode = config.track.wandb
    if mode == "auto" and os.environ.get("WANDB_DISABLED", "").lower() in YES:
        return "off"
    if mode == "auto":
        mode = MODES.get(os.environ.get("WANDB_MODE", ""), "auto")
    if mode == "off" or not (refused := _refused_variables()):
        return mode
    problem = "; ".join(f"W&B refuses the environment variable {name}: {why}" for name, why in refused.items())
    if mode == "online":
        raise UserError(NOT_ONLINE.format(problem))
    print(f"{problem}; logging offline", file=sys.stderr)
    for name in refused:
        del os.environ[name]
    os.environ["WANDB_MODE"] = "offline"  # For the run itself, and for workers on this machine.
    return "offline"


def _clean_environment() -> None:
    """Adjust W&B's environment variables before W&B is imported: turn off crash reports, remove unwanted values."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # An empty variable counts as unset; W&B itself would refuse it.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Do not share the W&B service of a parent process: if this process were killed, the run would stay in use there.
    os.environ.pop("WANDB_SERVICE", None)


def _refused_variables() -> dict[str, str]:
    """Return the environment variables that would make `wandb.init` fail, with the reasons. No reason cites a key."""
    refused: dict[str, str] = {}
    checked = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    if checked.get("WANDB_DISABLED", NO[0]).lower() not in (*YES, *NO):
        refused["WANDB_DISABLED"] = "it is neither true nor false"
    # Importing W&B takes a second, so avoid it if all variables are known to be valid.
    harmless = (
        "WANDB_ERROR_REPORTING",
        "WANDB_DISABLED",
        *(["WANDB_MODE"] if checked.get("WANDB_MODE") in MODES else []),
    )
    if set(checked) <= set(harmless):
        return refused
    import wandb
    from pydantic import ValidationError

    for name, value in checked.items():
        try:
            wandb.Settings(resume="allow").update_from_env_vars({name: value})
        except ValidationError as error:
            refused[name] = _one_line(error.errors()[0]["msg"])
        except Exception as error:
            refused[name] = _one_line(error)
    return refused


def has_key() -> bool:
    """Whether W&B has a key. If W&B refuses the key, W&B's own exception is raised."""
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))
    return wandb.login(prompt=False, verify=False)


def unusable(error: Exception) -> str:
    """Return one line that says why W&B cannot be used."""
    return f"W&B cannot be used: {_one_line(error) or type(error).__name__}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
