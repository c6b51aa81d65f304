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
    CropFraction,
    Features,
    Fraction,
    Images,
    Neighbors,
    Objects,
    Precision,
    Section,
    provenance,
)

__all__ = ["Backbone", "Clusters", "Features", "Images", "Neighbors", "Objects", "Section", "provenance"]

ExtraRow = Literal["concat", "multi_head", "supervised", "zero_shot_objects"]


class Augmented(Section):
    """Views shared by the two training stages; every draw belongs to (seed, stage, instance, epoch, image_id)."""

    min_crop: CropFraction = Field(0.6, description="smallest side of a training crop, as a share of the shorter side")
    flip: Fraction = Field(0.5, description="chance of a mirrored view")
    brightness: Fraction = Field(0.3, description="strength of the brightness change")
    contrast: Fraction = Field(0.3, description="strength of the contrast change")
    saturation: Fraction = Field(0.3, description="strength of the saturation change")
    grayscale: Fraction = Field(0.05, description="chance of a grey view")


class Trained(Augmented):
    """What every training has, AdamW under a warmed-up cosine schedule."""

    num_epochs: PositiveInt = Field(4, description="passes over the train images")
    batch_size: PositiveInt = Field(64, description="images (fusion: pairs) a step")
    learning_rate: PositiveFloat = Field(1e-3, description="peak of the cosine schedule")
    weight_decay: NonNegativeFloat = Field(1e-2, description="AdamW's weight decay on what is trained but the proxies")
    warmup: Fraction = Field(0.1, description="share of the steps in which the rate rises linearly")
    seed: NonNegativeInt = Field(0, description="seed of initial weights, order, partners and views")
    precision: Precision = Field("auto", description="auto: bfloat16 autocast where the device has it in hardware")


class Adaptors(Trained):
    bottleneck_dim: PositiveInt = Field(48, description="width of an adaptor's bottleneck")
    proxy_learning_rate: PositiveFloat = Field(1e-3, description="peak of the class proxies' cosine schedule")
    temperature: PositiveFloat = Field(0.05, description="tau of the normalised softmax")


class Fusion(Trained):
    pairs: tuple[Literal["neighbors", "views"], ...] = provenance(
        ("neighbors",), "the fusions to train: neighbors, and for the ablation views (two views of one image)"
    )
    attention_loss: Literal["mutual_information", "swapped", "none"] = Field(
        "mutual_information", description="how a pair's granularity attentions are led to agree (see grappa.losses)"
    )
    marginal_weight: NonNegativeFloat = Field(
        1.0, description="mutual_information: weight of the mean attention's entropy (keeps all sets in use)"
    )
    sharpness: PositiveFloat = Field(2.0, description="swapped: power by which the partner's attention is sharpened")
    barlow_weight: NonNegativeFloat = Field(0.0, description="weight of Barlow Twins on the pair's fused embeddings")
    barlow_off_diagonal: NonNegativeFloat = Field(3.9e-3, description="Barlow Twins' weight of the off-diagonal terms")
    attention_level: Literal["token", "cls"] = Field(
        "token", description="one attention a token, or the CLS token's for all"
    )
    attention_temperature: PositiveFloat = Field(1.0, description="the attention's logits are divided by it")
    initial_std: PositiveFloat = Field(
        0.02, description="spread of the keys' start; breaks the symmetry of equal attention"
    )
    num_epochs: PositiveInt = Field(2, description="passes over the train images")
    weight_decay: NonNegativeFloat = Field(1e-4, description="AdamW's weight decay")
    num_neighbors: PositiveInt = Field(5, description="a pair's second image is one of so many nearest neighbours")

    @field_validator("pairs")
    @classmethod
    def _with_neighbors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "neighbors" not in value or len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}; give [neighbors] or [neighbors, views]")
        return value


class Student(Trained):
    bottleneck_dim: PositiveInt = Field(48, description="width of the one set's bottleneck")
    temperature: PositiveFloat = Field(0.1, description="tau of the similarities to the bank of reference images")
    softening: PositiveFloat = Field(2.0, description="T by which tau is multiplied on both sides (Hinton)")
    cosine_weight: NonNegativeFloat = Field(1.0, description="weight of the distance to the teacher's embedding")
    bank_size: PositiveInt = Field(1024, description="train images that serve as the bank, at most")


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
    source: Literal["fused", "student"] = provenance(
        "fused", "the model that is deployed, indexed and searched: fused, or the student (one set, nearly as fast)"
    )


class Evaluation(Section):
    seed: NonNegativeInt = Field(0, description="seed of the hash that breaks ties")
    extra_rows: tuple[ExtraRow, ...] = provenance(
        (),
        "further rows of the result table: concat, multi_head, supervised (reads the train labels), zero_shot_objects",
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
    def _has_objects(self) -> Config:
        if "zero_shot_objects" in self.evaluation.extra_rows and self.objects.provider == "none":
            raise ValueError(
                "evaluation.extra_rows asks for `zero_shot_objects`, but objects.provider is none; set it to backbone "
                "(or columns, grounding_dino, random), or leave the row out"
            )
        if self.objects.provider == "grounding_dino" and not self.objects.model:
            raise ValueError("objects.provider is grounding_dino, but objects.model is null; give a hub name or folder")
        return self

    @property
    def granularities(self) -> tuple[str, ...]:
        """The names of the pseudo-granularities, ordered by number."""
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
