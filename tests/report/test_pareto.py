from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.report import Latency, Report, Row, pareto
from lightning_compress.report.pareto import on_front
from lightning_compress.report.pareto_files import pareto_console


def runs(**metrics: float) -> dict[str, Report]:
    """One report a run, with a file of 100 bytes, 200, and so on."""
    return {
        run: Report((Row("m.onnx", bytes=100 * (index + 1), metrics={"val_acc": value}),))
        for index, (run, value) in enumerate(metrics.items())
    }


def front_of(table) -> list[str]:
    return [point.run for point in table.front]


def test_the_front_by_hand():
    table = pareto(runs(a=0.7, b=0.9, c=0.8, d=0.95))
    assert (table.metric, table.mode, table.guessed, table.cost) == ("val_acc", "max", True, "bytes")
    assert [point.run for point in table.points] == ["a", "b", "c", "d"]
    assert front_of(table) == ["a", "b", "d"]  # c is larger than b and worse
    assert front_of(pareto(runs(a=0.7, b=0.9, c=0.8, d=0.95), mode="min")) == ["a"]


def test_equal_points_are_on_the_front_together():
    assert on_front([(1.0, 0.5), (1.0, 0.5), (1.0, 0.4), (2.0, 0.5)], "max") == [True, True, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_on_the_front(bad):
    assert on_front([(1.0, bad), (bad, 1.0), (2.0, 0.1)], "max") == [False, False, True]
    table = pareto(runs(a=bad, b=0.1))
    assert front_of(table) == ["b"]
    assert [note for note in table.notes if "NaN or infinite" in note] != []


values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf]), st.floats(-3, 3))


@given(st.lists(st.tuples(values, values), max_size=12), st.sampled_from(["min", "max"]))
@settings(max_examples=60, deadline=None)
def test_the_front_is_what_brute_force_finds(points, mode):
    def beats(one, other):
        (cost, metric), (cost_of_other, metric_of_other) = one, other
        as_good = metric >= metric_of_other if mode == "max" else metric <= metric_of_other
        return cost <= cost_of_other and as_good and one != other

    finite = [point for point in points if all(map(math.isfinite, point))]
    expected = [point in finite and not any(beats(other, point) for other in finite) for point in points]
    assert on_front(points, mode) == expected


def test_the_metric_is_one_that_all_have_and_should_be_large():
    first = Row("m", bytes=1, metrics={"own": 1.0, "val_loss": 0.1, "val_acc": 0.9})
    second = Row("m", bytes=2, metrics={"val_loss": 0.2, "val_acc": 0.8})
    reports = {"a": Report((first,)), "b": Report((second,))}
    assert pareto(reports).metric == "val_acc"
    assert pareto(reports, mode="min").metric == "val_loss"
    assert pareto(reports, metric="val_loss").mode == "min"
    assert pareto(reports, metric="own", mode="max").notes == ("Without Size or own, and so left out: 'b: m'.",)


def test_references_are_shown_once_and_are_never_on_the_front():
    reports = {
        run: Report(
            (
                Row("before", 10, bytes=50, metrics={"acc": random}),
                Row("teacher of at", 70, bytes=1, metrics={"acc": 0.123456 + random / 1e6}),
                Row("teacher", 90, bytes=1, metrics={"acc": 1.0}),
                Row("after", 10, bytes=40, metrics={"acc": 0.5 + random}),
                Row("after (ptq)", metrics={"acc": 0.5}),
            )
        )
        for run, random in (("a", 0.1), ("b", 0.2))
    }
    table = pareto(reports)
    shown = [(point.run, point.row.name, point.reference, point.front) for point in table.points]
    assert shown == [
        ("b", "after", False, True),
        ("a", "after", False, False),
        ("a", "before", True, False),
        ("a", "teacher of at", True, False),
        ("a", "teacher", True, False),
        ("b", "before", True, False),
    ]
    assert table.notes == ()


def test_times_of_several_runs_come_with_a_warning():
    def timed(runtime, batch=1):
        return Report((Row("m", metrics={"acc": 0.5}, latency_ms=Latency(runtime, batch, 2.0, 0.1)),))

    notes = " ".join(pareto({"a": timed("torch"), "b": timed("onnxruntime", 8)}, cost="latency").notes)
    assert "compare files with files" in notes
    assert "batches of different sizes" in notes
    assert "not measured in turns" in notes
    assert pareto({"a": timed("torch")}, cost="latency").notes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "val_ac"}, "no report has the metric 'val_ac'; there are 'val_acc'; did you mean 'val_acc'?"),
        (
            {"cost": "byte"},
            "cost must be one of bytes, bytes_compressed, latency, macs, got 'byte'; did you mean 'bytes'?",
        ),
        ({"mode": "up"}, "mode must be 'min' or 'max', got 'up'"),
        ({"cost": "macs"}, "no model has both MACs and val_acc, so there is nothing to compare"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        pareto(runs(a=0.5), **arguments)
    assert str(error.value) == message


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="reports is empty"):
        pareto({})
    with pytest.raises(ValueError, match="the name 'quality' does not say which way is better: give mode"):
        pareto({"a": Report((Row("m", bytes=1, metrics={"quality": 1.0}),))})
    apart = {run: Report((Row("m", bytes=1, metrics={run: 1.0}),)) for run in ("a", "b")}
    with pytest.raises(ValueError, match="no metric in common, so say which one is meant: 'a' has 'a'; 'b' has 'b'"):
        pareto(apart)


def test_what_does_not_fit_the_terminal_follows_below():
    table = pareto({"kd": Report((Row("after", bytes=400, bytes_compressed=300, metrics={"acc": 0.9}),))})
    whole = "Run  Model  Front  Size   acc  Deflated"
    assert pareto_console(table).splitlines()[1] == whole
    assert pareto_console(table, width=len(whole)) == pareto_console(table)
    assert pareto_console(table, width=len(whole) - 1) == (
        "Pareto table: Size against acc, higher is better, going by its name\n"
        "Run  Model  Front  Size   acc\n"
        "kd   after  yes    400 B  0.9\n"
        "\n"
        "Run  Model  Front  Deflated\n"
        "kd   after  yes    300 B\n"
    )
