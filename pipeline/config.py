"""The configuration: one frozen section a stage, checked before anything runs.

A field whose ``identity`` is False (paths, worker counts) never enters a recipe; every other field does, for the stages
that list it in ``pipeline.stages``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from pipeline.config_sections import (
    Backbone,
    Clusters,
    Features,
    Fraction,
    Images,
    Neighbors,
    Objects,
    Precision,
    Section,
    provenance,
)
from pipeline.config_training import Adaptors, Augmented, Fusion, Student

__all__ = [
    "Adaptors",
    "Augmented",
    "Backbone",
    "Clusters",
    "Features",
    "Fusion",
    "Images",
    "Neighbors",
    "Objects",
    "Section",
    "Student",
]

ExtraRow = Literal["concat", "multi_head", "supervised", "zero_shot_objects", "adapted_objects"]


class Embeddings(Section):
    precision: Precision = Field("auto", description="auto: bfloat16 where the device has it in hardware")
    whitening_power: Fraction = Field(0.5, description="strength of zero_shot_whitened: 0 none, 1 full PCA whitening")


class Heads(Section):
    kind: Literal["none", "whitening", "neighborhood"] = Field(
        "neighborhood", description="the last step of every adapted model, fitted without labels (see grappa.head)"
    )
    num_centroids: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto", description="neighborhood: centroids of the train embeddings; auto: a third of the images, at most 4096"
    )
    perplexity: Annotated[float, Field(gt=1.0)] = Field(
        10.0, description="neighborhood: centroids an image is near to; few centroids lower it to their middle"
    )
    deviation_power: Fraction = Field(0.5, description="strength of the whitening: 0 none, 1 full")
    neighborhood_weight: NonNegativeFloat = Field(
        1.0, description="neighborhood: weight of where an image lies beside how it differs from what lies there"
    )
    num_iterations: PositiveInt = Field(20, description="neighborhood: iterations of spherical k-means")
    seed: NonNegativeInt = Field(0, description="neighborhood: seed of the initial centroids")


class Model(Section):
    source: Literal["fused", "student", "single"] = provenance(
        "fused",
        "what is deployed and searched: the fused sets; the student; single: the only set, neither of them is trained",
    )


class Evaluation(Section):
    seed: NonNegativeInt = Field(0, description="seed of the hash that breaks ties")
    extra_rows: tuple[ExtraRow, ...] = provenance(
        (),
        "further rows: concat, multi_head, supervised (train labels), zero_shot_objects, adapted_objects (crops)",
    )

    @field_validator("extra_rows")
    @classmethod
    def _once(cls, value: tuple[ExtraRow, ...]) -> tuple[ExtraRow, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}; give each row once")
        return value


class Index(Section):
    rows: Literal["all", "train", "test"] = Field("all", description="the images that can be found")
    ivf_above: PositiveInt = Field(1_000_000, description="more rows than this get an inverted-file index")


class Compute(Section):
    """Where and how fast, never what: no field here is part of a recipe."""

    device: Literal["auto", "cpu", "cuda"] = provenance("auto", "auto: a GPU if there is one")
    num_threads: NonNegativeInt = provenance(0, "CPU threads of torch; 0: all cores (shared by the processes of a run)")
    num_workers: NonNegativeInt = provenance(0, "threads that decode and crop images; 0: all cores (likewise)")
    inference_batch_size: PositiveInt = provenance(64, "images a forward pass without gradients")
    checkpoint_seconds: PositiveFloat = provenance(60.0, "time between two checkpoints")


PERCEIVED = ("object_weight", "transfer_weight", "background_weight")


class Config(Section):
    """The whole configuration of a run."""

    images: Images = Images()
    backbone: Backbone = Backbone()
    features: Features = Features()
    neighbors: Neighbors = Neighbors()
    objects: Objects = Objects()
    clusters: Clusters = Clusters()
    adaptors: Adaptors = Adaptors()
    fusion: Fusion = Fusion()
    student: Student = Student()
    embeddings: Embeddings = Embeddings()
    heads: Heads = Heads()
    model: Model = Model()
    evaluation: Evaluation = Evaluation()
    index: Index = Index()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _can_train_the_fusion(self) -> Config:
        if self.fusion.num_neighbors > self.neighbors.num_neighbors:
            raise ValueError(
                f"fusion.num_neighbors is {self.fusion.num_neighbors} but neighbors.num_neighbors keeps "
                f"{self.neighbors.num_neighbors}; raise the latter"
            )
        if self.fusion.attention_loss == "none" and self.fusion.barlow_weight == 0:
            raise ValueError("fusion.attention_loss is none and fusion.barlow_weight 0: nothing to train; set one")
        return self

    @model_validator(mode="after")
    def _has_one_set(self) -> Config:
        if self.adaptors.supervision == "labels" and self.model.source != "single":
            raise ValueError(
                f"adaptors.supervision is labels, which makes one adaptor set, and model.source {self.model.source}; "
                "set model.source=single"
            )
        if self.model.source != "single":
            return self
        needless = [name for name in ("concat", "multi_head") if name in self.evaluation.extra_rows]
        if needless or "views" in self.fusion.pairs:
            what = f"evaluation.extra_rows asks for {needless[0]}" if needless else "fusion.pairs asks for views"
            raise ValueError(f"model.source is single, but {what}, which several sets have; leave it out")
        values = self.clusters.num_clusters
        if self.adaptors.supervision == "labels" or values == "auto:1" or (values != "auto" and len(values) == 1):
            return self
        raise ValueError(f"model.source is single, but clusters.num_clusters is {values}; give one number, or auto:1")

    @model_validator(mode="after")
    def _has_objects(self) -> Config:
        if self.objects.provider == "grounding_dino" and not self.objects.model:
            raise ValueError("objects.provider is grounding_dino, but objects.model is null; give a hub name or folder")
        weights = [f"adaptors.{name}" for name in PERCEIVED if getattr(self.adaptors, name)]
        shares = ["student.object_share"] if self.student.object_share else []
        rows = [
            f"the row {name}" for name in ("zero_shot_objects", "adapted_objects") if name in self.evaluation.extra_rows
        ]
        views = ["clusters.view=objects"] if self.clusters.view == "objects" else []
        asking = [*weights, *shares, *rows, *views]
        if asking and self.objects.provider == "none":
            raise ValueError(
                f"{asking[0]} needs object views, but objects.provider is none; set it to backbone (or columns, "
                f"grounding_dino, random), or leave {asking[0]} out"
            )
        return self

    @property
    def granularities(self) -> tuple[str, ...]:
        """The names of the pseudo-granularities, ordered by number; none where labels take their place."""
        if self.adaptors.supervision == "labels":
            return ()
        if isinstance(self.clusters.num_clusters, str):
            found = self.clusters.num_clusters
            raise ValueError(f"clusters.num_clusters is still `{found}`; `grappa init RUN` resolves it")
        return tuple(granularity_name(k) for k in self.clusters.num_clusters)


def granularity_name(num_clusters: int) -> str:
    """Return ``k00256`` for 256: "k" and at least five digits."""
    return f"k{num_clusters:05d}"


def num_clusters_of(granularity: str) -> int:
    """Return 256 for ``k00256``."""
    return int(granularity.removeprefix("k"))


def automatic_num_clusters(num_train: int, how: str = "auto") -> tuple[int, ...]:
    """Return 4 (``auto:7``: 7) geometric values from N/64 to N/3, each in 2..N/2, without repeats; N train images >= 4.

    A single value is the geometric middle. 4 values hold those of 2, and 7 those of 4: such runs share their sets.
    """
    count = int(how.partition(":")[2] or 4)
    low, high = max(2.0, num_train / 64), max(2.0, num_train / 3)
    shares = [step / (count - 1) for step in range(count)] if count > 1 else [0.5]
    values = (round(low * (high / low) ** share) for share in shares)
    return tuple(sorted({min(max(2, value), num_train // 2) for value in values}))


def identity_settings(config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    """Return ``{"clusters.seed": 0, ...}`` for sections (``clusters``) and single fields (``clusters.seed``)."""
    settings: dict[str, Any] = {}
    for name in names:
        section_name, _, field_name = name.partition(".")
        section: Section = getattr(config, section_name)
        dumped = section.model_dump(mode="json")
        fields = [field_name] if field_name else [field for field in dumped if is_identity(section, field)]
        settings.update({f"{section_name}.{field}": dumped[field] for field in fields})
    return settings


def is_identity(section: Section, field: str) -> bool:
    """Tell whether a field may enter a recipe."""
    extra = type(section).model_fields[field].json_schema_extra
    return not (isinstance(extra, dict) and extra.get("identity") is False)
