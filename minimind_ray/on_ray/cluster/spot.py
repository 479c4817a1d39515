"""Rank node types for Ray's autoscaler: spot machines first, and on-demand machines if the cloud has no spot machine.

cluster.yaml uses this rank with version 1 of the autoscaler. Version 2 has a setting `priority` for the same purpose,
but it notices only Kubernetes pods that stay pending. On AWS it would repeat a refused spot request again and again.
Version 1 records refusals, and allows another function for the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minimind_ray.on_ray.versions import private_parts

SPOT = "-spot"
"""The end of the name of every node type of spot machines."""


def spot_first(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Return the rank of a node type for the requested `resources`; None if no request fits.

    The first criterion is Ray's own rank. Of node types with equal rank, types that the cloud has not refused lately
    come first, then spot types. Ray forgets a refusal after half an hour. The head's Ray finds this function through
    the variable RAY_AUTOSCALER_UTILIZATION_SCORER.
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
    """Return a rank that replaces Ray's own: the node type whose resources the requests use best ranks highest.

    A type with GPUs ranks below all other types if no request asks for a GPU. Returns None if no request fits.
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
