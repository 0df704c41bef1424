"""What a step is made of: views of the weights, passes under them, and the terms of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_compress.mechanisms.capture import CaptureError, NetworkCall
from lightning_compress.mechanisms.lessons import Lesson
from lightning_compress.mechanisms.student import StudentCapture


@dataclass(frozen=True, eq=False)
class View:
    """One way to present the weights to a step.

    Attributes:
        name: Name, also of its losses.
        enter: Makes the context in which the step runs.
        deployed: Whether this is the network that will be shipped: its output is the step's, and distillation terms
            belong to it alone.
        owner: The term without which a loss does not run under it; "": there is none.
        learn: Runs a backward pass through the total of this view, when all terms are known, and gives its value; None
            where one backward pass goes through all views.
    """

    name: str
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    deployed: bool = True
    owner: str = ""
    learn: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of the user's step under one view.

    Attributes:
        view: The view it ran under.
        batch: The step's first argument.
        task_loss: What the step returned as its loss; None in validation.
        calls: Calls of each captured student.
        layers: Calls of each captured layer by its dotted name.
        again: Runs the step once more, on the same batch, with the same random numbers and without a trace; gives
            back its loss. None where nobody asked for it.
    """

    view: View
    batch: Any
    task_loss: Tensor | None
    calls: Mapping[StudentCapture, Sequence[NetworkCall]]
    layers: Mapping[str, Sequence[NetworkCall]] = field(default_factory=dict)
    again: Callable[[], Tensor] | None = None

    def call(self, capture: StudentCapture) -> NetworkCall | None:
        """The one call of a student in this pass; None if there was none.

        Raises:
            CaptureError: If the step called the student more than once.
        """
        calls = self.calls.get(capture, ())
        if len(calls) > 1:
            name = "/".join(capture.names or ()) or "the LightningModule"
            raise CaptureError(
                f"the step calls the student '{name}' {len(calls)} times; a term needs one call a step: choose a "
                "module that is called once with student=, or pass both inputs in one call"
            )
        return calls[0] if calls else None


@dataclass(frozen=True, eq=False)
class Term:
    """A loss to add.

    Attributes:
        name: Unique; terms are summed in the order of their names, so that no list's order changes a bit of the sum.
        compute: From the passes it belongs to, by view name, to the weighted loss; None for nothing this time.
        view: Name of the view it belongs to; "" for the deployed one, None for a term between views.
        student: Of whose calls it is computed: with manual optimisation it belongs to the losses that are, too.
        lesson: With manual optimisation, what follows the gradients of the losses that have it; None for nothing.
    """

    name: str
    compute: Callable[[Mapping[str, Pass]], Tensor | None]
    view: str | None = ""
    student: StudentCapture | None = None
    lesson: Lesson | None = None
