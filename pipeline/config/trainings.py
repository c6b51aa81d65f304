"""The sections of the trainings: adaptor sets, fusion and student, and what they share.

The defaults of views, epochs, batches, rates and temperatures were chosen on development splits of real photographs;
see "How the presets were chosen" in RESULTS.md.
"""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator

from grappa.pipeline.config.section import (
    CropFraction,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Precision,
    Section,
    later,
    provenance,
)


class Augmented(Section):
    """Settings of augmented views; a random draw is a function of (seed, stage, instance, epoch, image_id)."""

    min_crop: CropFraction = Field(0.6, description="smallest side of a training crop, as a share of the shorter side")
    flip: Fraction = Field(0.5, description="chance of a mirrored view")
    brightness: Fraction = Field(0.3, description="strength of the brightness change")
    contrast: Fraction = Field(0.3, description="strength of the contrast change")
    saturation: Fraction = Field(0.3, description="strength of the saturation change")
    grayscale: Fraction = Field(0.05, description="chance of a grey view")


class Trained(Augmented):
    """Settings of every training: AdamW with a warmed-up cosine schedule, on views that are milder than those by which
    models are judged."""

    min_crop: CropFraction = Field(0.85, description="smallest side of a training crop, as a share of the shorter side")
    brightness: Fraction = Field(0.1, description="strength of the brightness change")
    contrast: Fraction = Field(0.1, description="strength of the contrast change")
    saturation: Fraction = Field(0.1, description="strength of the saturation change")
    grayscale: Fraction = Field(0.0, description="chance of a grey view")
    num_epochs: PositiveInt = Field(2, description="passes over the train images")
    batch_size: PositiveInt = Field(32, description="images a step")
    learning_rate: PositiveFloat = Field(2e-3, description="peak of the cosine schedule")
    weight_decay: NonNegativeFloat = Field(1e-2, description="AdamW's weight decay on what is trained but the proxies")
    warmup: Fraction = Field(0.1, description="share of the steps in which the rate rises linearly")
    seed: NonNegativeInt = Field(0, description="seed of initial weights, order, partners and views")
    precision: Precision = Field("auto", description="auto: bfloat16 autocast where the device has it in hardware")


class AdaptorSetSettings(Trained):
    """Settings of every stage that trains an adaptor set: kind and sizes of its adaptors."""

    kind: Literal["bottleneck", "in_context", "both"] = Field(
        "bottleneck",
        description="adaptors beside the blocks' outputs; in_context: beside queries and keys; both: half of each",
    )
    bottleneck_dim: PositiveInt = Field(48, description="width of an adaptor's bottleneck")
    in_context_rank: Literal["auto"] | PositiveInt = Field(
        "auto", description="rank of in-context adaptors; auto: a 48th of the backbone's width"
    )


class Adaptors(AdaptorSetSettings):
    supervision: Literal["pseudo_labels", "labels"] = Field(
        "pseudo_labels", description="what a set is trained on: clusters, or (one set) the train images' labels"
    )
    proxy_learning_rate: PositiveFloat = Field(2e-3, description="peak of the class proxies' cosine schedule")
    temperature: PositiveFloat = Field(0.1, description="tau of the normalised softmax")
    object_weight: NonNegativeFloat = Field(0.0, description="weight of the same loss on object views (see objects)")
    transfer_weight: NonNegativeFloat = Field(
        0.0, description="weight of the perception transfer from object views to images"
    )
    softening: PositiveFloat = Field(2.0, description="transfer: T by which tau is multiplied on both sides (Hinton)")
    cosine_weight: NonNegativeFloat = Field(1.0, description="transfer: weight of the distance between the embeddings")
    transfer_from: Literal["better", "all"] = Field(
        "better", description="transfer: better: only from object views that are classified better than their image"
    )
    background_weight: NonNegativeFloat = Field(
        0.0, description="weight of the loss by which background views come to a proxy of their own"
    )


class Fusion(Trained):
    pairs: tuple[Literal["neighbors", "views"], ...] = provenance(
        ("neighbors",), "the fusions to train: neighbors, and for the ablation views (two views of one image)"
    )
    attention_loss: Literal["mutual_information", "swapped", "none"] = Field(
        "mutual_information",
        description="how a pair's granularity attentions are led to agree (see grappa.method.losses)",
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
    attention_temperature: PositiveFloat = Field(4.0, description="the attention's logits are divided by it")
    initial_std: PositiveFloat = Field(
        0.02, description="spread of the keys' start; breaks the symmetry of equal attention"
    )
    num_epochs: PositiveInt = Field(1, description="passes over the train images")
    batch_size: PositiveInt = Field(64, description="pairs a step")
    learning_rate: PositiveFloat = Field(3e-4, description="peak of the cosine schedule")
    weight_decay: NonNegativeFloat = Field(1e-4, description="AdamW's weight decay")
    num_neighbors: PositiveInt = Field(5, description="a pair's second image is one of so many nearest neighbours")

    @field_validator("pairs")
    @classmethod
    def _with_neighbors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "neighbors" not in value or len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}; give [neighbors] or [neighbors, views]")
        return value


class Student(AdaptorSetSettings):
    temperature: PositiveFloat = Field(0.1, description="tau of the similarities to the bank of reference images")
    softening: PositiveFloat = Field(2.0, description="T by which tau is multiplied on both sides (Hinton)")
    cosine_weight: NonNegativeFloat = Field(1.0, description="weight of the distance to the teacher's embedding")
    bank_size: PositiveInt = Field(1024, description="train images that serve as the bank, at most")
    object_share: Fraction = Field(0.0, description="share of the loss whose teacher sees object views (see objects)")
    whitening_power: Fraction = later(
        0.5, "embeddings are compared whitened with this power, as a head compares them; 0: as they are", before=0.0
    )
