"""From a network and one call of it to a serialised ONNX graph, and from the exporter's errors to a file and a line."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.export.errors import ExportError
from lightning_compress.export.parity import FIXED_HINT, is_batched, resized, traced_size
from lightning_compress.export.sample import Call
from lightning_compress.mechanisms.isolation import evaluating, quiet
from lightning_compress.mechanisms.tree import named_tensors

EXPORT_LOGGERS = ("torch", "torch.__trace", "onnxscript", "onnx_ir", "onnxruntime")
MAX_BYTES = 2**31 - 1  # of one protobuf message


class _Flat(nn.Module):
    """The network as a function from a flat list of tensors to a flat list of tensors.

    The exporter has its own rules for dicts, keyword arguments, defaults and output objects; it sees none of them.
    """

    def __init__(self, network: nn.Module, call: Call, children: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.network = network
        for name, child in children.items():
            self.add_module(name, child)
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        sample = self._call.sample(tensors)
        return tuple(tensor for _, tensor in named_tensors(self.network(*sample.args, **sample.kwargs)))


def convert(
    network: nn.Module,
    call: Call,
    output_names: Sequence[str],
    *,
    dynamic_batch: bool,
    opset: int,
    metadata: dict[str, str],
    children: Mapping[str, nn.Module] = MappingProxyType({}),
) -> bytes:
    """Export a network to a serialised ONNX model without metadata of single nodes.

    Args:
        network: The network, on the CPU.
        call: The input to trace with; its rows are repeated where they are traced at another batch size.
        output_names: One name for each tensor of the output.
        dynamic_batch: Whether dimension 0 of the inputs stays open.
        opset: ONNX operator set.
        metadata: What to write into the file as a whole.
        children: Modules beside the network whose buffers the trace may read, by the names that they get in the file.

    Returns:
        The bytes of the file.

    Raises:
        ExportError: If the exporter fails, or writes another operator set than asked for.
    """
    _check_size(network)
    batch = traced_size(call.tensors, dynamic_batch)
    tensors = resized(call.tensors, batch)
    shapes = tuple({0: "batch"} if dynamic_batch and is_batched(tensor, batch) else {} for tensor in tensors)
    try:
        with quiet(EXPORT_LOGGERS), evaluating(network), _compat.values_unseen():
            program = torch.onnx.export(
                _Flat(network, call, children).eval(),
                tensors,
                input_names=list(call.names),
                output_names=list(output_names),
                dynamic_shapes=(shapes,),
                opset_version=opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            serialised = _tidy(program.model, metadata)  # type: ignore[union-attr]
            _let_go()
    except Exception as error:  # the exporter lets through what tracing, decomposition and conversion raise
        raise ExportError(_explain(type(network).__name__, error, dynamic_batch)) from error
    _check_opset(program.model, opset)  # type: ignore[union-attr]
    if dynamic_batch:
        _check_bounds(type(network).__name__, *_compat.batch_bounds(program))
    return serialised


def _check_size(network: nn.Module) -> None:
    tensors = [*network.parameters(), *network.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > MAX_BYTES:
        raise ExportError(
            f"{type(network).__name__} holds {size} bytes of weights; one self-contained file holds at most {MAX_BYTES}"
        )


def _check_bounds(name: str, lower: int, upper: int | None) -> None:
    """Refuse a graph that holds for some batch sizes only; sizes 0 and 1 are not told apart by the exporter."""
    if lower > 2 or upper is not None:
        bounds = f"from {lower}" + ("" if upper is None else f" to {upper}")
        raise ExportError(
            f"{name} branches on the batch size, and the file would hold the branch for batch sizes {bounds} only; "
            f"{FIXED_HINT}"
        )


def _check_opset(model: Any, opset: int) -> None:
    written = model.opset_imports.get("")
    if written != opset:
        raise ExportError(f"opset={opset} was asked for, but the exporter wrote {written}; leave opset out")


def _let_go() -> None:
    """Free the weights of the graph: each rule of onnxscript's optimiser holds on to the last one that it looked at."""
    import onnx_ir
    from onnxscript.optimizer import optimize_ir

    value = onnx_ir.Value(name="x")
    node = onnx_ir.Node("", "Identity", [value])
    graph = onnx_ir.Graph([value], [node.outputs[0]], nodes=[node], opset_imports={"": 18})
    optimize_ir(onnx_ir.Model(graph, ir_version=10))


def _tidy(model: Any, metadata: dict[str, str]) -> bytes:
    """Drop what only describes the export, name the weights as the network does, and serialise."""
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateInitializersPass

    DeduplicateInitializersPass(size_limit=MAX_BYTES)(model)  # of a layer that is used twice
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                value.doc_string = None
                value.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()
    taken = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    taken |= {value.name for value in model.graph.inputs}
    for value in list(model.graph.initializers.values()):
        plain = value.name.removeprefix("network.")
        if plain not in taken:
            value.name = plain
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    serialised: bytes = onnx_ir.to_proto(model).SerializeToString()
    return serialised


def _explain(name: str, error: BaseException, dynamic_batch: bool) -> str:
    """One sentence about why the exporter failed, with the user's file and line where there is one."""
    chain = list(_chain(error))
    frame = _frame_of(chain)
    place = f"{frame.filename}:{frame.lineno}" if frame else ""
    if any("DataDependent" in type(link).__name__ for link in chain):
        code = linecache.getline(frame.filename, frame.lineno or 0).strip() if frame else ""
        where = f" at {place}: `{code}`" if frame else ""
        if any("specialized integer" in str(link) for link in chain):
            return (
                f"{name} cannot be exported because of a number that Python takes from a tensor, used{where}; a file "
                "holds operations on tensors only: compute the number from shapes, without .item(), .tolist() and int()"
            )
        return (
            f"{name} cannot be exported because of a data-dependent branch{where}; a file holds one branch only: "
            "use torch.where, or move the decision out of the forward"
        )
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()] or [type(chain[-1]).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    hint = f"; {FIXED_HINT}" if dynamic_batch and "batch" in str(chain[-1]) else ""
    where = (
        f" (at {place})" if place else "; it fails in torch's exporter: name a part of the network that does without"
    )
    return f"{name} cannot be exported: {reason}{where}{hint}"


def users_place(error: BaseException) -> str:
    """Where in the user's code an error was raised.

    Args:
        error: Any.

    Returns:
        " at file:line: `code`"; empty where no code of the user's led to it.
    """
    frame = _frame_of(list(_chain(error)))
    if frame is None:
        return ""
    code = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f" at {frame.filename}:{frame.lineno}: `{code}`"


def _frame_of(chain: Sequence[BaseException]) -> traceback.FrameSummary | None:
    return next((found for link in reversed(chain) if (found := _users_frame(link)) is not None), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what led to it, the first cause last."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _users_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame that is neither ours nor of torch, the exporter or the standard library."""
    paths = sysconfig.get_paths()
    packages = [paths["purelib"], paths["platlib"]]  # often below the standard library's folder, but not part of it
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    machinery = [os.path.join(folder, name) for folder in packages for name in ("onnxscript", "onnx_ir", "onnx")]
    machinery += [ours, os.path.dirname(torch.__file__)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        standard = _lies_below(frame.filename, [paths["stdlib"]]) and not _lies_below(frame.filename, packages)
        if not (frame.filename.startswith("<") or standard or _lies_below(frame.filename, machinery)):
            return frame
    return None


def _lies_below(file: str, folders: Sequence[str]) -> bool:
    return file.startswith(tuple(os.path.join(folder, "") for folder in folders))
