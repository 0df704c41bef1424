"""Integer files: written by the quantisation mode, and held to what it computes.

A file is kept only if its scales and integers are the given ones, bit for bit, if ONNX Runtime computes nearly what the
quantised network computes, and if it runs in integers what should run so.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.export.emission import CHILD, Emitting
from lightning_compress.export.errors import ExportError
from lightning_compress.export.parity import RANDOM_HINT, Reference, check_parity, references, usual_size
from lightning_compress.export.runtime import OnnxNetwork, open_session
from lightning_compress.export.sample import Call
from lightning_compress.export.tracing import convert
from lightning_compress.functional.quantizers import MOST_BITS
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.quantization import module_of, quantizing
from lightning_compress.mechanisms.rounding import Rounding
from lightning_compress.mechanisms.selection import joined, listing
from lightning_compress.mechanisms.tree import named_tensors

KERNELS = ("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul", "ConvInteger", "MatMulInteger")
NOISE = 2.0
"""A file may be off by so many times what quantisation has changed: it rounds as often, in other places."""
LEAST_NOISE, MOST_NOISE, MOST_OF_FEW_BITS = 0.02, 0.5, 0.9
"""Of the output's size, whatever quantisation has changed; one step of few bits is many of 8."""


class IntegerExport:
    """Export of one network with integers in it.

    Args:
        network: A copy of the network, in evaluation mode, on the CPU.
        call: The input to trace with.
        grids: The grids to write.
        plain: What the network gives in float, at each batch size.
        precision: "int8" or "int4".
        max_difference: As in :func:`~lightning_compress.export.parity.check_parity`; None: by what quantisation has
            changed, where the file multiplies integers.

    Raises:
        ExportError: If the network does not run quantised.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        grids: Grids,
        plain: Sequence[Reference],
        *,
        precision: str,
        max_difference: float | None,
    ) -> None:
        grids = grids.in_evaluation()
        self._network, self._call, self._grids, self._plain = network, call, grids, plain
        self._precision, self._max_difference = precision, max_difference
        _refuse_float64(network, call)
        rounding = Rounding(network, grids)
        with quantizing(network, rounding):
            self._expected = references(network, call, dynamic=len(plain) > 1)
        if missing := [name for name in grids.weights if name not in rounding.used]:
            raise ExportError(
                f"the weights {missing} have scales, and the network did not use them on the sample; export it with a "
                "sample= like the data that it was calibrated with"
            )
        self._held: dict[str, Tensor] = {}
        self._weights: dict[str, str] = {}  # of each layer, what its integers are called in the file
        self._layers = len(grids.sites)

    def convert(self, output_names: Sequence[str], *, opset: int, **options: Any) -> bytes:
        """The file.

        Args:
            output_names: One name for each tensor of the output.
            opset: ONNX operator set.
            options: The others of :func:`~lightning_compress.export.tracing.convert`.

        Returns:
            Its bytes.

        Raises:
            ExportError: If the network cannot be exported, or the exporter changed an integer or a scale.
        """
        emitting = Emitting(self._network, self._grids, opset=opset, products=self._precision == "int4")
        self._held = {f"{CHILD}.{name}": value for name, value in emitting.held.named_buffers()}
        self._weights = {site: f"{CHILD}.{emitting.buffers[f'{site}:weight']}" for site in self._grids.sites}
        with quantizing(self._network, emitting):
            children = {CHILD: emitting.held}
            graph = convert(self._network, self._call, output_names, opset=opset, children=children, **options)
        import onnx

        model = onnx.load_from_string(graph)
        self._check_scales(model)
        _round_before_clips_(model)
        self._layers = _layers(model)
        if self._precision == "int4":
            _pack_(model)
        del model.graph.value_info[:]  # shapes in between, which every runtime infers
        for node in model.graph.node:
            node.ClearField("name")
        serialised: bytes = model.SerializeToString()
        return serialised

    def check(self, file: OnnxNetwork) -> float:
        """Hold a file to the quantised network.

        Args:
            file: The file.

        Returns:
            The largest difference of an output.

        Raises:
            ExportError: If they differ by more than they may, or a layer does not run in integers.
        """
        self._check_kernels(file)
        if self._max_difference is not None:
            return check_parity(file, self._expected, self._max_difference)
        if self._precision == "int4" and all(grid.bits <= 4 for grid in self._grids.weights.values()):
            return check_parity(file, self._expected)
        # without integer activations ONNX Runtime rounds those of linear layers with 8-bit weights itself
        few = any(grid.bits < MOST_BITS for grid in self._grids.activations.values())
        most = MOST_OF_FEW_BITS if few else MOST_NOISE
        return self._largest_difference(file, lambda noise, size: noise.clamp(LEAST_NOISE * size, most * size))

    def check_trial(self, file: OnnxNetwork) -> float:
        """As :meth:`check`, for a file of provisional scales, which may be far off, but not like another network.

        Args:
            file: The file.

        Returns:
            The largest difference of an output.

        Raises:
            ExportError: If they differ by half of their size, and by more than twice what quantisation has changed, or
                a layer does not run in integers, or the network does not give the same twice.
        """
        with quantizing(self._network, Rounding(self._network, self._grids)):
            again = references(self._network, self._call, dynamic=False)[0]
        for (name, one), (_, other) in zip(_outputs(self._expected[0]), _outputs(again), strict=True):
            if not torch.equal(one, other) and not torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise ExportError(f"output '{name}' of the quantised network is another one each time: {RANDOM_HINT}")
        self._check_kernels(file)  # the network has not learned yet, and may be far from itself
        return self._largest_difference(file, lambda noise, size: noise.clamp(min=MOST_OF_FEW_BITS * size))

    def _largest_difference(self, file: OnnxNetwork, accepted: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Of an output; what is accepted is asked with the noise of quantisation and the output's size, as norms."""
        pairs = zip(self._plain, self._expected, strict=True)
        return max(self._difference(plain, expected, file, accepted) for plain, expected in pairs)

    def _difference(
        self,
        plain: Reference,
        expected: Reference,
        file: OnnxNetwork,
        accepted: Callable[[Tensor, Tensor], Tensor],
    ) -> float:
        largest = 0.0
        found = file.run(expected.tensors)
        floats = [tensor for _, tensor in _outputs(plain)]
        for (name, rounded), exact, got in zip(_outputs(expected), floats, found, strict=True):
            if rounded.shape != got.shape:
                raise ExportError(
                    f"output '{name}' has shape {tuple(rounded.shape)}, and {tuple(got.shape)} in the file"
                )
            if rounded.numel() == 0 or not rounded.is_floating_point():
                continue
            exact, rounded, got = _weighed(exact, rounded, got)
            sizes = torch.linalg.vector_norm(exact), torch.linalg.vector_norm(rounded)
            size, noise = torch.minimum(*sizes), NOISE * torch.linalg.vector_norm(rounded - exact)
            off = torch.linalg.vector_norm(got - rounded)
            limit = accepted(noise, size)
            if not off <= limit:  # NaN fails too
                raise ExportError(
                    f"output '{name}' of the file differs from that of the quantised network by {off / size:.3g} of "
                    f"its size, and at most {limit / size:.3g} is accepted here, where twice what quantisation itself "
                    f"has changed is {noise / size:.3g}; to_onnx(max_difference=) sets another limit"
                )
            largest = max(largest, (got - rounded).abs().max().item())
        return largest

    def _check_scales(self, model: Any) -> None:
        """Compare each integer and scale that the file uses with the given one, bit for bit."""
        from onnx import numpy_helper

        compared = 0
        for entry in model.graph.initializer:
            if (given := self._held.get(entry.name)) is not None:
                value = torch.from_numpy(numpy_helper.to_array(entry).copy())
                if given.dtype != value.dtype or not torch.equal(given, value):
                    raise ExportError(
                        f"the exporter changed '{entry.name}', so the file would not have the given scales"
                    )
                compared += 1
        if compared == 0:
            raise ExportError("the exporter left no scale in the file")

    def _check_kernels(self, file: OnnxNetwork) -> None:
        """Count the integer kernels that ONNX Runtime makes of a file; where activations are float there are none."""
        if not self._grids.integer_activations:
            return
        kernels = [node for node in optimised(file) if node.op_type in KERNELS]
        if len(kernels) < self._layers:
            read = {name for node in kernels for name in node.input}
            floats = [site for site, name in self._weights.items() if name not in read]
            left = sorted({joined(self._grids.network, module_of(site)) for site in floats})
            raise ExportError(
                f"ONNX Runtime runs {self._layers - len(kernels)} of {self._layers} quantised layers in float: "
                f"{listing(left) or 'their operators were merged with others'}; leave them out of the quantisation "
                "with exclude="
            )


