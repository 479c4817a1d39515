"""Cluster files: the shipped ones pass, and each fault is found with what to do."""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from minimind_ray.config.cluster import read_cluster, scales
from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.cluster import check as cluster_check
from minimind_ray.on_ray.cluster.check import Finding, check_cluster

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
FILES = ["cluster.yaml", "cluster/azure.yaml", "cluster/gcp.yaml", "cluster/kuberay.yaml", "cluster/local.yaml"]
Tree = dict[str, Any]
Check = Callable[..., list[Finding]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home as after the documented first steps: a token, a key, the clouds' packages; in the checkout's root."""
    for name in (".ray/auth_token", ".ssh/minimind-ray", ".ssh/minimind-ray.pub"):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        path.chmod(0o600)
    monkeypatch.delenv("MINIMIND_PUBLIC_ONLY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cluster_check, "_installed", lambda module: True)
    monkeypatch.setattr(cluster_check, "client_version", lambda: "2.60.0")
    return tmp_path / "home"


def edited(name: str) -> Tree:
    """A shipped file, with what it says is to be edited."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for example, own in (
        ("192.0.2.", "10.1.0."),
        ("my-project", "own"),
        ("REGISTRY/", "registry.example.org/"),
        ("my-bucket", "own"),
        ("myaccount", "own"),
    ):
        text = text.replace(example, own)
    return yaml.safe_load(text)


@pytest.fixture
def check(tmp_path: Path) -> Check:
    def call(tree: Tree, *asked: ScaleConfig) -> list[Finding]:
        path = tmp_path / "file.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return check_cluster(read_cluster(path), asked)

    return call


