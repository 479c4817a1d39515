"""What the tests share: one Ray instance for those that need one, and the corpus where it is at hand."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub

os.environ.setdefault("WANDB_MODE", "disabled")
# Tiny models: two threads on two cores that Ray's processes want too wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that runs the suite in its background, or nohup, hands down that signals are to be ignored; commands under
# test have to receive them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
# Ray's workers import what tests hand them from here.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
# Ray reads them as it is imported. One token for every cluster and process of the tests, whatever this machine has.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

import torch  # noqa: E402  It reads the number of threads as it is imported.

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks where a kernel is defined, its own as it is imported.


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray instance with 8 logical CPUs, stopped at the end."""
    from minimind_ray.on_ray.session import start_ray, stop_ray

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(
            "CUDA_VISIBLE_DEVICES", ""
        )  # Runs of several workers are refused where GPUs are not asked for.
        start_ray(cpus=8)
    yield
    stop_ray()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, which `huggingface_hub` asks in this process, with an empty cache and without a token."""
    from huggingface_hub import constants

    import minimind_ray.data.hub as reading

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    url = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reading, "WAITS", ())
    monkeypatch.delenv("HF_TOKEN", raising=False)
    reading.pin.cache_clear()
    yield server
    reading.pin.cache_clear()
    server.stop()


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The directory that MINIMIND_CORPUS names; tests that need real text skip without it."""
    path = os.environ.get("MINIMIND_CORPUS")
    if not path or not Path(path).is_dir():
        pytest.skip("needs real text: set MINIMIND_CORPUS to the corpus directory")
    return Path(path)
