"""The kinds of loggers, and how each takes what is logged.

A kind is known by the name of a class among the logger's bases, so that nothing is imported, and the loggers of both
Lightning packages, and what inherits from them, are the same.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from matplotlib.image import imsave

from lightning_compress import _compat
from lightning_compress.mechanisms.drafts import draft_of, write_whole
from lightning_compress.tracking.exported import Exported

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Table:
    """A table, as numbers and as text.

    Attributes:
        columns: Their names.
        rows: As many entries each: numbers, text, or None.
        markdown: The same for people, for loggers that take text alone.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    markdown: str


class Sink:
    """A logger of which nothing more is known: numbers, and what it has a method for.

    Args:
        logger: One of Lightning's, or what has its methods.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    @property
    def takes_pictures(self) -> bool:
        """Whether it takes pictures."""
        return hasattr(self.logger, "log_image")

    def define(self) -> None:
        """Say what is going to be logged."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """The configuration of the run: primitives."""
        self.logger.log_hyperparams({"compress": dict(values)})

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Several numbers of one step."""
        self.logger.log_metrics(dict(values), step=step)

    def picture(self, key: str, picture: Picture, step: int, newest: bool) -> None:
        """A picture, (height, width, 3); with ``newest`` it holds all that earlier ones of this key do."""
        self.logger.log_image(key, [picture], step=step)

    def table(self, key: str, table: Table, step: int) -> None:
        """A table, or its text."""
        if hasattr(self.logger, "log_table"):
            self.logger.log_table(key, columns=list(table.columns), data=[list(row) for row in table.rows], step=step)
        elif hasattr(self.logger, "log_text"):
            self.logger.log_text(key, columns=["text"], data=[[table.markdown]], step=step)

    def checkpoint(self, path: Path) -> None:
        """A checkpoint that files are made of."""

    def exported(self, exported: Exported, step: int) -> None:
        """A file of the model."""

    def save(self) -> None:
        """Let it write what it has."""
        self.logger.save()


class WandbSink(Sink):
    """Weights & Biases, by ``WandbLogger``."""

    def define(self) -> None:
        """The step of all that is ours; the user's own metrics stay as they are defined."""
        run, own = self.logger.experiment, _compat.wandb_settings(self.logger)
        run.define_metric(f"{own.prefix}compress/*", step_metric=own.step, step_sync=True)

    def settings(self, values: Mapping[str, Any]) -> None:
        """The run's configuration, under ``compress``."""
        self.logger.experiment.config.update({"compress": dict(values)}, allow_val_change=True)

    def checkpoint(self, path: Path) -> None:
        """An input of the run, by reference; what the logger uploads itself is there already."""
        import wandb

        run, own = self.logger.experiment, _compat.wandb_settings(self.logger)
        if own.checkpoints is None:
            artifact = wandb.Artifact(_checkpoint_name(run), type="checkpoint", metadata={"path": str(path)})
            artifact.add_reference(path.absolute().as_uri(), name=path.name)
            _compat.wandb_input(run, artifact)

    def exported(self, exported: Exported, step: int) -> None:
        """An artifact that names the one of its checkpoint."""
        import wandb

        run, own = self.logger.experiment, _compat.wandb_settings(self.logger)
        metadata = {**exported.metadata, "step": step}
        if "checkpoint" in metadata:
            metadata["checkpoint"] = {"artifact": own.checkpoints or _checkpoint_name(run), **metadata["checkpoint"]}
        artifact = wandb.Artifact(exported.name, type="model", metadata=metadata)
        artifact.add_file(str(exported.path), name=exported.path.name)
        run.log_artifact(artifact, aliases=["latest"])


class TensorBoardSink(Sink):
    """TensorBoard: pictures as they are, tables and settings as text."""

    takes_pictures = True

    def settings(self, values: Mapping[str, Any]) -> None:
        """As text: a second set of hyperparameters beside the module's would hide that."""
        self._text("compress/config", f"```yaml\n{_as_yaml(values)}```", 0)

    def picture(self, key: str, picture: Picture, step: int, newest: bool) -> None:
        """An image."""
        self.logger.experiment.add_image(key, picture, step, dataformats="HWC")

    def table(self, key: str, table: Table, step: int) -> None:
        """Markdown."""
        self._text(key, table.markdown, step)

    def exported(self, exported: Exported, step: int) -> None:
        """What is known of the file."""
        self._text(f"compress/{exported.callback}", f"```yaml\n{_as_yaml(exported.metadata)}```", step)

    def _text(self, key: str, text: str, step: int) -> None:
        self.logger.experiment.add_text(key, text, step)


class CSVSink(Sink):
    """CSV files: numbers as metrics, the rest as files in the folder ``compress`` beside them."""

    takes_pictures = True

    def settings(self, values: Mapping[str, Any]) -> None:
        """A file of its own: Lightning's ``hparams.yaml`` is for the arguments of the module."""
        write_whole(self._file("compress/config", ".yaml"), _as_yaml(values))

    def picture(self, key: str, picture: Picture, step: int, newest: bool) -> None:
        """A PNG file, over the last one if it holds all that that did."""
        with draft_of(self._file(key, ".png" if newest else f"-step={step}.png")) as draft:
            imsave(draft, picture)

    def table(self, key: str, table: Table, step: int) -> None:
        """A CSV file."""
        with draft_of(self._file(key, ".csv")) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([table.columns, *table.rows])

    def exported(self, exported: Exported, step: int) -> None:
        """What is known of the file, as JSON."""
        text = json.dumps({**exported.metadata, "step": step}, indent=2, default=str) + "\n"
        write_whole(self._file(f"compress/{exported.callback}", ".json"), text)

    def _file(self, key: str, suffix: str) -> Path:
        """Where a key lies: ``compress/dcil/sparsity`` is ``compress/dcil/sparsity.png`` in the logger's folder."""
        folder = self.logger.log_dir
        if "://" in str(folder):
            raise ValueError(f"pictures, tables and settings are files on this machine, and its folder is {folder}")
        _ = self.logger.experiment  # which wants to find its folder empty
        path = Path(self.logger.log_dir, *key.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(path.name + suffix)


_KINDS: dict[str, type[Sink]] = {
    "WandbLogger": WandbSink,
    "TensorBoardLogger": TensorBoardSink,
    "CSVLogger": CSVSink,
}


def sink_of(logger: Any) -> Sink | None:
    """How a logger takes what is logged.

    Args:
        logger: One of a Trainer's.

    Returns:
        None for the one that Lightning puts in the place of all others when nothing is to be logged.

    Example:
        >>> class CSVLogger: ...
        >>> type(sink_of(CSVLogger())).__name__
        'CSVSink'
    """
    names = [base.__name__ for base in type(logger).__mro__]
    if "DummyLogger" in names:
        return None
    return next((_KINDS[name] for name in names if name in _KINDS), Sink)(logger)


def _checkpoint_name(run: Any) -> str:
    return f"checkpoint-{run.id}"


def _as_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False, allow_unicode=True)
