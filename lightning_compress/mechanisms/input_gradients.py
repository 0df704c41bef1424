"""Input gradients: how the task losses of student and teacher depend on the input, both from the user's own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.mechanisms.capture import CaptureError, NetworkCall, differentiable
from lightning_compress.mechanisms.passes import Pass
from lightning_compress.mechanisms.teacher import Teacher
from lightning_compress.mechanisms.tree import rebuild
from lightning_compress.mechanisms.wrapping import shadowed

ARGUMENT = "map_kind='gradient'"


def input_gradient(loss: Tensor, call: NetworkCall, owner: str, *, create_graph: bool, scale: float = 1.0) -> Tensor:
    """The gradient of a task loss by the input of a network.

    Args:
        loss: The task loss, a 0-dim tensor with a graph.
        call: The network's call, with floating inputs that carry gradients.
        owner: Whose loss it is, for the error message ("student", "teacher").
        create_graph: Whether the gradient can be differentiated in turn.
        scale: Factor of the loss while it is differentiated, so that half precision does not lose small gradients.

    Returns:
        Shape (N, values): each sample's gradient in a row, of all inputs that have one.

    Raises:
        CaptureError: If the loss cannot be differentiated by the input.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> input_gradient((3 * x).sum(), NetworkCall((x,), {}, None), "student", create_graph=False)
        tensor([[3., 3.]])
    """
    inputs = [tensor for tensor in call.tensors if tensor.requires_grad]
    found: Sequence[Tensor | None] = ()
    try:
        if inputs and loss.requires_grad:
            found = torch.autograd.grad(loss * scale, inputs, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:  # reentrant activation checkpointing, say
        raise CaptureError(
            f"{ARGUMENT}: the task loss of the {owner} cannot be differentiated by its input: {error}"
        ) from error
    gradients = [gradient / scale for gradient in found if gradient is not None and gradient.ndim > 0]
    if not gradients or any(len(gradient) != len(gradients[0]) for gradient in gradients):
        raise CaptureError(
            f"{ARGUMENT}: the task loss of the {owner} cannot be differentiated by its input, which holds "
            f"{len(inputs)} floating tensors; each must be a batch, and the loss must depend on one of them"
        )
    return torch.cat([gradient.reshape(len(gradient), -1) for gradient in gradients], dim=1)


def loss_of_teacher(seen: Pass, network: nn.Module, teacher: Teacher) -> tuple[Tensor, NetworkCall]:
    """The teacher's task loss: the user's step once more, with the teacher in the student's place.

    Args:
        seen: The pass of the student, which can be run again.
        network: The student.
        teacher: The teacher.

    Returns:
        The loss, with a graph to the teacher's input, and the teacher's call.

    Raises:
        CaptureError: If the step fails with another network in the student's place, or does not call it once.

    Example:
        >>> from lightning_compress.mechanisms.passes import View
        >>> student, x = nn.Linear(2, 1), torch.ones(3, 2)
        >>> seen = Pass(View("plain"), x, None, {}, again=lambda: student(x).sum())
        >>> loss, call = loss_of_teacher(seen, student, Teacher(nn.Flatten(0)))
        >>> loss.item(), call.args[0].requires_grad
        (6.0, True)
    """
    given: list[NetworkCall] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = rebuild((args, kwargs), differentiable)
        output = teacher(NetworkCall(args, kwargs, None), gradients=True)
        given.append(NetworkCall(args, kwargs, output))
        return output

    if seen.again is None:
        raise RuntimeError("the pass cannot be run again: nobody asked for it")
    with shadowed(network, "forward", lambda _: forward):
        try:
            loss = seen.again()
        except Exception as error:  # whatever the user's step raises on what another network returns
            raise CaptureError(
                f"{ARGUMENT} needs the teacher's task loss, so the step is run once more with the teacher in the "
                f"student's place, and this failed: {type(error).__name__}: {error}. The teacher must return what the "
                "student returns: as many classes, in the same structure"
            ) from error
    if len(given) != 1:
        raise CaptureError(
            f"{ARGUMENT}: with the teacher in its place the student is called {len(given)} times in the step, not "
            "once, so it is not said which input is meant"
        )
    return loss, given[0]


def check_comparable(student: NetworkCall, teacher: NetworkCall, teacher_loss: Tensor) -> None:
    """Refuse a second pass that says nothing of the first: with another input, or of another kind.

    Args:
        student: The student's call.
        teacher: The teacher's, in the second pass.
        teacher_loss: The second pass's task loss.

    Raises:
        CaptureError: If their inputs differ, or the shapes of their outputs.
        ValueError: If the loss is not finite.

    Example:
        >>> call = NetworkCall((torch.ones(2, 1),), {}, torch.ones(2, 3))
        >>> check_comparable(call, call, torch.tensor(1.0))
    """
    ours, theirs = student.tensors, teacher.tensors
    if len(ours) != len(theirs) or not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    ):
        raise CaptureError(
            f"{ARGUMENT}: the step was run once more with the teacher in the student's place, and gave it another "
            "input than the student had; it must prepare the batch in the same way each time"
        )
    outputs = (teacher.output, student.output)
    if all(isinstance(output, Tensor) for output in outputs) and outputs[0].shape != outputs[1].shape:
        raise CaptureError(
            f"{ARGUMENT}: the teacher returns a tensor of shape {tuple(outputs[0].shape)} and the student one of shape "
            f"{tuple(outputs[1].shape)}; both must return the same, as many classes above all"
        )
    if not bool(teacher_loss.isfinite().all()):
        value = float(teacher_loss.detach())
        raise ValueError(f"{ARGUMENT}: the task loss of the teacher is {value} in the first step")


def check_differentiable_twice(term: Tensor, module: nn.Module) -> None:
    """Differentiate once on trial: torch says only then what it cannot differentiate twice.

    Args:
        term: What is computed from an input gradient.
        module: The module being trained.

    Raises:
        ValueError: If an operation cannot be differentiated twice, or no parameter is reached.

    Example:
        >>> layer, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
        >>> [gradient] = torch.autograd.grad(layer(x).square().sum(), [x], create_graph=True)
        >>> check_differentiable_twice(gradient.sum(), layer)
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found: Sequence[Tensor | None] = ()
    try:
        if term.requires_grad:
            found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            f"{ARGUMENT} differentiates the student twice, and an operation in it does not allow that: {error}. Flash "
            "attention can be switched off with torch.nn.attention.sdpa_kernel"
        ) from error
    if all(gradient is None for gradient in found):
        raise ValueError(f"{ARGUMENT}: the student's input gradient does not depend on any trained parameter")
