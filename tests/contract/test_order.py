"""The order of the callbacks in the list changes no bit of the weights, and one teacher runs once a batch."""

from __future__ import annotations

import pytest
import torch
from cases import CASES

from lightning_compress import DistillationCallback, ExportCallback, StructuredPruningCallback

from .modules import BATCH, STEPS, Classifier, NormClassifier, difference, loader, made, teacher_for, trainer

# Two techniques that mask the same weights are refused, so each of them is tried with the rows that do not.
MASKING = [case for case in CASES if case.keeps_dense]
# What makes the network smaller in the middle of a fit does not go with what counts channels before.
OTHERS = [case for case in CASES if not (case.keeps_dense or case.shrinks)]
QUANTISING = [case for case in CASES if case.quantises]


def rows_with(masking, quantising="QATCallback"):
    """All rows, in the order of the table, with one technique that masks weights, and one that quantises."""
    left = [case for case in QUANTISING if case.name != quantising]
    return tuple(case for case in CASES if case not in left and (case is masking or case in OTHERS))


def trained(kind, callbacks):
    module = made(kind)
    fitting = trainer(*callbacks)
    fitting.fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    return module, fitting.callback_metrics


@pytest.mark.filterwarnings("ignore:QATCallback 'qat'. 'psgd' has trained nothing yet")
@pytest.mark.parametrize(
    ("masking", "quantising", "kind", "heavy"),
    [
        *(
            pytest.param(
                MASKING[-1], own.name, Classifier, False, id=f"light rows with {own.name}", marks=pytest.mark.sample
            )
            for own in QUANTISING
        ),
        *(
            pytest.param(own, "QATCallback", kind, True, id=f"{own.name}-{kind.__name__}", marks=pytest.mark.slow)
            for own in MASKING
            for kind in (Classifier, NormClassifier)
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:ExportCallback .*leaves out the grids")  # the row writes one in fp32
def test_the_order_of_all_rows_does_not_matter(masking, quantising, kind, heavy, tmp_path):
    rows = tuple(case for case in rows_with(masking, quantising) if heavy or not case.heavy)
    alone, _ = trained(kind, [case.build(tmp_path, kind) for case in rows if case.changes_loss])
    orders = [rows, rows[::-1]]
    modules, metrics = zip(
        *(
            trained(kind, [case.build(tmp_path / str(index), kind) for case in order])
            for index, order in enumerate(orders)
        ),
        strict=True,
    )
    assert difference(*modules) == 0
    assert difference(modules[0], alone) == 0
    assert {key: float(value) for key, value in metrics[0].items()} == {
        key: float(value) for key, value in metrics[1].items()
    }


@pytest.mark.parametrize(
    "masking",
    [
        pytest.param(own, id=own.name, marks=pytest.mark.sample if own is MASKING[-1] else pytest.mark.slow)
        for own in MASKING
    ],
)
def test_the_order_does_not_matter_where_filters_go_before_the_first_step(masking, tmp_path):
    """With all rows that do not quantise in training: their state is made for the larger network, or follows."""
    rows = [case for case in rows_with(masking, "PTQCallback") if not case.heavy]
    modules, scores = [], []
    for index, place in enumerate((0, len(rows), len(rows) // 2)):
        others = [case.build(tmp_path / str(index), NormClassifier) for case in rows]
        others = others[::-1] if index else others
        structured = StructuredPruningCallback(0.5, min_channels=1)
        module, metrics = trained(NormClassifier, [*others[:place], structured, *others[place:]])
        assert module.model[0].out_channels == 2
        modules.append(module)
        scores.append({key: float(value) for key, value in metrics.items()})
    assert difference(modules[0], modules[1]) == difference(modules[0], modules[2]) == 0
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("second", MASKING, ids=lambda case: case.name)
@pytest.mark.parametrize("first", MASKING, ids=lambda case: case.name)
def test_two_techniques_that_mask_the_same_weights_are_refused(first, second, tmp_path):
    both = [case.build(tmp_path, Classifier) for case in (first, second)]
    both[1].name = "second"
    module = made(Classifier)
    with pytest.raises(ValueError, match=r"both (present the weight|mask weights)"):
        trainer(*both).fit(module, loader(), loader())
    assert difference(module, made(Classifier)) == 0
    assert "training_step" not in vars(module)


def test_two_techniques_that_quantise_are_refused(tmp_path):
    for order in (QUANTISING, QUANTISING[::-1]):
        module = made(Classifier)
        with pytest.raises(ValueError, match="would both quantise: QATCallback finds its grids itself"):
            trainer(*(case.build(tmp_path, Classifier) for case in order)).fit(module, loader(), loader())
        assert difference(module, made(Classifier)) == 0


@pytest.mark.filterwarnings("ignore:QATCallback 'qat'. 'psgd' has trained nothing yet")
@pytest.mark.slow
@pytest.mark.parametrize("masking", MASKING, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:ExportCallback .*leaves out the grids")  # the row writes one in fp32
def test_the_end_of_fit_runs_stage_by_stage_in_any_order(masking, tmp_path):
    """The report finds the exported file, wherever the two are in the list."""
    rows = rows_with(masking)
    for index in range(len(rows)):  # each callback first once, and last once
        order = rows[index:] + rows[:index]
        callbacks = {case.name: case.build(tmp_path / str(index), Classifier) for case in order}
        trained(Classifier, list(callbacks.values()))
        shown = [row.name for row in callbacks["CompressionReport"].result.rows]
        assert [row for row in shown if not row.startswith("teacher of")] == [
            "teacher",
            "before",
            "after",
            "after (qat)",
            "model.onnx",
        ]
        assert (tmp_path / str(index) / "model.onnx").is_file()


def two_distillations(teacher):
    soft = DistillationCallback(teacher, task_weight=0.3, kd_weight=0.5, temperature=3.0, name="soft")
    hard = DistillationCallback(teacher, task_weight=1.0, kd_weight=0.2, loss_kind="hard", name="hard")
    return soft, hard


@pytest.mark.parametrize("kind", [Classifier, NormClassifier], ids=lambda kind: kind.__name__)
def test_two_distillations_share_one_teacher(kind):
    modules = []
    for reverse in (False, True):
        teacher, batches = teacher_for(kind), []
        teacher.register_forward_hook(lambda part, args, out, batches=batches: batches.append(args[0]))
        callbacks = two_distillations(teacher)
        module, metrics = trained(kind, callbacks[::-1] if reverse else callbacks)
        modules.append(module)
        assert len(batches) == STEPS + 2  # once each training and validation batch, though two ask for it
        assert {"compress/soft/loss", "compress/hard/loss", "train_loss"} <= set(metrics)
        assert metrics["compress/soft/loss"] != metrics["compress/hard/loss"]
    assert difference(*modules) == 0

    soft_only, _ = trained(kind, two_distillations(teacher_for(kind))[:1])
    assert difference(modules[0], soft_only) > 0


def test_three_distillations_add_up_in_one_order():
    """Of two terms the order does not matter to floating point; of three it does."""
    teachers = [teacher_for(Classifier, seed) for seed in (3, 4, 5)]
    modules = []
    for order in ("abc", "cab", "bca", "cba"):
        callbacks = {
            name: DistillationCallback(teacher, task_weight=1.0, kd_weight=weight, loss_kind=loss_kind, name=name)
            for name, teacher, weight, loss_kind in zip(
                "abc", teachers, (0.3, 0.7, 1.1), ("softmax", "mse", "softmax"), strict=True
            )
        }
        modules.append(trained(Classifier, [callbacks[name] for name in order])[0])
    assert [difference(module, modules[0]) for module in modules] == [0] * 4


def test_only_one_callback_weighs_the_task_loss():
    teacher = teacher_for(Classifier)
    both = [DistillationCallback(teacher, name="a"), DistillationCallback(teacher, name="b")]
    module, fitting = made(Classifier), trainer(*both)
    with pytest.raises(ValueError, match="only one callback can weigh the task loss"):
        fitting.fit(module, loader(), loader())
    assert difference(module, made(Classifier)) == 0
    assert "training_step" not in vars(module)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.sample
@pytest.mark.parametrize("export_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_student_named_by_one_callback_serves_the_other(export_first, tmp_path):
    """An export that was not told of a network takes the student of the distillation, in both orders."""
    distillation = DistillationCallback(teacher_for(Classifier), student="model")
    export = ExportCallback(tmp_path / "model.onnx")
    trained(Classifier, [export, distillation] if export_first else [distillation, export])
    assert export.captured_sample.network == "model"
    assert export.result.max_logit_difference < 1e-5
    assert torch.is_tensor(export.captured_sample.args[0])
