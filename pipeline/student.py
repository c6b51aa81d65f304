"""Stage ``student``: one adaptor set that is taught to embed as the fused model does, for retrieval at its cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.adaptors import optimization, set_sizes, training_task, write_metrics
from pipeline.checkpoints import write_tensors
from pipeline.context import StageContext
from pipeline.fused import open_fusion
from pipeline.inputs import open_backbone, open_sets, open_views, read_images, train_rows
from pipeline.perception import open_objects

if TYPE_CHECKING:
    from grappa.adaptors import AdaptorSet
    from grappa.student import Transfer

FILE = "student.safetensors"


def run(context: StageContext) -> str:
    from grappa.student import new_student, train_student

    settings = context.config.student
    backbone, sets = open_backbone(context), open_sets(context, context.config.granularities)
    bottleneck_dim, rank = set_sizes(settings, backbone.width)
    teacher = open_fusion(context, "neighbors", sets).folded()
    rows = train_rows(read_images(context.input("images")))
    views = open_views(context, settings, backbone.spec.image_size)
    with training_task(context, settings, len(rows)) as training:
        student, result = train_student(
            backbone,
            teacher,
            views,
            rows,
            start=new_student(backbone, bottleneck_dim, in_context_rank=rank, seed=settings.seed),
            transfer=_transfer(settings),
            optimization=optimization(settings),
            seed=settings.seed,
            run=training,
            objects=open_objects(context) if settings.object_share else None,
        )
    if not context.leads:
        return ""
    write_tensors(context.path / FILE, student.state_dict())
    write_metrics(context, result)
    last = result.metrics[-1]
    return f"{settings.num_epochs} epochs, loss {last['loss']:.4f}, cosine to the fused model {last['similarity']:.4f}"


def open_student(context: StageContext) -> AdaptorSet:
    """Return the student's adaptor set."""
    from safetensors.torch import load_file

    from grappa.adaptors import AdaptorSet

    return AdaptorSet.from_state_dict(load_file(context.input("student") / FILE))


def _transfer(settings: Any) -> Transfer:
    from grappa.student import Transfer

    return Transfer(
        temperature=settings.temperature,
        softening=settings.softening,
        cosine_weight=settings.cosine_weight,
        bank_size=settings.bank_size,
        object_share=settings.object_share,
    )
