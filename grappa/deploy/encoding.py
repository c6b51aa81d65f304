"""Items to embeddings: paths, PIL images, arrays and tensors, read by threads ahead of the model's batches.

Shapes: N items, B batch, D width, S side of the model's input.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from numbers import Integral
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from grappa.backbone.spec import BackboneSpec
from grappa.core.devices import moved, staged
from grappa.core.printing import sentence, shown
from grappa.images.decoding import ImageDecodeError, image_to_rgb
from grappa.images.files import ERRORS_OF_THE_FILE, ListedFile, RejectedFileError, decode_file
from grappa.images.paths import escape_path, show, size_of
from grappa.images.transforms import normalize

T = TypeVar("T")
R = TypeVar("R")
Item = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
Errors = Literal["raise", "mask"]
Report = bool | Callable[[int, int | None], None]

BATCH = 64  # items a forward pass; another number may round otherwise
MAX_PIXELS = 100_000_000  # a larger image is refused as a decompression bomb
_NO_BOX = (float("nan"),) * 4
_MOST_THREADS = 8


class ItemError(ValueError):
    """An item that cannot be used as an image; the message names the item and says why."""


class Encoder(Protocol):
    """What is asked of a model: how it crops an image, and its forward pass."""

    @property
    def spec(self) -> BackboneSpec: ...

    @property
    def embedding_dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def cache_size(self) -> int: ...

    def crop(self, image: NDArray[np.uint8]) -> Tensor: ...

    def __call__(self, images: Tensor) -> Tensor: ...


# ---------------------------------------------------------------- one item


def prepared(model: Encoder, item: Item, max_pixels: int) -> Tensor:
    """Return an item as the model's input (3, S, S) float32, on the CPU; ItemError, which does not name it.

    A path, a PIL image, an (H, W, 3) uint8 array and a (3, H, W) uint8 tensor are images; a floating-point tensor
    (3, S, S) is what this function returned, and is passed on.
    """
    if isinstance(item, Tensor) and item.is_floating_point():
        return _checked(model, item)
    try:
        pixels = _pixels(model, item, max_pixels)
    except (ImageDecodeError, RejectedFileError) as error:
        raise ItemError(str(error)) from error
    return normalize(model.crop(pixels).unsqueeze(0), model.spec.mean, model.spec.std)[0]


def _checked(model: Encoder, tensor: Tensor) -> Tensor:
    side = model.spec.image_size
    if tensor.shape != (3, side, side):
        raise ItemError(
            f"a floating-point tensor of shape {tuple(tensor.shape)}; expected (3, {side}, {side}), normalised as "
            "preprocess() does"
        )
    if not bool(tensor.isfinite().all()):
        raise ItemError("a tensor that holds NaN or infinity")
    return tensor.detach().float().cpu()


def _pixels(model: Encoder, item: Item, max_pixels: int) -> NDArray[np.uint8]:
    """Return an item as (H, W, 3) uint8 RGB, upright."""
    if isinstance(item, str | os.PathLike):
        return _read(item, model.cache_size, max_pixels)
    if isinstance(item, Image.Image):
        return _drawn(item, max_pixels)
    array = item.permute(1, 2, 0).cpu().numpy() if isinstance(item, Tensor) and item.ndim == 3 else item
    fits = isinstance(array, np.ndarray) and array.ndim == 3 and array.shape[2] == 3 and array.size > 0
    if fits and array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    raise ItemError(
        f"{_kind(item)}; expected a path, a PIL image, an (H, W, 3) uint8 array, a (3, H, W) uint8 tensor, or a "
        "floating-point tensor of preprocess()"
    )


def _read(path: str | os.PathLike[str], cache_size: int, max_pixels: int) -> NDArray[np.uint8]:
    file = os.fspath(path)
    listed = ListedFile(escape_path(file), 0, "", _NO_BOX, size_of(file))
    try:
        return decode_file(listed, "", cache_size=cache_size, max_pixels=max_pixels).pixels
    except ValueError as error:  # also a path that no file can have
        raise error if isinstance(error, RejectedFileError) else ItemError(sentence(error)) from error
    except OSError as error:
        if error.errno in (*ERRORS_OF_THE_FILE, errno.EINVAL):
            raise ItemError(f"unreadable: {error.strerror}") from error
        raise


def _drawn(image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    if image.width * image.height > max_pixels:
        raise ItemError(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels}")
    if not image.width * image.height:
        raise ItemError(f"an image of {image.width} x {image.height} pixels")
    try:
        return image_to_rgb(image)
    except (ImageDecodeError, MemoryError):
        raise
    except Exception as error:  # an image that is read only now raises whatever a broken file makes PIL raise
        raise ItemError(f"truncated or broken image: {sentence(error, limit=200)}") from error


def _kind(item: object) -> str:
    if isinstance(item, np.ndarray | Tensor):
        return (
            f"{'an array' if isinstance(item, np.ndarray) else 'a tensor'} of shape {tuple(item.shape)}, {item.dtype}"
        )
    return f"{shown(item)} (a {type(item).__name__})"


def is_single(items: object) -> bool:
    """Tell whether something is one item, and not several."""
    if isinstance(items, str | os.PathLike | Image.Image):
        return True
    return isinstance(items, np.ndarray | Tensor) and items.ndim == 3


def named(item: object, number: int) -> str:
    """Return how an item is named in an error: its place, and its path where it has one."""
    path = item if isinstance(item, str | os.PathLike) else getattr(item, "filename", "")
    return f"item {number} ({show(os.fspath(path))})" if path else f"item {number}"


# ---------------------------------------------------------------- many items


def encode(
    model: Encoder,
    items: Iterable[Item],
    *,
    batch_size: int = BATCH,
    progress: Report = False,
    errors: Errors = "raise",
    max_pixels: int = MAX_PIXELS,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return embeddings (N, D) float32 and which items could be used, (N,) bool; the rows of the others are NaN.

    ``GrappaModel.encode`` says what the arguments are.
    """
    try:
        iter(items)
    except TypeError:
        raise ItemError(f"found {type(items).__name__}, expected images: paths, PIL images, arrays, tensors") from None
    if not isinstance(batch_size, Integral) or batch_size < 1 or errors not in ("raise", "mask"):
        wanted = "expected a whole number of 1 or more, and raise or mask"
        raise ValueError(f"batch_size is {batch_size!r}, errors is {errors!r}; {wanted}")
    total = len(items) if isinstance(items, Sequence | np.ndarray | Tensor) else None
    rows = [np.empty((0, model.embedding_dim), np.float32)]
    usable = [np.empty(0, np.bool_)]
    problems: list[str] = []

    def prepare(item: Item) -> tuple[Item, Tensor | ItemError]:
        try:
            return item, prepared(model, item, max_pixels)
        except ItemError as error:
            return item, error

    with _reporting(progress, total) as report:
        for found in prepared_ahead(prepare, items, batch_size):
            inputs, mask = _usable(found, sum(map(len, usable)), problems, errors)
            rows.append(_embedded(model, inputs, mask))
            usable.append(mask)
            report(sum(map(len, usable)), total)
    if problems:
        number = sum(map(len, usable))
        warnings.warn(f"{len(problems)} of {number} items cannot be used; first: {problems[0]}", stacklevel=3)
    return np.concatenate(rows), np.concatenate(usable)


