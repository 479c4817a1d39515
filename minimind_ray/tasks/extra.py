"""Whether the packages for benchmarks are installed. This file is read before they are imported."""

from __future__ import annotations

from importlib.util import find_spec

from minimind_ray.config.errors import UserError


def require_lm_eval() -> None:
    """Check that lm-eval is installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise UserError("benchmarks need the package lm-eval: pip install 'minimind-ray[eval]'")
