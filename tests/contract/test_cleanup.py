"""Nothing stays behind, however the fit ends."""

from __future__ import annotations

import signal

import lightning.pytorch as L
import pytest
from cases import each_case

from .modules import BATCH, Classifier, NormClassifier, difference, loader, made, trainer
from .traces import condition, is_portable, traces


class Failing(L.Callback):
    """Somebody else's callback, which raises in one hook."""

    def __init__(self, hook: str) -> None:
        def fail(*_, **__):
            raise RuntimeError("another callback is broken")

        setattr(self, hook, fail)


def run(kind, failure, callbacks):
    """A fit that ends in one of the ways of ENDS; returns the module and the Trainer."""
    module, data, before = made(kind), {}, []
    if failure == "step":
        module.fails_at, module.failure = 3, RuntimeError("the step is broken")
    elif failure == "validation":
        module.fails_in_validation = True
    elif failure == "loader":
        data = {"fails_at": 3 * BATCH}
    elif failure in ("callback before", "callback after"):
        before = [Failing("on_train_batch_end")]
    elif failure == "start of another":
        before = [Failing("on_train_start")]
    elif failure == "Ctrl-C":
        module.fails_at, module.failure = 3, None
        module.training_step = None  # replaced below, so that the class stays picklable
        del module.training_step
    order = [*callbacks, *before] if failure == "callback after" else [*before, *callbacks]
    fitting = trainer(*order)
    expected = ENDS[failure]
    if expected is None:
        fitting.fit(module, loader(kind, **data), loader(kind))
    else:
        with pytest.raises(expected):
            fitting.fit(module, loader(kind, **data), loader(kind))
    return module, fitting
