"""Train small language models on one machine or on a Ray cluster.

`from minimind_ray import train, tune, load, compare` is the Python interface (api.py); it is imported when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimind_ray.api import compare, load, train, tune

__all__ = ["compare", "load", "train", "tune"]


def __getattr__(name: str) -> Any:
    if name == "train":  # The package of that name, which can be called.
        return import_module("minimind_ray.train")
    if name in __all__:
        return getattr(import_module("minimind_ray.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
