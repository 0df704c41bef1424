"""Fits in two processes that Lightning starts as scripts: ``python launched.py FOLDER ROW:KIND...``.

Each process leaves ``FOLDER/ROW/rank<n>.pt``: what its fit left, or the error that ended it.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rows import ROWS

from contract.bystanders import rank_file
from contract.modules import AUTOMATIC, Classifier
from contract.ranks import Sharded
from contract.setups import PLAIN, assert_the_contract, fitted, left, without

TOGETHER = PLAIN.but(batches=Sharded)
SCRIPTS = TOGETHER.but(settings={"devices": 2, "strategy": "ddp", "use_distributed_sampler": False})


def drop_own_forward(module: Classifier) -> None:
    """Lightning's DDP puts the forward of the class on the instance, and leaves it there."""
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward


def outcome(name: str, kind_name: str, folder: Path) -> dict:
    """What the fit of a row leaves in this process."""
    row = next(row for row in ROWS if row.name == name)
    kind = next(kind for kind in AUTOMATIC if kind.__name__ == kind_name)
    try:
        plain = without(kind, SCRIPTS)
        fit = fitted(row, kind, folder / name, SCRIPTS)
        for module in (plain.module, fit.module):
            drop_own_forward(module)
        assert_the_contract(fit, row, plain)
        return {"left": left(fit), "weights": fit.module.state_dict(), "ranks": fit.trainer.world_size}
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for wanted in sys.argv[2:]:
        name, kind_name = wanted.split(":")
        found = outcome(name, kind_name, Path(sys.argv[1]))
        rank = torch.distributed.get_rank()
        (Path(sys.argv[1]) / name).mkdir(exist_ok=True, parents=True)
        torch.save(found, rank_file(Path(sys.argv[1]) / name, rank))
