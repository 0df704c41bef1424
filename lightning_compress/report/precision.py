"""A file of lower precision beside the same network in fp32: bytes, and time in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_compress.export.onnx import ExportResult
from lightning_compress.export.parity import resized
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.report.latency import measure_latency, shows_difference


@dataclass(frozen=True)
class AgainstFp32:
    """Two files of one network, both run by ONNX Runtime on one thread.

    Attributes:
        precision: Of the first, "int8" or "int4".
        bytes: Its size.
        bytes_fp32: Size of the file in fp32.
        batch: Samples in a call.
        milliseconds: Median time of a call.
        milliseconds_fp32: The same in fp32.
        speed: How many times as fast as in fp32: the median over rounds in which both ran.
        speed_low: Lower end of its 95% interval; None with too few rounds.
        speed_high: Upper end.
    """

    precision: str
    bytes: int
    bytes_fp32: int
    batch: int
    milliseconds: float
    milliseconds_fp32: float
    speed: float
    speed_low: float | None = None
    speed_high: float | None = None

    def __str__(self) -> str:
        size = f"the {self.precision} file has {self.bytes / self.bytes_fp32:.3f} of the bytes of one in fp32"
        batch = f"(batch {self.batch}, one thread)"
        if not shows_difference(self.speed_low, self.speed_high):
            return f"{size}; no difference in time is shown {batch}"
        if self.speed >= 1:
            return f"{size} and runs {self.speed:.2f} times as fast {batch}"
        return (
            f"{size}, but takes {1 / self.speed:.2f} times as long {batch}: for speed the better file is that of "
            "precision='fp32'"
        )


def against_fp32(file: ExportResult, plain: ExportResult, *, seconds: float = 5.0) -> AgainstFp32:
    """Compare a file with one in fp32, for one sample where both take any batch size.

    Args:
        file: The file of lower precision.
        plain: That in fp32, of the same network.
        seconds: Time to measure for, in seconds.

    Returns:
        Bytes and times.
    """
    one = 1 in file.checked_batch_sizes and 1 in plain.checked_batch_sizes
    tensors = resized(file.tensors, 1) if one else file.tensors

    def call(path: ExportResult) -> Callable[[], object]:
        network = OnnxNetwork(path.path, threads=1)
        return lambda: network.run(tensors)

    times = measure_latency({"fp32": call(plain), "file": call(file)}, seconds=seconds)
    own = times["file"]
    ratio = own.ratio or own.median / times["fp32"].median
    return AgainstFp32(
        precision=file.precision,
        bytes=file.bytes,
        bytes_fp32=plain.bytes,
        batch=len(tensors[0]) if tensors and tensors[0].ndim else 1,
        milliseconds=own.median,
        milliseconds_fp32=times["fp32"].median,
        speed=1 / ratio,
        speed_low=None if own.ratio_high is None else 1 / own.ratio_high,
        speed_high=None if own.ratio_low is None else 1 / own.ratio_low,
    )
