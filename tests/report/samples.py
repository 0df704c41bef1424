"""A report with everything in it, shared by the tests of how it is kept and shown."""

from __future__ import annotations

from lightning_compress.report import ExportedFile, Latency, Layer, Report, Row


def full_report() -> Report:
    eager = Latency("torch", 1, 3.0, 0.2, 50, 1.0, 1.0, 1.0)
    faster = Latency("onnxruntime", 1, 1.5, 0.1, 50, 0.5, 0.49, 0.51)
    same = Latency("torch", 1, 3.1, 0.2, 50, 1.0, 0.9, 1.1)
    slower = Latency("onnxruntime", 1, 6.0, 0.1, 50, 2.0, 1.9, 2.1)
    rows = (
        Row("before", 1000, 1000, 5000, 4400, 4100, eager, {"val_acc": 0.1}),
        Row("after", 1000, 100, 5000, 4400, 700, same, {"val_acc": 0.9}),
        Row("fp32.onnx", None, None, None, 4700, 800, faster, {"val_acc": 0.9}),
        Row("int8.onnx", None, None, None, 1100, 300, slower, {"val_acc": 0.89}),
    )
    return Report(
        rows=rows,
        layers=(Layer("model.conv", "Conv2d", 0.9, 32, 16), Layer("", "GRU", 0.0, 16)),
        files=(
            ExportedFile("runs/fp32.onnx", "fp32", 4700, 1e-7),
            ExportedFile("runs/int8.onnx", "int8", 1100, 0.2, ("softmax",)),
        ),
        notes=("The teacher was not measured.",),
        versions={"lightning_compress": "0.1.0", "torch": "2.14.1"},
        recipe={"version": 1, "callbacks": [{"class_path": "PruningCallback"}]},
    )


def nasty_report() -> Report:
    name = "<script>alert('$x$')</script> | \"a&b\" `c`\n\u65e5\u672c"
    return Report(
        rows=(Row(name, bytes=10, metrics={name: float("nan")}), Row("other", bytes=5, metrics={name: float("inf")})),
        layers=(Layer(name, name, 0.5, 32),),
        files=(ExportedFile(name, name, 3, None, (name,)),),
        notes=(name,),
        versions={name: name},
        recipe={name: name},
    )
