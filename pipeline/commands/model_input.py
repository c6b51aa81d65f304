"""What `grappa init` knows of the backbone's input before it is loaded: what is wrong with it, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

from grappa.backbone.naming.catalog import name_problem, patch_size
from grappa.backbone.naming.timm_source import declared
from grappa.backbone.spec import BackboneSpec, check_patches, own_module_spec, resolve_spec, visible_side
from grappa.backbone.unusable import BackboneError
from grappa.pipeline.config.schema import Backbone, Config
from grappa.pipeline.config.yaml_file import ConfigError

Say = Callable[[str], None]
MOST_RAW_BYTES = 50e9  # of a raw pixel cache under `auto`: more than this does not stay in a usual machine's memory
JPEG_SHARE = 1 / 5  # of the raw pixels' bytes, measured on photographs at a shorter side of 160 px
UNKNOWN_SIDE = 256  # pixels of the shorter side in the pixel cache where the source does not tell what the model sees
USUAL_SIZE = 224  # pixels of the input that most models have
BYTES = 3 * 4 / 3  # of a pixel of the shorter side's square: photographs are a third longer than they are wide


def check_input(settings: Backbone) -> None:
    """Refuse a name that can be no backbone, options that it lacks, and an input that does not fit; ConfigError."""
    problem = name_problem(settings.name) if settings.module is None else ""
    if problem:
        raise ConfigError(f"backbone.name: {problem}")
    try:
        spec, patch = _declared_spec(settings), patch_size(settings.name, settings.options)
        found = declared(settings.name) if spec and patch and not spec.module else None
        if spec and patch and found:
            check_patches(spec, patch, found.weights)
    except BackboneError as error:
        raise ConfigError(str(error)) from None


def settle_cache_size(config: Config, before: Config | None) -> Config:
    """Replace ``images.cache_size: auto`` by the pixels that the backbone sees of an image's shorter side.

    before: the configuration of a run whose images are decoded, perhaps. If it has the same backbone, and images that
    are large enough, its size is kept, so that they need not be decoded again.
    """
    if config.images.cache_size != "auto":
        return config
    spec = _known_spec(config.backbone)
    side = visible_side(spec) if spec else UNKNOWN_SIDE
    if before and before.images.cache_size != "auto" and same_backbone(before.backbone, config.backbone):
        side = max(side, before.images.shorter_side)
    images = config.images.model_copy(update={"cache_size": side})
    return config.model_copy(update={"images": images})


def settle_cache(config: Config, num_images: int, before: Config | None) -> Config:
    """Replace ``images.cache: auto``: raw as long as the cache is small enough, else jpeg.

    before: the configuration of a run whose images are decoded, perhaps; its form is kept, whatever their number.
    """
    if config.images.cache != "auto":
        return config
    form = before.images.cache if before else "auto"
    if form == "auto":
        form = "raw" if raw_bytes(config, num_images) <= MOST_RAW_BYTES else "jpeg"
    images = config.images.model_copy(update={"cache": form})
    return config.model_copy(update={"images": images})


def raw_bytes(config: Config, num_images: int) -> float:
    """Return what the raw pixels of so many images take on disk, or less: smaller images are not enlarged."""
    return num_images * config.images.shorter_side**2 * BYTES


def same_backbone(one: Backbone, other: Backbone) -> bool:
    """Tell whether two sections are equal but for the file of the weights."""
    return one == other.model_copy(update={"weights": one.weights})


def say_input(config: Config, num_images: int, say: Say) -> None:
    """Say what the backbone takes and what the pixel cache will be; warn where the cache is too small for the model."""
    spec, side, disk = _known_spec(config.backbone), config.images.shorter_side, _disk(config, num_images)
    if spec is None:
        say(f"backbone {config.backbone.name}: its input is known when it is loaded; {disk}")
        return
    say(f"backbone {spec.name}: {spec.image_size} px input{_patches(spec)}; {disk}")
    if side < visible_side(spec):
        say(
            f"warning: images.cache_size is {side}, but the backbone sees {visible_side(spec)} px of the shorter side: "
            "it would get enlarged images at the cost of sharp ones; set images.cache_size=auto, or a smaller "
            "backbone.image_size"
        )


def _disk(config: Config, num_images: int) -> str:
    """Return in words what the pixel cache will take."""
    form, raw = config.images.form, raw_bytes(config, num_images)
    if form == "none":
        return f"no pixels are kept (images.cache is none): the {num_images} originals are decoded at each reading"
    keeps = f"the pixel cache keeps {config.images.shorter_side} px of an image's shorter side"
    as_jpeg = readable_size(raw * JPEG_SHARE)
    if form == "jpeg":
        return f"{keeps} as JPEG, about {as_jpeg} or less (images.cache is jpeg; raw: {readable_size(raw)})"
    less = f"; jpeg: {as_jpeg}" if raw > MOST_RAW_BYTES else ""
    return f"{keeps}, about {readable_size(raw)} or less (images.cache is raw{less})"


def _patches(spec: BackboneSpec) -> str:
    patch = patch_size(spec.name, spec.options) if not spec.module else None
    if patch is None or spec.image_size < patch:
        return ""
    number, usual = (spec.image_size // patch) ** 2, (USUAL_SIZE // patch) ** 2
    more = f", {number / usual:.1f} times those at {USUAL_SIZE} px" if number > usual > 0 else ""
    return f", {number} patches{more}"


def readable_size(num_bytes: float) -> str:
    """Return a number of bytes in words, such as ``88 MB``."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _known_spec(settings: Backbone) -> BackboneSpec | None:
    """Return the specification of a backbone; None where the source does not tell it, or would have it refused."""
    try:
        return _declared_spec(settings)
    except BackboneError:
        return None


def _declared_spec(settings: Backbone) -> BackboneSpec | None:
    """Return the specification by what timm's source says; None where it says nothing of the model's input."""
    if settings.module is not None:
        return own_module_spec(
            settings.module,
            image_size=settings.image_size,
            crop_fraction=settings.crop_fraction,
            mean=settings.mean,
            std=settings.std,
            options=settings.options,
        )
    found = declared(settings.name)
    if found is None or found.weights is None:
        return None
    return resolve_spec(
        settings.name,
        found.weights,
        image_size=settings.image_size,
        crop_fraction=settings.crop_fraction,
        mean=settings.mean,
        std=settings.std,
        options=settings.options,
    )