def _outputs(reference: Reference) -> list[tuple[str, Tensor]]:
    """Name and value of each tensor that a network gave."""
    return [(name or "output", tensor) for name, tensor in named_tensors(reference.output)]


def _weighed(exact: Tensor, rounded: Tensor, got: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without what is infinite in all of them, and with large elements made smaller, by the same factors."""
    same = ~exact.isfinite() & (exact == rounded) & (exact == got)
    exact, rounded, got = (torch.where(same, 0.0, own) for own in (exact, rounded, got))
    magnitude = exact.abs()
    limit = usual_size(magnitude)
    weight = torch.where((magnitude > limit) & (limit > 0), limit / magnitude, 1.0)
    return exact * weight, rounded * weight, got * weight


def _refuse_float64(network: nn.Module, call: Call) -> None:
    named = [*network.named_parameters(), *zip(call.names, call.tensors, strict=True)]
    if wide := [name for name, value in named if value.dtype == torch.float64]:
        raise ExportError(
            f"integer kernels go with float32, and {listing(wide)} {'is' if len(wide) == 1 else 'are'} float64, as "
            "with precision='64-true'; train in another precision"
        )


def _layers(model: Any) -> int:
    """How many operators take a weight of integers."""
    import onnx

    weights = {entry.name for entry in model.graph.initializer if entry.data_type == onnx.TensorProto.INT8}
    read = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
    widened = {node.output[0] for node in read}
    return sum(name in widened for node in model.graph.node for name in node.input)


def optimised(file: OnnxNetwork) -> list[Any]:
    """The operators that ONNX Runtime makes of a file."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = os.path.join(folder, "optimised.onnx")
        try:
            open_session(file.path, options)
        except Exception as error:  # its own kinds; of a file that it has run before
            path = options.optimized_model_filepath
            raise ExportError(f"ONNX Runtime could not write what it makes of the file to '{path}': {error}") from error
        return list(onnx.load(options.optimized_model_filepath).graph.node)


def _round_before_clips_(model: Any) -> None:
    """Quantise before a clip, as that of ReLU6, too, where the grid behind it reaches beyond its limits.

    ONNX Runtime leaves out a clip that the integers make themselves; before any other, a layer would run in float. On
    the same grid, what is rounded, clipped and rounded again is what is clipped and rounded.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    values = {entry.name: entry for entry in graph.initializer}
    values |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    uses = Counter(name for node in graph.node for name in node.input) + Counter(own.name for own in graph.output)
    alone = [node for node in graph.node if node.op_type == "Clip" and uses[node.output[0]] == 1]
    clips = {node.output[0]: node for node in alone if node.input[0] not in rounded}
    nodes: list[Any] = []
    for node in graph.node:
        clip = clips.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if clip is not None and set(clip.input[1:]) - {""} <= values.keys():
            scale, zero = (numpy_helper.to_array(values[name]) for name in node.input[1:3])
            given = [numpy_helper.to_array(values[name]) if name else None for name in clip.input[1:3]]
            low, high = (*given, None, None)[:2]
            lowest, highest = (scale * np.float32(end - zero.item()) for end in (0.5, 254.5))
            if (low is not None and low > lowest) or (high is not None and high < highest):
                written, read = (f"{node.output[0]}_before_{part}" for part in ("clip", "clip_read"))
                before = [
                    helper.make_node("QuantizeLinear", [clip.input[0], *node.input[1:3]], [written]),
                    helper.make_node("DequantizeLinear", [written, *node.input[1:3]], [read]),
                ]
                nodes[nodes.index(clip) : nodes.index(clip)] = before
                clip.input[0] = read
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _pack_(model: Any) -> None:
    """Store the integers of weights that ``DequantizeLinear`` reads in 4 bits each, where they fit."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    tensors = {entry.name: entry for entry in model.graph.initializer}
    read = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    for node in read:
        weight = numpy_helper.to_array(tensors[node.input[0]])
        if weight.dtype != np.int8 or np.abs(weight).max(initial=0) > 7:
            continue
        zeros = f"{node.input[0]}_zero_point_4"
        for name, values in (
            (node.input[0], weight),
            (zeros, np.zeros(weight.shape[0 if weight.ndim > 2 else 1], np.int8)),
        ):
            halves = np.append(values.ravel(), np.zeros(values.size % 2, np.int8)).reshape(-1, 2) & 0x0F
            packed = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=values.shape, name=name)
            packed.raw_data = (halves[:, 0] | (halves[:, 1] << 4)).astype(np.uint8).tobytes()
            if name in tensors:
                tensors[name].CopyFrom(packed)
            else:
                model.graph.initializer.append(packed)
                tensors[name] = packed
        node.input[2] = zeros
    used = {name for node in model.graph.node for name in node.input}
    for entry in [entry for entry in model.graph.initializer if entry.name not in used]:
        model.graph.initializer.remove(entry)
    onnx.checker.check_model(model)
