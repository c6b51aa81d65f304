"""The configuration: one frozen section for each stage, checked before anything runs.

A field whose ``identity`` is False (a path, a worker count) never enters a fingerprint. Every other field enters the
fingerprints of the stages that list it in ``grappa.pipeline.graph.stages``.
"""

import math
import re
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from grappa.core.home import expanded
from grappa.pipeline.config.section import (
    LARGEST,
    CropFraction,
    Fraction,
    NonNegativeInt,
    Place,
    PositiveInt,
    PositiveTriple,
    Precision,
    Section,
    Triple,
    later,
    provenance,
    without_plugins,
)
from grappa.pipeline.config.trainings import Adaptors, Augmented, Fusion, Student

# fmt: off
Layout = Literal[
    "auto", "domain/class", "class", "flat", "split/domain/class", "split/class", "split/flat", "domain/split/class",
]
# fmt: on


class Images(Section):
    sources: tuple[Place, ...] = provenance((), "folders, tables (.csv, .parquet), tars, or URLs of these")
    domains: tuple[str, ...] = provenance((), "further folders as NAME=DIR: all their images are the domain NAME's")
    layout: Layout = provenance(
        "auto",
        "what the folders above an image are, from outside; class, flat: one domain; auto: recognised",
    )
    protocol: Literal["as_given", "closed_set"] = provenance(
        "as_given",
        "the tested images: those of the given split; closed_set: half of each train class, without the given test",
    )
    protocol_seed: NonNegativeInt = provenance(0, "closed_set: seed of the halves")
    cache_size: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="pixels of an image's shorter side in the pixel cache; auto: what the backbone sees of it",
    )
    cache: Literal["auto", "raw", "jpeg", "none"] = later(
        "auto",
        "pixels kept on disk: raw; jpeg: a fifth of the disk; none: decoded at each reading; auto: raw up to 50 GB",
        before="raw",
    )
    max_rejected: Fraction = provenance(0.05, "share of unreadable files above which the stage stops")
    max_pixels: PositiveInt = Field(100_000_000, description="a larger image is refused as a decompression bomb")
    shard_size: PositiveInt = Field(1024, description="images a file of the pixel cache; the unit of resuming")

    @field_validator("domains")
    @classmethod
    def _with_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parts = [text.partition("=") for text in value]
        for text, (name, equals, folder) in zip(value, parts, strict=True):
            if not (name and equals and folder):
                raise ValueError(f"found {text!r}; give NAME=DIR, such as birds=/data/birds")
        return tuple(f"{name}={expanded(folder)}" for name, _, folder in parts)

    @property
    def shorter_side(self) -> int:
        """The pixels of an image's shorter side in the pixel cache; ValueError where they are not settled."""
        if isinstance(self.cache_size, str):
            raise ValueError(f"images.cache_size is still `{self.cache_size}`; `grappa init RUN` resolves it")
        return self.cache_size

    @property
    def form(self) -> str:
        """How the pixel cache is kept: raw, jpeg or none; ValueError where it is not settled."""
        if self.cache == "auto":
            raise ValueError("images.cache is still `auto`; `grappa init RUN` resolves it")
        return self.cache

    @property
    def listed_by(self) -> dict[str, Any]:
        """The fields that decide which images are listed, and as what."""
        fields = self.to_json()
        return {name: fields[name] for name in ("sources", "domains", "layout", "protocol", "protocol_seed")}


class Backbone(Section):
    name: str = Field("vit_small_patch16_224.dino", description="a model of timm, see `grappa backbones`")
    module: str | None = provenance(
        None, "package.module:function that makes a torch module of your own, which is then adapted; null: timm's name"
    )
    weights: Place | None = provenance(None, "a weight file or folder, or hf-hub:OWNER/NAME; null: the hub's weights")
    image_size: PositiveInt | None = Field(
        None, description="pixels of the square input, a multiple of the model's patch; null: the model's own"
    )
    crop_fraction: CropFraction | None = Field(
        None, description="share of the shorter side that the model sees; null: the model's own"
    )
    mean: Triple | None = Field(None, description="channel means of the input, 0-1; null: the model's own")
    std: PositiveTriple | None = Field(None, description="channel deviations of the input, 0-1; null: the model's own")
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="further arguments of the architecture, such as {depth: 6}; not its classes, colors or pooling",
    )


class Features(Section):
    precision: Precision = Field("auto", description="auto: bfloat16 where the device has it in hardware")
    whitening_power: Literal["auto"] | Fraction = Field(
        "auto",
        description="PCA whitening before clusters and neighbours are sought: 0 none, 1 full; auto: chosen by views",
    )


