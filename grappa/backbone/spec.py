"""What a backbone is made of and how its input is prepared: plain values, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from grappa.backbone.architectures import check_input, check_name, check_options
from grappa.backbone.weights import BackboneError
from grappa.core.printing import shown


@dataclass(frozen=True)
class BackboneSpec:
    """All that is needed to build the architecture and to prepare its input, without any file or network.

    image_size: side of the square input, pixels. crop_fraction: share (0-1) of the shorter side that is shown. mean,
    std: of the three colors, 0-1. options: further arguments of the architecture, those of
    ``grappa.backbone.architectures.OPTIONS``. BackboneError for any other value.
    """

    name: str
    image_size: int
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_input(self.image_size, self.crop_fraction, self.mean, self.std)
        check_options(self.options)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: object) -> BackboneSpec:
        """Return the specification that gave this ``to_json()``; BackboneError for any other value."""
        names = {each.name for each in fields(cls)}
        if not isinstance(record, Mapping) or set(record) != names:
            raise BackboneError(f"the backbone is {shown(record)}; expected an object with {', '.join(sorted(names))}")
        colors = {name: tuple(each) if isinstance(each := record[name], list) else each for name in ("mean", "std")}
        return cls(**{**record, **colors})
