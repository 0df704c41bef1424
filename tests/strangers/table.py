"""All modules of other packages that the callbacks are tried on."""

from __future__ import annotations

from . import images, others, series

STRANGERS = {str(stranger): stranger for stranger in (*images.STRANGERS, *series.STRANGERS, *others.STRANGERS)}
