"""What a cluster may become, where it starts its nodes when they are asked for; nothing here starts Ray."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray import session
from minimind_ray.on_ray.cluster.jobs import connect
from minimind_ray.on_ray.session import (
    Machines,
    free_left_groups,
    is_single_node,
    machines,
    ray_running,
    require_cpus,
    require_own_gpus,
    require_resources,
    start_ray,
    workers_that_fit,
)
from minimind_ray.on_ray.versions import private_parts

pytestmark = pytest.mark.unit

TYPES = {
    "head": {"resources": {"CPU": 0, "driver": 1000}, "max_workers": 0},
    "cpu": {"resources": {"CPU": 16}, "max_workers": 2},
    "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4},
}


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home of a head that `ray up` made, of whose 6 workers 3 may run at once."""
    config = {"provider": {"type": "aws"}, "head_node_type": "head", "available_node_types": TYPES, "max_workers": 3}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv("MINIMIND_NODE_TYPES", raising=False)


@pytest.mark.usefixtures("head")
def test_workers_that_may_come_count_up_to_the_files_limit() -> None:
    assert machines().resources() == {"CPU": 16 + 16 + 8, "GPU": 3}
    assert workers_that_fit(ScaleConfig(gpus_per_worker=1.0), spare_cpus=0) == 3
    assert workers_that_fit(ScaleConfig(cpus_per_worker=8.0), spare_cpus=0) == 2 + 2 + 1
    assert workers_that_fit(ScaleConfig(cpus_per_worker=8.0), spare_cpus=1) == 2 + 1 + 1
    require_cpus(40, 3, "a run")
    with pytest.raises(UserError, match="needs 4 GPUs and the cluster has 3"):
        require_cpus(1, 4, "a run")


@pytest.mark.parametrize(("address", "where"), [("auto", "the cluster"), ("", "this machine")])
def test_a_gpu_where_there_is_none_is_refused_by_its_setting(
    monkeypatch: pytest.MonkeyPatch, address: str, where: str
) -> None:
    monkeypatch.setattr(session, "machines", lambda: Machines([{"CPU": 4.0}], 1))
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    require_resources(ScaleConfig(workers=3))
    with pytest.raises(UserError, match=f"scale.gpus_per_worker asks for a GPU .*{where} has none; set it to 0"):
        require_resources(ScaleConfig(gpus_per_worker=0.5))
    with pytest.raises(UserError, match=f"this run needs 5 CPUs and {where} has 4; .*scale.cpus_per_worker"):
        require_resources(ScaleConfig(workers=4))


