"""The doctor's findings on made-up nodes, and its look at this machine and at clocks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from minimind_ray.on_ray.cluster import doctor
from minimind_ray.on_ray.cluster.doctor import Node, diagnose, examine_here, probe

GB = 10**9
WELL = Node(
    name="a", python="3.12.3", versions={"ray": "2.60.0", "torch": "2.13.0+cu130", "minimind-ray": "0.1.0"}, cpus=8,
    gpus=("L4",), driver_gpus=1, cuda="13.0", nccl="2.28.3", disk_free=90 * GB, disk_size=150 * GB, shm=16 * GB,
    open_files=65536, storage={}, object_store=8.0 * GB, ray_gpus=1.0,
)  # fmt: skip


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "says", "note"),
    [
        ({"driver_gpus": 2}, "torch is for CUDA 13.0", False),
        ({"driver_gpus": 1, "gpus": (), "cuda": "", "ray_gpus": 0.0}, "torch is a build for CPUs", False),
        ({"ray_gpus": 4.0}, "Ray counts 4 GPUs and torch finds 1", False),
        ({"disk_free": 5 * GB}, "97% full", False),
        ({"disk_free": 8 * GB, "disk_size": 100 * GB}, "8.0 GB are left", True),
        ({"shm": 64_000_000}, "/dev/shm has 0.06 GB", True),
        ({"open_files": 1024}, "1024 open files", True),
        ({"clock": -5.0}, "5.0 s behind", True),
        ({"clock": 900.0}, "900.0 s ahead", False),
        ({"storage": {"s3://b": "denied"}}, "cannot use s3://b: denied", False),
        ({"python": "3.11.9"}, "versions of Python differ: 3.12 on b, 3.11 on a", False),
        ({"versions": {**WELL.versions, "ray": "2.59.0"}}, "versions of ray differ: 2.60.0 on b, 2.59.0 on a", False),
    ],
)
def test_a_sick_node_is_found(change: dict[str, object], says: str, note: bool) -> None:
    findings = diagnose([replace(WELL, name="b"), replace(WELL, **change)])
    assert [(says in finding.what, finding.note) for finding in findings] == [(True, note)]
    assert findings[0].fix


@pytest.mark.unit
def test_well_nodes_have_no_findings() -> None:
    build = replace(
        WELL, name="head", gpus=(), driver_gpus=0, ray_gpus=0.0, versions={**WELL.versions, "torch": "2.13.0+cpu"}
    )
    assert diagnose([WELL, build, replace(WELL, python="3.12.9", clock=0.4)]) == []


@pytest.mark.unit
def test_packages_of_another_version_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_version", lambda name: "0.1" if name == "wandb" else "9" if name == "torch" else "2.60.0"
    )
    says = [finding.what for finding in doctor._wrong_versions()]
    assert any(what.startswith("wandb is 0.1, and ") for what in says)
    assert any(what.startswith("torch is 9, and ") for what in says)
    assert not any(what.startswith("ray is") for what in says)


@pytest.mark.unit
def test_this_machine_is_looked_at_without_ray(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (node,) = examine_here([str(tmp_path / "new"), str(file / "below")])
    assert list(node.storage) == [str(file / "below")]
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    assert node.cpus > 0 and 0 < node.disk_free < node.disk_size and node.versions["ray"].startswith("2.")


@pytest.mark.ray
def test_clocks_are_compared_with_the_one_here(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    actor = ray.remote(num_cpus=0)(doctor._Examiner).remote()
    assert abs(doctor._ahead(actor)) < 0.5
    real = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() - 100)
    assert doctor._ahead(actor) == pytest.approx(100, abs=0.5)
    ray.kill(actor)


@pytest.mark.unit
def test_probe_is_plain_data() -> None:
    import pickle

    node = probe()
    assert pickle.loads(pickle.dumps(node)) == node
