"""Arguments without effect: compared with the defaults of the class that tells of them, whoever passes them on."""

from __future__ import annotations

import inspect

import pytest

from lightning_compress import DCILCallback, DPFCallback, PruningCallback, QATCallback
from lightning_compress.callbacks.arguments import tell_without_effect
from lightning_compress.callbacks.masks import MaskCallback


class Late(PruningCallback):
    """Has an end of its own where none counts."""

    def __init__(self, sparsity=0.5, *, end=0.9, **settings):
        super().__init__(sparsity, schedule="one_shot", end=end, **settings)


class Slow(QATCallback):
    """Has a rate of its own for steps that may not learn."""

    def __init__(self, *, step_lr=0.1, **settings):
        super().__init__(step_lr=step_lr, **settings)


class Fixed(Slow):
    """Has no such argument."""

    def __init__(self, **settings):
        super().__init__(step_lr=0.1, **settings)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Late, "end=0.9 has no effect with schedule='one_shot'"),
        (Slow, "step_lr=0.1 has no effect with step_size='mse'"),
        (Fixed, "step_lr=0.1 has no effect with step_size='mse'"),
    ],
)
def test_what_a_subclass_passes_on_is_told_of_as_if_it_had_been_given(kind, message):
    with pytest.warns(UserWarning, match=message) as warned:
        kind()
    assert len(warned) == 1


def test_a_default_that_is_given_is_taken_whatever_that_of_a_subclass_is():
    assert Late(end=0.75).end == 0.75
    assert Slow(step_lr=0.01).step_lr == 0.01
    assert Fixed(step_size="learned").step_lr == 0.1  # a warning would be an error


def test_the_class_is_named_whose_defaults_count():
    tell_without_effect(QATCallback(), QATCallback, "this", step_lr=0.01)
    message = r"^QATCallback: step_lr=0.01 has no effect with this; leave it out \(its default is 0.1\)$"
    with pytest.warns(UserWarning, match=message):
        tell_without_effect(QATCallback(), Slow, "this", step_lr=0.01)


@pytest.mark.parametrize("kind", [PruningCallback, DPFCallback, DCILCallback])
def test_techniques_with_masks_have_the_defaults_of_their_base(kind):
    base, own = (inspect.signature(built).parameters for built in (MaskCallback, kind))
    usual = {name: parameter.default for name, parameter in base.items() if parameter.default is not parameter.empty}
    assert usual == {"schedule": "cubic", "end": 0.75}
    assert {name: own[name].default for name in usual} == usual
