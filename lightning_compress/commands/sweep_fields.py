"""The fields of a recipe that a sweep may vary, and how far each is varied where the user does not say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard

import yaml

from lightning_compress.commands.exits import UsageError
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.recipe import Recipe
from lightning_compress.recipe.classes import callback_class, check_arguments
from lightning_compress.report.units import significant


@dataclass(frozen=True)
class Around:
    """From ``low`` to ``high`` times what the recipe says, by factors."""

    low: float
    high: float

    def of(self, value: Any) -> dict[str, Any] | None:
        """The W&B parameter; None where the recipe says no positive number."""
        if not _is_number(value) or value <= 0:
            return None
        low, high = float(significant(value * self.low)), float(significant(value * self.high))
        return {"distribution": "log_uniform_values", "min": low, "max": high}


@dataclass(frozen=True)
class Remaining:
    """From twice to half of what remains where the recipe's share is gone: 0.8 to 0.95 of 0.9."""

    def of(self, value: Any) -> dict[str, Any] | None:
        """The W&B parameter; None where the recipe says no share."""
        if not _is_number(value) or not 0 < value < 1:
            return None
        low, high = max(1 - 2 * (1 - value), value / 2), 1 - (1 - value) / 2
        return {"min": round(low, 6), "max": round(high, 6)}


@dataclass(frozen=True)
class OneOf:
    """Some values, whatever the recipe says."""

    values: tuple[Any, ...]

    def of(self, value: Any) -> dict[str, Any] | None:
        """The W&B parameter."""
        return {"values": list(self.values)}


MOST_OTHERS = 3
"""Arguments that are varied together, of one callback, and are tried beside another."""
BITS = OneOf((4, 6, 8))
RANGES: Mapping[str, Mapping[str, Around | Remaining | OneOf]] = {
    # kd_weight and not task_weight: what counts is the one beside the other
    "DistillationCallback": {"temperature": Around(1 / 4, 4), "kd_weight": Around(1 / 4, 1.25)},
    "AttentionTransferCallback": {"strength": Around(1 / 10, 10), "weight": Around(1 / 10, 10)},
    "FactorTransferCallback": {"weight": Around(1 / 10, 10), "factor_ratio": OneOf((0.25, 0.5, 0.75))},
    "PSGDCallback": {
        "bits": OneOf((3, 4, 6, 8)),
        "gradient_scale": Around(1 / 10, 10),
        "mean_factor": Around(1 / 3, 3),
    },
    "PTQCallback": {"weight_bits": BITS},
    "QATCallback": {"weight_bits": BITS},
    "PruningCallback": {"sparsity": Remaining()},
    "StructuredPruningCallback": {"ratio": Remaining()},
    "DPFCallback": {"sparsity": Remaining()},
    "DCILCallback": {"sparsity": Remaining(), "temperature": Around(1 / 4, 4)},
}
"""What is varied of each callback, and how far."""


@dataclass(frozen=True)
class Field:
    """An argument of a callback of the recipe.

    Attributes:
        key: As ``lightning-compress run --set`` takes it, in the characters that W&B allows.
        others: Other ways to write the key.
        value: What the recipe says, or the argument's default.
        where: The entry of the recipe that has it.
        usual: Its range from the table; None: it has none, or not with this value.
    """

    key: str
    others: tuple[str, ...]
    value: Any
    where: str
    usual: dict[str, Any] | None

    @property
    def argument(self) -> str:
        """Its name alone."""
        return self.key.rpartition(".")[2]