def test_all_shipped_files_are_tested() -> None:
    assert sorted(["cluster.yaml", *(f"cluster/{p.name}" for p in (ROOT / "cluster").glob("*.yaml"))]) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_is_right_once_it_is_edited(name: str, check: Check) -> None:
    assert check(edited(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_without_private_parts_of_ray_only_the_schema_is_left_out(
    name: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIMIND_PUBLIC_ONLY", "1")
    [finding] = check(edited(name))
    assert finding.note and finding.what.startswith("the file is not compared with Ray's schema")


@pytest.mark.parametrize("name", FILES)
def test_shipped_files_have_prices_an_idle_bill_and_a_highest(name: str) -> None:
    cluster = read_cluster(ROOT / name)
    idle, most = cluster.cost_idle(), cluster.cost_at_most()
    assert idle is not None and most is not None
    assert idle == cluster.prices["head"]  # Nothing but the head is kept.
    assert most >= idle


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cluster.yaml", ["s3://my-bucket"]),
        ("cluster/azure.yaml", ["AZURE_STORAGE_ACCOUNT_NAME=myaccount"]),
        ("cluster/gcp.yaml", ["project_id", "gs://my-bucket"]),
        ("cluster/kuberay.yaml", ["the image is still that of the example", "s3://my-bucket"]),
        ("cluster/local.yaml", ["192.0.2.10"]),
    ],
)
def test_what_was_not_edited_is_an_error(name: str, found: list[str]) -> None:
    findings = check_cluster(read_cluster(ROOT / name))
    assert [says in finding.what for says, finding in zip(found, findings, strict=True)] == [True] * len(found)
    assert not any(finding.note for finding in findings)


def change(tree: Tree, path: str, value: object) -> Tree:
    """A copy with another value at a dotted path; None takes the key out."""
    tree = deepcopy(tree)
    *parents, last = path.split("/")
    at = tree
    for key in parents:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return tree


RULES = [
    # (file, path, value, what the finding says, whether it is only a note)
    ("cluster.yaml", "setup_commands", None, "development version of Ray", False),
    ("cluster.yaml", "setup_commands", ["pip install ray"], "no version of Ray is pinned for the workers", False),
    ("cluster.yaml", "setup_commands", ["bash ~/minimind-ray/cluster/setup.sh"], "MINIMIND_STORAGE is not set", True),
    ("cluster.yaml", "setup_commands", ["pip install 'ray[default]==2.40.0'"], "2.40.0 on the head", False),
    ("cluster.yaml", "head_setup_commands", ["pip install ray==2.59.0"], "2.59.0 on the head, 2.60.0 on", False),
    ("cluster.yaml", "no_such_key", 1, "Ray refuses the file", False),
    ("cluster.yaml", "head_node_type", "nobody", "Ray refuses the file", False),
    ("cluster.yaml", "auth/ssh_private_key", "~/.ssh/absent", "there is no ~/.ssh/absent", False),
    ("cluster.yaml", "file_mounts", {"~/x": "no/such/folder"}, "there is no no/such/folder", False),
    ("cluster.yaml", "file_mounts", {"~/x": "minimind_ray"}, "do not get the cluster's token", False),
    ("cluster.yaml", "worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"], "off on workers", False),
    ("cluster.yaml", "provider/security_group/IpPermissions",
     [{"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}], "8265 to 8265 to the world", False),
    ("cluster.yaml", "provider/security_group", None, "ssh open to the world", True),
    ("cluster.yaml", "idle_timeout_minutes", 600, "kept for 600 minutes", False),
    ("cluster.yaml", "idle_timeout_minutes", None, "no idle_timeout_minutes", True),
    ("cluster.yaml", "available_node_types/gpu-1-spot/min_workers", 2, "2 gpu-1-spot are paid for all the time", True),
    ("cluster.yaml", "available_node_types/head/resources", {"CPU": 4}, "trials may run on the head", True),
    ("cluster.yaml", "available_node_types/gpu-1-ondemand", None, "gpu-1-spot has no on-demand type", True),
    ("cluster.yaml", "available_node_types/head/node_config/IamInstanceProfile", None, "rights for EC2 and S3", True),
    ("cluster.yaml", "provider/cache_stopped_nodes", True, "disks are still paid for", True),
    ("cluster.yaml", "metadata/price_per_hour/gpu-1-spot", None, "no price for gpu-1-spot", True),
    ("cluster.yaml", "metadata/price_per_hour/gpu", 1.0, "names gpu, which is not a node type", False),
    ("cluster.yaml", "metadata/key", "WANDB_API_KEY=0123456789abcdef", "contains a secret", False),
    ("cluster.yaml", "metadata/key", "AKIA" + "A" * 16, "an AWS access key", False),
    ("cluster.yaml", "docker", {"image": "rayproject/ray:latest-gpu", "container_name": "c"},
     "the image of the workers, rayproject/ray:latest-gpu, may change", False),
    ("cluster/local.yaml", "auth/ssh_user", None, "ssh_user is missing", False),
    ("cluster/local.yaml", "auth/ssh_private_key", None, "the head sets up the workers", False),
    ("cluster/local.yaml", "provider/worker_ips", ["10.1.0.10"], "named twice", False),
    ("cluster/local.yaml", "provider/worker_ips", None, "Ray refuses the file", False),
    ("cluster/local.yaml", "head_start_ray_commands", ["ray start --head"], "57153", False),
    ("cluster/kuberay.yaml", "spec/authOptions", None, "token authentication is off", False),
    ("cluster/kuberay.yaml", "spec/rayVersion", "2.52.0", "2.52.0 on the cluster", False),
    ("cluster/kuberay.yaml", "spec/headGroupSpec/serviceType", "LoadBalancer", "to other networks", False),
    ("cluster/kuberay.yaml", "spec/headGroupSpec/rayStartParams", {}, "trials may run on the head", True),
    ("cluster/kuberay.yaml", "spec/enableInTreeAutoscaling", False, "workers stay", False),
    ("cluster/kuberay.yaml", "spec/autoscalerOptions/idleTimeoutSeconds", 7200, "kept for 120 minutes", False),
    ("cluster/kuberay.yaml", "spec/workerGroupSpecs", [], "MINIMIND_NODE_TYPES does not list", False),
    ("cluster/kuberay.yaml", "spec/workerGroupSpecs", None, "Ray refuses the file", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "value", "says", "note"), RULES, ids=[f"{r[0]}:{r[1]}:{r[3]}" for r in RULES])
def test_a_fault_is_found(name: str, path: str, value: object, says: str, note: bool, check: Check) -> None:
    findings = [finding for finding in check(change(edited(name), path, value)) if says in finding.what]
    assert [finding.note for finding in findings] == [note]
    assert findings[0].fix


def test_the_dashboard_must_not_listen_to_the_world(check: Check) -> None:
    tree = edited("cluster.yaml")
    start = [command.replace("127.0.0.1", "0.0.0.0") for command in tree["head_start_ray_commands"]]
    (finding,) = check({**tree, "head_start_ray_commands": start})
    assert "every address" in finding.what and not finding.note


def test_images_of_one_cluster_are_one(check: Check) -> None:
    tree = edited("cluster/kuberay.yaml")
    tree["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["image"] = (
        "registry.example.org/ray:2.59.0"
    )
    (finding,) = check(tree)
    assert "different images" in finding.what


def test_a_refused_spot_request_is_a_note_without_the_rank(check: Check) -> None:
    tree = edited("cluster.yaml")
    start = [re.sub(r"RAY_AUTOSCALER_UTILIZATION_SCORER=\S+", "", c) for c in tree["head_start_ray_commands"]]
    (finding,) = check({**tree, "head_start_ray_commands": start})
    assert "again and again" in finding.what and finding.note


def test_token_and_keys_have_to_be_there_and_private(home: Path, check: Check) -> None:
    tree = edited("cluster/local.yaml")
    (home / ".ssh/minimind-ray").chmod(0o644)
    (home / ".ray/auth_token").chmod(0o644)
    assert [(finding.fix, finding.note) for finding in check(tree)] == [
        ("chmod 600 ~/.ssh/minimind-ray", False),
        (f"chmod 600 {home}/.ray/auth_token", True),
    ]
    (home / ".ssh/minimind-ray").chmod(0o600)
    (home / ".ray/auth_token").unlink()
    (finding,) = check(tree)
    assert finding.fix == "make one: ray get-auth-token --generate" and not finding.note


def test_the_cloud_package_has_to_be_there(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    monkeypatch.setattr(cluster_check, "_installed", lambda module: False)
    (finding,) = check(edited("cluster/azure.yaml"))
    assert finding.fix == "pip install 'minimind-ray[azure]'"


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (ScaleConfig(workers=1, gpus_per_worker=1.0), None),
        (ScaleConfig(workers=4, gpus_per_worker=0.25), None),
        (ScaleConfig(workers=8, cpus_per_worker=4.0), None),
        (ScaleConfig(workers=1, gpus_per_worker=8.0), "no node type that may start has them"),
        (ScaleConfig(workers=1, gpus_per_worker=16.0), "no node type that may start has them"),
        (ScaleConfig(workers=1, cpus_per_worker=64.0), "no node type that may start has them"),
        (ScaleConfig(workers=64, gpus_per_worker=1.0), "room for 17"),
    ],
)
def test_an_experiment_has_to_fit(scale: ScaleConfig, says: str | None, check: Check) -> None:
    """Room: the 3 machines with 4 GPUs and 5 of those with one make the 8 workers that the file allows: 17."""
    found = check(edited("cluster.yaml"), scale)
    assert [says in finding.what if says else False for finding in found] == ([True] if says else [])


def test_own_machines_are_not_known_before_they_are_up(check: Check) -> None:
    (finding,) = check(edited("cluster/local.yaml"), ScaleConfig(gpus_per_worker=1.0))
    assert finding.note and "doctor" in finding.fix


def test_the_cost_of_a_trial_is_that_of_its_part_of_the_cheapest_machine(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    types = {
        "head": {"resources": {"CPU": 0}},
        "cpu": {"resources": {"CPU": 16}},
        "one": {"resources": {"CPU": 8, "GPU": 1}},
        "four": {"resources": {"CPU": 48, "GPU": 4}},
        "off": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 0},
    }
    price = {"head": 0.5, "cpu": 1.6, "one": 1.0, "four": 5.0, "off": 0.1}
    path.write_text(
        yaml.safe_dump(
            {"provider": {"type": "aws"}, "head_node_type": "head", "available_node_types": types, "max_workers": 3,
             "metadata": {"price_per_hour": price}}
        )
    )  # fmt: skip
    cluster = read_cluster(path)
    assert cluster.trial_price(ScaleConfig(gpus_per_worker=1.0)) == (1.0, "one")
    assert cluster.trial_price(ScaleConfig(gpus_per_worker=0.5, workers=2)) == (1.0, "one")
    assert cluster.trial_price(ScaleConfig(gpus_per_worker=2.0)) == (2.5, "four")
    assert cluster.trial_price(ScaleConfig(cpus_per_worker=2.0)) == (pytest.approx(0.2), "cpu")
    assert cluster.trial_price(ScaleConfig(gpus_per_worker=8.0)) is None
    assert cluster.cost_idle() == 0.5
    assert cluster.cost_at_most() == 0.5 + 3 * 5.0


def test_what_an_experiment_asks_for_is_found_in_each_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("scale: {workers: 3, gpus_per_worker: 1}\n")
    assert scales(path) == [ScaleConfig(workers=3, gpus_per_worker=1.0)]
    path.write_text("stage: sft\nsettings: {scale: {gpus_per_worker: 0.5}}\naxes: {}\n")
    assert scales(path) == [ScaleConfig(gpus_per_worker=0.5)]
    path.write_text(
        "name: r\nsettings: {scale: {workers: 2}}\nstages: [{name: sft}, {settings: {scale: {cpus_per_worker: 4}}}]\n"
    )
    assert scales(path) == [ScaleConfig(workers=2), ScaleConfig(workers=2, cpus_per_worker=4.0)]
    path.write_text("scale: {workers: none}\n")
    with pytest.raises(UserError, match="scale.workers"):
        scales(path)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("cluster.yaml", "head_start_ray_commands", True),
        ("cluster.yaml", "idle_timeout_minutes", [10]),
        ("cluster/azure.yaml", "available_node_types/gpu-1-spot/node_config", [1]),
        ("cluster/gcp.yaml", "file_mounts", ["minimind_ray"]),
        ("cluster/kuberay.yaml", "spec/autoscalerOptions", [600]),
        ("cluster/local.yaml", "auth", "ubuntu"),
    ],
)
def test_a_section_of_another_shape_is_told_beside_the_rest(name: str, path: str, value: object, check: Check) -> None:
    (finding,) = {
        f.fix: f for f in check(change(edited(name), path, value)) if "the expected structure" in f.what
    }.values()
    assert "cluster/" in finding.fix and not finding.note


