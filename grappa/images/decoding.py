"""From the bytes of an image file to RGB pixels, the same on every machine, or the plain reason against it."""

from __future__ import annotations

import importlib
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from grappa.core.extras import is_installed, missing_sentence

# AVIF is read where Pillow was built with it, HEIF where the package of the extra heic is installed.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "HEIF")
TWELVE_BITS = "12 bits or less in 16, scaled by their own range"
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PILLOWS_PIXELS = 2**30 // 12  # Pillow's default: above it, it warns, above twice as many it refuses
METADATA_BYTES = 64 * 2**20  # of what may lie beside an image's pixels, packed or not
_EXIF_ORIENTATION, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 274, 262, 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageDecodeError(ValueError):
    """The bytes cannot be used as an image; the message is the plain reason, without the file's name."""


def decode_image(data: bytes, *, max_pixels: int, notes: list[str] | None = None) -> NDArray[np.uint8]:
    """Decode an image file of one of ``FORMATS`` to (H, W, 3) uint8 RGB.

    Pillow's own limits do not count: they are ``max_pixels`` and ``METADATA_BYTES`` here, whatever the program has set.
    EXIF orientation is applied (an EXIF block that cannot be read counts as none). Of several frames the first is used.
    Transparency is laid on white; color profiles are ignored. Of 16-bit samples the high byte is kept; where a grey
    image has none above 12 bits, the 8 highest bits that it uses. ``notes`` gets a text where that was so.

    Raises:
        ImageDecodeError: empty, not an image of these formats, truncated or broken, more than ``max_pixels`` pixels
            (found in the header, before decoding), more metadata than ``METADATA_BYTES``, or samples without a known
            range (32-bit, floating point).
    """
    if not data:
        raise ImageDecodeError("empty file")
    try:
        with _own_limits(max_pixels), _open(data, max_pixels) as image:
            return image_to_rgb(image, notes)
    except (ImageDecodeError, MemoryError):
        raise
    except Exception as error:  # a broken file makes PIL raise nearly anything: SyntaxError, struct.error, KeyError ...
        raise ImageDecodeError(_reason(error)) from error


def image_to_rgb(image: Image.Image, notes: list[str] | None = None) -> NDArray[np.uint8]:
    """Return a PIL image as (H, W, 3) uint8 RGB, oriented, on white, of 8 bits, as ``decode_image`` says.

    Raises:
        ImageDecodeError: samples without a known range (32-bit, floating point). A broken file raises what PIL raises.
    """
    image.load()
    return np.array(_oriented(_rgb(image, notes), _orientation(image)))


def shrink(image: NDArray[np.uint8], shorter_side: int) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 to a shorter side of ``shorter_side``, bicubic with antialiasing; never enlarges."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter <= shorter_side:
        return image
    size = (round(width * shorter_side / shorter), round(height * shorter_side / shorter))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


_lock = threading.Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_running: list[int] = []  # max_pixels of each decoding that is under way
_former: list[Any] = []  # the program's own limits meanwhile
_LIMITS = (
    (Image, "MAX_IMAGE_PIXELS"),
    (PngImagePlugin, "MAX_TEXT_CHUNK"),
    (PngImagePlugin, "MAX_TEXT_MEMORY"),
    (ImageFile, "LOAD_TRUNCATED_IMAGES"),
)


@contextmanager
def _own_limits(max_pixels: int) -> Iterator[None]:
    """Let Pillow have our limits, which are variables of its modules; after the last decoding the program's return."""
    with _lock:
        if not _running:
            _former[:] = [getattr(module, name) for module, name in _LIMITS]
        _running.append(max_pixels)
        _set_limits(*_ours())
    try:
        yield
    finally:
        with _lock:
            _running.remove(max_pixels)
            _set_limits(*(_ours() if _running else _former))


def _ours() -> tuple[Any, ...]:
    """Return our values of ``_LIMITS``; below Pillow's default our own check of an image's size is enough."""
    return max(*_running, _PILLOWS_PIXELS), METADATA_BYTES, METADATA_BYTES, False


def _set_limits(*values: Any) -> None:
    for (module, name), value in zip(_LIMITS, values, strict=True):
        setattr(module, name, value)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
    except UnidentifiedImageError:
        raise ImageDecodeError(_unidentified(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = str(error).partition(" exceeds")[0]  # Pillow names twice the limit
        raise ImageDecodeError(f"decompression bomb: {found}, more than the limit of {max_pixels}") from None
    if image.width * image.height > max_pixels:
        raise ImageDecodeError(
            f"decompression bomb: {image.width} x {image.height} pixels, more than the limit of {max_pixels}"
        )
    return image


@cache
def _known_formats() -> tuple[str, ...]:
    """Return those of ``FORMATS`` that are installed."""
    Image.init()
    if is_installed("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unidentified(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and "HEIF" not in _known_formats():
        return f"an image in HEIC format: {missing_sentence('pillow_heif')}, or save it as JPEG"
    return "not an image in JPEG, PNG, WebP, BMP, TIFF, GIF, JPEG 2000, AVIF or HEIC format"


def _rgb(image: Image.Image, notes: list[str] | None) -> Image.Image:
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ImageDecodeError(f"samples of 32 bits (mode {image.mode}) have no known range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _eight_bits(image, notes)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, notes: list[str] | None) -> Image.Image:
    """Return a grey image of 16-bit samples as 8-bit grey, with alpha where one grey value is declared transparent."""
    samples = np.asarray(image).astype(np.uint16)
    num_bits = int(samples.max()).bit_length()
    if num_bits <= 12 and notes is not None:
        notes.append(TWELVE_BITS)
    grey = (samples >> (max(num_bits - 8, 0) if num_bits <= 12 else 8)).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    alpha = np.where(samples == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])


def _oriented(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - an unreadable EXIF block: viewers take no notice of it either
        return 1


def _reason(error: Exception) -> str:
    if "MAX_TEXT" in str(error):
        return f"the texts beside the pixels take more than {METADATA_BYTES} bytes unpacked: save it without them"
    return f"truncated or broken image: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
