"""The device a computation runs on, and the precision that suits it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import torch

from grappa.core.printing import sentence


def resolve_device(requested: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu`` or ``cuda``; ValueError when there is no GPU for ``cuda``."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError("the device is set to cuda but torch finds no GPU; set compute.device to auto or cpu")
    return torch.device(requested)


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device that holds numbers; ValueError for one that torch does not know or this machine does not have."""
    try:
        found = torch.zeros(1, device=device)
        found.cpu()  # what lies on `meta` has no numbers
        return found.device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # each is some device's own
        why = sentence(error, limit=200)
        raise ValueError(f"the device is {str(device)!r}, which torch cannot use here ({why}); give cpu") from error


def resolve_precision(requested: str, device: torch.device) -> str:
    """Return ``float32`` or ``bfloat16``; ``auto`` is decided by what the hardware has, never by timing."""
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if has_bfloat16_products() else "float32"


def has_bfloat16_products() -> bool:
    """Tell whether this machine's CPU multiplies bfloat16 numbers in hardware.

    While the environment variable GRAPPA_BFLOAT16 is 0 it is taken for one that does not, to measure what others get.
    """
    return os.environ.get("GRAPPA_BFLOAT16") != "0" and bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context in which matrix products run in ``precision``; parameters and residual stream stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def staged(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a batch that is ready to be ``moved``: for a GPU in page-locked memory, so that the copy runs beside the
    work.
    """
    return batch.pin_memory() if device.type == "cuda" else batch


def moved(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a batch on the device; a GPU gets it asynchronously if it was ``staged``."""
    return batch.to(device, non_blocking=True)


def set_num_threads(num_threads: int) -> None:
    """Bound torch's CPU threads (>= 1); faiss and BLAS follow the same OpenMP setting."""
    torch.set_num_threads(num_threads)


@cache
def _cpu_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return frozenset()
    lines = (line for line in path.read_text().splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())
