"""The one wrapper around a module's steps: installed by the first who needs it, removed by the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.sharding import class_name, sharded_units
from lightning_compress.mechanisms.wrapping import OWN_MARK, copied_plainly, marked, shadowed

__all__ = ["StepController", "find_controller", "step_controller"]

_CONTROLLER = f"{OWN_MARK}_controller"


def find_controller(module: nn.Module) -> StepController | None:
    """The controller installed on a module, if there is one.

    Args:
        module: The LightningModule.

    Returns:
        The controller or None.

    Example:
        >>> find_controller(nn.Linear(1, 1)) is None
        True
    """
    reference = vars(module).get(_CONTROLLER)
    controller = None if reference is None else reference()
    # A deep copy of the module refers to the controller of the original, which is none of its own.
    return controller if isinstance(controller, StepController) and controller.module is module else None


@contextmanager
def step_controller(module: nn.Module) -> Iterator[StepController]:
    """The controller of a module: installed by the first who opens it, removed by the last who closes it.

    Args:
        module: The LightningModule; in a plain loop any module with a ``training_step``.

    Yields:
        The controller.

    Raises:
        TypeError: If the module has no ``training_step``.

    Example:
        >>> import torch
        >>> from lightning_compress.mechanisms.passes import Term
        >>> class Net(nn.Linear):
        ...     def training_step(self, x):
        ...         return self(x).sum()
        >>> net = Net(2, 1)
        >>> with step_controller(net) as controller, controller.term(Term("one", lambda passes: torch.ones(()))):
        ...     difference = net.training_step(torch.zeros(1, 2)) - net.bias
        >>> round(difference.item(), 4), "training_step" in vars(net)
        (1.0, False)
    """
    controller = find_controller(module)
    if controller is None:
        if not callable(getattr(module, "training_step", None)):
            raise TypeError(f"{class_name(module)} has no training_step to add to")
        controller = StepController(module)
        _install(controller)
    controller.references += 1
    try:
        yield controller
    finally:
        controller.references -= 1
        if controller.references == 0:
            controller.stack.close()


def _install(controller: StepController) -> None:
    module, stack = controller.module, controller.stack

    def training(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: controller.run_training(original, args, kwargs)

    def validation(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: controller.run_validation(original, args, kwargs)

    stack.enter_context(copied_plainly(module))
    vars(module)[_CONTROLLER] = marked(lambda: controller)  # a function, so that deep copies do not copy it
    stack.callback(vars(module).pop, _CONTROLLER, None)
    stack.enter_context(shadowed(module, "training_step", training))
    # Lightning asks whether validation_step is overridden; the wrapper answers through __wrapped__, as the original.
    if hasattr(module, "validation_step"):
        stack.enter_context(shadowed(module, "validation_step", validation))
    if sharded_units(module) and hasattr(module, "backward"):
        stack.enter_context(shadowed(module, "backward", controller.weights.sharded.learning))
