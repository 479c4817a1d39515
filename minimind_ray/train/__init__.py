"""Training: one optimizer step, the training loop around it, and the run directory with its checkpoints.

The package can also be called: `minimind_ray.train(...)` trains a stage, see `minimind_ray.api.train`. The package must
be callable itself, because `from minimind_ray import train` returns this package, not a function with the same name.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Train one stage: `minimind_ray.api.train`."""
        return import_module("minimind_ray.api").train(*arguments, **settings)

    def __reduce__(self) -> Any:
        """Pickle by name, as cloudpickle does for ordinary packages: a notebook's function may use this package."""
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