def chosen(recipe: Recipe, vary: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is varied.

    Args:
        recipe: A checked recipe.
        vary: ``KEY=min..max``, ``KEY=a,b,c`` or ``KEY`` each; none: all that the table knows.

    Returns:
        Key to what W&B knows of a parameter.

    Raises:
        UsageError: If a key is unknown or has no range, a value is none that the recipe could have, or there is nothing
            to vary.

    Example:
        >>> recipe = Recipe(1, callbacks=({"class_path": "DCILCallback", "init_args": {"sparsity": 0.9}},))
        >>> chosen(recipe, [])["DCILCallback.sparsity"], chosen(recipe, ["dcil.end=0.5..0.9"])
        ({'min': 0.8, 'max': 0.95}, {'DCILCallback.end': {'min': 0.5, 'max': 0.9}})
    """
    fields = fields_of(recipe)
    if not vary:
        found = {field.key: field.usual for field in fields if field.usual is not None}
        if not found:
            raise UsageError(
                f"{recipe.path}: nothing in it has a usual range; say what to vary with --vary KEY=min..max"
            )
        return found
    known = {key: field for field in fields for key in (field.key, *field.others)}
    parameters, wishes = {}, []
    for wish in vary:
        key, equals, text = wish.partition("=")
        if key not in known:
            raise UsageError(f"--vary {key}: the recipe has no such argument{did_you_mean(key, known)}")
        field = known[key]
        entry = _given(key, text, field.value) if equals else field.usual
        if entry is None:
            raise UsageError(f"--vary {key} needs a range, as {key}=min..max or {key}=a,b,c: it has no usual one here")
        parameters[field.key] = entry
        wishes += [(wish, field)] if equals else []
    for wish, field in wishes:
        _check(recipe, field, wish, parameters, [other for other in fields if other.key in parameters])
    return parameters


def _check(
    recipe: Recipe, field: Field, wish: str, parameters: Mapping[str, Mapping[str, Any]], varied: Sequence[Field]
) -> None:
    """Refuse what ``run --set`` would refuse: a value, or an end, that goes with nothing that the callback is given."""
    [(class_path, init_args)] = [(path, given) for where, path, given in recipe.entries if where == field.where]
    others = [own for own in varied if own.where == field.where and own.key != field.key]
    beside = [dict(init_args)]
    for other in others[:MOST_OTHERS]:
        values = _values(parameters[other.key])
        beside += [{**own, other.argument: value} for own in beside for value in values]
    for value in _values(parameters[field.key]):
        refusals = [_refusal(class_path, field.where, {**own, field.argument: value}) for own in beside]
        if all(refusals):
            raise UsageError(f"--vary {wish}: {value} cannot be: {refusals[0]}")


def _values(entry: Mapping[str, Any]) -> Sequence[Any]:
    """All of a list, or both ends of a range."""
    return entry["values"] if "values" in entry else (entry["min"], entry["max"])


def _refusal(class_path: str, where: str, init_args: Mapping[str, Any]) -> str:
    try:
        check_arguments(callback_class(class_path, where), init_args, where)
    except ValueError as error:
        return str(error)
    return ""


def fields_of(recipe: Recipe) -> list[Field]:
    """Every argument of every callback of a recipe, ``export`` included.

    Args:
        recipe: A checked recipe.

    Example:
        >>> fields_of(Recipe(1, export={"path": "model.onnx"}))[0].key
        'ExportCallback.path'
    """
    classes = [callback_class(class_path, where) for where, class_path, _ in recipe.entries]
    bits = _linked_bits(recipe)
    fields = []
    for (where, _, init_args), cls in zip(recipe.entries, classes, strict=True):
        names = [cls.__name__, init_args.get("name") or getattr(cls, "default_name", cls.__name__)]
        names = names if classes.count(cls) == 1 else names[1:]  # a class that is there twice says nothing
        paths = [f"{where}.init_args" if where != "export" else where, *names[1:]]
        for argument, parameter in inspect.signature(cls).parameters.items():
            value = init_args.get(argument, None if parameter.default is parameter.empty else parameter.default)
            usual = RANGES.get(cls.__name__, {}).get(argument)
            varies = usual is not None and argument not in bits and _has_effect(argument, init_args)
            entry = usual.of(value) if usual is not None and varies else None
            others = tuple(f"{path}.{argument}" for path in paths)
            fields.append(Field(f"{names[0]}.{argument}", others, value, where, entry))
    return fields


def _has_effect(argument: str, init_args: Mapping[str, Any]) -> bool:
    """Whether an argument counts beside the others: a pattern has its own sparsity, a number needs no factor of it."""
    if argument == "sparsity":
        return bool(init_args.get("pattern", "unstructured") == "unstructured")
    if argument == "temperature":
        return init_args.get("loss_kind") not in ("mse", "hard") and init_args.get("kl_start") != 1
    if argument == "bits":
        return bool(init_args.get("target", "grid") != "zero")
    instead = {"strength": "weight", "mean_factor": "gradient_scale"}.get(argument)
    return instead is None or not _is_number(init_args.get(instead))


def _linked_bits(recipe: Recipe) -> tuple[str, ...]:
    """Arguments that cannot be varied alone: bits of two callbacks that have to agree, and of a file of 4 bits."""
    names = [class_path.rpartition(".")[2] for _, class_path, _ in recipe.entries]
    trained = "PSGDCallback" in names and {"PTQCallback", "QATCallback"} & {*names}
    int4 = any(init_args.get("precision") == "int4" for _, _, init_args in recipe.entries)
    return ("bits", "weight_bits") if trained or int4 else ()


def _given(key: str, text: str, value: Any) -> dict[str, Any]:
    """What a user wrote behind a key."""
    low, dots, high = text.partition("..")
    if not dots:
        parts = text.split(",")
        if "" in parts:
            raise UsageError(f"--vary {key}={text}: a value is missing; write {key}=min..max or {key}=a,b,c")
        return {"values": [_read(part) for part in parts]}
    ends = [_read(low), _read(high)]
    if not all(_is_number(end) for end in ends) or not ends[0] < ends[1]:
        raise UsageError(f"--vary {key}={text}: a range goes from a number to a larger one, as in 0.5..0.9")
    if isinstance(value, float) or any(isinstance(end, float) for end in ends):
        ends = [float(end) for end in ends]
    return {"min": ends[0], "max": ends[1]}


def _read(text: str) -> Any:
    """As YAML reads it, but ``1e-3`` is a number."""
    with suppress(yaml.YAMLError):
        value = yaml.safe_load(text)
        with suppress(ValueError):
            return float(value) if isinstance(value, str) else value
    return text


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
