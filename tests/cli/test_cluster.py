"""`minimind-ray cluster check`: what it prints, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.cluster import check
from minimind_ray.sweep.request import trial_price
from tests.cli.conftest import Command

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the checkout's root, with a token in the home."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x")
    token.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(check, "_installed", lambda module: True)


def test_a_file_is_checked_and_priced(command: Command, tmp_path: Path) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text.replace("my-bucket", "own"))
    outcome = command("cluster", "check", tmp_path / "c.yaml")
    assert outcome.code == 0
    assert "0.20 USD an hour idle (144 a month), 13.63 at most" in outcome.out
    assert outcome.out.endswith("ok\n")


def test_the_file_at_the_root_is_the_default_and_wants_a_bucket(command: Command) -> None:
    outcome = command("cluster", "check")
    assert outcome.code == 1
    assert (
        "error the storage is still that of the example: MINIMIND_STORAGE=s3://my-bucket\n      -> name your own"
        in outcome.out
    )


def test_errors_make_the_exit_code(command: Command, tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    tree["idle_timeout_minutes"] = 600
    tree["setup_commands"] = [line.replace("my-bucket", "own") for line in tree["setup_commands"]]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    outcome = command("cluster", "check", tmp_path / "c.yaml")
    assert outcome.code == 1
    assert "kept for 600 minutes\n      -> set idle_timeout_minutes: 10" in outcome.out
    assert "1 error(s)" in outcome.out


def test_an_experiment_that_does_not_fit(command: Command, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("scale: {gpus_per_worker: 8}\n")
    outcome = command("cluster", "check", "--config", tmp_path / "e.yaml")
    assert outcome.code == 1
    assert "set max_workers of gpu-8-spot above 0" in outcome.out


def test_what_is_no_cluster_file_is_said_in_a_sentence(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1\n")
    outcome = command("cluster", "check", tmp_path / "x.yaml")
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {tmp_path}/x.yaml: not a cluster file")


def test_what_is_wrong_with_a_price_or_an_experiment_is_said_in_a_sentence(command: Command, tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "cluster" / "kuberay.yaml").read_text())
    tree["metadata"]["annotations"] = {"minimind-ray/price-per-hour": "{head: 0.2"}
    (tmp_path / "k.yaml").write_text(yaml.safe_dump(tree))
    outcome = command("cluster", "check", tmp_path / "k.yaml")
    assert outcome.err == f"error: {tmp_path}/k.yaml: minimind-ray/price-per-hour: not YAML: {{head: 0.2\n"
    tree["metadata"]["annotations"] = {"minimind-ray/price-per-hour": "{head: much}"}
    (tmp_path / "k.yaml").write_text(yaml.safe_dump(tree))
    outcome = command("cluster", "check", tmp_path / "k.yaml")
    assert outcome.err.startswith(f"error: {tmp_path}/k.yaml: price_per_hour: give the USD an hour")
    (tmp_path / "e.yaml").write_text("stages: 5\n")
    outcome = command("cluster", "check", "--config", tmp_path / "e.yaml")
    assert outcome.err == f"error: {tmp_path}/e.yaml: not a stage's config, a sweep or a recipe\n"


@pytest.mark.parametrize(("text", "price"), [("0.5", 0.5), ("cluster.yaml", 0.45)])
def test_a_sweep_is_priced_by_a_number_or_by_a_cluster_file(text: str, price: float) -> None:
    assert trial_price(text, ScaleConfig(gpus_per_worker=1.0)) == pytest.approx(price)


def test_a_trial_without_gpus_is_priced_on_a_machine_without() -> None:
    assert trial_price("cluster.yaml", ScaleConfig(workers=2, cpus_per_worker=4.0)) == pytest.approx(0.30 * 8 / 16)


def test_a_price_that_cannot_be_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a number nor a cluster file"):
        trial_price("cheap", ScaleConfig())
    with pytest.raises(UserError, match="no node type with a price is large enough"):
        trial_price("cluster.yaml", ScaleConfig(gpus_per_worker=16.0))
