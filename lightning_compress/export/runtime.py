"""An exported file as something that takes and gives torch tensors, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_compress.export.errors import EvaluationError, first_line
from lightning_compress.mechanisms.extras import install_line

ELEMENT_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
SEVERITY_ERROR = 3  # of ONNX Runtime's logger


def require_onnx() -> None:
    """Check that the packages behind ONNX export are installed, without importing them.

    Raises:
        ImportError: If one is missing; the message holds the line that installs them.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"run: {install_line('onnx')}"
        )


_sessions: WeakSet[Any] = WeakSet()
_until_forked: list[Any] = []
_inherited: list[Any] = []
"""What a forked process has of its parent's sessions, and must never let go of."""


def open_session(path: str | os.PathLike[str], options: Any) -> Any:
    """Open a file in ONNX Runtime on the CPU, in a way that processes can be forked from this one.

    A session's end waits for its threads, and a forked process has none of them: its garbage collector would wait for
    ever, be it for a session that nobody uses any more. So a worker of a data loader keeps all that it inherits.

    Args:
        path: The file.
        options: An ``onnxruntime.SessionOptions``.

    Returns:
        The ``onnxruntime.InferenceSession``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    _sessions.add(session)
    return session


if hasattr(os, "register_at_fork"):  # elsewhere nothing forks
    os.register_at_fork(
        before=lambda: _until_forked.extend(_sessions),
        after_in_parent=_until_forked.clear,
        after_in_child=lambda: _inherited.extend(_until_forked),
    )


class OnnxNetwork:
    """An ONNX file behind a call with torch tensors.

    The file is opened on the first use, and again after unpickling and in a forked process.

    Args:
        path: The file.
        threads: Number of threads inside one operation; None leaves it to ONNX Runtime.

    Attributes:
        calls: How often :meth:`run` has succeeded.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If ``onnxruntime`` or one of its companions is not installed.
        ValueError: If ``threads`` is not positive.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        require_onnx()
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path '{self.path}' is not a file")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1 or None, got {threads}")
        self.threads = threads
        self.calls = 0
        self._session: Any = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    @property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``, opened when first asked for."""
        if self._session is None or self._process != os.getpid():
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = SEVERITY_ERROR
            if self.threads is not None:
                options.intra_op_num_threads = self.threads
            try:
                self._session, self._process = open_session(self.path, options), os.getpid()
            except Exception as error:  # onnxruntime has a class for each status code, without a common base
                raise EvaluationError(f"ONNX Runtime cannot open '{self.path}': {first_line(error)}") from error
        return self._session

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order that :meth:`run` takes them."""
        return tuple(entry.name for entry in self.session.get_inputs())

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order that :meth:`run` gives them."""
        return tuple(entry.name for entry in self.session.get_outputs())

    @property
    def metadata(self) -> dict[str, str]:
        """What the exporter wrote into the file about itself."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run the file once.

        Args:
            tensors: One tensor for each input, in the order of ``input_names``, on any device, contiguous or not.
                Floating tensors are cast to the type the file declares, integer tensors likewise.

        Returns:
            One tensor for each output, on the device of the first input.

        Raises:
            EvaluationError: If the file does not take these tensors.
        """
        inputs = self.session.get_inputs()
        if len(tensors) != len(inputs):
            names = [entry.name for entry in inputs]
            raise EvaluationError(f"'{self.path}' takes {len(inputs)} tensors, {names}, but got {len(tensors)}")
        feed = {entry.name: self._array(entry, tensor) for entry, tensor in zip(inputs, tensors, strict=True)}
        try:
            outputs = self.session.run(None, feed)
        except Exception as error:
            shapes = {entry.name: tuple(feed[entry.name].shape) for entry in inputs}
            declared = {entry.name: tuple(entry.shape) for entry in inputs}
            raise EvaluationError(
                f"'{self.path}' does not take inputs of shape {shapes}; it declares {declared}: {first_line(error)}"
            ) from error
        self.calls += 1
        device = tensors[0].device if tensors else torch.device("cpu")
        return [torch.as_tensor(output, device=device) for output in outputs]

    def _array(self, entry: Any, tensor: Tensor) -> Any:
        """A tensor as the NumPy array that one input of the file takes."""
        dtype = ELEMENT_TYPES.get(entry.type)
        if dtype is None:
            raise EvaluationError(
                f"input '{entry.name}' of '{self.path}' is of type {entry.type}, which is not handled"
            )
        if dtype != tensor.dtype and dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise EvaluationError(f"input '{entry.name}' of '{self.path}' is {dtype}, but got {tensor.dtype}")
        return tensor.detach().to("cpu", dtype).contiguous().numpy()
