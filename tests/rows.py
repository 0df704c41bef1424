"""The rows of the reliability matrix: each public callback, and those that are attached together."""

from __future__ import annotations

from cases import CASES, Row

ROWS: tuple[Row, ...] = CASES