@pytest.mark.parametrize("text", ["a: 1", "provider: 3", "kind: RayCluster", "provider: {}"])
def test_other_files_are_no_cluster_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml: not a (valid )?cluster file"):
        read_cluster(tmp_path / "x.yaml")


def test_nodes_get_exact_versions_within_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    allowed = {r.name: r for r in map(Requirement, project["project"]["dependencies"])}
    lines = (ROOT / "cluster/requirements.txt").read_text().splitlines()
    pins = {r.name: r for r in (Requirement(line) for line in lines if line and line[0] != "#")}
    assert set(allowed) <= set(pins)
    for name, pin in pins.items():
        (spec,) = pin.specifier
        assert spec.operator == "=="
        if name in allowed:
            assert allowed[name].specifier.contains(spec.version), name
            assert allowed[name].extras == pin.extras, name
    assert f"rayproject/ray:{next(iter(pins['ray'].specifier)).version}-" in (ROOT / "cluster/Dockerfile").read_text()


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_the_head_gets_the_packages_of_its_cloud(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (command,) = yaml.safe_load((ROOT / ("cluster.yaml" if name == "aws" else f"cluster/{name}.yaml")).read_text())[
        "head_setup_commands"
    ]
    asked = command.replace("'", "").split("--quiet ")[1].split()
    assert sorted(asked) == sorted(project["project"]["optional-dependencies"][name])


def test_file_and_documentation_ask_for_the_kuberay_that_the_check_names() -> None:
    asked = re.compile(r"(?:KubeRay|KubeRay operator|kuberay-operator --version) (\d+\.\d+\.\d+)")
    for name in ("cluster/kuberay.yaml", "docs/cluster.md"):
        versions = asked.findall((ROOT / name).read_text(encoding="utf-8"))
        assert set(versions) <= {cluster_check.KUBERAY} and versions, name


def test_setup_is_a_program() -> None:
    assert (ROOT / "cluster/setup.sh").stat().st_mode & stat.S_IXUSR
