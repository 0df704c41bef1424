"""The demo: on real data, a teacher, a student alone, distilled, pruned and quantised too, checked files, the table.

The test set is looked at once a run, after the last epoch; nothing is chosen by it.
"""

from __future__ import annotations

import gzip
import logging
import os
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.callbacks.dcil import DCILCallback
from lightning_compress.callbacks.distillation import DistillationCallback
from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.callbacks.qat import QATCallback
from lightning_compress.callbacks.structured import StructuredPruningCallback
from lightning_compress.export import Sample, evaluate, to_onnx
from lightning_compress.export.evaluate import evaluate_forward
from lightning_compress.mechanisms.channel_graph import require_torch_pruning
from lightning_compress.mechanisms.extras import install_line
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.mechanisms.signs import on_terminal
from lightning_compress.report import compare, units, write_report
from lightning_compress.report.cells import shown_path
from lightning_compress.report.render import for_terminal
from lightning_compress.report.table import Row, with_quantised

METRIC = "val_accuracy"
TOLERANCE = 0.005
STUDENT_WIDTH = 8
SPARSITY = 0.9
REMOVED = 0.75  # of the multiply-accumulates of the teacher, with --structured
QUANTISED_FROM = 0.7  # of the training, when the masks are all but final
INTERRUPTED = 130  # as a shell reports Ctrl-C
FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("FashionMNIST/raw"), Path("data/FashionMNIST/raw"))
FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FASHION_HELP = (
    "Fashion-MNIST is not on this machine. On Debian or Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere: "
    "python -c \"import torchvision; torchvision.datasets.FashionMNIST('data', download=True)\" and call the demo "
    "from the same folder"
)


class DemoDataError(RuntimeError):
    """The data that the demo was asked for is not there, or is not known."""


@dataclass(frozen=True)
class DemoData:
    """Images and labels, and how long to train on them.

    Attributes:
        train: Images (N, 1, H, W), standardised, and labels (N,).
        test: The same for the test set.
        epochs: Epochs of the teacher, and of each student.
        teacher_width: Channels of the teacher's first stage; a student has 8.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: tuple[int, int]
    teacher_width: int

    def loaders(self, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Loaders of the training set, in an order that the seed fixes, and of the test set."""
        generator = torch.Generator().manual_seed(seed)
        train = DataLoader(TensorDataset(*self.train), batch_size=64, shuffle=True, generator=generator)
        return train, DataLoader(TensorDataset(*self.test), batch_size=500)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; halves the resolution where the width grows."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Images features (N, C, H, W) to (N, width, H / stride, W / stride)."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small grey images.

    Args:
        width: Channels of the first stage; doubled in the second and third.
        classes: Number of classes.
    """

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            ResidualBlock(width, width), ResidualBlock(width, 2 * width), ResidualBlock(2 * width, 4 * width)
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, H, W) to logits (N, classes)."""
        features: Tensor = self.stages(self.stem(x))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class LitClassifier(L.LightningModule):
    """An ordinary classifier: it knows nothing of compression.

    Args:
        width: Width of its network.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = SmallResNet(width)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of images and labels."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self.network(images)
        self.accuracy(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log(METRIC, self.accuracy)

    def configure_optimizers(self) -> Any:
        """SGD whose learning rate falls along a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run_demo(*, data: str = "digits", out: str = "compress-demo", structured: bool = False, seed: int = 0) -> int:
    """Run the demo and leave everything in one folder.

    Args:
        data: "digits" (scikit-learn's, 8x8) or "fashion-mnist" (14x14, 20,000 training images).
        out: Folder for checkpoints, logs, files and the report; made if it does not exist.
        structured: Whether the teacher is made smaller too, with whole filters.
        seed: Seed of the weights and of the order of the batches; teacher and students use the same.

    Returns:
        0 if all went well; 1 if a file's accuracy differs from its module's by more than half a point; 2 if the data
        is not there or not known (the reason is written to stderr); 130 if it was interrupted.
    """
    start = time.perf_counter()
    try:
        if structured:
            require_torch_pruning()
        source = load_data(data)
    except (DemoDataError, ImportError) as error:
        sys.stderr.write(f"lightning-compress demo: {error}\n")
        return 2
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            return _train_and_compare(source, folder, data, seed, start, structured)
    except (KeyboardInterrupt, SystemExit):  # Lightning ends the process on Ctrl-C
        sys.stderr.write("\nlightning-compress demo: interrupted\n")
        return INTERRUPTED


