"""Divergence: the mean loss of a window beside that of the first."""

import math

import pytest
import torch

from lightning_compress.mechanisms.divergence import WINDOW, LossWatch


def seen(watch, *losses, **options):
    """What each batch said that gave one of these losses."""
    return [watch.see(loss if loss is None else torch.tensor(loss), **options) for loss in losses]


def window(watch, loss, **options):
    assert seen(watch, *[loss] * WINDOW, **options) == [False] * (WINDOW - 1) + [loss is not None]


def test_windows_are_compared_with_the_first():
    watch = LossWatch()
    assert watch.grown(2.0) is None
    for loss, expected in ((0.5, None), (1.0, None), (1.01, "from 0.5 to 1.01"), (0.1, None)):
        window(watch, loss)
        assert watch.grown(2.0) == expected
    assert watch.grown(1.1) is None


def test_a_mean_is_over_all_of_a_window():
    watch = LossWatch()
    window(watch, 1.0)
    seen(watch, *[float(i) for i in range(WINDOW)])
    assert watch.grown(9.0) == f"from 1 to {sum(range(WINDOW)) / WINDOW:.4g}"


def test_a_small_loss_counts_as_more():
    watch = LossWatch()
    window(watch, 0.001)
    window(watch, 0.19)
    assert (watch.grown(2.0), watch.grown(2.0, small=0.01)) == (None, "from 0.001 to 0.19")
    assert watch.grown(2.0, small=0.1) is None


@pytest.mark.parametrize("single", [math.nan, math.inf, -math.inf])
def test_single_losses_that_are_no_numbers_are_left_out_and_a_window_of_them_is_not(single):
    watch = LossWatch()
    window(watch, 1.0)
    assert seen(watch, *[1.0] * (WINDOW - 1), single)[-1]
    assert watch.grown(1.5) is None
    window(watch, single)
    assert watch.grown(1e9) == "from 1 to nan"


def test_what_outputs_may_be():
    """The loss itself, or under its name; anything else is a batch without one."""
    watch = LossWatch()
    outputs = [{"loss": torch.tensor([2.0])}, torch.tensor(4.0), None, {"other": 1}, torch.zeros(2), 7.0]
    found = [watch.see(entry) for entry in [*outputs, *[None] * (WINDOW - len(outputs))]]
    assert found == [False] * (WINDOW - 1) + [True]
    window(watch, 13.0)
    assert watch.grown(4.0) == "from 3 to 13"
    assert seen(LossWatch(), *[None] * WINDOW) == [False] * WINDOW


def test_beginning_again_compares_with_what_was_last():
    watch = LossWatch()
    watch.begin_again()  # nothing was seen, so the next window is the first
    window(watch, 8.0)
    window(watch, 1.0)
    seen(watch, 100.0, 100.0)
    watch.begin_again()  # which forgets a window that is not complete
    window(watch, 3.0)
    assert watch.grown(2.0) == "from 1 to 3"


def test_processes_see_the_same():
    """The mean over them of sums and counts; one of them may have no loss at all."""
    other = torch.tensor([30.0, 10.0, 10.0])
    for ours in (1.0, None):
        watch = LossWatch()
        seen(watch, *[ours] * WINDOW, reduce=lambda tensor: (tensor + other) / 2)
        total, count = (30.0, 10) if ours is None else (30.0 + WINDOW, 10 + WINDOW)
        assert watch.state()["last"] == pytest.approx(total / count)


def test_its_state_goes_on_where_it_was():
    watch, later = LossWatch(), LossWatch()
    window(watch, 1.0)
    seen(watch, 5.0, None, 7.0)
    later.load(watch.state())
    for own in (watch, later):
        assert seen(own, *[9.0] * (WINDOW - 3))[-1]
    assert later.state() == watch.state()
    assert later.grown(2.0) == watch.grown(2.0) == f"from 1 to {(12 + 9 * (WINDOW - 3)) / (WINDOW - 1):.4g}"
