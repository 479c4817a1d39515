"""Functions for cluster files that need private parts of Ray's autoscaler (see versions.py).

They are used only if `versions.private_parts` is true. Without them, `cluster check` does not compare a file with Ray's
schema (see `check.prepared`), and node types are ranked by a simpler rule (see `spot.plain_rank`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,  # pyright: ignore[reportPrivateUsage]
)
from ray.autoscaler._private.resource_demand_scheduler import (
    _resource_based_utilization_scorer,  # pyright: ignore[reportPrivateUsage]
)
from ray.autoscaler._private.util import prepare_config, validate_config


def with_defaults(tree: Mapping[str, Any], kuberay: bool) -> dict[str, Any]:
    """Return a cluster file's content with Ray's defaults. Raises Ray's own exception if Ray refuses the file."""
    config = deepcopy(dict(tree))
    logging.disable(logging.WARNING)
    try:
        # Hide Ray's own messages on the terminal; the caller reports the error in one sentence.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if kuberay:
                config["metadata"].setdefault("namespace", "default")
                return _derive_autoscaling_config_from_ray_cr(config)
            config = prepare_config(config)
            validate_config(config)
            return config
    finally:
        logging.disable(logging.NOTSET)


def rank(
    node_resources: Mapping[str, float], requests: Sequence[Mapping[str, float]], availability: Any
) -> tuple[Any, ...] | None:
    """Return Ray's own rank of a node type with these resources for the requests; None if no request fits."""
    node: Any = dict(node_resources)  # Ray's type annotations expect one of its message classes here.
    needs: Any = list(requests)
    return _resource_based_utilization_scorer(node, needs, node_availability_summary=availability)
