"""Which callbacks go together, how they are built beside one another, and which pairs are refused.

The contract in ``tests/contract/test_combinations.py`` runs every row in every order. Each pair of public callbacks is
in ``WORKS`` or in ``REFUSED``: a new callback is added to one of the two for each that there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import CASES, Case
from contract.modules import Classifier, NormClassifier

from lightning_compress import (
    CompressionCallback,
    DCILCallback,
    ExportCallback,
    QATCallback,
    StructuredPruningCallback,
)

SHORT = {case.name.removesuffix("Callback"): case for case in CASES}
LATER = 0.25
"""The fraction of the training at which quantisation begins where something else has to come before it."""

WORKS = {
    "Distillation": (
        "AttentionTransfer FactorTransfer PSGD PTQ QAT Pruning DPF DCIL StructuredPruning Export CompressionReport"
    ),
    "AttentionTransfer": "FactorTransfer PSGD PTQ QAT Pruning DPF DCIL StructuredPruning Export CompressionReport",
    "FactorTransfer": "PSGD PTQ QAT Pruning DPF DCIL StructuredPruning Export CompressionReport",
    "PSGD": "PTQ QAT Pruning DPF DCIL StructuredPruning Export CompressionReport",
    "PTQ": "Pruning DPF DCIL StructuredPruning Export CompressionReport",
    "QAT": "Pruning DPF DCIL StructuredPruning Export CompressionReport",
    "Pruning": "StructuredPruning Export CompressionReport",
    "DPF": "StructuredPruning Export CompressionReport",
    "DCIL": "StructuredPruning Export CompressionReport",
    "StructuredPruning": "Export CompressionReport",
    "Export": "CompressionReport",
}
"""Pairs that work."""

REFUSED = {
    "PTQ QAT": "would both quantise: QATCallback finds its grids itself",
    "Pruning DPF": "both present the weight",
    "Pruning DCIL": "both mask weights",
    "DPF DCIL": "both mask weights",
}
"""Pairs that are refused, and how the error says so."""

MORE = (
    "Distillation DPF QAT",
    "Distillation DCIL QAT",
    "Distillation AttentionTransfer FactorTransfer",
    "Distillation StructuredPruning QAT",
    "Distillation PSGD PTQ",
    "Distillation Pruning PTQ",
    "AttentionTransfer Pruning QAT",
    "StructuredPruning DPF PTQ",
)
"""Combinations of three."""


@dataclass(frozen=True)
class Combination:
    """Several callbacks in one Trainer: what a :class:`cases.Case` is of one, but that it builds a list.

    Attributes:
        members: Their rows, in the order of the table.
        modules: Kinds of module that it is tried on.
    """

    members: tuple[Case, ...]
    modules: tuple[type[Classifier], ...] = (Classifier, NormClassifier)

    @property
    def name(self) -> str:
        """The classes, as in the tables of the documentation."""
        return " + ".join(case.name for case in self.members)

    @property
    def changes_loss(self) -> bool:
        return any(case.changes_loss for case in self.members)

    @property
    def keeps_dense(self) -> bool:
        return any(case.keeps_dense for case in self.members)

    @property
    def quantises(self) -> bool:
        return any(case.quantises for case in self.members)

    @property
    def shrinks(self) -> bool:
        return any(case.shrinks for case in self.members)

    @property
    def heavy(self) -> bool:
        return any(case.heavy for case in self.members)

    def has(self, *names: str) -> bool:
        """Whether one of these, without "Callback", is a member."""
        return any(SHORT[name] in self.members for name in names)

    def build(self, folder: Path, kind: type[Classifier]) -> list[CompressionCallback]:
        """Fresh callbacks, the same ones each time."""
        return [self._builder(case)(folder, kind) for case in self.members]

    def _builder(self, case: Case) -> Callable[[Path, type[Classifier]], CompressionCallback]:
        """The row's own, but where one has to come before another."""
        if case is SHORT["StructuredPruning"]:  # channels go before the first step
            return lambda folder, kind: StructuredPruningCallback(0.5, min_channels=1)
        if case is SHORT["DCIL"] and self.has("StructuredPruning", "QAT"):  # fewer weights, and none of a filter dead
            return lambda folder, kind: DCILCallback(0.2, update_interval=1)
        if case is SHORT["QAT"] and self.has("StructuredPruning", "PSGD"):
            return lambda folder, kind: QATCallback(weight_bits=4, step_size="observed", start=LATER)
        if case is SHORT["Export"] and self.has("PTQ", "QAT"):
            return lambda folder, kind: ExportCallback(folder / "model.onnx", precision="int8")
        return case.build


def combination(names: str) -> Combination:
    """From the names of classes without "Callback"."""
    chosen = [SHORT[name] for name in names.split()]
    return Combination(tuple(case for case in CASES if case in chosen))


PAIRS = tuple(combination(f"{first} {other}") for first, others in WORKS.items() for other in others.split())
COMBINATIONS = (*PAIRS, *(combination(names) for names in MORE))
SAMPLE = [combination(names) for names in ("Distillation DCIL", "PSGD PTQ", "StructuredPruning QAT", MORE[0])]


def each_combination(*, heavy: bool = True) -> pytest.MarkDecorator:
    """Parametrise a test over the combinations: slow, and some of them a sample."""
    rows = [
        pytest.param(
            own,
            id="+".join(case.name.removesuffix("Callback") for case in own.members),
            marks=[pytest.mark.slow, *[pytest.mark.sample] * (own in SAMPLE)],
        )
        for own in COMBINATIONS
        if heavy or not own.heavy
    ]
    return pytest.mark.parametrize("own", rows)
