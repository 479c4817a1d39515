"""When a run compiles what lies between its matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.model import ops
from minimind_ray.train.context import settle_compile

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield
    ops.run_eagerly()


def compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: function(*args))


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)


@pytest.mark.parametrize(
    ("setting", "flops", "expected"),
    [("auto", 1e12, False), ("auto", 1e15, True), (True, 1e12, True), (False, 1e15, False)],
)
def test_long_runs_are_compiled(setting: Any, flops: float, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    assert settle_compile(setting, flops, CPU) is ops.compiled() is expected
    assert not settle_compile(False, flops, CPU)  # The next run of the process.
    assert not ops.compiled()


@pytest.mark.parametrize("before", [True, False])
def test_a_run_goes_on_as_it_began(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    assert settle_compile("auto", 1e15 if not before else 1e12, CPU, before) is before


def test_without_a_compiler_only_what_was_asked_for_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_compiler(monkeypatch)
    assert not settle_compile("auto", 1e15, CPU)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"train\.compile"):
        settle_compile(True, 1e15, CPU)
    assert not settle_compile("auto", 1e15, CPU, before=True)
    assert "was compiled when it began, but compiling fails here" in capsys.readouterr().err


def test_compiled_code_is_kept_apart_for_each_kind_of_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    here = ops._cache_directory()
    assert here.is_relative_to(tmp_path) and here == ops._cache_directory()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    assert ops._cache_directory() != here
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    elsewhere = ops._cache_directory()
    assert elsewhere.is_dir() and elsewhere.stat().st_mode & 0o77 == 0
    elsewhere.rmdir()
