"""A Ray in this machine's processes, without those of Ray's that would serve nobody here.

Each of them takes a second of a core to start, and some of it as long as it runs.
"""

from __future__ import annotations

import logging
from pathlib import Path

import ray
from ray._private import node, ray_constants


class Head(node.Node):
    """Starts none of the three below."""

    def start_monitor(self) -> None:
        """The autoscaler, which starts other machines."""

    def start_log_monitor(self) -> None:
        """What sends the workers' output to the driver, which does not want it."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """The dashboard, which `include_dashboard=False` leaves without pages.

        Ray's agent asks for its address every second until there is one, to send it what happens; no one is at this.
        """
        client = self.get_gcs_client()
        assert client
        client.internal_kv_put(
            ray_constants.DASHBOARD_ADDRESS.encode(), b"127.0.0.1:9", True, ray_constants.KV_NAMESPACE_DASHBOARD
        )


def start(cpus: int | None, folder: Path) -> None:
    """`ray.init` of a Ray here, which has `cpus` logical CPUs and keeps its files in `folder`."""
    before = node.Node
    node.Node = Head
    try:
        ray.init(
            address="local",  # Not one that runs on this machine for something else.
            num_cpus=cpus,
            _temp_dir=str(folder),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # No runtime environment: it would cost each worker a second start, and processes of this machine
            # inherit the settings.
        )
    finally:
        node.Node = before
