"""Entry point that every Trainer of both Lightning packages calls; returns nothing unless ``run`` asked for it.

Lightning loads it in every program on the machine, unguarded. So it imports nothing that could fail or take time, and
is installed beside the package, as ``_lightning_compress_factory``: the package's own ``__init__`` would come first.
"""

from __future__ import annotations

import os


def callbacks() -> list[object]:
    """The callbacks of the recipe named in the environment; an empty list for every other program.

    Returns:
        Callbacks for the Trainer under construction.

    Example:
        >>> callbacks()
        []
    """
    order = os.environ.get("LIGHTNING_COMPRESS_RUN")
    if order is None:
        return []
    from lightning_compress.commands.attachment import attachments

    return [*attachments(order)]
