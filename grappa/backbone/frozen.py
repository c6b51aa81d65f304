"""The frozen pretrained model, any that timm makes, and how its units are adapted.

The model pools as timm does; adaptors stand beside the outputs of its units (``grappa.backbone.adapting``). The plain
vision transformer with a class token takes a shorter way to the same values (``grappa.backbone.vit``).

Shapes: B batch, T tokens, D width, S image side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.adapting.adapted import Adaptation, Adding, Residual, Residuals, hook, listening
from grappa.backbone.adapting.dry_run import Found, look
from grappa.backbone.adapting.projections import Projection, call_by_module, find_projections
from grappa.backbone.adapting.units import Unit, find_units
from grappa.backbone.architectures import create_model
from grappa.backbone.naming.catalog import name_problem
from grappa.backbone.own_module import Maker, made_by, place_of
from grappa.backbone.spec import BackboneSpec, check_patches, own_module_spec, resolve_spec
from grappa.backbone.unusable import BackboneError
from grappa.backbone.vit import FusedWhereFaster, is_plain, reads_class_token, run_block
from grappa.backbone.weights import hub_state, import_timm, load_state, read_state_dict

__all__ = ["Adaptation", "Backbone", "Residual", "Residuals", "build_backbone", "embed", "load_backbone"]

_WITH_CLASS_TOKEN = tuple(f"timm.models.{name}" for name in ("vision_transformer", "deit", "eva", "beit", "naflexvit"))


class Backbone(nn.Module):
    """A frozen model whose units can be adapted.

    Its embedding is what timm returns for the model's own pooling, before any classifier; of a model that is not
    timm's, what it returns.
    """

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.model = model.eval()
        self.spec = spec
        self.requires_grad_(False)
        call_by_module(model)
        self._may_be_units = find_units(model)
        self._may_be_projections = find_projections(model, self._may_be_units)
        if not self._is_plain():
            hook(
                model, [*self._may_be_units, *(n for each in self._may_be_projections for n in (each.query, each.key))]
            )
        self._found: Found | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """The modules that get an adaptor on their output; BackboneError where the model has none that is known."""
        units = self._seen().units
        if not units:
            raise BackboneError(
                f"no block to adapt is known in {self.spec.name} (a {type(self.model).__name__}); "
                "give its modules' names in an attribute units, or choose another backbone"
            )
        return units

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Where queries and keys are made, in the units; BackboneError where the model has no such place."""
        projections = self._seen().projections
        if not projections:
            raise BackboneError(
                f"{self.spec.name} (a {type(self.model).__name__}) has no linear module that makes queries and keys, "
                "which in-context adaptors need; set adaptors.kind=bottleneck, or choose another backbone"
            )
        return projections

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each unit."""
        return tuple(unit.width for unit in self.units)

    @property
    def embedding_dim(self) -> int:
        """The width of the embedding."""
        return self._seen().embedding_dim

    @property
    def has_class_token(self) -> bool:
        """Whether the first token of every unit is a class token, which the embedding is read from."""
        model: Any = self.model
        if type(model).__module__ not in _WITH_CLASS_TOKEN or model.global_pool != "token":
            return False
        return getattr(getattr(model, "embeds", model), "cls_token", None) is not None

    def _seen(self) -> Found:
        """Return what a dry run shows of the model; a plain vision transformer needs none."""
        if self._found is None:
            model: Any = self.model
            if reads_class_token(model):
                names = (f"blocks.{number}" for number in range(len(model.blocks)))
                units = tuple(Unit(name, model.embed_dim) for name in names)
                self._found = Found(units, self._may_be_projections, model.embed_dim)
            else:
                size = self.spec.image_size
                self._found = look(model, _pooled, size, self._may_be_units, self._may_be_projections)
        return self._found

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the backbone is frozen."""
        return super().train(False)

    def on(self, device: torch.device) -> Backbone:
        """Move to ``device`` and choose its attention: the fused kernel, on a CPU where it is the faster one only.

        What timm itself does not fuse on a CPU stays explicit there.
        """
        for module in self.model.modules():
            if device.type != "cpu" and hasattr(module, "fused_attn"):
                module.fused_attn = True  # type: ignore[assignment]
            elif isinstance(own := getattr(module, "fused_attn", False), FusedWhereFaster) or own:
                module.fused_attn = FusedWhereFaster()  # type: ignore[assignment]
        return self.to(device)

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens (B, T, D) that a plain vision transformer's first block gets of (B, 3, S, S) images."""
        model: Any = self.model
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens

    def forward(self, images: Tensor, adaptation: Adaptation | None = None) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, S, S) float, normalised with ``spec.mean`` and ``spec.std``.
            adaptation: an adaptor set, a fusion; None: the plain backbone.

        Returns:
            (B, D) the pooled embedding before any classifier, not normalised.

        Raises:
            BackboneError: queries and keys are adapted, and the model has no module that makes them; or it has no
                units.
        """
        if self.takes_the_short_way(adaptation):
            return self._class_token(images, adaptation)
        if adaptation is None:
            return _pooled(self.model, images)
        units = self.units if len(adaptation.outputs) else ()
        projections = self.projections if len(adaptation.in_context) else ()
        adding = Adding(adaptation, units, projections, len(images), class_token=self.has_class_token)
        with listening(adding):
            return _pooled(self.model, images)

    def takes_the_short_way(self, adaptation: Adaptation | None) -> bool:
        """Tell whether the model is a vision transformer that is written out here, so that no hook acts."""
        if not reads_class_token(self.model):
            return False
        return adaptation is None or not len(adaptation.in_context) or self._is_plain()

    def _is_plain(self) -> bool:
        """Tell whether no way but the short one is ever taken."""
        model: Any = self.model
        return reads_class_token(model) and all(is_plain(block) for block in model.blocks)

    def _class_token(self, images: Tensor, adaptation: Adaptation | None) -> Tensor:
        """Return what ``forward`` does for a vision transformer that reads its class token."""
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


def _pooled(model: Any, images: Tensor) -> Tensor:
    """Return what the model gives before any classifier: (B, D), if it is a model for images."""
    if not hasattr(model, "forward_head"):
        whole: Tensor = model(images)
        return whole
    pooled: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return pooled


def embed(backbone: Backbone, images: Tensor, adaptation: Adaptation | None = None) -> Tensor:
    """Return (B, D) float32 L2-normalised embeddings of (B, 3, S, S) normalised images."""
    return F.normalize(backbone(images, adaptation).float(), dim=-1)


def build_backbone(spec: BackboneSpec, module: Maker | None = None) -> Backbone:
    """Build the architecture with random weights; no file and no network is touched.

    module: the function that makes a model of a user's own, where the specification names one; nothing is imported or
    run by the specification's word alone. BackboneError where it is needed and None.
    """
    if spec.module:
        if module is None:
            raise BackboneError(f"this backbone is a module made by {spec.module}; give that function as `module`")
        return Backbone(made_by(module), spec)
    model = create_model(spec.name, spec.image_size, spec.options)
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
    module: Maker | None = None,
    say: Callable[[str], None] | None = None,
) -> Backbone:
    """Load a pretrained backbone from a file, or from timm's hub when ``weights`` is None.

    Args:
        name: a timm model name.
        weights: a weight file, a folder of a model, or ``hf-hub:OWNER/NAME`` (`grappa.backbone.weights`); no code of a
            file is run.
        image_size: side of the square input in pixels; positions are resampled. None: the model's own.
        crop_fraction, mean, std: how an image is prepared; None: the model's own.
        options: further arguments of the architecture (``BackboneSpec``), and ``img_size``.
        module: a function, or ``package.module:function``, that makes a torch module of your own instead: from images
            (B, 3, S, S) to features (B, D). ``name`` is then not read; without ``weights`` it has its own.
        say: called with what is worth knowing of the weights, such as which tensors of a file were ignored.

    Raises:
        BackboneError: unknown or unsuitable model, hub out of reach, weights that do not fit.
    """
    given: dict[str, Any] = {"image_size": image_size, "crop_fraction": crop_fraction, "mean": mean, "std": std}
    given["options"] = options
    if module is not None:
        backbone = build_backbone(own_module_spec(place_of(module), **given), module)
        return backbone if weights is None else _with_weights(backbone, read_state_dict(weights), str(weights), say)
    own = _own_input(name)
    spec = resolve_spec(name, own, **given)
    backbone = build_backbone(spec)
    patches: Any = getattr(backbone.model, "patch_embed", None)
    if hasattr(patches, "feat_ratio"):
        check_patches(spec, patches.feat_ratio(), own)
    state = hub_state(name) if weights is None else read_state_dict(weights)
    return _with_weights(backbone, state, name if weights is None else str(weights), say)


def _with_weights(
    backbone: Backbone, state: Mapping[str, Tensor], source: str, say: Callable[[str], None] | None
) -> Backbone:
    remark = load_state(backbone.model, state, source=source)
    if say and remark:
        say(remark)
    return backbone


def _own_input(name: str) -> Any:
    """Return what timm declares of a model's weights, a ``PretrainedCfg``; BackboneError for an unsuitable name."""
    problem = name_problem(name)
    if problem:
        raise BackboneError(problem)
    return import_timm().get_pretrained_cfg(name)


def _run(block: nn.Module, hidden_BTD: Tensor, in_context: Residual | None, *, last: bool) -> Tensor:
    if in_context is None and not (last and is_plain(block)):
        out: Tensor = block(hidden_BTD)
        return out
    return run_block(block, hidden_BTD, in_context, class_token=last)
