"""Progress: which part of the training is behind, in optimizer steps."""

from __future__ import annotations

import math
from typing import Any

from lightning_compress import _compat


class Progress:
    """How far a fit has come; made from ``on_train_start`` on, where its length is known.

    With manual optimisation, where several optimizers may step in one batch, or none, batches are counted instead.

    Args:
        trainer: The Trainer.
        module: The LightningModule.

    Raises:
        ValueError: If the training has no end.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer = trainer
        self._automatic = bool(getattr(module, "automatic_optimization", True))
        self.total = float(trainer.estimated_stepping_batches)
        if self._automatic:
            self._lengths = [self.total]
        else:
            epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
            self._lengths = [float(trainer.num_training_batches) * epochs, float(trainer.max_steps)]
        self._lengths = [length if 0 < length < math.inf else math.inf for length in self._lengths]
        if all(math.isinf(length) for length in self._lengths):
            raise ValueError(
                "a schedule needs to know how long the training is, and here it has no end in batches: give the "
                "Trainer max_steps, or max_epochs with a training set that has a length"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps so far; batches with manual optimisation."""
        return int(self._trainer.global_step) if self._automatic else _compat.batches_seen(self._trainer)

    @property
    def steps_over(self) -> int:
        """Complete steps: with manual optimisation the batch that is under way does not count yet."""
        return self.steps - (not self._automatic and _compat.is_in_step(self._trainer))

    def step_at(self, fraction: float) -> int:
        """Before which step, counted from 0, so much of the training is behind for the first time."""
        return math.ceil(fraction * min(self._lengths) - 1e-9)

    @property
    def steps_after_this(self) -> int:
        """What :attr:`steps` will be after the optimizer step that is about to be taken."""
        return self.steps + self._automatic  # a batch counts from its start

    @property
    def fraction_before(self) -> float:
        """The share of the training that is behind when a batch begins."""
        done = [self.steps_over] if self._automatic else [self.steps_over, self._trainer.global_step]
        return self._share(done)

    @property
    def fraction(self) -> float:
        """The share of the training that is behind, in [0, 1]."""
        return self._share([self.steps] if self._automatic else [self.steps, self._trainer.global_step])

    def _share(self, done: list[int]) -> float:
        return min(max(part / length for part, length in zip(done, self._lengths, strict=True)), 1.0)
