"""The before/after table as typed records, and the JSON file they are kept in.

The schema is versioned: a file of an older version loads, a file of a newer one is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SCHEMA = 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRIEF = 60  # characters of a wrong value in an error message

# JSON has no number for these; strings keep them apart from null, which means "not measured".
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Latency:
    """Time of one call, from rounds in which every candidate ran in turn.

    Attributes:
        runtime: What ran the call, such as ``"torch"`` or ``"onnxruntime"``.
        batch: Samples in the call; at least 1.
        median: Milliseconds.
        spread: Interquartile range, milliseconds.
        rounds: Number of timed calls.
        ratio: Median over the rounds of this time divided by the first candidate's in the same round; below 1 is
            faster. ``None`` when nothing was compared.
        ratio_low: Lower end of the 95% interval of ``ratio``; ``None`` with fewer than 6 rounds.
        ratio_high: Upper end of that interval.
    """

    runtime: str
    batch: int
    median: float
    spread: float
    rounds: int | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class Row:
    """One model of the table; what was not measured is ``None``.

    Attributes:
        name: ``"before"``, ``"after"``, ``"teacher"``, or the name of an exported file.
        parameters: Number of parameter elements.
        nonzeros: How many of them are not zero.
        macs: Multiply-accumulates of one forward of a single sample.
        bytes: Size of the file, or of the saved ``state_dict`` of a module.
        bytes_compressed: The same after deflate at level 9.
        latency_ms: Time of a forward.
        metrics: What the validation logged, by name.
    """

    name: str
    parameters: int | None = None
    nonzeros: int | None = None
    macs: int | None = None
    bytes: int | None = None
    bytes_compressed: int | None = None
    latency_ms: Latency | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One layer of the compressed network.

    Attributes:
        name: Dotted name inside the measured module.
        type: Class name.
        sparsity: Fraction of zeros in its weights, 0 to 1.
        bits: Bits of one weight.
        filters: Output channels or features; ``None`` where the layer has no such number.
        parameters: Elements of its weights; ``None`` in reports of earlier versions.
    """

    name: str
    type: str
    sparsity: float
    bits: int
    filters: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class ExportedFile:
    """One exported file.

    Attributes:
        path: Where it was written.
        precision: ``"fp32"``, ``"int8"`` or ``"int4"``.
        bytes: Its size.
        max_logit_difference: Largest absolute difference to the module's own output in the parity check.
        left_in_float: Layers and operations that the precision did not reach.
        model: Name of the row that it was made of; ``None`` for the compressed module.
        quantised: Name of the row with the metrics of that network, quantised as the file is; ``None`` without one.
        bytes_fp32: Size of a file of the same network in fp32; ``None`` where there was none to compare with.
        speed_fp32: How many times as fast it ran as that one, in turns, on one thread.
        speed_fp32_low: Lower end of the 95% interval of that; ``None`` where too few rounds tell.
        speed_fp32_high: Its upper end.
    """

    path: str
    precision: str
    bytes: int
    max_logit_difference: float | None = None
    left_in_float: tuple[str, ...] = ()
    model: str | None = None
    quantised: str | None = None
    bytes_fp32: int | None = None
    speed_fp32: float | None = None
    speed_fp32_low: float | None = None
    speed_fp32_high: float | None = None


@dataclass(frozen=True)
class Picture:
    """What a technique has drawn, for the page.

    Attributes:
        title: Above it.
        legend: What it shows, in one sentence.
        png: Content of a PNG file; base64 in the JSON.
    """

    title: str
    legend: str
    png: bytes


