"""Spot machines first, on-demand ones where the cloud has none: how the autoscaler of cluster.yaml ranks node types.

Autoscaler v2 has a `priority` for that, but takes notice only of Kubernetes pods that stay pending: a spot request that
AWS refuses is made again and again. Version 1 notes refusals, and lets its rank be replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minimind_ray.on_ray.versions import private_parts

SPOT = "-spot"
"""Names of node types that are spot machines end so."""


def spot_first(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Ray's own rank of a type for the `resources` asked for; of equals, one not refused lately, then a spot one.

    The head's Ray is started with it in RAY_AUTOSCALER_UTILIZATION_SCORER. A refusal is forgotten after half an hour.
    """
    if private_parts():
        from minimind_ray.on_ray.cluster import private_autoscaler

        rank = private_autoscaler.rank(node_resources, resources, node_availability_summary)
    else:
        rank = plain_rank(node_resources, resources)
    if rank is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return *rank, record is None or record.is_available, node_type.endswith(SPOT)


def plain_rank(node_resources: Mapping[str, float], requests: Sequence[Mapping[str, float]]) -> tuple[Any, ...] | None:
    """Return the rank of a node type without Ray's own: the type whose resources the requests use best is highest.

    A type with GPUs ranks below all others if no request asks for a GPU. None if no request fits.
    """
    left = dict(node_resources)
    for request in requests:
        if all(left.get(name, 0) >= amount for name, amount in request.items()):
            left |= {name: left.get(name, 0) - amount for name, amount in request.items()}
    shares = [1 - left[name] / amount for name, amount in node_resources.items() if amount >= 1]
    if not any(shares):
        return None
    needs_gpus = any(request.get("GPU") for request in requests)
    return needs_gpus or not node_resources.get("GPU"), min(shares), sum(shares) / len(shares)
