"""A head without workers whose autoscaler starts processes in place of machines; then a command on it.

    python autoscaling.py COMMAND…

For namespaces of its own (see test_autoscaling.py): it takes Ray's usual ports, and /tmp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ray

HEAD = "ray.head.default"  # The provider's own name for it.
WORKERS = {"cpu": {"CPU": 4}, "gpu": {"CPU": 4, "GPU": 1}}


def config() -> dict[str, object]:
    """What `ray up` would leave on the head."""
    types = {name: {"resources": has, "node_config": {}, "max_workers": 1} for name, has in WORKERS.items()}
    types[HEAD] = {"resources": {"CPU": 0, "driver": 1000}, "node_config": {}, "max_workers": 0}
    lists = ("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    commands = [f"{kind}_{what}" for kind in ("head", "worker") for what in ("setup_commands", "start_ray_commands")]
    return {
        "cluster_name": "fake", "max_workers": 2, "upscaling_speed": 10, "idle_timeout_minutes": 5,
        "head_node_type": HEAD, "available_node_types": types, "auth": {}, "docker": {}, "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "fake_multinode", "head_node_id": "f" * 51 + "00000", "use_node_id_as_ip": True,
            "disable_node_updaters": True, "disable_launch_config_check": True,
        },
        **{key: [] for key in (*lists, *commands)},
    }  # fmt: skip


def main(command: list[str]) -> int:
    """Start it, run the command, and tell on which nodes there are CPUs in the end."""
    home = Path(os.environ["HOME"])
    (home / "ray_bootstrap_config.yaml").write_text(json.dumps(config()))
    env = {
        **os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "0",
        "RAY_AUTOSCALER_UTILIZATION_SCORER": "minimind_ray.on_ray.cluster.spot.spot_first",
    }  # fmt: skip
    start = ["ray", "start", "--head", "--num-cpus=0", '--resources={"driver": 1000}', "--disable-usage-stats"]
    subprocess.run([*start, f"--autoscaling-config={home}/ray_bootstrap_config.yaml"], env=env, check=True)
    os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"
    code = subprocess.run(command, check=False).returncode
    ray.init(log_to_driver=False)
    print("nodes:", sorted(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
    print("GPUs:", ray.cluster_resources().get("GPU", 0))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