def load_data(name: str) -> DemoData:
    """The demo's data, from packages and files that are on the machine.

    Args:
        name: "digits" or "fashion-mnist".

    Returns:
        Training and test set.

    Raises:
        DemoDataError: If there is no such data set, or its files are not on this machine.
        ImportError: If scikit-learn is needed and not installed.
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist()
    accepted = ["digits", "fashion-mnist"]
    raise DemoDataError(f"--data must be one of {accepted}, got {name!r}{did_you_mean(name, accepted)}")


@dataclass
class _Compared:
    """What the report compares: networks, their files, and what is known of both.

    Attributes:
        modules: Row to trained module.
        exports: Row that each file was made of, and the callback that wrote it.
        quantised: Row of a quantised network, row of the same in full precision, and the callback with its file.
        notes: Sentences below the tables.
    """

    modules: dict[str, LitClassifier]
    exports: list[tuple[str, ExportCallback]]
    quantised: list[tuple[str, str, ExportCallback]]
    notes: list[str]


def _train_and_compare(source: DemoData, folder: Path, data: str, seed: int, start: float, structured: bool) -> int:
    teacher_epochs, student_epochs = source.epochs
    stages = 6 if structured else 5
    _say(f"[1/{stages}] teacher: a residual network of width {source.teacher_width}, {teacher_epochs} epochs on {data}")
    teacher = _fit(source, _made(source.teacher_width, seed), teacher_epochs, folder / "teacher", seed)

    def student(name: str, callbacks: Sequence[Callback] = ()) -> LitClassifier:
        return _fit(source, _made(STUDENT_WIDTH, seed), student_epochs, folder / name, seed, callbacks)

    _say(f"[2/{stages}] student alone: width {STUDENT_WIDTH}, {student_epochs} epochs")
    alone = student("student_alone")
    _say(f"[3/{stages}] student distilled: the same seed, batches and number of steps, and one callback more")
    exporting = _exporting(folder / "student.onnx")
    distilled = student("student_distilled", [DistillationCallback(teacher.network), exporting])
    _say(
        f"[4/{stages}] distilled, pruned and quantised in one fit: {SPARSITY:.0%} of the convolutions' weights are "
        f"zero, 8 bits from {QUANTISED_FROM:.0%} of the steps on"
    )
    pruning, quantising = DCILCallback(SPARSITY), QATCallback(start=QUANTISED_FROM)
    exporting_pruned = _exporting(folder / "student_pruned.onnx")
    exporting_int8 = _exporting(folder / "student_int8.onnx", "int8")
    compressing = [DistillationCallback(teacher.network), pruning, quantising]
    pruned = student("student_quantised", [*compressing, exporting_pruned, exporting_int8])
    compared = _Compared(
        {"teacher": teacher, "student alone": alone, "student distilled": distilled, "distilled and pruned": pruned},
        [
            ("student distilled", exporting),
            ("distilled and pruned", exporting_pruned),
            ("distilled and pruned", exporting_int8),
        ],
        [("distilled, pruned, quantised", "distilled and pruned", exporting_int8)],
        [*pruning.remarks(), *quantising.remarks(), *exporting_int8.remarks()],
    )
    if structured:
        _say(
            f"[5/{stages}] the teacher made smaller: {REMOVED:.0%} of its multiply-accumulates go with whole filters, "
            "then it learns from what it was, and is quantised, in one fit"
        )
        _make_smaller(source, teacher, student_epochs, folder, seed, compared)
    _say(f"[{stages}/{stages}] files and table: export, check, validation through the files, times")
    failures = _report(source, folder, seed, data, compared)
    _say(f"Took {time.perf_counter() - start:.0f} s.")
    for failure in failures:
        sys.stderr.write(f"lightning-compress demo: {failure}\n")
    return 1 if failures else 0


def _make_smaller(
    source: DemoData, teacher: LitClassifier, epochs: int, folder: Path, seed: int, compared: _Compared
) -> None:
    """Take filters out of a copy of the teacher, and add what becomes of it to what is compared."""
    row, smaller = "teacher made smaller", _made(source.teacher_width, seed)
    smaller.load_state_dict(teacher.state_dict())
    pruning, quantising = StructuredPruningCallback(REMOVED, budget="macs"), QATCallback(start=QUANTISED_FROM)
    exports = [_exporting(folder / "smaller.onnx"), _exporting(folder / "smaller_int8.onnx", "int8")]
    compressing = [pruning, DistillationCallback(teacher.network), quantising]
    compared.modules[row] = _fit(source, smaller, epochs, folder / "teacher_smaller", seed, [*compressing, *exports])
    compared.exports += [(row, export) for export in exports]
    compared.quantised.append((f"{row}, quantised", row, exports[1]))
    compared.notes += [*pruning.remarks(), *quantising.remarks(), *exports[1].remarks()]


def _exporting(path: Path, precision: str = "fp32") -> ExportCallback:
    return ExportCallback(path, precision=precision, metric=METRIC, tolerance=TOLERANCE, name=path.name)


def _made(width: int, seed: int) -> LitClassifier:
    torch.manual_seed(seed)
    return LitClassifier(width)


def _fit(
    source: DemoData, module: LitClassifier, epochs: int, folder: Path, seed: int, callbacks: Sequence[Callback] = ()
) -> LitClassifier:
    start = time.perf_counter()
    watched = on_terminal()
    progress = TQDMProgressBar(refresh_rate=5) if watched else _FirstEpoch(start)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        callbacks=[progress, *callbacks],
        enable_progress_bar=watched,
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,  # the test set is looked at once
        log_every_n_steps=10,
    )
    train, test = source.loaders(seed)
    trainer.fit(module, train, test)
    trainer.save_checkpoint(folder / "last.ckpt")
    _say_finished(start, f"{METRIC} {units.metric(float(trainer.callback_metrics[METRIC]))}")
    return module


class _FirstEpoch(Callback):
    """Says how long the first epoch took, where no bar shows how it goes on."""

    def __init__(self, start: float) -> None:
        self._start = start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            _say(f"      epoch 1 of {trainer.max_epochs}: {time.perf_counter() - self._start:.1f} s")


def _metrics(module: LitClassifier, source: DemoData, seed: int) -> dict[str, float]:
    return evaluate_forward(module, source.loaders(seed)[1])


def _about_the_students(metrics: Mapping[str, Mapping[str, float]]) -> str:
    accuracy = {name: 100 * of_row[METRIC] for name, of_row in metrics.items()}
    gain = accuracy["student distilled"] - accuracy["student alone"]
    cost = accuracy["distilled and pruned"] - accuracy["student distilled"]
    return (
        f"{METRIC} is on the test set after the last epoch. One seed: what distillation did for the student "
        f"({gain:+.1f} points), and then pruning ({cost:+.1f} points), are illustrations, not evidence."
    )


def _report(source: DemoData, folder: Path, seed: int, data: str, compared: _Compared) -> list[str]:
    """Measure all of it, write and print the report; what is wrong with the files."""
    begin, sample, (_, test) = time.perf_counter(), source.test[0][:8], source.loaders(seed)
    exports = [export for _, export in compared.exports]
    results = [export.result for export in exports if export.result is not None]
    if len(results) < len(exports):
        raise RuntimeError("the export at the end of the fit wrote no file")
    teacher = compared.modules["teacher"]
    files = [to_onnx(teacher.network, folder / "teacher.onnx", sample), *results]
    in_float = {row: export for row, export in compared.exports if export.precision == "fp32"}
    metrics = {
        row: in_float[row].module_metrics if row in in_float else _metrics(module, source, seed)
        for row, module in compared.modules.items()
    }
    metrics["teacher.onnx"] = evaluate(files[0].path, teacher, test, network="network")
    metrics.update({result.path.name: export.file_metrics for result, export in zip(results, exports, strict=True)})
    report = compare(
        {row: module.network for row, module in compared.modules.items()},
        files,
        made_of=["teacher", *(row for row, _ in compared.exports)],
        sample=Sample((sample,)),
        metrics=metrics,
        notes=[f"Data: {data}; {_about_the_students(metrics)}", *compared.notes],
        recipe={"demo": {"data": data}},
    )
    for name, of, export in compared.quantised:
        row = Row(name, metrics=dict(export.module_metrics))
        report = with_quantised(report, row, of=of, files=[str(export.path)])
    written = write_report(report, folder)
    names = [os.path.basename(file.path) for file in files]
    _say_finished(begin, ", ".join(f"{METRIC} {units.metric(metrics[name][METRIC])} in {name}" for name in names))
    _say("")
    sys.stdout.write(for_terminal(report) + "\n")
    _say(f"\nReport: {shown_path(written.html)}\nFiles:  {', '.join(shown_path(file.path) for file in files)}")
    failures = [export.failure for export in exports if export.failure]
    gap = abs(metrics["teacher.onnx"][METRIC] - metrics["teacher"][METRIC])
    if not gap <= TOLERANCE:
        failures.append(f"{METRIC} of teacher.onnx differs from the module's by {gap:.3g}, beyond {TOLERANCE:g}")
    return failures


def _digits() -> DemoData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the demo needs scikit-learn: {install_line('demo')}") from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] - 4.9) / 6.0
    y = torch.tensor(labels, dtype=torch.long)[order]
    return DemoData((x[:1297], y[:1297]), (x[1297:], y[1297:]), epochs=(20, 20), teacher_width=32)


def _fashion_mnist() -> DemoData:
    train_x, train_y, test_x, test_y = (_read_idx(name) for name in FASHION_FILES)

    def prepared(images: Tensor) -> Tensor:
        return (F.avg_pool2d(images[:, None].float() / 255, 2) - 0.286) / 0.320  # (N, 28, 28) -> (N, 1, 14, 14)

    train = (prepared(train_x[:20000]), train_y[:20000].long())
    return DemoData(train, (prepared(test_x), test_y.long()), epochs=(3, 4), teacher_width=16)


def _read_idx(name: str) -> Tensor:
    """Read one file of the IDX format, plain or gzipped."""
    for folder in FASHION_FOLDERS:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                dimensions = raw[3]
                shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
                return torch.frombuffer(bytearray(raw[4 + 4 * dimensions :]), dtype=torch.uint8).reshape(shape)
    raise DemoDataError(FASHION_HELP)


def _say_finished(start: float, what: str) -> None:
    _say(f"      {time.perf_counter() - start:.0f} s, {what}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def _quiet() -> Iterator[None]:
    """Only what the demo has to say: Lightning's notes on devices, workers and tips are for other programs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
