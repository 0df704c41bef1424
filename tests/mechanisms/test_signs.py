from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_compress.mechanisms import signs
from lightning_compress.mechanisms.signs import sign


class Terminal(io.StringIO):
    """What a terminal gets."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(signs, "sys", SimpleNamespace(stdout=stream, modules={}))  # pytest has the real one's stdout
    monkeypatch.setattr(signs, "PATIENCE", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    return stream


def trainer(bar, *, rank=0):
    return SimpleNamespace(progress_bar_callback=bar, is_global_zero=rank == 0)


def worked(trainer, total):
    with sign(trainer, "Calibrating", total) as step:
        for _ in range(total or 3):
            step()


SHOWN = {3: ("2/3", "67%"), None: ("2it", "━"), 0: ("Calibrating ...", "Calibrating")}


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("total", SHOWN)
def test_it_is_shown_on_a_terminal_and_gone_afterwards(terminal, bar, total):
    with sign(trainer(bar()), "Calibrating", total) as step:
        if total != 0:
            step()
            time.sleep(0.12)  # it is drawn ten times a second
            step()
            time.sleep(0.12 if bar is RichProgressBar else 0)
    written = terminal.getvalue()
    assert "Calibrating" in written
    assert SHOWN[total][bar is RichProgressBar] in written
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).rpartition("\r")[2]
    assert last.strip() == ""


def test_a_command_without_a_trainer_says_whether_it_is_shown(terminal, monkeypatch):
    worked(False, 0)
    assert terminal.getvalue() == ""
    worked(True, 0)
    assert "Calibrating ..." in terminal.getvalue()
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    before = terminal.getvalue()
    worked(True, 0)
    assert terminal.getvalue() == before


def test_silence(terminal, monkeypatch):
    worked(None, 3)
    worked(trainer(None), 3)
    worked(trainer(TQDMProgressBar(), rank=1), 3)
    worked(trainer(TQDMProgressBar(refresh_rate=0)), 3)
    disabled = TQDMProgressBar()
    disabled.disable()
    worked(trainer(disabled), 3)
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    worked(trainer(TQDMProgressBar()), 3)
    worked(trainer(RichProgressBar()), 3)
    assert terminal.getvalue() == ""


def test_short_counted_work_leaves_no_flicker(terminal, monkeypatch):
    monkeypatch.setattr(signs, "PATIENCE", 60.0)
    worked(trainer(TQDMProgressBar()), 3)
    worked(trainer(RichProgressBar()), 3)
    assert "Calibrating" not in terminal.getvalue()


def test_a_sign_within_another_one_is_no_error(terminal):
    for bar in (TQDMProgressBar(), RichProgressBar()):
        with sign(trainer(bar), "outside"), sign(trainer(bar), "inside"):
            pass
    assert "outside" in terminal.getvalue()


def test_the_display_of_rich_that_is_live_takes_it_in(terminal):
    bar = RichProgressBar()
    own = L.Trainer(callbacks=[bar], logger=False, enable_checkpointing=False, accelerator="cpu")
    bar._init_progress(own)
    try:
        with sign(own, "Calibrating", 2) as step:
            step()
            assert [task.description for task in bar.progress.tasks] == ["Calibrating"]
        assert bar.progress.tasks == []
        assert bar.progress.live.is_started
    finally:
        bar.progress.stop()


def test_an_error_ends_it(terminal):
    for bar in (TQDMProgressBar(), RichProgressBar()):
        with pytest.raises(RuntimeError, match="broken"), sign(trainer(bar), "Calibrating"):
            raise RuntimeError("broken")
        worked(trainer(bar), 2)  # another one can begin
