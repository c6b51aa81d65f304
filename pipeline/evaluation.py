"""Stage ``evaluation``: retrieval metrics of every model on the test rows, per domain and over the merged gallery.

Adapted models are evaluated with their embedding head; ``zero_shot_head`` is the frozen backbone with one (a free
competitor, as ``zero_shot_whitened`` is), ``fused_raw`` the fused model without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.context import StageContext
from pipeline.inputs import read_images, test_rows
from pipeline.stages import evaluated_rows

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

GALLERIES = ("domain", "merged")


def run(context: StageContext) -> str:
    import pandas as pd

    images = read_images(context.input("images"))
    labels = pd.read_parquet(context.input("images") / "labels.parquet")["label"]
    rows, transductive = test_rows(images)
    num_labeled = int(labels.iloc[rows].notna().sum())
    per_query = _evaluate_all(context, images.iloc[rows], labels.iloc[rows], rows) if num_labeled else _nothing()
    metrics = _write(context, per_query)
    if not num_labeled:
        return "no test image has a label: nothing to evaluate (the model and its index are complete all the same)"
    where = "transductive: no image is split, all rows are both" if transductive else "test rows"
    return f"{_headline(metrics)} ({where}, {num_labeled} of {len(rows)} labeled)"


def _evaluate_all(
    context: StageContext, images: pd.DataFrame, labels: pd.Series, rows: NDArray[np.int64]
) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    from grappa import memory
    from grappa.evaluation import evaluate, oracle
    from grappa.randomness import id_numbers

    ids, sources = images["image_id"].to_numpy(), evaluated_rows(context.config)
    width = max(_embeddings(context, source).shape[1] for source in sources.values())
    context.need_memory(memory.evaluation(len(rows), width, len(sources)))
    parts = []
    with context.task("evaluating", len(sources) * len(GALLERIES), unit="tables") as advance:
        for name, source in sources.items():
            embeddings = _embeddings(context, source)
            chosen = np.asarray(embeddings[rows])
            for gallery in GALLERIES:
                table = evaluate(
                    chosen,
                    labels=labels.to_numpy(),
                    domains=images["domain"].to_numpy(),
                    ids=id_numbers(ids.tolist()),
                    gallery=gallery,
                    seed=context.config.evaluation.seed,
                )
                table.insert(0, "image_id", ids[table.pop("row").to_numpy()])
                parts.append(table.assign(model=name, gallery=gallery))
                advance(1)
    per_query = pd.concat(parts, ignore_index=True)
    return pd.concat([per_query, oracle(per_query, list(context.config.granularities))], ignore_index=True)


def _embeddings(context: StageContext, source: tuple[str, str]) -> NDArray[np.float32]:
    import numpy as np

    mapped: NDArray[np.float32] = np.load(context.input(*source) / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    return mapped


def _nothing() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {"image_id": pd.Series(dtype=str), "model": pd.Series(dtype=str), "gallery": pd.Series(dtype=str)}
    )


def _write(context: StageContext, per_query: pd.DataFrame) -> pd.DataFrame:
    from grappa.evaluation import summarize

    metrics = summarize(per_query)
    per_query.to_parquet(context.path / "per_query.parquet", index=False)
    metrics.to_csv(context.path / "metrics.csv", index=False)
    return metrics


def _headline(metrics: pd.DataFrame) -> str:
    means = metrics[(metrics["domain"] == "_mean") & (metrics["gallery"] == "domain")].set_index("model")["map"]
    free = max(means[name] for name in ("zero_shot", "zero_shot_whitened", "zero_shot_head") if name in means)
    return (
        f"mean mAP {means['zero_shot']:.3f} zero-shot, {free:.3f} the best free competitor, "
        f"{means['mean']:.3f} mean over sets, {means['fused']:.3f} fused"
    )
