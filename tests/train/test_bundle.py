"""What comes home of a run on a cluster."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.train import bundle
from minimind_ray.train.bundle import MARK, MAX_FILE_BYTES, pack, unpack

pytestmark = pytest.mark.unit


def test_all_but_models_comes_out_of_a_log_as_it_went_in(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "trials" / "a"
    for name in ("run.json", "checkpoints/step-00000001/model.safetensors", ".ray/state", "wandb/run.wandb"):
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"of {name}")
    (tmp_path / "sweep" / "report.html").write_bytes(bytes(range(256)))
    with (run / "large.bin").open("wb") as large:
        large.truncate(MAX_FILE_BYTES + 1)
    log = f"Running entrypoint\nwarning: {MARK}\n{pack(str(tmp_path / 'sweep'))}\nmore\n"
    target = tmp_path / "here"
    assert unpack(log, target) == [target / "report.html", target / "trials" / "a" / "run.json"]
    assert (target / "report.html").read_bytes() == bytes(range(256))
    assert (target / "trials" / "a" / "run.json").read_text() == "of run.json"


def test_nothing_there_is_nothing_fetched(tmp_path: Path) -> None:
    assert unpack("no such line", tmp_path / "a") == unpack(pack(str(tmp_path / "none")), tmp_path / "a") == []


def _link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc"
    return member


@pytest.mark.parametrize(
    "member",
    [*map(tarfile.TarInfo, ("../outside", "/outside", "a/../../outside", ".bashrc", "a/.env", "wandb/x")), _link("a")],
    ids=str,
)
def test_only_files_of_a_run_are_written(member: tarfile.TarInfo, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(member)
    with pytest.raises(UserError, match="refused"):
        unpack(MARK + base64.b64encode(buffer.getvalue()).decode(), tmp_path / "target")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("cut", [-1, -40, 20, 8])
def test_a_damaged_line_writes_nothing(cut: int, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes(bytes(range(256)) * 9)
    line = pack(str(tmp_path / "run"))
    for damaged in (line[:cut], f"{line[:cut]}!!", MARK + base64.b64encode(b"no archive").decode()):
        with pytest.raises(UserError, match="are damaged"):
            unpack(damaged, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_results_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    for name in "abc":
        (tmp_path / "run" / name).write_bytes(bytes(100_000))
    line = pack(str(tmp_path / "run"))
    for bound, value in {"MAX_BYTES": 250_000, "MAX_FILES": 2}.items():
        with monkeypatch.context() as smaller:
            smaller.setattr(bundle, bound, value)
            with pytest.raises(UserError, match="more than"):
                unpack(line, tmp_path / "here")
            with pytest.raises(UserError, match="more than"):
                pack(str(tmp_path / "run"))
    with monkeypatch.context() as smaller:  # A header may be long, too.
        smaller.setattr(bundle, "MAX_BYTES", 1000)
        smaller.setattr(bundle, "MAX_FILES", 10)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("x" * 1_000_000))
        with pytest.raises(UserError, match="more than"):
            unpack(MARK + base64.b64encode(buffer.getvalue()).decode(), tmp_path / "here")
    assert not (tmp_path / "here").exists()
