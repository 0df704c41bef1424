"""Entry point that every Trainer of both Lightning packages calls; returns nothing unless ``run`` asked for it."""

from __future__ import annotations

import os

VARIABLE = "LIGHTNING_COMPRESS_RUN"


def callbacks() -> list[object]:
    """The callbacks of the recipe named in the environment; an empty list for every other program.

    Returns:
        Callbacks for the Trainer under construction.
    """
    if VARIABLE not in os.environ:
        return []
    from lightning_compress.recipe import attachments

    return attachments(os.environ[VARIABLE])
