"""Which architectures a backbone may have, and which arguments of them are settings: all that timm is ever given.

A specification comes from a configuration, or from the ``model.json`` of strangers. ``timm.create_model`` itself is no
place to hand such a record to: by its name or its arguments it also reads files and downloads. So a name must be one
that timm itself registers, and an argument must be listed here with its type and range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from grappa.backbone.unusable import BackboneError
from grappa.core.printing import sentence, shown

MAX_IMAGE_SIZE = 8192
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)?")  # no "hf-hub:", no "local-dir:", no path


@dataclass(frozen=True)
class Number:
    """A number in [low, high]; ``whole``: an integer."""

    low: float
    high: float
    whole: bool = False

    def allows(self, value: object) -> bool:
        """Tell whether ``value`` is such a number; a truth value is none."""
        kinds = (int,) if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{'an integer' if self.whole else 'a number'} from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Flag:
    """``true`` or ``false``."""

    def allows(self, value: object) -> bool:
        """Tell whether ``value`` is a truth value."""
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Name:
    """The name of a layer in timm's own tables, such as ``rmsnorm``."""

    def allows(self, value: object) -> bool:
        """Tell whether ``value`` looks like such a name; whether timm knows it turns out when it is built."""
        return isinstance(value, str) and re.fullmatch(r"[a-z0-9_]{0,32}", value) is not None

    def __str__(self) -> str:
        return "the name of a layer in timm"


_SHARE = Number(0, 0.99)
OPTIONS: Mapping[str, Number | Flag | Name] = {
    "patch_size": Number(1, 1024, whole=True),
    "embed_dim": Number(1, 16384, whole=True),
    "depth": Number(1, 64, whole=True),
    "num_heads": Number(1, 1024, whole=True),
    "window_size": Number(1, 256, whole=True),
    "reg_tokens": Number(0, 1024, whole=True),
    "mlp_ratio": Number(0.01, 64),
    "init_values": Number(0, 1e3),
    **dict.fromkeys(("qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias"), Flag()),
    **dict.fromkeys(("no_embed_class", "pre_norm", "final_norm", "dynamic_img_size", "dynamic_img_pad"), Flag()),
    "strict_img_size": Flag(),
    **dict.fromkeys(("pos_embed", "norm_layer", "act_layer", "embed_norm_layer"), Name()),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), _SHARE),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), _SHARE),
}
_FIXED = {  # arguments of timm that would undo what the product needs of a model
    "num_classes": "a backbone gives features, not classes",
    "in_chans": "images have three colors",
    "global_pool": "the model's own pooling gives its features",
}


def check_name(name: object) -> None:
    """Refuse what cannot be the name of an architecture of timm; BackboneError."""
    if not isinstance(name, str) or len(name) > 100 or not _NAME.fullmatch(name):
        raise BackboneError(f"the backbone is called {shown(name)}; give a timm model, such as vit_small_patch16_224")


def check_options(options: object) -> None:
    """Refuse arguments that are not listed in ``OPTIONS``, or are out of their range; BackboneError."""
    if not isinstance(options, Mapping):
        raise BackboneError(f"the backbone's options are {shown(options)}; expected names with values")
    for name, value in options.items():
        if name in _FIXED:
            raise BackboneError(f"the backbone's option {name} cannot be set: {_FIXED[name]}; leave it out")
        if name not in OPTIONS:
            raise BackboneError(f"the backbone has no option {shown(name)}; expected one of {', '.join(OPTIONS)}")
        if not OPTIONS[name].allows(value):
            raise BackboneError(f"the backbone's option {name} is {shown(value)}; expected {OPTIONS[name]}")


def check_input(image_size: object, crop_fraction: object, mean: object, std: object) -> None:
    """Refuse a preprocessing that gives no image: sizes, shares, means or deviations out of range; BackboneError."""
    _check("image_size", image_size, Number(1, MAX_IMAGE_SIZE, whole=True))
    _check("crop_fraction", crop_fraction, Number(math.ulp(0.0), 1))
    for name, values, allowed in (("mean", mean, Number(-1e6, 1e6)), ("std", std, Number(1e-6, 1e6))):
        if not isinstance(values, tuple) or len(values) != 3:
            raise BackboneError(f"the backbone's {name} is {shown(values)}; expected three numbers, one a color")
        for value in values:
            _check(name, value, allowed)


def _check(name: str, value: object, allowed: Number) -> None:
    if not allowed.allows(value):
        raise BackboneError(f"the backbone's {name} is {shown(value)}; expected {allowed}")


def create_model(name: str, image_size: int, options: Mapping[str, Any]) -> Any:
    """Return a model with random weights and without a classifier, made by timm from checked arguments only; it pools
    as its author meant. No file and no network is touched.
    """
    check_name(name)
    check_options(options)
    timm = _import_timm()
    if not _is_timms_own(name):
        raise BackboneError(f"timm has no model called {shown(name)}; see timm.list_models()")
    arguments = {**options, "pretrained": False, "num_classes": 0}
    try:
        return _sized(partial(timm.create_model, name, **arguments), image_size)
    except Exception as error:  # each family refuses arguments in its own way
        raise BackboneError(
            f"{name!r} cannot be built for {image_size} x {image_size} pixels with the options {shown(dict(options))} "
            f"({sentence(error, limit=200)}); choose others"
        ) from error


def _sized(create: Callable[..., Any], image_size: int) -> Any:
    """Return the model made for an input size; models for any size have no such argument."""
    try:
        return create(img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return create()


def _is_timms_own(name: str) -> bool:
    timm = _import_timm()
    base = name.partition(".")[0]
    return timm.is_model(base) and timm.models.model_entrypoint(base).__module__.startswith("timm.models.")


def _import_timm() -> Any:
    """Import timm when a model is made: it loads torch, which names and options need not."""
    from grappa.backbone.files.conversions import import_timm

    return import_timm()
