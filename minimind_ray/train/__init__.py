"""One optimizer step, the training loop around it, and the run directory with its checkpoints.

`from minimind_ray import train` gives this package, since a package's name wins over a function's. The package can be
called and trains a stage; see `minimind_ray.api.train`.
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
        """By name, as cloudpickle does for packages of the plain type; a function of a notebook may refer to this."""
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