@dataclass(frozen=True)
class Report:
    """Everything a report shows; ``to_json`` and ``from_json`` keep it.

    Attributes:
        rows: The models; ratios are taken to the first.
        layers: The layers of the compressed network.
        files: The exported files.
        notes: Sentences on what was not measured, and why.
        versions: Package name to version.
        recipe: The recipe that attached the callbacks, or ``None``.
        command: What was called to attach it, or ``None``.
        pictures: What the techniques have drawn.
        schema: Version of the JSON layout.
    """

    rows: tuple[Row, ...]
    layers: tuple[Layer, ...] = ()
    files: tuple[ExportedFile, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    command: str | None = None
    pictures: tuple[Picture, ...] = ()
    schema: int = SCHEMA


def with_quantised(report: Report, row: Row, *, of: str, files: Collection[str]) -> Report:
    """Add a row for a network that is quantised: the same weights as in another row, other metrics.

    Args:
        report: What was measured.
        row: Its name and its metrics.
        of: Name of the row of the network in full precision; the new one is put below it.
        files: Paths of the files that are quantised in the same way.

    Returns:
        The report with it.

    Example:
        >>> report = Report(rows=(Row("after"), Row("m.onnx")), files=(ExportedFile("m.onnx", "int8", 9),))
        >>> report = with_quantised(report, Row("after (qat)"), of="after", files=["m.onnx"])
        >>> [row.name for row in report.rows], report.files[0].quantised
        (['after', 'after (qat)', 'm.onnx'], 'after (qat)')
    """
    place = next(index for index, entry in enumerate(report.rows) if entry.name == of) + 1
    return replace(
        report,
        rows=(*report.rows[:place], row, *report.rows[place:]),
        files=tuple(replace(file, quantised=row.name) if file.path in files else file for file in report.files),
    )


def to_json(report: Report) -> str:
    """Write a report as strict JSON, indented by two spaces.

    Args:
        report: What to write.

    Returns:
        JSON text ending in a newline; NaN and infinities are the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

    Example:
        >>> text = to_json(Report(rows=(Row("before", parameters=3),)))
        >>> from_json(text).rows[0].parameters
        3
    """
    document = {"schema": report.schema, **asdict(report)}
    return json.dumps(encoded(document), indent=2, allow_nan=False, default=str) + "\n"


def from_json(text: str) -> Report:
    """Read what :func:`to_json` wrote, now or in an earlier version.

    Args:
        text: The content of a ``compression_report.json``.

    Returns:
        The report; keys that this version does not know are left out.

    Raises:
        ValueError: If the text is no report, or its schema is newer than this package reads.

    Example:
        >>> from_json('{"schema": 99}')
        Traceback (most recent call last):
        ValueError: this report has schema 99, this package reads up to 1: a newer lightning-compress wrote it...
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a compression report must be JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("a compression report must be JSON, and this is nested too deeply") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a compression report must be text, and holds half a character: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise ValueError(f"a compression report has a whole number from 1 under 'schema', got {schema!r}")
    if schema > SCHEMA:
        raise ValueError(
            f"this report has schema {schema}, this package reads up to {SCHEMA}: a newer lightning-compress wrote it, "
            "upgrade with `pip install -U lightning-compress`"
        )
    return Report(
        rows=tuple(_read_row(entry) for entry in _list(document, "rows")),
        layers=tuple(_record(Layer, entry, "layers") for entry in _list(document, "layers")),
        files=tuple(_read_file(entry) for entry in _list(document, "files")),
        notes=tuple(str(note) for note in _list(document, "notes")),
        versions={name: str(version) for name, version in (_object(document, "versions") or {}).items()},
        recipe=_object(document, "recipe"),
        command=_text(document.get("command"), "command"),
        pictures=tuple(_read_picture(entry) for entry in _list(document, "pictures")),
    )


def encoded(value: Any) -> Any:
    """Replace non-finite floats by their names, and bytes by base64, at any depth.

    Args:
        value: What JSON can hold, and these.

    Returns:
        What strict JSON can hold.

    Example:
        >>> encoded({"loss": float("nan"), "png": b"ab"})
        {'loss': 'NaN', 'png': 'YWI='}
    """
    if isinstance(value, Mapping):
        return {str(key): encoded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(entry) for entry in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _list(document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"'{key}' of a compression report must be a list, got {type(value).__name__}")
    return value


def _object(document: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"'{key}' of a compression report must be an object, got {_brief(value)}")
    return value


def _text(value: Any, key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"'{key}' of a compression report must be text, got {_brief(value)}")
    return value


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be computed with: JSON has whole numbers of any length."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."


def _record(kind: type[Any], entry: Any, where: str) -> Any:
    """Build ``kind`` from the keys of ``entry`` that it knows; a missing required key is named."""
    if not isinstance(entry, dict):
        raise ValueError(f"'{where}' of a compression report must hold objects, got {entry!r}")
    known = kind.__dataclass_fields__
    # Only fields without text in them are numbers; a layer may be called "NaN".
    values = {
        key: value if "str" in str(known[key].type) else _number(value) for key, value in entry.items() if key in known
    }
    for key, value in values.items():
        accepted = str(known[key].type)
        if value is None and "None" in accepted:
            continue
        if re.match("int|float", accepted) and not _is_number(value):
            raise ValueError(f"'{key}' in '{where}' of a compression report must be a number, got {_brief(value)}")
        if re.match("str", accepted) and not isinstance(value, str):
            raise ValueError(f"'{key}' in '{where}' of a compression report must be text, got {_brief(value)}")
    try:
        return kind(**values)
    except TypeError as error:
        missing = str(error).partition("argument")[2].lstrip("s: ")
        raise ValueError(f"an entry of '{where}' lacks {missing}: {entry!r}") from error


def _read_row(entry: Any) -> Row:
    row: Row = _record(Row, entry, "rows")
    latency = None if row.latency_ms is None else _record(Latency, row.latency_ms, "latency_ms")
    metrics = {name: _number(value) for name, value in (_object(entry, "metrics") or {}).items()}
    if wrong := [name for name, value in metrics.items() if not _is_number(value)]:
        raise ValueError(f"'{wrong[0]}' in 'metrics' of a compression report must be a number")
    return replace(row, latency_ms=latency, metrics=metrics)


def _read_file(entry: Any) -> ExportedFile:
    file: ExportedFile = _record(ExportedFile, entry, "files")
    return replace(file, left_in_float=tuple(str(name) for name in _list(entry, "left_in_float")))


def _read_picture(entry: Any) -> Picture:
    picture: Picture = _record(Picture, entry, "pictures")
    try:
        return replace(picture, png=base64.b64decode(picture.png, validate=True))
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"the picture '{picture.title}' of a compression report is no base64: {error}") from error
