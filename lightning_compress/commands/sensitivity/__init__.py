"""Sensitivity: each layer alone pruned or quantised, through the project's own validation, and a suggested recipe."""

from __future__ import annotations

from lightning_compress.commands.sensitivity.command import sensitivity

__all__ = ["sensitivity"]
