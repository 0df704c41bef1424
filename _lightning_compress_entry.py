"""Entry point that every Trainer of both Lightning packages calls; returns nothing unless ``run`` asked for it.

Lightning loads it in every program on the machine, unguarded. So it imports nothing that could fail or take time, and
lies outside of the package, whose own ``__init__`` would come first.
"""

from __future__ import annotations

import os

VARIABLE = "LIGHTNING_COMPRESS_RUN"


def callbacks() -> list[object]:
    """The callbacks of the recipe named in the environment; an empty list for every other program.

    Returns:
        Callbacks for the Trainer under construction.

    Example:
        >>> callbacks()
        []
    """
    if VARIABLE not in os.environ:
        return []
    from lightning_compress.attachment import attachments

    return [*attachments(os.environ[VARIABLE])]
