"""What a host computes with."""

from __future__ import annotations

import pytest
import torch

from minimind_ray.train.context import arithmetic

pytestmark = pytest.mark.unit


def test_arithmetic_names_threads_and_a_grant_of_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    assert arithmetic(torch.bfloat16) == "2 threads, AVX512 and AMX"
    assert arithmetic(torch.float32) == "2 threads, AVX512"
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)  # refused by Linux, or no such CPU
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert arithmetic(torch.bfloat16) == "1 thread, AVX512"
