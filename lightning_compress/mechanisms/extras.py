"""Packages that only some parts of this one need, and the line that installs them."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires

PACKAGE = "lightning-compress"


def install_line(extra: str) -> str:
    """The command that installs what an extra brings, in the versions that it takes, from wherever this package came.

    Args:
        extra: Its name in ``pyproject.toml``.

    Returns:
        One line.

    Example:
        >>> install_line("structured")
        'pip install "torch-pruning<2,>=1.6.1"'
    """
    needed: list[str] = []
    with suppress(PackageNotFoundError):  # a checkout that was not installed
        for line in requires(PACKAGE) or ():
            package, _, condition = line.partition(";")
            if condition.replace('"', "'").strip() == f"extra == '{extra}'":
                needed.append(f'"{package.strip()}"')
    return f"pip install {' '.join(needed)}" if needed else f'pip install "{PACKAGE}[{extra}]"'
