"""What all trainings on cached images share: the views, the order of the batches, and the settings of a run.

Order and views are functions of (seed, stage, instance, epoch, image_id). A checkpoint therefore holds tensors and a
step number only, and a resumed training equals an uninterrupted one, on a CPU bit for bit.

Shapes: B batch, S image side, N images, n train rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa.core.arrays import Rows
from grappa.core.distributed import ALONE, Processes
from grappa.core.randomness import key, shuffled, uniforms
from grappa.images.pixels import ImageRows
from grappa.images.transforms import NUM_DRAWS, Augmentation, train_batch
from grappa.training.loop import Checkpointer, Recorded


@dataclass(frozen=True)
class Views:
    """Augmented views of the cached images; ids: (N,) uint64, one for each row of the cache.

    image_size, crop_mode, interpolation: how the model's images are framed (see ``BackboneSpec``).
    """

    cache: ImageRows
    ids: NDArray[np.uint64]
    image_size: int
    augmentation: Augmentation
    num_workers: int = 1
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def draw(self, view_key: int, rows: Rows) -> Tensor:
        """Return (B, 3, S, S) uint8; row b depends on ``view_key`` and the id of image ``rows[b]`` only."""
        draws = uniforms(view_key, self.ids[rows], NUM_DRAWS)
        return train_batch(
            self.cache,
            rows,
            draws,
            image_size=self.image_size,
            augmentation=self.augmentation,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            num_workers=self.num_workers,
        )


@dataclass(frozen=True)
class Runtime:
    """Where and how a training runs: device, precision, checkpoint, progress, and the processes that share a batch.

    ``recorded`` gets each record of the metrics as soon as it is known.
    """

    device: torch.device
    precision: str
    checkpoint: Checkpointer | None = None
    progress: Callable[[int], None] | None = None
    processes: Processes = ALONE
    recorded: Recorded | None = None

    @property
    def hooks(self) -> tuple[Checkpointer | None, Callable[[int], None] | None, Processes, Recorded | None]:
        """The last arguments of ``grappa.training.loop.fit``."""
        return self.checkpoint, self.progress, self.processes, self.recorded


class BatchOrder:
    """Which train rows a step sees: every epoch has a new order, drawn from the ids, and its remainder is left out.

    Several ``processes`` share a batch; its size and the order do not depend on their number.
    """

    def __init__(
        self,
        ids: NDArray[np.uint64],
        batch_size: int,
        parts: tuple[int | str, ...],
        processes: Processes = ALONE,
    ) -> None:
        self.ids, self.parts, self.processes = ids, parts, processes
        self.batch_size = min(batch_size, len(ids))
        self.steps_per_epoch = len(ids) // self.batch_size
        if self.batch_size < processes.world_size:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be shared by {processes.world_size} processes; start fewer"
            )
        self._own = processes.own_slice(self.batch_size)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, step: int) -> tuple[Rows, int]:
        """Return the batch of a step, positions (B,) among the train rows, and its epoch.

        Of several processes each gets its slice of the batch.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(key(*self.parts, epoch, "order"), self.ids)
        return self._order[number * self.batch_size : (number + 1) * self.batch_size][self._own], epoch


def torch_seed(*parts: int | str) -> int:
    """Return a seed for a generator of torch, drawn from ``parts``."""
    return key(*parts) >> 1
