"""When a run compiles what lies between its matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.model import ops
from minimind_ray.train.context import settle_compile

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def compiled() -> bool:
    return any(kernel.compiled is not kernel.eager for kernel in ops.KERNELS)


@pytest.mark.parametrize(
    ("setting", "flops", "expected"),
    [("auto", 1e12, False), ("auto", 1e15, True), (True, 1e12, True), (False, 1e15, False)],
)
def test_long_runs_are_compiled(setting: Any, flops: float, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: function(*args))
    try:
        settle_compile(setting, flops, CPU)
        assert compiled() is expected
        settle_compile(False, flops, CPU)  # The next run of the process.
        assert not compiled()
    finally:
        ops.run_eagerly()


def test_without_a_compiler_only_what_was_asked_for_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    settle_compile("auto", 1e15, CPU)
    assert not compiled()
    with pytest.raises(UserError, match=r"train\.compile"):
        settle_compile(True, 1e15, CPU)
