"""What comes home of a run on a cluster."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import pytest

from minimind_ray.train.bundle import LARGEST, MARK, pack, unpack

pytestmark = pytest.mark.unit


def test_all_but_models_comes_out_of_a_log_as_it_went_in(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "trials" / "a"
    for name in ("run.json", "checkpoints/step-00000001/model.safetensors", ".ray/state", "wandb/run.wandb"):
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"of {name}")
    (tmp_path / "sweep" / "report.html").write_bytes(bytes(range(256)))
    with (run / "large.bin").open("wb") as large:
        large.truncate(LARGEST + 1)
    log = f"Running entrypoint\nwarning: {MARK}\n{pack(str(tmp_path / 'sweep'))}\nmore\n"
    target = tmp_path / "here"
    assert unpack(log, target) == [target / "report.html", target / "trials" / "a" / "run.json"]
    assert (target / "report.html").read_bytes() == bytes(range(256))
    assert (target / "trials" / "a" / "run.json").read_text() == "of run.json"


def test_nothing_there_is_nothing_fetched(tmp_path: Path) -> None:
    assert unpack("no such line", tmp_path / "a") == unpack(pack(str(tmp_path / "none")), tmp_path / "a") == []


def test_no_file_is_written_outside(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(MARK + base64.b64encode(buffer.getvalue()).decode(), tmp_path / "target")
    assert not (tmp_path / "outside").exists()
