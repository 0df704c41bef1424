"""For modules that optimise manually: ask for the total loss where the step computes its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from lightning_compress.mechanisms.losses import loss_of, names_of
from lightning_compress.mechanisms.step import find_controller


class CompressionMixin:
    """Let callbacks that add to the loss work in a LightningModule with ``automatic_optimization = False``.

    Example:
        >>> import torch
        >>> class Lit(CompressionMixin, nn.Module):
        ...     pass
        >>> Lit().compressed_loss(torch.tensor(2.0))  # no callback attached: the task loss itself
        tensor(2.)
    """

    _lightning_compress_mixin = True

    def compressed_loss(
        self, task_loss: Tensor | Callable[[], Tensor], *, callbacks: Iterable[str] | None = None
    ) -> Tensor:
        """The task loss, weighed, plus the terms of the attached callbacks.

        To be called in ``training_step`` for each loss, before its backward pass. A term belongs to the losses that
        were computed from what its student returned; a loss without any comes back as it is. So of several networks
        only the student's losses change, whatever the callbacks. Of several losses of one call of the student each is
        weighed, and the first that is asked for has the term.

        Args:
            task_loss: The step's own loss, a 0-dim tensor with a graph. Or a function without arguments that computes
                it: it is called at once, and again where a callback runs the step twice, as ``DCILCallback`` does.
                It may not call this method, nor run a backward pass or let an optimizer step.
            callbacks: Names of the callbacks whose terms belong to this loss, where it was computed from the students
                of several, or is computed from none; ``[]`` for no terms. The student's call is then that of which the
                loss was computed, else the one since the last call of this method.

        Returns:
            The loss to give to ``manual_backward``; ``task_loss`` itself where no callback is attached, and in a
            validation step, which may share code with the training step.

        Raises:
            TypeError: If the class is not a module, ``task_loss`` is no loss, or ``callbacks`` are no names.
            ValueError: If ``task_loss`` is not one number, ``callbacks`` has a name of nobody who adds to a loss, or
                two callbacks weigh the loss.
            CaptureError: If a student was called several times for the loss, it is not said which terms belong to it,
                an earlier loss has the term that is named, or its student is frozen; a ``RuntimeError``.
            RuntimeError: If called outside of a training step with manual optimisation while callbacks are attached,
                within the function that was given to it, with a tensor where a function is needed, with a function
                that learns, or that is run twice and uses what was computed before, or with what it was asked for, or
                gave back, before.
        """
        if not isinstance(self, nn.Module):
            raise TypeError(f"CompressionMixin is for LightningModules; {type(self).__name__} is no torch.nn.Module")
        controller, names = find_controller(self), names_of(callbacks)
        if controller is None:
            return loss_of(task_loss)
        return controller.compressed_loss(task_loss, names)
