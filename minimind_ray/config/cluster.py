"""Read a cluster file to compute costs: the types of machines, their numbers, resources and prices.

A cluster file is in Ray's format (`ray up`) or KubeRay's (kind: RayCluster). The user adds prices, in USD an hour for
each node type: for Ray as `metadata: {price_per_hour: {NAME: USD}}`, which Ray ignores; for Kubernetes as YAML text in
the annotation `minimind-ray/price-per-hour`. `scales` reads the resources that an experiment asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import merged, read_yaml
from minimind_ray.config.reading import parse_yaml
from minimind_ray.config.schema import ScaleConfig

PRICE_ANNOTATION = "minimind-ray/price-per-hour"


@dataclass(frozen=True)
class NodeType:
    """A type of worker machine: the resources of a machine (None if unknown), and the least and most machines."""

    name: str
    cpus: float | None
    gpus: float | None
    least: int
    most: int

    def fits(self, scale: ScaleConfig) -> int:
        """Return how many training workers fit on one machine; 0 if its resources are too small or unknown."""
        if self.cpus is None or self.gpus is None:
            return 0
        workers = self.cpus / scale.cpus_per_worker
        if scale.gpus_per_worker:
            workers = min(workers, self.gpus / scale.gpus_per_worker)
        return int(workers + 1e-6)

    def share(self, scale: ScaleConfig) -> float:
        """Return the fraction of a machine that a worker takes: the larger of its fractions of CPUs and GPUs."""
        assert self.cpus is not None and self.gpus is not None
        return max(scale.cpus_per_worker / self.cpus, scale.gpus_per_worker / self.gpus if self.gpus else 0)


@dataclass(frozen=True)
class ClusterFile:
    """A cluster file. `max_workers` is the limit for all node types together.

    `prices` has the price of each node type by its name, in USD an hour. `head` is the name of the head's type.
    """

    path: Path
    provider: str
    tree: Mapping[str, Any]
    head: str
    workers: tuple[NodeType, ...]
    max_workers: int
    prices: Mapping[str, float]

    def cost_idle(self) -> float | None:
        """Return the USD an hour of the head and the minimum of workers; None if a price is missing."""
        return self._sum({self.head: 1} | {node.name: node.least for node in self.workers if node.least})

    def cost_at_most(self) -> float | None:
        """Return the USD an hour of the most expensive machines that may run at once; None if a price is missing."""
        if self.head not in self.prices or any(node.most and node.name not in self.prices for node in self.workers):
            return None
        count, left = {self.head: 1}, self.max_workers
        for node in sorted(self.workers, key=lambda node: self.prices.get(node.name, 0), reverse=True):
            count[node.name] = min(node.most, left)
            left -= count[node.name]
        return self._sum({name: number for name, number in count.items() if number})

    def trial_price(self, scale: ScaleConfig) -> tuple[float, str] | None:
        """Return the USD an hour of a run of this scale, and the node type: the cheapest type with a price.

        A run without GPUs gets the price of machines without GPUs, if there are any, because Ray prefers them.
        """
        able = [node for node in self.workers if node.most and node.fits(scale) and node.name in self.prices]
        if not scale.gpus_per_worker:
            able = [node for node in able if not node.gpus] or able
        priced = [(scale.most * node.share(scale) * self.prices[node.name], node.name) for node in able]
        return min(priced, default=None)

    def _sum(self, count: Mapping[str, int]) -> float | None:
        if any(name not in self.prices for name in count):
            return None
        return sum(self.prices[name] * number for name, number in count.items())


def read_cluster(path: str | Path) -> ClusterFile:
    """Read a cluster file. Checks only the parts that `ClusterFile` needs.

    Raises:
        UserError: the file cannot be read, or is not a cluster file.
    """
    path, tree = Path(path), read_yaml(path)
    try:
        if tree.get("kind") == "RayCluster":
            return _kuberay(path, tree)
        if "provider" in tree:
            return _launched(path, tree)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a valid cluster file: {type(error).__name__}: {error}") from None
    raise UserError(f"{path}: not a cluster file: it has neither `provider` (ray up) nor `kind: RayCluster` (KubeRay)")


def _launched(path: Path, tree: dict[str, Any]) -> ClusterFile:
    provider = str(tree["provider"]["type"])
    prices = _prices(path, (tree.get("metadata") or {}).get("price_per_hour") or {})
    if provider == "local":
        count = len(tree["provider"].get("worker_ips") or ())
        worker = NodeType("worker", None, None, count, min(count, int(tree.get("max_workers", count))))
        return ClusterFile(path, provider, tree, "head", (worker,), count, prices)
    most, head = int(tree.get("max_workers", 2)), str(tree.get("head_node_type", ""))
    workers = tuple(
        NodeType(
            str(name),
            float((node.get("resources") or {}).get("CPU", 0)),
            float((node.get("resources") or {}).get("GPU", 0)),
            int(node.get("min_workers", 0)),
            min(int(node.get("max_workers", most)), most),
        )
        for name, node in (tree.get("available_node_types") or {}).items()
        if name != head
    )
    return ClusterFile(path, provider, tree, head, workers, most, prices)


def _kuberay(path: Path, tree: dict[str, Any]) -> ClusterFile:
    text = (tree["metadata"].get("annotations") or {}).get(PRICE_ANNOTATION, "{}")
    workers: list[NodeType] = []
    for group in tree["spec"].get("workerGroupSpecs") or ():
        container = group["template"]["spec"]["containers"][0].get("resources") or {}
        size = {**(container.get("requests") or {}), **(container.get("limits") or {})}
        start = group.get("rayStartParams") or {}
        cpus = float(start.get("num-cpus", _quantity(size.get("cpu", 0))))
        gpus = float(start.get("num-gpus", size.get("nvidia.com/gpu", 0)))
        hosts = int(group.get("numOfHosts", 1))
        least, most = int(group.get("minReplicas", 0)) * hosts, int(group["maxReplicas"]) * hosts
        workers.append(NodeType(str(group["groupName"]), cpus, gpus, least, most))
    most = sum(node.most for node in workers)
    try:
        prices = _prices(path, parse_yaml(str(text)))
    except yaml.YAMLError:
        raise UserError(f"{path}: {PRICE_ANNOTATION}: not YAML: {text}") from None
    return ClusterFile(path, "kuberay", tree, "head", tuple(workers), most, prices)


def _quantity(text: object) -> float:
    """Parse a number of CPUs as Kubernetes writes it: 3, "3" or 500m."""
    text = str(text)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _prices(path: Path, prices: object) -> dict[str, float]:
    if not isinstance(prices, dict) or any(
        isinstance(p, bool) or not isinstance(p, int | float) or p < 0 for p in prices.values()
    ):
        raise UserError(
            f"{path}: price_per_hour: give the USD an hour of each node type, such as {{head: 0.2}}, not {prices!r}"
        )
    return {str(name): float(price) for name, price in prices.items()}


def scales(path: str | Path) -> list[ScaleConfig]:
    """Return the resources that an experiment asks for. The file is a stage's config, a sweep, or a recipe.

    A recipe gives one `ScaleConfig` for each stage, other files give one.

    Raises:
        UserError: the file cannot be read, or its `scale` section is wrong.
    """
    tree = read_yaml(path)
    common: dict[str, Any] = tree.get("settings") or tree
    stages: Iterable[Mapping[str, Any]] = tree.get("stages") or [{}]
    try:
        return [
            ScaleConfig.model_validate(
                merged(common.get("scale") or {}, (stage.get("settings") or {}).get("scale") or {})
            )
            for stage in stages
        ]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: scale.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (AttributeError, TypeError):
        raise UserError(f"{path}: not a stage's config, a sweep or a recipe") from None
