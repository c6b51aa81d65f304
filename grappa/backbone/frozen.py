"""The frozen pretrained model, any timm VisionTransformer with a class token, and how its blocks are adapted.

First comes the backbone, then how it is built and loaded.

Shapes: B batch, T tokens, D width, S image side.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.architectures import create_model
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.vit import is_plain, run_block
from grappa.backbone.weights import BackboneError, hub_state, import_timm, load_state, read_state_dict
from grappa.core.printing import shown

Residual = Callable[[Tensor], Tensor]
Residuals = Sequence[Residual] | nn.ModuleList


class Adaptation(Protocol):
    """What adapts the backbone: in each of two places one residual a block, or no residual at all.

    ``outputs``: (B, T, D) -> (B, T, D), from a block's output to what is added to it. In the last block it gets the
    class token only (T = 1), since no other token is read after it. ``in_context``: (B, T, D) -> (B, T, 2 D), from a
    block's normed input to what is added to its queries and keys.
    """

    @property
    def outputs(self) -> Residuals: ...

    @property
    def in_context(self) -> Residuals: ...


class Backbone(nn.Module):
    """A frozen VisionTransformer whose blocks can be adapted."""

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.model = model.eval()
        self.spec = spec
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        return int(self.model.embed_dim)  # type: ignore[arg-type]

    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the backbone is frozen."""
        return super().train(False)

    def on(self, device: torch.device) -> Backbone:
        """Move to ``device`` and choose its attention: explicit products on a CPU, the fused kernel elsewhere.

        On a CPU the fused kernel's backward pass takes most of a training step (tests/benchmarks: R10).
        """
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = device.type != "cpu"  # type: ignore[assignment]
        return self.to(device)

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens (B, T, D) that the first block gets of (B, 3, S, S) normalised images."""
        model: Any = self.model
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens

    def forward(self, images: Tensor, adaptation: Adaptation | None = None) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, S, S) float, normalised with ``spec.mean`` and ``spec.std``.
            adaptation: an adaptor set, a fusion; None: the plain backbone.

        Returns:
            (B, D) the class token after the final norm, not normalised.

        Raises:
            BackboneError: queries and keys are adapted, and a block's attention is not timm's plain one.
        """
        model: Any = self.model
        outputs, in_context = ((), ()) if adaptation is None else (adaptation.outputs, adaptation.in_context)
        hidden_BTD = self.tokens(images)
        for number, block in enumerate(model.blocks):
            last = number == len(model.blocks) - 1
            hidden_BTD = _run(block, hidden_BTD, in_context[number] if len(in_context) else None, last=last)
            if len(outputs):
                hidden_BTD = hidden_BTD + outputs[number](hidden_BTD)
        embedding: Tensor = model.norm(hidden_BTD[:, 0])
        return embedding


def embed(backbone: Backbone, images: Tensor, adaptation: Adaptation | None = None) -> Tensor:
    """Return (B, D) float32 L2-normalised embeddings of (B, 3, S, S) normalised images."""
    return F.normalize(backbone(images, adaptation).float(), dim=-1)


def build_backbone(spec: BackboneSpec) -> Backbone:
    """Build the architecture with random weights; no file and no network is touched."""
    model = create_model(spec.name, spec.image_size, spec.options, pretrained=False)
    return Backbone(model, spec)


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    image_size: int | None = None,
    crop_fraction: float | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Backbone:
    """Load a pretrained backbone from a file, or from timm's hub when ``weights`` is None.

    Args:
        name: a timm model name; it must be a VisionTransformer with a class token.
        weights: a weight file, a folder of a model, or ``hf-hub:OWNER/NAME`` (`grappa.backbone.weights`); no code of a
            file is run.
        image_size: side of the square input in pixels; positions are resampled. None: the model's own.
        crop_fraction, mean, std: how an image is prepared; None: the model's own.
        options: further arguments of the architecture (``BackboneSpec``), and ``img_size``.
        say: called with what is worth knowing of the weights, such as which tensors of a file were ignored.

    Raises:
        BackboneError: unknown or unsuitable model, hub out of reach, weights that do not fit.
    """
    spec = _resolve_spec(name, image_size, crop_fraction, mean, std, options or {})
    backbone = build_backbone(spec)
    state = hub_state(name) if weights is None else read_state_dict(weights)
    remark = load_state(backbone.model, state, source=name if weights is None else str(weights))
    if say and remark:
        say(remark)
    return backbone


def _resolve_spec(
    name: str,
    image_size: int | None,
    crop_fraction: float | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    options: Mapping[str, Any],
) -> BackboneSpec:
    default = _default_cfg(name)
    own_size = int(options.get("img_size", default["input_size"][-1]))
    return BackboneSpec(
        name=name,
        image_size=image_size or own_size,
        crop_fraction=crop_fraction or float(default["crop_pct"]),
        mean=mean or tuple(default["mean"]),
        std=std or tuple(default["std"]),
        options={key: value for key, value in options.items() if key != "img_size"},
    )


def _default_cfg(name: str) -> dict[str, Any]:
    timm = import_timm()
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models("*vit*"), n=1)
        hint = f"did you mean {close[0]}?" if close else "see timm.list_models()"
        raise BackboneError(f"timm has no model called {shown(name)}; {hint}")
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise BackboneError(f"timm has no weights called {name!r} ({error}); leave out what follows the dot") from error
    record: dict[str, Any] = cfg.to_dict()
    return record


def _run(block: nn.Module, hidden_BTD: Tensor, in_context: Residual | None, *, last: bool) -> Tensor:
    if in_context is None and not (last and is_plain(block)):
        out: Tensor = block(hidden_BTD)
        return out
    if not is_plain(block):
        raise BackboneError(
            "in-context adaptors need timm's plain attention, this backbone has blocks of type "
            f"{type(block).__name__}; set adaptors.kind=bottleneck, or choose another backbone"
        )
    return run_block(block, hidden_BTD, in_context, class_token=last)
