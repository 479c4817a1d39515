"""Spot machines first, on-demand ones where the cloud has none: how the autoscaler of cluster.yaml ranks node types.

Autoscaler v2 has a `priority` for that, but takes notice only of Kubernetes pods that stay pending: a spot request that
AWS refuses is made again and again. Version 1 notes refusals, and lets its rank be replaced.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import (
    _resource_based_utilization_scorer,  # pyright: ignore[reportPrivateUsage]
)

SPOT = "-spot"
"""Names of node types that are spot machines end so."""


def spot_first(
    node_resources: Any,
    resources: Any,
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[Any, ...] | None:
    """Ray's own rank of a type for the `resources` asked for; of equals, one not refused lately, then a spot one.

    The head's Ray is started with it in RAY_AUTOSCALER_UTILIZATION_SCORER. A refusal is forgotten after half an hour.
    """
    rank = _resource_based_utilization_scorer(
        node_resources, resources, node_availability_summary=node_availability_summary
    )
    if rank is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return *rank, record is None or record.is_available, node_type.endswith(SPOT)
