"""What a host computes with."""

from __future__ import annotations

import pytest
import torch

from minimind_ray.train import context
from minimind_ray.train.context import arithmetic, resolve_precision

pytestmark = pytest.mark.unit


def test_arithmetic_names_threads_and_a_grant_of_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    monkeypatch.setattr(context, "_amx_granted", lambda: True)
    assert arithmetic(torch.bfloat16) == "2 threads, AVX512 and AMX"
    assert arithmetic(torch.float32) == "2 threads, AVX512"
    monkeypatch.setattr(context, "_amx_granted", lambda: False)  # refused by Linux
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert arithmetic(torch.bfloat16) == "1 thread, AVX512"
    monkeypatch.setattr(context, "_amx_granted", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})  # no such CPU
    assert arithmetic(torch.bfloat16) == "1 thread, AVX512"


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_tile": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        ({"bf16": True}, torch.float32),  # ARM
    ],
)
def test_auto_is_bfloat16_on_a_cpu_that_has_it(
    features: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_precision("auto", torch.device("cpu")) is dtype
