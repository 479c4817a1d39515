"""Decide whether to use private parts of Ray, which Ray does not document.

Three modules use such parts: private_ray.py, private_train.py and cluster/private_autoscaler.py. Each caller of these
modules can also do without them.
"""

from __future__ import annotations

import os

TESTED = ("2.60.0",)
"""The versions of Ray with which the three modules were tested."""


def private_parts() -> bool:
    """Whether to use private parts of Ray: this version of Ray was tested, and MINIMIND_PUBLIC_ONLY is not 1."""
    import ray

    return ray.__version__ in TESTED and os.environ.get("MINIMIND_PUBLIC_ONLY", "0") in ("", "0")
