"""What a backbone is made of and how its input is prepared: plain values, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from grappa.backbone.architectures import check_input, check_name, check_options
from grappa.backbone.unusable import BackboneError
from grappa.core.printing import shown

CROP_MODES, INTERPOLATIONS = ("center", "squash"), ("bicubic", "bilinear")
_FORMER = {"crop_mode": "center", "interpolation": "bicubic", "module": ""}  # what records without these fields mean
_PLACE = re.compile(r"[A-Za-z_][\w.]{0,150}:[A-Za-z_]\w{0,100}")

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneSpec:
    """All that is needed to build the architecture and to prepare its input, without any file or network.

    image_size: side of the square input, pixels. crop_fraction: share (0-1) of the shorter side that is shown. mean,
    std: of the three colors, 0-1. options: further arguments of the architecture, those of
    ``grappa.backbone.architectures.OPTIONS``. crop_mode: ``center``, a square of the shorter side; ``squash``, the
    whole image, both sides stretched to the square's. interpolation: how an image is resized to the input. module:
    where the function is that makes a model of a user's own, ``package.module:function``; "": it is one of timm.
    BackboneError for any other value.
    """

    name: str
    image_size: int
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    module: str = ""

    def __post_init__(self) -> None:
        if self.module == "":
            check_name(self.name)
        else:
            check_place(self.module)
            if self.name != self.module.partition(":")[2]:
                raise BackboneError(f"the backbone is called {shown(self.name)}; expected its function's name")
        check_input(self.image_size, self.crop_fraction, self.mean, self.std)
        check_options(self.options)
        for name, allowed in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in allowed:
                found = shown(getattr(self, name))
                raise BackboneError(f"the backbone's {name} is {found}; expected {' or '.join(allowed)}")

    @property
    def framing(self) -> dict[str, Any]:
        """How an image is brought to the input: the arguments of ``eval_crop`` in ``grappa.images.transforms``."""
        return {name: getattr(self, name) for name in ("image_size", "crop_fraction", "crop_mode", "interpolation")}

    def to_json(self) -> dict[str, Any]:
        """Return the record of it; what is as in records of former versions is left out, so that they stay equal."""
        record = asdict(self)
        return {name: value for name, value in record.items() if _FORMER.get(name) != value}

    @classmethod
    def from_json(cls, record: object) -> BackboneSpec:
        """Return the specification that gave this ``to_json()``; BackboneError for any other value."""
        names = {each.name for each in fields(cls)}
        if not isinstance(record, Mapping) or set(_FORMER | dict(record)) != names:
            raise BackboneError(f"the backbone is {shown(record)}; expected an object with {', '.join(sorted(names))}")
        colors = {name: tuple(each) if isinstance(each := record[name], list) else each for name in ("mean", "std")}
        return cls(**{**record, **colors})


def check_place(text: object) -> None:
    """Refuse what does not say where a function is; BackboneError."""
    if not isinstance(text, str) or not _PLACE.fullmatch(text):
        raise BackboneError(f"backbone.module is {shown(text)}; expected package.module:function")


def own_module_spec(
    place: str,
    *,
    image_size: int | None = None,
    crop_fraction: float | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> BackboneSpec:
    """Return the specification of a model of a user's own; what is None is usual: 224 px, the whole shorter side,
    ImageNet's colors. BackboneError: a value is out of its range, or there are options, which only timm's models have.
    """
    check_place(place)
    if options:
        raise BackboneError(
            f"backbone.options is {shown(dict(options))}; a module of your own has none, leave them out"
        )
    name, colors = place.partition(":")[2], (mean or _IMAGENET_MEAN, std or _IMAGENET_STD)
    return BackboneSpec(name, image_size or 224, crop_fraction or 1.0, *colors, module=place)


def resolve_spec(
    name: str,
    own: Any,
    *,
    image_size: int | None = None,
    crop_fraction: float | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> BackboneSpec:
    """Return the specification of a model of timm; what is None is the model's own.

    Args:
        own: what timm declares of the model's weights, its ``PretrainedCfg``.
        options: further arguments of the architecture (``BackboneSpec``), and ``img_size``.

    Raises:
        BackboneError: the model's own input is none that can be given, or a value is out of its range.
    """
    options = options or {}
    size = image_size or options.get("img_size")
    _check_own_input(name, own, size, crop_fraction)
    return BackboneSpec(
        name=name,
        image_size=size or own.input_size[1],
        crop_fraction=crop_fraction or float(own.crop_pct),
        mean=mean or tuple(own.mean),
        std=std or tuple(own.std),
        options={key: value for key, value in options.items() if key != "img_size"},
        crop_mode=own.crop_mode,
        interpolation=own.interpolation,
    )


def _check_own_input(name: str, own: Any, size: int | None, crop_fraction: float | None) -> None:
    """Refuse a model whose own input cannot be given, and is not replaced by a given size or crop; BackboneError."""
    channels, height, width = own.input_size
    if channels != 3:
        raise BackboneError(f"{name!r} takes images of {channels} channels; choose a model of color images")
    if size is None and height != width:
        raise BackboneError(f"{name!r} takes images of {height} x {width} pixels, not square; set backbone.image_size")
    if crop_fraction is None and own.crop_pct > 1:
        raise BackboneError(f"{name!r} takes images with an added border; set backbone.crop_fraction=1 to do without")
    for field_name, allowed in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
        if getattr(own, field_name) not in allowed:
            found = f"{field_name} {getattr(own, field_name)!r}"
            raise BackboneError(f"{name!r} needs {found}; choose a model with {' or '.join(allowed)}")


def check_patches(spec: BackboneSpec, patch_size: int, own: Any) -> None:
    """Refuse an input whose side is no multiple of the patch: its border would be left out; BackboneError.

    Models that enlarge their input to whole patches by themselves (``dynamic_img_pad``) take any size, and a model
    takes its own, whatever it is; own: what timm declares of its weights.
    """
    below = spec.image_size // patch_size * patch_size
    if spec.image_size not in (below, own.input_size[-1]) and not spec.options.get("dynamic_img_pad"):
        near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise BackboneError(
            f"backbone.image_size is {spec.image_size}, no multiple of the {patch_size} pixels of a patch of "
            f"{spec.name}; set it to {near}"
        )


def visible_side(spec: BackboneSpec) -> int:
    """Return the shorter side, in pixels, that an image needs so that nothing of the input is enlarged: S / c.

    S is the side of the input, c the share of the shorter side that is shown. A training crop of a smaller share is
    enlarged, as one that is cut from an image of this size always is.
    """
    return math.ceil(spec.image_size / spec.crop_fraction - 1e-6)
