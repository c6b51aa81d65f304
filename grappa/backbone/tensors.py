"""The tensors of a model that has been built by shapes alone: they get memory, and their values.

Some are computed from the architecture and are not saved with it (tables of relative positions, rotations, masks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from grappa.core.printing import shown

MAX_COMPUTED = 2**28  # bytes of the tensors that are computed; the largest known model has some millions


def fill(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Load a state dict that has every saved parameter and buffer of ``model``; ValueError for the first misfit."""
    wanted = model.state_dict()
    for name in sorted({*wanted, *state}):
        found, expected = (_kind(each[name]) if name in each else "nothing" for each in (state, wanted))
        if found != expected:
            raise ValueError(f"{prefix}{name}: found {found}, expected {expected}")
    model.load_state_dict(dict(state))


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} of whole numbers"


def tables_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the saved tensors of whole numbers that say where something stands; a counter of batches says nothing."""
    state = model.state_dict()
    return {
        name: each
        for name, each in state.items()
        if not each.is_floating_point() and not name.endswith("num_batches_tracked")
    }


def saved(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict in which no two tensors share memory; some models have one tensor under several names."""
    state: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in model.state_dict().items():
        shared = tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() in taken
        state[name] = tensor.clone() if shared else tensor
        taken.add(tensor.untyped_storage().data_ptr())
    return state


def may_be_infinite(name: str) -> bool:
    """Tell whether a tensor of this name holds bounds, which are infinite where there is none (Gemma's encoders)."""
    return name.endswith(("input_min", "input_max", "output_min", "output_max"))


def give_memory(model: nn.Module) -> None:
    """Move a model from the device ``meta`` to the CPU; what is saved has no values yet, the rest is computed.

    ValueError where what is computed would be large, before it is.
    """
    for name, module in model.named_modules():
        if module._non_persistent_buffers_set and not hasattr(module, "init_non_persistent_buffers"):
            raise ValueError(f"{shown(name)} (a {type(module).__name__}) does not say how its tables are computed")
    saved = set(model.state_dict())
    size = sum(each.nbytes for name, each in model.named_buffers() if name not in saved)
    if size > MAX_COMPUTED:
        raise ValueError(f"its tables would take {size} bytes, expected at most {MAX_COMPUTED}")
    model.to_empty(device="cpu")
    for module in model.modules():
        compute: Any = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None:
            compute()