def forward(model: Encoder, inputs: Sequence[Tensor]) -> NDArray[np.float32]:
    """Return the embeddings (B, D) float32 of inputs (3, S, S), each as ``prepared`` returns it."""
    with torch.inference_mode():
        batch = moved(staged(torch.stack(list(inputs)), model.device), model.device)
        found: NDArray[np.float32] = model(batch).float().cpu().numpy()
    if not np.isfinite(found).all():
        raise ValueError("the model gave NaN or infinity: its numbers are too small a type for it; use float32")
    return found


def prepared_ahead(
    prepare: Callable[[T], R], items: Iterable[T], batch_size: int, *, num_threads: int | None = None
) -> Iterator[list[R]]:
    """Yield ``prepare`` of the items in their order, in batches; threads prepare a batch ahead.

    num_threads: None: as many as there are processors, 8 at most.
    """
    pool = ThreadPoolExecutor(num_threads or min(_MOST_THREADS, os.cpu_count() or 1), "decode")
    try:
        waiting: deque[list[Future[R]]] = deque()
        remaining = iter(items)
        while part := list(islice(remaining, batch_size)):
            waiting.append([pool.submit(prepare, item) for item in part])
            if len(waiting) > 1:
                yield [each.result() for each in waiting.popleft()]
        for last in waiting:
            yield [each.result() for each in last]
    finally:
        pool.shutdown(cancel_futures=True)


def _usable(
    found: Sequence[tuple[Item, Tensor | ItemError]], start: int, problems: list[str], errors: Errors
) -> tuple[list[Tensor], NDArray[np.bool_]]:
    inputs: list[Tensor] = []
    mask = np.zeros(len(found), np.bool_)
    for number, (item, each) in enumerate(found):
        if isinstance(each, Tensor):
            inputs.append(each)
            mask[number] = True
            continue
        problem = f"{named(item, start + number)}: {each}"
        if errors == "raise":
            raise ItemError(f"{problem}; leave it out, or pass errors='mask'") from each
        problems.append(problem)
    return inputs, mask


def _embedded(model: Encoder, inputs: Sequence[Tensor], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    rows = np.full((len(mask), model.embedding_dim), np.nan, np.float32)
    if len(inputs):
        rows[mask] = forward(model, inputs)
    return rows


@contextmanager
def _reporting(progress: Report, total: int | None) -> Iterator[Callable[[int, int | None], Any]]:
    """Give a function that is told the number of items done and of all items (None: unknown)."""
    if callable(progress):
        yield progress
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="images", disable=not progress) as bar:
        yield lambda done, _: bar.update(done - bar.n)
