"""Every callback on LightningModules of other packages, unmodified: it has its effect, or says why it cannot.

Run with ``pip install -r tests/strangers/requirements.txt && pytest tests/strangers``; the other tests leave this
folder out. What is refused, and with which words, is written in the rows, beforehand. ``requirements-alone.txt`` is
installed after it, with ``--no-deps``.
"""

from __future__ import annotations

import functools
import gc
import re
from typing import Any

import pytest
from contract.traces import traces
from records import record

from .effects import TECHNIQUES, attached
from .stranger import STEPS, Stranger, fit, largest_difference
from .table import STRANGERS

# Networks are not trained here, so that scales found early do not last; and other people's code warns of what it likes.
pytestmark = pytest.mark.filterwarnings("ignore")
LONG = 300  # characters of a reason


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """Nothing is fetched from a hub; two demos look for a text before they train, and others write where they are."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext-2.txt").write_text("a b c\n" * 100)
    yield
    gc.collect()  # networks and Trainers hold each other, and some are large


@functools.lru_cache(maxsize=2)
def plain(name: str) -> Any:
    """The module after the same steps without any callback; only looked at."""
    module = STRANGERS[name].made()
    fit(STRANGERS[name], module)
    return module


@pytest.mark.parametrize("name", STRANGERS)
def test_a_module_trains_the_same_twice(name):
    """So what differs with a callback is its doing."""
    again = STRANGERS[name].made()
    trainer = fit(STRANGERS[name], again)
    assert trainer.global_step == STEPS
    assert largest_difference(plain(name), again) == 0
    untrained = dict(STRANGERS[name].made().named_parameters())  # without what is made when a fit starts
    assert any(not untrained[key].equal(own) for key, own in again.named_parameters() if key in untrained)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("name", STRANGERS)
def test_a_callback_on_a_stranger(name, technique, tmp_path):
    stranger = STRANGERS[name]
    if technique in stranger.refuses:
        outcome, reason = "refused", refusal(stranger, technique, tmp_path)
    else:
        outcome, reason = "works", effect(name, technique, tmp_path)
    record("strangers", technique, name, outcome, reason)


def effect(name: str, technique: str, folder: Any) -> str:
    """What the callback has done, after all that must hold has held."""
    stranger, reference, row = STRANGERS[name], plain(name), TECHNIQUES[technique]
    module, callback = stranger.made(), attached(technique, stranger, folder)
    trainer = fit(stranger, module, callback)
    done = row.shown(callback, module, reference, trainer)
    if technique != "StructuredPruningCallback":
        assert (largest_difference(module, reference) > 0) == row.changes
    assert list(module.state_dict()) == list(reference.state_dict())
    assert traces(module) == traces(reference)
    return done


def refusal(stranger: Stranger, technique: str, folder: Any) -> str:
    """The message with which the callback refuses the module, which it leaves as it was."""
    module = stranger.made()
    with pytest.raises(Exception, match=re.compile(stranger.refuses[technique], re.DOTALL)) as caught:
        fit(stranger, module, attached(technique, stranger, folder))
    assert type(caught.value).__module__.split(".")[0] in ("builtins", "lightning_compress")
    own = [key for key in vars(module) if "compress" in key or key in ("training_step", "validation_step", "forward")]
    assert own == [key for key in own if key in vars(stranger.made())]
    assert not [part for part in module.modules() for hook in hooks(part) if hasattr(hook, "_lightning_compress")]
    return shortly(str(caught.value))


def shortly(message: str) -> str:
    """A message on one line, without where packages are installed, and no longer than a reason may be."""
    line = re.sub(r"/\S*/(?:site|dist)-packages/", "", " ".join(message.split()))
    return line if len(line) <= LONG else f"{line[:LONG].rsplit(' ', 1)[0]} ..."


def hooks(part: Any) -> list[Any]:
    """The forward hooks of a module."""
    return [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
