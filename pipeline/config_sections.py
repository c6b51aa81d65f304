"""The first sections of the configuration: images, the frozen backbone and what it finds. Use ``pipeline.config``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Precision = Literal["auto", "float32", "bfloat16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
CropFraction = Annotated[float, Field(gt=0.0, le=1.0)]
Triple = tuple[float, float, float]
PositiveTriple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class Section(BaseModel):
    """A frozen group of fields; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def provenance(default: Any, description: str) -> Any:
    """Return a field that is written down but is no part of any recipe."""
    return Field(default=default, description=description, json_schema_extra={"identity": False})


class Images(Section):
    sources: tuple[str, ...] = provenance((), "folders (DOMAIN/...) or tables (.csv, .parquet) of images")
    protocol: Literal["as_given", "closed_set"] = provenance(
        "as_given",
        "who is tested: the given split; closed_set: half of each train class's images, the given test left out",
    )
    protocol_seed: NonNegativeInt = provenance(0, "closed_set: seed of the halves")
    cache_size: PositiveInt = Field(256, description="pixels of the shorter side kept in the pixel cache")
    max_rejected: Fraction = provenance(0.05, "share of unreadable files above which the stage stops")
    max_pixels: PositiveInt = Field(100_000_000, description="a larger image is refused as a decompression bomb")
    shard_size: PositiveInt = Field(1024, description="images a file of the pixel cache; the unit of resuming")


class Backbone(Section):
    name: str = Field("vit_small_patch16_224.dino", description="a timm VisionTransformer with a class token")
    weights: str | None = provenance(None, "a .safetensors file or a state dict; null: the hub's weights")
    image_size: PositiveInt | None = Field(None, description="pixels of the square input; null: the model's own")
    crop_fraction: CropFraction | None = Field(
        None, description="share of the shorter side seen; null: the model's own"
    )
    mean: Triple | None = Field(None, description="channel means of the input, 0-1; null: the model's own")
    std: PositiveTriple | None = Field(None, description="channel deviations of the input, 0-1; null: the model's own")
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="further arguments for timm.create_model, such as {depth: 6}"
    )


class Features(Section):
    precision: Precision = Field("auto", description="auto: bfloat16 where the device has it in hardware")


class Neighbors(Section):
    num_neighbors: PositiveInt = Field(10, description="nearest train images kept for each image")


class Clusters(Section):
    num_clusters: str | tuple[PositiveInt, ...] = Field(
        "auto", description="the pseudo-granularities; auto: 4 (auto:7: 7) geometric values, N/64 to N/3 of N images"
    )
    view: Literal["images", "objects"] = provenance(
        "images", "whose features are clustered: the images', or those of their object views (see objects)"
    )
    num_iterations: PositiveInt = Field(20, description="iterations of spherical k-means")
    seed: NonNegativeInt = Field(0, description="seed of the initial centroids")

    @field_validator("num_clusters")
    @classmethod
    def _ascending(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str):
            if not re.fullmatch(r"auto(:([1-9]|1[0-6]))?", value):
                raise ValueError(f"found {value!r}; give auto, auto:7 (any number up to 16) or numbers as [64, 512]")
            return value
        if not value or min(value) < 2 or len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}; give one or more different numbers, each at least 2")
        return tuple(sorted(value))


class Objects(Section):
    provider: Literal["none", "backbone", "columns", "grounding_dino", "random"] = Field(
        "none",
        description="who finds the objects: the backbone, the table's boxes, a detector; random: the control",
    )
    min_confidence: Fraction = Field(0.3, description="a box of less confidence is refused: the image stays whole")
    min_area: Fraction = Field(0.02, description="a smaller box is refused; share of the image's area")
    max_area: Fraction = Field(0.9, description="a larger box is refused; share of the image's area")
    enlargement: Annotated[float, Field(ge=1.0, le=4.0)] = Field(
        1.1, description="the object view's sides, as a multiple of the box's"
    )
    max_aspect: Annotated[float, Field(ge=1.0)] = Field(
        4 / 3, description="a view's longer side over its shorter one, at most; the shorter one grows"
    )
    model: str | None = provenance(
        None, "grounding_dino: a name on the hub, or a folder with config.json and model.safetensors"
    )
    prompt: str = Field("an object.", description="grounding_dino: what to look for, phrases that end in a full stop")
    seed: NonNegativeInt = Field(0, description="random: seed of the boxes")

    @model_validator(mode="after")
    def _leaves_room(self) -> Objects:
        if self.min_area >= self.max_area:
            raise ValueError(f"min_area is {self.min_area:g} and max_area {self.max_area:g}; give a larger max_area")
        return self
