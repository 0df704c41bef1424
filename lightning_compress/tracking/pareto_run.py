"""A Pareto table as a run of Weights & Biases; unlike the rest of this package, it begins one of its own."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_compress.mechanisms.extras import install_line
from lightning_compress.report.pareto import Pareto
from lightning_compress.report.pareto_files import pareto_records
from lightning_compress.report.scatter import scatter_png


def require_wandb() -> None:
    """Refuse before any work what needs wandb.

    Raises:
        ImportError: If it is not installed.

    Example:
        >>> require_wandb()
    """
    if find_spec("wandb") is None:
        raise ImportError(f"--wandb needs wandb, which is not installed; run: {install_line('wandb')}")


def log_pareto(project: str, table: Pareto, sources: Mapping[str, str], page: Path) -> None:
    """Log a table, its plot and its page as one run, offline where W&B is set so.

    Args:
        project: Of W&B.
        table: The models.
        sources: Name of each run to the file of its report.
        page: The HTML page of the table.

    Raises:
        ConnectionError: If W&B does not take it.
    """
    import wandb
    from PIL import Image

    settings: dict[str, Any] = {key: getattr(table, key) for key in ("metric", "mode", "cost")}
    settings["reports"] = dict(sources)
    records = pareto_records(table)
    columns: list[str | int] = list(records[0])
    try:
        with wandb.init(project=project, job_type="pareto", name="pareto", config=settings) as run:
            run.log(
                {
                    "pareto/table": wandb.Table(columns=columns, data=[list(record.values()) for record in records]),
                    "pareto/plot": wandb.Image(Image.open(io.BytesIO(scatter_png(table)))),
                    "pareto/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False),
                    "pareto/front": len(table.front),
                }
            )
    except wandb.Error as error:
        raise ConnectionError(str(error)) from error
