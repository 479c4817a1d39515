"""Whether parts of Ray are used that Ray does not document: `private_ray.py` and `private_train.py`."""

from __future__ import annotations

import os

TESTED = ("2.60.0",)
"""The versions of Ray with which those two modules were tested."""


def private_parts() -> bool:
    """True with a tested version of Ray, unless MINIMIND_PUBLIC_ONLY is 1. Each caller has a public way as well."""
    import ray

    return ray.__version__ in TESTED and os.environ.get("MINIMIND_PUBLIC_ONLY", "0") in ("", "0")
