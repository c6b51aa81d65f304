"""The models that embed an image of one's own: the deployed one, and the frozen backbone it came from.

Both are loaded once, while the first page is looked at already; an image waits for them.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grappa.pipeline.commands.search import load_run_model
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.store.artifacts import RunFolder, published

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from grappa.backbone.frozen import Backbone
    from grappa.model import GrappaModel


@dataclass(frozen=True)
class Encoded:
    """The embeddings (D,) float32 of an image, and its attention over the granularities (L, G), if the deployed model
    has a fusion."""

    before: NDArray[np.float32]
    after: NDArray[np.float32]
    attention: NDArray[np.float32] | None


class Encoder:
    """Embeds one image at a time."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._loaded: tuple[GrappaModel, Backbone] | None = None

    def load_in_background(self) -> None:
        """Load the models in a thread; what fails there fails again, with its sentence, where an image is encoded."""
        threading.Thread(target=self._try_to_load, name="load models", daemon=True).start()

    def _try_to_load(self) -> None:
        with suppress(Exception):
            self._models()

    def encode(self, image: Image.Image) -> Encoded:
        """Return the embeddings of an image (RGB, upright), by the same steps as `grappa search` and the pipeline."""
        import torch

        model, backbone = self._models()
        with self._lock, torch.inference_mode():
            from grappa.backbone.frozen import embed
            from grappa.deploy.encoding import forward

            pixels = model.preprocess(image).unsqueeze(0)
            before = embed(backbone, pixels).numpy()[0]
            return Encoded(before, forward(model, list(pixels))[0], _attention(model, pixels))

    def _models(self) -> tuple[GrappaModel, Backbone]:
        with self._lock:
            if self._loaded is None:
                self._loaded = load_run_model(self._folder.root), _frozen(self._folder)
            return self._loaded


def _frozen(folder: RunFolder) -> Backbone:
    from grappa.pipeline.opening import backbone_in

    return backbone_in(published(folder, "backbone"), read_config(folder).backbone.module)


def _attention(model: GrappaModel, pixels: Tensor) -> NDArray[np.float32] | None:
    from grappa.method.fusion import FoldedFusion, class_token_attention

    if not isinstance(model.adaptation, FoldedFusion):
        return None
    found: NDArray[np.float32] = class_token_attention(model.backbone, pixels, model.adaptation).numpy()[0]
    return found
