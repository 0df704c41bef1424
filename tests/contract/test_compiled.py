"""Compiled networks and compiled LightningModules: hooks fire, in the first fit and in the second."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, each_case
from torch._dynamo.testing import CompileCounter

from lightning_compress import DistillationCallback

from .modules import (
    BATCH,
    STEPS,
    Classifier,
    NetworkItself,
    NormClassifier,
    difference,
    loader,
    made,
    teacher_for,
    trainer,
)
from .traces import traces

# Steps compiled as a whole take seconds to trace; test_distillation_exact.py has one of them among the fast tests.
SAMPLE = pytest.mark.sample
CHILD_FIRST = [
    pytest.param("child", marks=SAMPLE),
    *(pytest.param(form, marks=pytest.mark.slow) for form in ("in place", "module")),
]
# A row that looks at outputs, one that looks at layers and one that masks weights; two passes over compiled graphs are
# in test_dcil.py. Other forms than a compiled child are in the matrix.
SAMPLED = ("DistillationCallback", "AttentionTransferCallback", "PruningCallback")
ROWS = [pytest.param(case, id=case.name, marks=SAMPLE if case.name in SAMPLED else pytest.mark.slow) for case in CASES]


def compiled(module, form):
    """What the user hands to the Trainer."""
    if form == "child":
        module.model = torch.compile(module.model, backend="eager")
    elif form == "in place":
        module.model.compile(backend="eager")
    else:
        return torch.compile(module, backend="eager")
    return module


def fitted(kind, callbacks, form=None, fits=1):
    module = made(kind)
    handed = module if form is None else compiled(module, form)
    for _ in range(fits):
        fitting = trainer(*callbacks, num_sanity_val_steps=2)
        fitting.fit(handed, loader(kind), loader(kind, rows=2 * BATCH))
    return module, fitting


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", ROWS)
def test_compiled_equals_uncompiled(case, tmp_path):
    """With the sanity check on: it runs the network before the first step."""
    plain, _ = fitted(NormClassifier, [case.build(tmp_path / "plain", NormClassifier)])
    module, fitting = fitted(NormClassifier, [case.build(tmp_path / "compiled", NormClassifier)], "child")
    theirs = [value for _, value in sorted(plain.state_dict().items())]
    ours = {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}
    assert (
        max(float((a - b).abs().max()) for a, b in zip(theirs, (ours[key] for key in sorted(ours)), strict=True)) == 0
    )
    assert "val_loss" in fitting.callback_metrics


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", CHILD_FIRST)
@each_case("DistillationCallback")
def test_a_second_compiled_fit_is_captured_too(case, form, tmp_path):
    callback = case.build(tmp_path, Classifier)
    batches = []
    callback.teacher_network.register_forward_hook(lambda part, args, out: batches.append(len(args[0])))
    module, _ = fitted(Classifier, [callback], form, fits=2)
    plain, _ = fitted(Classifier, [case.build(tmp_path, Classifier)], fits=2)
    assert callback.effects["the distillation loss"] == STEPS
    assert batches.count(8) >= 2 * (STEPS + 2)
    weights = {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}
    assert difference({key: weights[key] for key in plain.state_dict()}, plain) == 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", CHILD_FIRST)
@each_case("DistillationCallback")
def test_a_network_that_ran_compiled_before_the_fit(case, form, tmp_path):
    """Compiled code from before our hooks would never call them: in training, in validation, and in eval mode."""
    module = made(Classifier)
    handed, callback = compiled(module, form), case.build(tmp_path, Classifier)
    trainer().validate(handed, loader(), verbose=False)
    trainer().fit(handed, loader())
    before = {key.replace("_orig_mod.", ""): value.clone() for key, value in module.state_dict().items()}
    fitting = trainer(callback)
    fitting.fit(handed, loader(), loader())
    assert callback.effects["the distillation loss"] == STEPS
    assert "compress/kd/val_loss" in fitting.callback_metrics

    plain = made(Classifier)
    plain.load_state_dict(before)
    trainer(case.build(tmp_path, Classifier)).fit(plain, loader(), loader())
    weights = {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}
    assert difference({key: weights[key] for key in plain.state_dict()}, plain) == 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", CHILD_FIRST)
def test_the_network_is_really_compiled(form):
    """The tests above are worth something only if compiled code ran."""
    counter, module = CompileCounter(), made(Classifier)
    if form == "child":
        module.model = torch.compile(module.model, backend=counter)
    elif form == "in place":
        module.model.compile(backend=counter)
    handed = torch.compile(module, backend=counter) if form == "module" else module
    trainer(DistillationCallback(teacher_for(Classifier))).fit(handed, loader(), loader())
    assert counter.frame_count > 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("form", "student"),
    [
        ("child", None),
        *(pytest.param("in place", own, marks=pytest.mark.slow) for own in ("model", None)),
        pytest.param("child", "model", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_child_is_found_and_named_plainly(form, student):
    callback, module = DistillationCallback(teacher_for(Classifier), student=student), made(Classifier)
    trainer(callback).fit(compiled(module, form), loader(), loader())
    assert callback.effects["the distillation loss"] == STEPS
    assert callback.captured_sample.network == "model"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@each_case("DistillationCallback")
def test_a_compiled_network_that_is_the_module_itself(case, tmp_path):
    plain, _ = fitted(NetworkItself, [case.build(tmp_path, NetworkItself)])
    module, _ = fitted(NetworkItself, [case.build(tmp_path, NetworkItself)], "module")
    assert difference(module, plain) == 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", [row for row in ROWS if not row.values[0].heavy])
def test_nothing_stays_on_a_compiled_module(case, tmp_path):
    plain, _ = fitted(Classifier, [], "child")
    torch._dynamo.reset()  # what is traced leaves marks on parameters, and code that is there already is not traced
    module, _ = fitted(Classifier, [case.build(tmp_path, Classifier)], "child")
    assert traces(module) == traces(plain)
    inputs = torch.randn(2, 8)
    assert torch.equal(module(inputs), module.model(inputs))
