"""What the way to a cluster's head says where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minimind_ray.config.errors import UserError
from minimind_ray.on_ray.cluster.tunnel import reason, tunnel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def told(file: Path) -> str:
    with pytest.raises(UserError) as error, tunnel(file):
        pass
    return str(error.value)


def test_a_cluster_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = yaml.safe_load((ROOT / "cluster/local.yaml").read_text()) | {"cluster_name": tmp_path.name}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    said = told(file)
    assert f"RuntimeError: Head node of cluster ({tmp_path.name}) not found!" in said
    assert said.endswith(f"start it with: ray up {file}")


def test_what_is_no_cluster_of_ray_up() -> None:
    assert "kubectl port-forward" in told(ROOT / "cluster/kuberay.yaml")
    assert "not a cluster file" in told(ROOT / "experiments/dpo.yaml")
    assert "No such file" in told(ROOT / "nothere.yaml")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            [
                "ssh: connect to host 10.1.0.10 port 22: No route to host",
                "Error: Command failed:",
                "",
                "ssh -tt -i key",
            ],
            0,
        ),
        (
            [
                "Traceback:",
                "root@a: Permission denied (publickey).",
                "x.ClickException: Command failed:",
                "ssh",
            ],
            1,
        ),
        (["INFO loaded", "RuntimeError: Head node of cluster (a) not found!", ""], 1),
        (["something new", ""], 0),
    ],
)
def test_the_line_that_says_why_is_found_among_those_of_ray_and_ssh(said: list[str], why: int) -> None:
    assert reason(said) == said[why]
