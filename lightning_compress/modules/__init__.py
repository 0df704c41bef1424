"""Small trainable networks that techniques add beside the user's own, usable in any training loop."""

from __future__ import annotations

from lightning_compress.modules.factors import Paraphraser, Translator

__all__ = ["Paraphraser", "Translator"]
