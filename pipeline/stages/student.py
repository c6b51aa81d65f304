"""Stage ``student``: one adaptor set that learns to embed as the fused model does, at the cost of a single set."""

from __future__ import annotations

from grappa.core import memory
from grappa.images.splits import train_rows
from grappa.method.student import Transfer, new_student, train_student
from grappa.pipeline.config.trainings import Student
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.learning import open_views, optimization, sizes_of_set, training_task, write_metrics
from grappa.pipeline.opening import (
    open_backbone,
    open_fused_sets,
    open_fusion,
    open_objects,
    read_images,
    shape_of,
)
from grappa.pipeline.store.checkpoints import write_tensors


def run(context: StageContext) -> str:
    settings = context.config.student
    backbone, sets = open_backbone(context), open_fused_sets(context)
    bottleneck_dim, rank = sizes_of_set(settings, backbone.embedding_dim)
    teacher = open_fusion(context, "neighbors", sets).folded()
    rows = train_rows(read_images(context.input("images")))
    views = open_views(context, settings, backbone.spec)
    start = new_student(backbone, bottleneck_dim, in_context_rank=rank, seed=settings.seed)

    def need(batch_size: int, precision: str) -> int:
        num_views = batch_size * (2 if settings.object_share else 1)
        taught = memory.embedding(shape_of(backbone, [teacher]), num_views, precision)
        return taught + memory.training(shape_of(backbone, [start]), batch_size, precision)

    with training_task(context, settings, len(rows), need) as training:
        student, result = train_student(
            backbone,
            teacher,
            views,
            rows,
            start=start,
            transfer=transfer(settings),
            optimization=optimization(settings),
            seed=settings.seed,
            run=training,
            objects=open_objects(context) if settings.object_share else None,
        )
    if not context.leads:
        return ""
    write_tensors(context.path / "student.safetensors", student.state_dict())
    write_metrics(context, result)
    last = result.metrics[-1]
    return f"{settings.num_epochs} epochs, loss {last['loss']:.4f}, cosine to the fused model {last['similarity']:.4f}"


def transfer(settings: Student) -> Transfer:
    return Transfer(
        temperature=settings.temperature,
        softening=settings.softening,
        cosine_weight=settings.cosine_weight,
        bank_size=settings.bank_size,
        object_share=settings.object_share,
        whitening_power=settings.whitening_power,
    )
