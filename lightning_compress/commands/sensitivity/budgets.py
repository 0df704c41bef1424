"""Budgets as they are written on the command line: ``bytes=25%``, ``bytes=200kB``, ``macs=50%``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_compress.commands.exits import UsageError
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.report import units

QUANTITIES = {"bytes": ("bits", "sparsity"), "macs": ("filters",)}
"""What is limited, and by which methods it can be."""
PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Budget:
    """How much may be left.

    Attributes:
        quantity: "bytes" or "macs".
        amount: A share of what there is, or a number.
        is_share: Which of the two.
    """

    quantity: str
    amount: float
    is_share: bool

    def limit(self, whole: float) -> float:
        """How much may be left of a whole.

        Example:
            >>> Budget("bytes", 0.25, True).limit(1000)
            250.0
        """
        return self.amount * whole if self.is_share else self.amount

    def __str__(self) -> str:
        shown = units.share(self.amount) if self.is_share else shown_amount(self.quantity, self.amount).replace(" ", "")
        return f"{self.quantity}={shown}"


DEFAULTS = {"bytes": Budget("bytes", 0.25, True), "macs": Budget("macs", 0.5, True)}


def parsed_budget(text: str) -> Budget:
    """Read a budget.

    Args:
        text: QUANTITY=AMOUNT.

    Returns:
        The budget.

    Raises:
        UsageError: If it is none.

    Example:
        >>> parsed_budget("bytes=200kB")
        Budget(quantity='bytes', amount=200000.0, is_share=False)
    """
    quantity, sign, amount = text.partition("=")
    if not sign or quantity not in QUANTITIES:
        raise UsageError(
            f"--budget {text}: must be bytes=25%, bytes=200kB, macs=50% or the like{did_you_mean(quantity, QUANTITIES)}"
        )
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|(?:[kmg]i?)?)(b?)", amount.strip().lower())
    if match is None or (match[3] and (quantity == "macs" or match[2] == "%")):
        accepted = (
            "a percentage, or a number of bytes such as 200kB" if quantity == "bytes" else "a percentage, or 1.2M"
        )
        raise UsageError(f"--budget {text}: '{amount}' must be {accepted}")
    number = float(match[1])
    if match[2] == "%":
        if not 0 < number < 100:
            raise UsageError(f"--budget {text}: a percentage must be between 0 and 100, got {amount}")
        return Budget(quantity, number / 100, True)
    if number <= 0:
        raise UsageError(f"--budget {text}: must be above 0")
    return Budget(quantity, number * PREFIXES[match[2]], False)


def shown_amount(quantity: str, amount: float) -> str:
    """Bytes with their unit, other things without.

    Example:
        >>> shown_amount("bytes", 2e5), shown_amount("macs", 2e5)
        ('200 kB', '200 k')
    """
    return units.size(round(amount)) if quantity == "bytes" else units.count(round(amount))
