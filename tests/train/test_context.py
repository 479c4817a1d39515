"""What a host computes with."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import TrainConfig
from minimind_ray.train import context
from minimind_ray.train.context import PRECISIONS, arithmetic, resolve_precision

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


@pytest.mark.parametrize("precision", ["bf16", "fp8", "BFLOAT16", ""])
def test_an_unknown_precision_is_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"precision is {precision!r}: give auto, bfloat16 or float32"):
        resolve_precision(precision, torch.device("cpu"))


def test_every_precision_of_the_config_is_known() -> None:
    assert set(get_args(TrainConfig.model_fields["precision"].annotation)) == {"auto", *PRECISIONS}
