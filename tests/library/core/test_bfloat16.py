import pytest
import torch

from grappa.core import devices


def test_bfloat16_is_switched_off_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPPA_BFLOAT16", raising=False)
    monkeypatch.setattr(devices, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert devices.has_bfloat16_products() and devices.resolve_precision("auto", torch.device("cpu")) == "bfloat16"
    monkeypatch.setenv("GRAPPA_BFLOAT16", "0")
    assert not devices.has_bfloat16_products()
    assert devices.resolve_precision("auto", torch.device("cpu")) == "float32"
