"""From models and exported files to a report: everything measured on copies, all times in one interleaved run."""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lightning_compress import __version__
from lightning_compress.export.copying import independent_copy, widen_
from lightning_compress.export.errors import ExportError, first_line
from lightning_compress.export.onnx import ExportResult
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.export.sample import Sample, bind, on_cpu
from lightning_compress.mechanisms.isolation import evaluating, random_state_kept
from lightning_compress.report.latency import measure_latency
from lightning_compress.report.measure import (
    compressed_bytes,
    count_macs,
    count_nonzeros,
    count_parameters,
    layer_table,
    serialized_state,
    single_sample,
)
from lightning_compress.report.table import ExportedFile, Latency, Layer, Report, Row

Metrics = Mapping[str, Mapping[str, float]]

_OF_EXTRAS = ("onnx", "onnxscript", "torch-pruning")
"""Packages that are imported where a file is written, or filters are removed."""


def compare(
    models: Mapping[str, nn.Module],
    files: Sequence[ExportResult] = (),
    *,
    made_of: Sequence[str] | None = None,
    sample: Sample | None = None,
    metrics: Metrics | None = None,
    latency: bool = True,
    seconds: float = 10.0,
    compressed: str | None = None,
    prefix: str = "",
    notes: Sequence[str] = (),
    recipe: dict[str, Any] | None = None,
    bits: Mapping[str, int] = MappingProxyType({}),
) -> Report:
    """Measure models and exported files side by side.

    Parameters, zeros and bytes are those of the modules as they are; MACs and times are those of copies on the CPU, in
    evaluation mode, half precision widened to float32, for one sample, on one thread.

    Args:
        models: Name to network; ratios are to the first.
        files: Files that were exported from one of them; a file's row is called by its file name.
        made_of: Which model each file was made of; ``None`` where all were made of ``compressed``.
        sample: One input that all models take, of any batch size; ``None`` leaves out MACs and times, with a note.
        metrics: Name of a row to its metrics.
        latency: Whether to measure times.
        seconds: Time for all of them together, in seconds.
        compressed: Which model the layers are listed of; ``None`` for the last.
        prefix: Dotted name of that model inside the user's module; the layers' names begin with it.
        notes: Sentences to add to the report's own.
        recipe: What to keep as the recipe.
        bits: Bits of the layers that are quantised, by the name that they have in the report.

    Returns:
        The report. What could not be measured is missing from it, and a note says why.

    Raises:
        ValueError: If there is no model, or ``compressed`` or a key of ``metrics`` names no row.

    Example:
        >>> report = compare({"before": nn.Linear(4, 2)}, sample=Sample((torch.zeros(8, 4),)), latency=False)
        >>> report.rows[0].parameters, report.rows[0].macs
        (10, 8)
    """
    if not models:
        raise ValueError("models is empty; give at least one network")
    named_files = dict(zip(file_names(files), files, strict=True))
    names = [*models, *named_files]
    layers_of = list(models)[-1] if compressed is None else compressed
    if layers_of not in models:
        raise ValueError(f"compressed names '{layers_of}', not one of the models: {list(models)}")
    if unknown := [name for name in metrics or {} if name not in names]:
        raise ValueError(f"metrics names '{unknown[0]}', not one of the rows: {names}")
    sources = [layers_of] * len(files) if made_of is None else list(made_of)
    if len(sources) != len(files) or any(name not in models for name in sources):
        raise ValueError(f"made_of must name one of the models {list(models)} for each file, got {sources}")
    all_notes = list(notes)
    with random_state_kept():
        inputs = _one_sample(sample, all_notes)
        copies = {name: _runnable(name, model, all_notes) for name, model in models.items()}
        rows = [_module_row(name, model, copies[name], inputs, all_notes) for name, model in models.items()]
        rows += [_file_row(name, result) for name, result in named_files.items()]
        with evaluating(models[layers_of]):  # reading a spectrally normed weight in training would move its buffers
            listed = layer_table(models[layers_of])
        times: dict[str, Latency] = {}
        if latency and inputs is not None:
            calls = {name: _module_call(copy, inputs) for name, copy in copies.items() if copy is not None}
            calls |= {
                name: _file_call(file, models[source], inputs)
                for (name, file), source in zip(named_files.items(), sources, strict=True)
            }
            times = _times(calls, set(named_files), seconds, all_notes)
            if len(times) > 1 and next(iter(models)) not in times:  # what everything else is compared with
                all_notes.append(f"Times are compared with that of '{next(iter(times))}'.")
    return Report(
        rows=tuple(
            replace(row, latency_ms=times.get(row.name), metrics=dict((metrics or {}).get(row.name, {})))
            for row in rows
        ),
        layers=tuple(_placed(layer, prefix, bits) for layer in listed),
        files=tuple(_file(result, source) for result, source in zip(files, sources, strict=True)),
        notes=tuple(dict.fromkeys(all_notes)),
        versions=versions(),
        recipe=recipe,
    )