def test_a_node_that_cannot_be_reached_has_no_room_whatever_ray_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as lost:
        nodes = [{"NodeID": "lost", "NodeManagerPort": lost.getsockname()[1]}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        nodes += [{"NodeID": name, "NodeManagerPort": server.getsockname()[1]} for name in ("here", "noticed")]
        common = {"Alive": True, "Resources": {"CPU": 4}, "NodeManagerAddress": "127.0.0.1"}
        monkeypatch.setattr("ray.nodes", lambda: [node | common for node in nodes])
        assert workers_that_fit(ScaleConfig(), spare_cpus=1) == 7
        assert workers_that_fit(ScaleConfig(), spare_cpus=1, without={"noticed"}) == 3


def test_one_machine_is_alone_unless_others_are_there_or_may_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINIMIND_NODE_TYPES", raising=False)
    nodes = [{"Alive": True}, {"Alive": False}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert is_single_node()
    nodes[1]["Alive"] = True
    assert not is_single_node()
    nodes.pop()
    monkeypatch.setenv("MINIMIND_NODE_TYPES", "[]")
    assert not is_single_node()
    monkeypatch.delenv("MINIMIND_NODE_TYPES")
    request.getfixturevalue("head")
    assert not is_single_node()


@pytest.mark.usefixtures("head")
def test_on_kubernetes_the_head_is_told_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_NODE_TYPES", json.dumps([{"CPU": 7, "GPU": 1, "count": 4}]))
    assert machines().resources() == {"CPU": 28, "GPU": 4}
    assert workers_that_fit(ScaleConfig(gpus_per_worker=0.5), spare_cpus=0) == 8


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", "no cluster answers there: .*refused"),
        ("http://127.0.0.1:8265", "is a dashboard"),
        ("head", "RAY_ADDRESS=head: .*Invalid address"),
    ],
)
def test_an_address_without_a_cluster_is_told_at_once(address: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # The tests' shared one may be.
    with pytest.raises(UserError, match=told):
        start_ray()


@pytest.mark.skipif(not private_parts(), reason="promised with private parts of Ray only: Ray itself asks for minutes")
@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nhello"]
)
def test_a_port_of_something_else_is_no_cluster(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("minimind_ray.on_ray.private_ray.HEAD_SECONDS", 0.2)
    monkeypatch.setattr("minimind_ray.on_ray.cluster.jobs.DASHBOARD_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            kept: list[socket.socket] = []
            with suppress(OSError):  # The server is closed.
                while True:
                    kept.append(server.accept()[0])
                    if answer:
                        kept[-1].sendall(answer)
                        kept[-1].close()

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"RAY_ADDRESS={address}: no Ray head answers there"):
            start_ray()
        monkeypatch.setenv("RAY_ADDRESS", f"http://{address}")
        with pytest.raises(UserError, match=f"RAY_ADDRESS=http://{address}: no Ray dashboard answers"), connect(None):
            pass


@pytest.mark.parametrize("slow", [1, 2])
def test_a_start_that_timed_out_is_tried_once_more(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def init(**settings: object) -> None:
        starts.append(settings)
        if len(starts) <= slow:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:9"))
    monkeypatch.setattr("minimind_ray.on_ray.session.watch_head", lambda address: None)
    with nullcontext() if slow == 1 else pytest.raises(UserError, match="could not start .* busy"):
        start_ray(2)
    assert len(starts) == 2 and starts[0] == starts[1]


def test_one_ray_serves_all_runs_of_an_outer_block(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int | None] = []
    monkeypatch.setattr("ray.is_initialized", lambda: bool(running))
    monkeypatch.setattr("minimind_ray.on_ray.session.start_ray", running.append)
    monkeypatch.setattr("minimind_ray.on_ray.session.stop_ray", running.clear)
    with pytest.raises(UserError, match="no data"), ray_running(4):
        for cpus in (2, 8):
            with ray_running(cpus):
                pass
            assert running == [4]
        raise UserError("no data")
    assert not running
    with ray_running():
        assert running == [None]


def test_workers_do_not_share_a_gpu_that_none_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    require_own_gpus(ScaleConfig(workers=1))
    require_own_gpus(ScaleConfig(workers=2, gpus_per_worker=0.5))
    with pytest.raises(UserError, match="scale.gpus_per_worker is 0"):
        require_own_gpus(ScaleConfig(workers=2))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    require_own_gpus(ScaleConfig(workers=2))


@pytest.fixture
def left_group(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The groups that are removed, without private parts of Ray: an actor with the id `ab` made the only group."""
    removed: list[object] = []
    monkeypatch.setenv("MINIMIND_PUBLIC_ONLY", "1")
    monkeypatch.setattr(session, "_own_groups", lambda: [{"name": "minimind-ray 01 ab 9"}])
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:9"))
    monkeypatch.setattr("ray.util.state.get_actor", lambda id, address: SimpleNamespace(state="DEAD"))
    monkeypatch.setattr("ray.util.get_placement_group", lambda name: name)
    monkeypatch.setattr(import_module("ray.util.placement_group"), "remove_placement_group", removed.append)
    return removed


def test_by_public_means_two_trials_may_remove_the_same_group(
    left_group: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_left_groups()
    assert left_group == ["minimind-ray 01 ab 9"]

    def removed_meanwhile(name: str) -> None:
        raise ValueError(f"Failed to look up placement group with name: {name}")

    monkeypatch.setattr("ray.util.get_placement_group", removed_meanwhile)
    free_left_groups()
    assert len(left_group) == 1


def test_by_public_means_a_cluster_without_a_dashboard_is_told(
    left_group: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_dashboard(id: str, address: str) -> None:
        raise ConnectionError("Could not read 'dashboard' from GCS. Did GCS start successfully?")

    monkeypatch.setattr("ray.util.state.get_actor", no_dashboard)
    with pytest.raises(UserError, match="dashboard does not answer .*--include-dashboard=true"):
        free_left_groups()
    assert not left_group
