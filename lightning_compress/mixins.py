"""For modules that optimise manually: ask for the total loss where the step computes its own."""

from __future__ import annotations

from torch import Tensor, nn

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

    def compressed_loss(self, task_loss: Tensor) -> Tensor:
        """The task loss, weighed, plus the terms of the attached callbacks.

        To be called in ``training_step`` after the network was called and before the backward pass. Several calls a
        step each cover the network calls since the last one.

        Args:
            task_loss: The step's own loss, a 0-dim tensor with a graph.

        Returns:
            The loss to give to ``manual_backward``; ``task_loss`` itself where no callback is attached.

        Raises:
            TypeError: If the class is not a module.
            RuntimeError: If called outside of a training step with manual optimisation while callbacks are attached.
        """
        if not isinstance(self, nn.Module):
            raise TypeError(f"CompressionMixin is for LightningModules; {type(self).__name__} is no torch.nn.Module")
        controller = find_controller(self)
        return task_loss if controller is None else controller.compressed_loss(task_loss)
