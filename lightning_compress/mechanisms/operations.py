"""What a quantised network does with each of torch's operations, by the operation's name.

Where ONNX Runtime has an integer kernel, the inputs of an operation carry a quantiser, and its output needs one. What
can be fused into the kernel before it, and what only moves numbers, passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress import _compat

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
"""Name to the number of spatial dimensions."""
LAYERS = (*CONVOLUTIONS, *(f"conv_transpose{own}d" for own in (1, 2, 3)), "linear", "addmm", "baddbmm")
"""Operations that multiply by weights, also those that have no integer kernel here."""


class Kind(Enum):
    """What a quantised network does with an operation."""

    WEIGHTED = "convolution or linear layer: input and weight are quantised"
    NORM = "batch norm: folded into the layer before it"
    FUSED = "runs as a part of the kernel before it"
    JOINED = "integer kernel where all inputs are on grids"
    POOLED = "integer kernel that averages"
    CURVED = "integer kernel for one input"
    MOVED = "moves numbers, and an integer kernel runs across it"
    CUT = "moves numbers, and what follows needs a quantiser again, of the same grid"
    FLOAT = "no integer kernel"
    ASKED = "says something about a tensor"


_NAMES = {
    Kind.WEIGHTED: (*CONVOLUTIONS, "linear"),
    Kind.NORM: ("batch_norm",),
    Kind.FUSED: ("relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max", "threshold"),
    Kind.JOINED: ("add", "mul", "multiply", "cat", "concat", "concatenate"),
    Kind.POOLED: ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "mean"),
    Kind.CURVED: ("sigmoid", "silu", "leaky_relu", "hardsigmoid", "hardswish"),
    Kind.MOVED: (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "contiguous", "channel_shuffle"),
        *("detach", "clone", "identity", "pixel_unshuffle"),
        # what is left by dropout is another number, but in training only, where nothing runs in integers
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
    ),
    Kind.CUT: (
        *("chunk", "split", "tensor_split", "unbind", "getitem", "narrow", "select", "expand", "expand_as", "repeat"),
        *("roll", "flip", "pixel_shuffle", "tile", "index_select"),
    ),
    Kind.ASKED: (
        *("get", "set", "delete", "size", "dim", "ndimension", "numel", "nelement", "stride", "len", "bool", "item"),
        *("is_floating_point", "is_complex", "is_contiguous", "storage_offset", "data_ptr", "get_device"),
        *("element_size", "tolist", "format", "repr", "hash", "is_inference", "requires_grad_", "register_hook"),
        *("backward", "retain_grad", "is_same_size", "storage", "untyped_storage", "is_nonzero"),
    ),
}
IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
KINDS = {name: kind for kind, names in _NAMES.items() for name in names}


def _plain(name: str) -> str:
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        short = name[1:]
        return short if name[0] in "ir" and short in KINDS else name
    return name.rstrip("_") if name.endswith("_") and name.rstrip("_") in KINDS else name


def _writes(name: str) -> bool:
    inside = name.startswith("__") and name.endswith("__")
    in_place = inside and name[2] == "i" and name[3:-2] in IN_PLACE
    return name == "__setitem__" or in_place or (name.endswith("_") and not inside)


_BUILT_IN: dict[Any, str] = {
    function: str(function.__name__)
    for owner in (functional, torch.functional, *_compat.FUNCTION_OWNERS, Tensor)
    for function in (getattr(owner, attribute, None) for attribute in dir(owner))
    if isinstance(function, (BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType))
}
"""Functions of torch to their names, for which compiled code cannot ask them."""
_NAMES_OF = {function: _plain(name) for function, name in _BUILT_IN.items()}
_NAMES_OF[torch.batch_norm] = "torch_batch_norm"  # takes its arguments in another order than the functional one
_WRITERS = {function: _writes(name) for function, name in _BUILT_IN.items()}
_OPERATORS = {function: name.startswith("__") for function, name in _BUILT_IN.items()}


def operation_name(function: Callable[..., Any]) -> str:
    """The name of an operation, however it was called: ``+``, ``torch.add`` and ``add_`` are all "add".

    Args:
        function: What a torch function mode is given.

    Returns:
        Its name, without what stands for an operator or for working in place.

    Example:
        >>> operation_name(torch.add), operation_name(Tensor.__iadd__), operation_name(torch.relu_)
        ('add', 'add', 'relu')
    """
    known = _NAMES_OF.get(function)
    return _plain(str(getattr(function, "__name__", type(function).__name__))) if known is None else known


def writes(function: Callable[..., Any]) -> bool:
    """Whether an operation writes into its first argument, which its caller may go on with.

    Args:
        function: What a torch function mode is given.

    Returns:
        True for ``sub_`` and ``x[0] = y``, say.

    Example:
        >>> writes(Tensor.sub_), writes(Tensor.__setitem__), writes(Tensor.sub)
        (True, True, False)
    """
    known = _WRITERS.get(function)
    return _writes(str(getattr(function, "__name__", ""))) if known is None else known


def is_operator(function: Callable[..., Any]) -> bool:
    """Whether an operation is an operator of Python, whose result takes the place of its first argument.

    Args:
        function: What a torch function mode is given.

    Returns:
        True for ``+=``, say.

    Example:
        >>> is_operator(Tensor.__iadd__), is_operator(Tensor.add_)
        (True, False)
    """
    known = _OPERATORS.get(function)
    return str(getattr(function, "__name__", "")).startswith("__") if known is None else known


def kind_of(name: str, args: Sequence[Any] = (), options: Mapping[str, Any] = MappingProxyType({})) -> Kind:
    """What a quantised network does with an operation.

    Args:
        name: As :func:`operation_name` gives it.
        args: Its arguments, where those decide.
        options: Its keyword arguments.

    Returns:
        Its kind; :attr:`Kind.FLOAT` for what is not known.

    Example:
        >>> kind_of("conv2d").name, kind_of("softmax").name
        ('WEIGHTED', 'FLOAT')
    """
    if name == "pad":
        mode, value = (_argument(args, options, *at) for at in ((2, "mode", "constant"), (3, "value", None)))
        return Kind.CUT if mode != "constant" else Kind.FLOAT if value else Kind.MOVED
    if name == "interpolate":
        return Kind.CUT if _argument(args, options, 3, "mode", "nearest").startswith("nearest") else Kind.FLOAT
    if name in ("hardtanh", "clamp", "clip", "clamp_min"):  # 0 is on every grid, other limits may not be
        argument, default = ("min_val", -1.0) if name == "hardtanh" else ("min", 0)
        lowest = _argument(args, options, 1, argument, default)
        return Kind.FUSED if isinstance(lowest, (int, float)) and lowest == 0 else Kind.FLOAT
    return KINDS.get(name, Kind.FLOAT)


def _argument(args: Sequence[Any], options: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return options.get(name, args[place] if len(args) > place else default)


def keeps_dimensions(options: Mapping[str, Any]) -> bool:
    """Whether a reduction keeps the dimensions that it reduces, in torch's or in NumPy's spelling.

    Args:
        options: Its keyword arguments.

    Returns:
        False by default.

    Example:
        >>> keeps_dimensions({"keepdims": True}), keeps_dimensions({})
        (True, False)
    """
    return bool(options.get("keepdim", options.get("keepdims", False)))


def is_global_average(name: str, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation takes the mean over all positions of maps ``(N, C, H, W)``.

    Args:
        name: "mean" or "adaptive_avg_pool2d".
        x: Its input.
        args: What follows it.
        kwargs: Keyword arguments.

    Returns:
        False for a mean over anything else.

    Example:
        >>> import torch
        >>> is_global_average("mean", torch.zeros(1, 2, 3, 3), [(2, 3)], {})
        True
    """
    if x.ndim != 4:
        return False
    if name == "mean":
        dims = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
        if not isinstance(dims, (list, tuple)) or kwargs.get("dtype") is not None or len(args) > 2:
            return False
        return sorted(dim % 4 for dim in dims) == [2, 3]
    size = args[0] if args else kwargs.get("output_size")
    return size in (1, (1, 1), [1, 1])
