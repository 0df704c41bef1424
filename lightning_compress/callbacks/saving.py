"""What the techniques share whose checkpoints hold something else than the module does while it trains."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.mechanisms.checkpoints import close_after_exception
from lightning_compress.mechanisms.wrapping import copied_plainly


class SavingCallback(CompressionCallback):
    """Base of the techniques that act on what the module loads from set-up on, and in a fit on what it saves.

    They end that with ``self._files.close()`` when the module holds what its files should, in ``bake``.

    Args:
        name: As in the base class.
    """

    def __init__(self, *, name: str | None) -> None:
        super().__init__(name=name)
        self._files = ExitStack()
        self._saving = False  # whether the module itself changes what is saved

    # For techniques

    def _loading_files(self, trainer: Any, pl_module: Any, stage: str) -> AbstractContextManager[None]:
        """Act on each checkpoint that the module loads."""
        raise NotImplementedError

    def _saving_files(self, pl_module: Any) -> AbstractContextManager[None]:
        """Act on each checkpoint that the module saves."""
        raise NotImplementedError

    # Life cycle

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin to act on files."""
        super().setup(trainer, pl_module, stage)
        self._files.close()
        self._files.enter_context(copied_plainly(pl_module))
        self._files.enter_context(self._loading_files(trainer, pl_module, stage))
        if stage == "fit":
            self._files.enter_context(self._saving_files(pl_module))
            self._files.callback(setattr, self, "_saving", False)
            self._saving = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing on the module."""
        super().teardown(trainer, pl_module, stage)
        if not self._is_elsewhere(trainer):
            self._files.close()

    def interrupted(self, trainer: Any, pl_module: Any) -> None:
        """Leave nothing on the module, once the checkpoints of the exception are written."""
        super().interrupted(trainer, pl_module)
        close_after_exception(trainer, self._files)
