"""Grounding DINO (Liu et al., ECCV 2024), the detector that finds what a text names, through ``transformers``.

An optional extra: nothing here is imported unless ``objects.provider`` asks for it. Weights are read from safetensors
only, and no code that comes with a model is run.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from grappa.backbone.weights import import_timm
from grappa.core.extras import install_command

INSTALL = install_command("objects")


class DetectorError(ValueError):
    """A detector that cannot be had; the sentence says what to do."""


@dataclass(frozen=True)
class Detector:
    """A Grounding DINO with its processor, on a device, and the text that it looks for."""

    model: Any
    processor: Any
    prompt: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


def load_detector(name: str, prompt: str, *, device: torch.device | None = None) -> Detector:
    """Load a Grounding DINO from a folder or from the hub.

    Args:
        name: a folder with config.json, model.safetensors and the processor's files, or a name on the hub.
        prompt: phrases in lower case, each with a full stop at its end: "a bird. a plane."

    Raises:
        DetectorError: ``transformers`` is missing, there is no such model (or no network), it is another architecture,
            or its weights are not in safetensors; or the prompt has no full stop at its end.
    """
    if not prompt.strip().endswith("."):
        raise DetectorError(f"objects.prompt is {prompt!r}; give phrases that end in a full stop, such as `an object.`")
    transformers = _import_transformers()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type != "grounding-dino":
            raise DetectorError(
                f"{name} is a {config.model_type} model and no Grounding DINO; set another objects.model"
            )
        processor = transformers.GroundingDinoProcessor.from_pretrained(name)
        model = transformers.GroundingDinoForObjectDetection.from_pretrained(name, use_safetensors=True)
    except DetectorError:
        raise
    except Exception as error:  # hub clients raise many kinds; all mean the same to a user
        raise DetectorError(
            f"the detector {name} cannot be loaded ({type(error).__name__}: {_first_line(error)}); set objects.model "
            "to a folder that holds config.json, model.safetensors and the processor's files"
        ) from error
    return Detector(model.eval().requires_grad_(False).to(device or "cpu"), processor, prompt.strip().lower())


def _import_transformers() -> Any:
    import_timm()  # makes torchvision importable where its operators do not load
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise DetectorError(
            f"objects.provider is grounding_dino, which needs the package transformers; install it by `{INSTALL}`"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")


def detect(detector: Detector, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the surest box of an image, (5,) float32: x0, y0, x1, y1 as shares of its sides (0-1), and confidence.

    The confidence is the sigmoid of the box's largest logit over the words of the prompt, as in the detector's own
    post-processing. One image at a time: what it gets does not depend on others. Five NaN where the box has no area.

    Args:
        image: (H, W, 3) uint8.
    """
    shown = Image.fromarray(image)  # of an array of three rows the processor would take the rows for channels
    inputs = detector.processor(images=shown, text=detector.prompt, return_tensors="pt").to(detector.device)
    with torch.inference_mode():
        outputs = detector.model(**inputs)
    confidences = outputs.logits[0].float().sigmoid().amax(dim=-1)
    best = int(confidences.argmax())
    x, y, width, height = outputs.pred_boxes[0, best].float().tolist()
    corners = np.clip([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 0, 1)
    if not (corners[0] < corners[2] and corners[1] < corners[3]):
        return np.full(5, np.nan, dtype=np.float32)
    return np.array([*corners, float(confidences[best])], dtype=np.float32)
