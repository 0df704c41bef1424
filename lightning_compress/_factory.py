"""Where the entry point was at first: editable installations go on with the entry points that they were made with."""

from __future__ import annotations

from _lightning_compress_entry import VARIABLE, callbacks

__all__ = ["VARIABLE", "callbacks"]
