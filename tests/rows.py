"""The rows of the reliability matrix: each public callback, and some that are attached together."""

from __future__ import annotations

from cases import CASES, Row
from combinations import COMBINATIONS, SAMPLE

TOGETHER = tuple(own for own in COMBINATIONS if own in SAMPLE or len(own.members) > 2)
ROWS: tuple[Row, ...] = (*CASES, *TOGETHER)