def _placed(layer: Layer, prefix: str, bits: Mapping[str, int]) -> Layer:
    name = ".".join(filter(None, (prefix, layer.name)))
    return replace(layer, name=name, bits=bits.get(name, layer.bits))


def _file(result: ExportResult, model: str) -> ExportedFile:
    return ExportedFile(
        path=str(result.path),
        precision=result.precision,
        bytes=result.bytes,
        max_logit_difference=result.max_logit_difference,
        left_in_float=result.left_in_float,
        model=model,
    )


def versions() -> dict[str, str]:
    """Versions of what a report depends on; what is not installed, or not used in this process, is left out.

    Returns:
        Name to version.

    Example:
        >>> sorted(versions())[:2]
        ['lightning', 'lightning_compress']
    """
    found = {"lightning_compress": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    used = [package for package in _OF_EXTRAS if package.replace("-", "_") in sys.modules]
    optional = {package: _installed(package) for package in ("lightning", "onnxruntime", *used)}
    return found | {package: number for package, number in optional.items() if number is not None}


def file_names(files: Sequence[ExportResult]) -> list[str]:
    """The name of each file's row: its file name, or its whole path where two are called alike.

    Args:
        files: Exported files.

    Returns:
        One name a file.
    """
    short = [result.path.name for result in files]
    return [name if short.count(name) == 1 else str(result.path) for name, result in zip(short, files, strict=True)]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _one_sample(sample: Sample | None, notes: list[str]) -> Sample | None:
    if sample is None:
        notes.append("MACs and latency were not measured: no input of the network is known.")
        return None
    try:
        args, kwargs = single_sample((sample.args, dict(sample.kwargs)))
    except ValueError as error:
        notes.append(f"MACs and latency were not measured: {error}.")
        return None
    return on_cpu(Sample(args, kwargs))


def _runnable(name: str, model: nn.Module, notes: list[str]) -> nn.Module | None:
    try:
        return widen_(independent_copy(model).cpu().eval())
    except ExportError as error:
        notes.append(f"MACs and latency of {name} were not measured: {error}.")
        return None


def _module_row(name: str, model: nn.Module, copy: nn.Module | None, inputs: Sample | None, notes: list[str]) -> Row:
    state = serialized_state(model)
    macs = None
    if inputs is not None and copy is not None:
        macs, reason = count_macs(copy, inputs.args, inputs.kwargs)
        if reason is not None:
            notes.append(f"{name}: {reason}.")
    return Row(
        name=name,
        parameters=count_parameters(model),
        nonzeros=count_nonzeros(model),
        macs=macs,
        bytes=len(state),
        bytes_compressed=compressed_bytes(state),
    )


def _file_row(name: str, result: ExportResult) -> Row:
    return Row(name=name, bytes=result.bytes, bytes_compressed=compressed_bytes(result.path))


def _times(
    calls: Mapping[str, Callable[[], object]], files: Set[str], seconds: float, notes: list[str]
) -> dict[str, Latency]:
    """Times of all calls that work, measured in one go."""
    working = {}
    for name, call in calls.items():
        if problem := _trial(call):
            notes.append(f"The latency of {name} was not measured: {problem}.")
        else:
            working[name] = call
    if not working:
        return {}
    times = measure_latency(working, seconds=seconds)
    return {name: replace(time, runtime="onnxruntime" if name in files else "torch") for name, time in times.items()}


def _trial(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:  # whatever a network may raise: the others are still measured
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _module_call(network: nn.Module, inputs: Sample) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return network(*inputs.args, **inputs.kwargs)

    return call


def _file_call(result: ExportResult, network: nn.Module, inputs: Sample) -> Callable[[], object]:
    """The file on the same sample, opened when it is first called."""
    session: list[tuple[OnnxNetwork, list[torch.Tensor]]] = []

    def call() -> object:
        if not session:
            file = OnnxNetwork(result.path, threads=1)
            bound = bind(inspect.signature(network.forward), inputs)
            tensors = dict(zip(bound.names, bound.tensors, strict=True))
            session.append((file, [tensors[name] for name in file.input_names]))
        file, ordered = session[0]
        return file.run(ordered)

    return call
