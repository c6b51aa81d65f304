"""Every format and mode gives the expected colors; everything else a plain reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from grappa.images import decoding
from grappa.images.decoding import ImageDecodeError, decode_image, shrink

LIMIT = 10**6
RED, BLUE, GRAY = (200, 30, 60), (20, 40, 220), (90, 90, 90)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(left: Any, right: Any, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (48, 32), right)
    image.paste(left, (0, 0, 24, 32))
    return image


def two_colors(pixels: np.ndarray) -> tuple[list[int], list[int]]:
    return pixels[16, 12].tolist(), pixels[16, 36].tolist()


def decode(data: bytes) -> np.ndarray:
    return decode_image(data, max_pixels=LIMIT)


def cmyk(red: int, green: int, blue: int) -> tuple[int, int, int, int]:
    return 255 - red, 255 - green, 255 - blue, 0


def palette(transparent: bool = False) -> tuple[Image.Image, dict[str, Any]]:
    image = Image.new("P", (48, 32), 1)
    image.putpalette([*RED, *BLUE])
    image.paste(0, (0, 0, 24, 32))
    return image, {"transparency": bytes([255, 0])} if transparent else {}


def sixteen(left: int, right: int) -> Image.Image:
    samples = np.full((32, 48), right, dtype=np.uint16)
    samples[:, :24] = left
    return Image.fromarray(samples)


def png_rgb16(left: tuple[int, ...], right: tuple[int, ...]) -> bytes:
    samples = np.empty((32, 48, 3), dtype=">u2")
    samples[:, :24], samples[:, 24:] = left, right
    rows = b"".join(b"\0" + row.tobytes() for row in samples)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


WHITE, BLACK = [255, 255, 255], [0, 0, 0]
HALF_RED = [227, 142, 157]  # RED at half opacity over white: (200 * 128 + 255 * 127) / 255, ...
OPAQUE_AND_CLEAR = halves((*RED, 255), (*BLUE, 0), "RGBA")
SHADED = halves((*RED, 128), (*BLUE, 255), "RGBA")

# name -> (bytes, expected left, expected right, tolerance)
CASES: dict[str, tuple[bytes, Any, Any, int]] = {
    "JPEG": (encoded(halves(RED, BLUE), "JPEG", quality=95), RED, BLUE, 3),
    "JPEG progressive": (encoded(halves(RED, BLUE), "JPEG", quality=95, progressive=True), RED, BLUE, 3),
    "JPEG gray": (encoded(halves(90, 200, "L"), "JPEG", quality=95), GRAY, (200,) * 3, 3),
    "JPEG CMYK": (encoded(halves(cmyk(*RED), cmyk(*BLUE), "CMYK"), "JPEG", quality=95), RED, BLUE, 4),
    "PNG": (encoded(halves(RED, BLUE), "PNG"), RED, BLUE, 0),
    "PNG gray": (encoded(halves(90, 200, "L"), "PNG"), GRAY, (200,) * 3, 0),
    "PNG bits": (encoded(halves(1, 0, "1"), "PNG"), WHITE, BLACK, 0),
    "PNG alpha": (encoded(OPAQUE_AND_CLEAR, "PNG"), RED, WHITE, 0),
    "PNG half alpha": (encoded(SHADED, "PNG"), HALF_RED, BLUE, 1),
    "PNG gray alpha": (encoded(halves((90, 255), (90, 0), "LA"), "PNG"), GRAY, WHITE, 0),
    "PNG palette": (encoded(palette()[0], "PNG"), RED, BLUE, 0),
    "PNG palette transparent": (encoded(palette()[0], "PNG", **palette(True)[1]), RED, WHITE, 0),
    "PNG transparent color": (encoded(halves(RED, BLUE), "PNG", transparency=BLUE), RED, WHITE, 0),
    "PNG gray 16": (encoded(sixteen(90 * 256 + 7, 65535), "PNG"), GRAY, WHITE, 0),
    "PNG gray 16 transparent": (encoded(sixteen(90 * 256, 512), "PNG", transparency=512), GRAY, WHITE, 0),
    "PNG RGB 16": (png_rgb16((51400, 7710, 15420), (5140, 10280, 56540)), RED, BLUE, 0),
    "WebP": (encoded(halves(RED, BLUE), "WEBP", lossless=True), RED, BLUE, 0),
    "WebP lossy": (encoded(halves(RED, BLUE), "WEBP", quality=95), RED, BLUE, 6),
    "WebP alpha": (encoded(OPAQUE_AND_CLEAR, "WEBP", lossless=True), RED, WHITE, 0),
    "BMP": (encoded(halves(RED, BLUE), "BMP"), RED, BLUE, 0),
    "BMP palette": (encoded(palette()[0], "BMP"), RED, BLUE, 0),
    "BMP bits": (encoded(halves(1, 0, "1"), "BMP"), WHITE, BLACK, 0),
    "TIFF": (encoded(halves(RED, BLUE), "TIFF"), RED, BLUE, 0),
    "TIFF deflate": (encoded(halves(RED, BLUE), "TIFF", compression="tiff_deflate"), RED, BLUE, 0),
    "TIFF CMYK": (encoded(halves(cmyk(*RED), cmyk(*BLUE), "CMYK"), "TIFF"), RED, BLUE, 1),
    "TIFF alpha": (encoded(OPAQUE_AND_CLEAR, "TIFF"), RED, WHITE, 0),
    "TIFF palette": (encoded(palette()[0], "TIFF"), RED, BLUE, 0),
    "TIFF bits": (encoded(halves(1, 0, "1"), "TIFF"), WHITE, BLACK, 0),
    "TIFF gray 16": (encoded(sixteen(90 * 256 + 7, 65535), "TIFF"), GRAY, WHITE, 0),
    "PNG gray 12 in 16": (encoded(sixteen(90 * 16 + 7, 4095), "PNG"), GRAY, WHITE, 0),
    "PNG gray 10 in 16": (encoded(sixteen(90 * 4, 1023), "PNG"), GRAY, WHITE, 0),
    "TIFF gray 12 in 16": (encoded(sixteen(90 * 16, 4095), "TIFF"), GRAY, WHITE, 0),
    "TIFF gray 12 in 16 inverted": (encoded(sixteen(165 * 16, 4095), "TIFF", tiffinfo={262: 0}), GRAY, BLACK, 0),
    "PNG gray 8 in 16": (encoded(sixteen(90, 255), "PNG"), GRAY, WHITE, 0),
    "PNG black 16": (encoded(sixteen(0, 0), "PNG"), BLACK, BLACK, 0),
    "GIF": (encoded(palette()[0], "GIF"), RED, BLUE, 0),
    "GIF transparent": (encoded(palette()[0], "GIF", transparency=1), RED, WHITE, 0),
    "GIF gray": (encoded(halves(90, 200, "L"), "GIF"), GRAY, (200,) * 3, 0),
    "JPEG 2000": (encoded(halves(RED, BLUE), "JPEG2000"), RED, BLUE, 0),
    "JPEG 2000 gray": (encoded(halves(90, 200, "L"), "JPEG2000"), GRAY, (200,) * 3, 0),
    "JPEG 2000 alpha": (encoded(OPAQUE_AND_CLEAR, "JPEG2000"), RED, WHITE, 0),
    "JPEG 2000 gray 16": (encoded(sixteen(90 * 256 + 7, 65535), "JPEG2000"), GRAY, WHITE, 0),
    "TIFF gray 16 inverted": (encoded(sixteen(165 * 256, 0), "TIFF", tiffinfo={262: 0}), GRAY, WHITE, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_every_format_and_mode_gives_the_expected_colors(name: str) -> None:
    data, left, right, tolerance = CASES[name]
    pixels = decode(data)
    assert (pixels.shape, pixels.dtype) == ((32, 48, 3), np.uint8)
    np.testing.assert_allclose(two_colors(pixels), (left, right), atol=tolerance, rtol=0)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_has_it() -> None:
    data = encoded(halves(RED, BLUE), "AVIF", quality=100, subsampling="4:4:4")
    np.testing.assert_allclose(two_colors(decode(data)), (RED, BLUE), atol=4)
    with pytest.raises(ImageDecodeError, match="truncated or broken|not an image"):
        decode(data[: len(data) // 2])


def heic(image: Image.Image, **options: Any) -> bytes:
    """A picture as phones take it; skips where the package of the extra is not installed."""
    pytest.importorskip("pillow_heif", reason="pillow-heif (extra heic) is not installed").register_heif_opener()
    return encoded(image, "HEIF", quality=100, chroma=444, **options)


def test_heic_is_read_where_its_package_is() -> None:
    np.testing.assert_allclose(two_colors(decode(heic(halves(RED, BLUE)))), (RED, BLUE), atol=4)
    turned = Image.Exif()
    turned[274] = 6
    assert decode(heic(halves(RED, BLUE), exif=turned.tobytes())).shape == (48, 32, 3)


def test_without_its_package_heic_is_refused_with_the_way_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_known_formats", lambda: ("JPEG", "PNG"))
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(ImageDecodeError, match=r"an image in HEIC format: .* `pip install 'grappa-retrieval\[heic\]'`"):
        decode(data)


@pytest.mark.parametrize(("highest", "noted"), [(255, True), (4095, True), (4096, False), (65535, False)])
def test_that_a_gray_image_was_scaled_by_its_own_range_is_noted(highest: int, noted: bool) -> None:
    notes: list[str] = []
    decode_image(encoded(sixteen(7, highest), "PNG"), max_pixels=LIMIT, notes=notes)
    assert notes == ([decoding.TWELVE_BITS] if noted else [])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = np.zeros((32, 64, 3), dtype=np.uint8)
    upright[:16, :32], upright[:16, 32:], upright[16:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {  # the transformation that the viewer's one undoes
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    pixels = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert pixels.shape == (32, 64, 3)
    assert np.abs(pixels.astype(int) - upright).max() <= 12


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_of_several_frames_the_first_is_used(kind: str) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames = [halves(BLUE, RED), halves(GRAY, RED)]
    data = encoded(halves(RED, BLUE), kind, save_all=True, append_images=frames, **lossless)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert two_colors(decode(data)) == (list(RED), list(BLUE))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_counts_as_none() -> None:
    data = encoded(halves(RED, BLUE), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    np.testing.assert_allclose(two_colors(decode(data)), (RED, BLUE), atol=3)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_a_truncated_image_is_refused(kind: str, keep: float) -> None:
    data = encoded(Image.fromarray(NOISE), kind)
    assert decode(data).shape == (64, 64, 3)
    with pytest.raises(ImageDecodeError, match="truncated or broken|not an image"):
        decode(data[: int(len(data) * keep)])


def test_empty_foreign_and_unranged_data_are_refused_with_the_reason() -> None:
    floating = Image.fromarray(np.zeros((8, 8), dtype=np.float32))
    with pytest.raises(ImageDecodeError, match="empty file"):
        decode(b"")
    with pytest.raises(ImageDecodeError, match="not an image in JPEG"):
        decode(b"path,domain\n" * 20)
    with pytest.raises(ImageDecodeError, match="not an image in JPEG"):
        decode(encoded(halves(0, 1, "L"), "ICO"))
    with pytest.raises(ImageDecodeError, match="32 bits"):
        decode(encoded(floating, "TIFF"))


def test_a_broken_checksum_is_refused() -> None:
    data = bytearray(encoded(Image.fromarray(NOISE), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageDecodeError, match="truncated or broken"):
        decode(bytes(data))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (4000, 4000)), "PNG")
    assert len(data) < 10_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        ImageDecodeError, match="decompression bomb: 4000 x 4000 pixels, more than the limit of 1000000"
    ):
        decode(data)


def test_beyond_pils_own_limit_ours_alone_counts() -> None:
    header = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    header[16:24] = struct.pack(">II", 2**14, 2**14)
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    for limit in (10**6, 10**8, 2**28 - 1):
        with pytest.raises(ImageDecodeError, match=f"decompression bomb: .*, more than the limit of {limit}"):
            decode_image(bytes(header), max_pixels=limit)
    with pytest.raises(ImageDecodeError, match="truncated"):
        decode_image(bytes(header), max_pixels=2**28)


def test_shrink_keeps_the_aspect_and_never_enlarges() -> None:
    image = np.arange(60 * 90 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 90, 3)
    assert shrink(image, 20).shape == (20, 30, 3)
    assert shrink(image.transpose(1, 0, 2), 20).shape == (30, 20, 3)
    assert shrink(image, 60) is image
    assert shrink(image[:10], 20).shape == (10, 90, 3)


def test_shrink_averages_instead_of_picking_pixels() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    small = shrink(stripes, 16)
    assert np.abs(small[:, 2:-2].astype(int) - 100).max() <= 8
