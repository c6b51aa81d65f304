"""A verdict written by hand, published in a run."""

from __future__ import annotations

import json
from typing import Any

from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.work import open_work

VERDICT: dict[str, Any] = {
    "verdict": "helped",
    "evidence": "Neighbourhoods of <fused> stand out more than the frozen backbone's. The gain is beyond chance.",
    "choice": "fused",
    "images": "test",
    "num_images": 1024,
    "models": [
        {"model": "zero_shot_head", "indicator": 2.61, "difference": 0.0, "low": 0.0, "high": 0.0, "low_within": 0.0},
        {"model": "mean", "indicator": 2.63, "difference": 0.02, "low": -0.01, "high": 0.05, "low_within": -0.02},
        {"model": "fused", "indicator": 2.95, "difference": 0.34, "low": 0.29, "high": 0.38, "low_within": 0.11},
    ],
}


def publish_verdict(run: RunFolder, content: object = VERDICT) -> None:
    """Publish a verdict.json of this content; a text is written as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    fingerprint = {"stage": "verdict", "instance": None, "version": 0, "config": {}, "inputs": {}}
    with open_work(run.artifact("verdict"), fingerprint) as work:
        (work.path / "verdict.json").write_text(text)
        work.publish({})