class Neighbors(Section):
    num_neighbors: PositiveInt = Field(10, description="number of nearest train images of each image")
    engine: Literal["auto", "exact", "ivf", "hnsw"] = later(
        "auto",
        "how they are found: exact; ivf, hnsw: approximate, the recall is told; auto: ivf above 1,000,000 train images",
        before="exact",
    )

    @property
    def settled_engine(self) -> Literal["exact", "ivf", "hnsw"]:
        """How neighbours are found; ValueError where it is not settled."""
        if self.engine == "auto":
            raise ValueError("neighbors.engine is still `auto`; `grappa init RUN` resolves it")
        return self.engine


class Clusters(Section):
    num_clusters: str | tuple[PositiveInt, ...] = Field(
        "auto", description="the pseudo-granularities; auto: 4 (auto:7: 7) geometric values, N/64 to N/3 of N images"
    )
    max_clusters: Annotated[int, Field(ge=2, le=LARGEST)] | None = provenance(
        65_536, "auto: clusters of the finest granularity, at most (the others keep their ratio to it); null: N/3"
    )
    two_level_above: PositiveInt | None = provenance(
        100_000, "more clusters than this are made in two levels: parts, then clusters within them; null: never"
    )
    view: Literal["images", "objects"] = provenance(
        "images", "whose features are clustered: the images', or those of their object views (see objects)"
    )
    embeddings: Place | None = provenance(
        None,
        "a run whose model's embeddings are clustered; RUN/embeddings/MODEL: that model's; null: features",
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

    def in_two_levels(self, num_clusters: int) -> bool:
        """Tell whether so many clusters are made in two levels."""
        return self.two_level_above is not None and num_clusters > self.two_level_above


class Objects(Section):
    provider: Literal["none", "backbone", "columns", "grounding_dino", "random"] = Field(
        "none",
        description="the source of the boxes: the backbone, the table's columns, a detector; random: the control",
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
    model: Place | None = provenance(
        None, "grounding_dino: a name on the hub, or a folder with config.json and model.safetensors"
    )
    prompt: str = Field("an object.", description="grounding_dino: what to look for, phrases that end in a full stop")
    seed: NonNegativeInt = Field(0, description="random: seed of the boxes")

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.min_area >= self.max_area:
            raise ValueError(f"min_area is {self.min_area:g} and max_area {self.max_area:g}; give a larger max_area")
        return self


ExtraModel = Literal["concat", "multi_head", "supervised", "zero_shot_objects", "adapted_objects"]


class Embeddings(Section):
    precision: Precision = Field("auto", description="auto: bfloat16 where the device has it in hardware")
    whitening_power: Fraction = Field(0.5, description="strength of zero_shot_whitened: 0 none, 1 full PCA whitening")


class SampledViews(Augmented):
    """Views by which heads and the deployed model are chosen without labels; no training sees them."""

    num_images: Annotated[int, Field(ge=16)] = Field(
        1024, description="train images with a view, at most, and as many test images"
    )
    seed: NonNegativeInt = Field(0, description="seed of the sample and of its views")
    num_judged: Annotated[int, Field(ge=16)] | None = later(
        512,
        "of these, the ones with a view through every adapted model: test images where there are some; null: all",
        before=None,
    )


class Selection(Section):
    """Which of the trained adaptor sets are fused, and so taught to the student."""

    sets: Literal["auto", "all"] = Field(
        "auto", description="the sets that are fused; auto: without those that are certainly weaker, told by views"
    )
    max_loss: Fraction = Field(0.03, description="auto: what a set may certainly be below the best, as a share of it")
    num_images: PositiveInt = Field(2048, description="auto: train images, at most; half of them are judged by a view")


class Heads(Section):
    kind: Literal["auto", "none", "whitening", "neighborhood"] = Field(
        "auto",
        description="the models' last step, fitted without labels; auto: its weight is chosen without them too",
    )
    num_centroids: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto", description="neighborhood: centroids of the train embeddings; auto: a third of the images, at most 4096"
    )
    perplexity: Annotated[float, Field(gt=1.0)] = Field(
        10.0, description="neighborhood: number of centroids near an image; of M centroids at most (M + 1) / 2"
    )
    deviation_power: Fraction = Field(0.5, description="strength of the whitening: 0 none, 1 full")
    neighborhood_weight: NonNegativeFloat = Field(
        1.0, description="neighborhood: weight of an image's neighbourhood beside its deviation from the neighbourhood"
    )
    num_iterations: PositiveInt = Field(20, description="neighborhood: iterations of spherical k-means")
    seed: NonNegativeInt = Field(0, description="neighborhood: seed of the initial centroids")


class Model(Section):
    source: str = provenance(
        "auto",
        "the deployed model: auto: by the verdict; zero_shot, mean, fused, student, k00256; single: the only set",
    )

    @field_validator("source")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if not re.fullmatch(r"auto|zero_shot|mean|fused|student|single|k\d{5,}", value):
            raise ValueError(
                f"found {value!r}; give auto, zero_shot, mean, fused, student, single, or a granularity such as k00256"
            )
        return value


class Evaluation(Section):
    seed: NonNegativeInt = Field(0, description="seed of the hash that breaks ties")
    max_queries: Literal["auto"] | PositiveInt | None = later(
        "auto",
        "labelled test images that query all others, at most, drawn evenly over domains; auto: 10,000; null: all",
        before=None,
    )
    extra_rows: tuple[ExtraModel, ...] = provenance(
        (),
        "further models: concat, multi_head, supervised (train labels), zero_shot_objects, adapted_objects (crops)",
    )

    @field_validator("extra_rows")
    @classmethod
    def _once(cls, value: tuple[ExtraModel, ...]) -> tuple[ExtraModel, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}; give each model once")
        return value


class Index(Section):
    rows: Literal["all", "train", "test"] = Field("all", description="the images that can be found")
    kind: Literal["auto", "flat", "ivf", "hnsw", "ivfpq"] = later(
        "auto", "how it is searched: flat is exact; ivf, hnsw, ivfpq: approximate; auto: flat, or ivf above ivf_above"
    )
    ivf_above: PositiveInt = Field(1_000_000, description="auto: more rows than this get an inverted-file index")


class Compute(Section):
    """Device and speed of the computations: no field here is part of a fingerprint."""

    device: Literal["auto", "cpu", "cuda"] = provenance("auto", "auto: a GPU if there is one")
    num_threads: NonNegativeInt = provenance(0, "CPU threads of torch; 0: all cores (shared by the processes of a run)")
    num_workers: NonNegativeInt = provenance(0, "threads that decode and crop images; 0: all cores (shared likewise)")
    inference_batch_size: PositiveInt = provenance(64, "images a forward pass without gradients")
    checkpoint_seconds: PositiveFloat = provenance(60.0, "time between two checkpoints")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = provenance(
        (), "where the curves of trainings go while they run, beside metrics.jsonl; each is an extra of its name"
    )


PERCEIVED = ("object_weight", "transfer_weight", "background_weight")


class Config(Section):
    """The whole configuration of a run."""

    images: Images = Field(default_factory=Images)
    backbone: Backbone = Field(default_factory=Backbone)
    features: Features = Field(default_factory=Features)
    neighbors: Neighbors = Field(default_factory=Neighbors)
    objects: Objects = Field(default_factory=Objects)
    clusters: Clusters = Field(default_factory=Clusters)
    adaptors: Adaptors = Field(default_factory=Adaptors)
    selection: Selection = Field(default_factory=Selection)
    fusion: Fusion = Field(default_factory=Fusion)
    student: Student = Field(default_factory=Student)
    embeddings: Embeddings = Field(default_factory=Embeddings)
    views: SampledViews = Field(default_factory=SampledViews)
    heads: Heads = Field(default_factory=Heads)
    model: Model = Field(default_factory=Model)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    index: Index = Field(default_factory=Index)
    compute: Compute = Field(default_factory=Compute)

    @model_validator(mode="after")
    def _can_train_the_fusion(self) -> Self:
        if self.fusion.num_neighbors > self.neighbors.num_neighbors:
            raise ValueError(
                f"fusion.num_neighbors is {self.fusion.num_neighbors} but neighbors.num_neighbors keeps "
                f"{self.neighbors.num_neighbors}; raise the latter"
            )
        if self.fusion.attention_loss == "none" and self.fusion.barlow_weight == 0:
            raise ValueError("fusion.attention_loss is none and fusion.barlow_weight 0: nothing to train; set one")
        return self

    @model_validator(mode="after")
    def _has_one_set(self) -> Self:
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
    def _deploys_what_there_is(self) -> Self:
        source, values = self.model.source, self.clusters.num_clusters
        if source.startswith("k") and not isinstance(values, str) and source not in self.granularities:
            raise ValueError(f"model.source is {source}, but the granularities are {', '.join(self.granularities)}")
        return self

    @model_validator(mode="after")
    def _has_objects(self) -> Self:
        if self.objects.provider == "grounding_dino" and not self.objects.model:
            raise ValueError("objects.provider is grounding_dino, but objects.model is null; give a hub name or folder")
        weights = [f"adaptors.{name}" for name in PERCEIVED if getattr(self.adaptors, name)]
        shares = ["student.object_share"] if self.student.object_share else []
        models = [
            f"the model {name}"
            for name in ("zero_shot_objects", "adapted_objects")
            if name in self.evaluation.extra_rows
        ]
        views = ["clusters.view=objects"] if self.clusters.view == "objects" else []
        asking = [*weights, *shares, *models, *views]
        if asking and self.objects.provider == "none":
            raise ValueError(
                f"{asking[0]} needs object views, but objects.provider is none; set it to backbone (or columns, "
                f"grounding_dino, random), or leave {asking[0]} out"
            )
        return self

    @model_validator(mode="after")
    def _clusters_one_kind(self) -> Self:
        if self.clusters.embeddings is not None and self.clusters.view == "objects":
            raise ValueError(
                "clusters.embeddings names another run, whose embeddings are of images, but clusters.view is objects; "
                "leave one of them out"
            )
        return self

    @property
    def granularities(self) -> tuple[str, ...]:
        """The names of the pseudo-granularities, ordered by number; empty where labels replace pseudo-labels."""
        if self.adaptors.supervision == "labels":
            return ()
        if isinstance(self.clusters.num_clusters, str):
            found = self.clusters.num_clusters
            raise ValueError(f"clusters.num_clusters is still `{found}`; `grappa init RUN` resolves it")
        return tuple(granularity_name(k) for k in self.clusters.num_clusters)


with without_plugins():
    Config.model_rebuild()


def granularity_name(num_clusters: int) -> str:
    """Return ``k00256`` for 256: "k" and at least five digits."""
    return f"k{num_clusters:05d}"


def num_clusters_of(granularity: str) -> int:
    """Return 256 for ``k00256``."""
    return int(granularity.removeprefix("k"))


def automatic_num_clusters(num_train: int, how: str = "auto", most: int | None = None) -> tuple[int, ...]:
    """Return 4 (``auto:7``: 7) geometric values from N/64 to N/3 for N >= 4 train images, without repeated values.

    Of few images the finest clusters would mostly be of one image: the largest value is N/6 for up to 300 images, and
    its share grows to N/3 at 1,000. Of many images, N * N/3 comparisons would be too many: where the largest value
    would be above ``most`` it is ``most``, and the others are smaller by the same factor. All values are in 2..N/2. A
    single value is the geometric middle. The values of 2 are among those of 4, and those of 4 among those of 7, so that
    such runs share adaptor sets.
    """
    count = int(how.partition(":")[2] or 4)
    finest = num_train / _images_per_finest_cluster(num_train)
    kept = 1.0 if most is None else min(1.0, most / finest)
    low, high = max(2.0, kept * num_train / 64), max(2.0, kept * finest)
    shares = [step / (count - 1) for step in range(count)] if count > 1 else [0.5]
    values = (round(low * (high / low) ** share) for share in shares)
    return tuple(sorted({min(max(2, value), num_train // 2) for value in values}))


def _images_per_finest_cluster(num_train: int) -> float:
    """Return 6 for up to 300 images and 3 from 1,000 images, geometric in between."""
    few, many = 300, 1000
    share = math.log(min(max(num_train, few), many) / few) / math.log(many / few)
    return 6.0 * 0.5**share


def identity_settings(config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    """Return ``{"clusters.seed": 0, ...}`` for sections (``clusters``) and single fields (``clusters.seed``)."""
    settings: dict[str, Any] = {}
    for name in names:
        section_name, _, field_name = name.partition(".")
        section: Section = getattr(config, section_name)
        dumped = section.to_json()
        fields = [field_name] if field_name else [field for field in dumped if is_identity(section, field)]
        changed = [field for field in fields if not _as_before(section, field)]
        settings.update({f"{section_name}.{field}": dumped[field] for field in changed})
    return settings


def _as_before(section: Section, field: str) -> bool:
    """Tell whether a later field has the value with which everything is as it was without the field."""
    marks = _marks(type(section)).get(field, {})
    return marks.get("later") is True and getattr(section, field) == marks["before"]


def is_identity(section: Section, field: str) -> bool:
    """Tell whether a field may enter a fingerprint."""
    return _marks(type(section)).get(field, {}).get("identity") is not False


@cache
def _marks(kind: type[Section]) -> dict[str, dict[str, Any]]:
    """Return what `provenance` and `later` say of the fields of a section."""
    extras = {name: field.json_schema_extra for name, field in kind.model_fields.items()}
    return {name: dict(extra) for name, extra in extras.items() if isinstance(extra, dict)}
