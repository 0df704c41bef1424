"""The end of the fit under FSDP2: rank 0 measures and writes what one process does, and all ranks leave together."""

from __future__ import annotations

import pytest
from records import record

from .place import alone, farthest, in_ranks

TOLERANCE = 1e-6
ROWS = {
    "ends:reported": ("CompressionReport", "with DistillationCallback"),
    "ends:exported": ("ExportCallback + CompressionReport", "an fp32 file"),
    "ends:rounded": ("PSGDCallback + ExportCallback", "an int4 file"),
    "ends:ended": ("ExportCallback + CompressionReport", "a fit resumed at its end"),
}
BF16 = "ends:exported:bf16 policy"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_ranks(tmp_path_factory.mktemp("ends"), *ROWS, BF16, "ends:failing", "ends:full_disk", "ends:absent")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_rank_zero_measures_and_writes_what_one_process_does(found, name, tmp_path):
    ranks = found[name]
    assert [rank.get("error") for rank in ranks] == [None, None]
    reference = alone(name, tmp_path)
    assert farthest(ranks[0]["state_dict"], reference["state_dict"]) <= TOLERANCE
    assert farthest(ranks[0]["state_dict"], ranks[1]["state_dict"]) == 0
    rows = reference.get("rows", {})
    if name == "ends:ended":  # "before" is copied when the training starts, and it does not
        rows.pop("before")
    assert list(ranks[0].get("rows", {})) == list(rows)
    for row, expected in rows.items():
        metrics, ours = expected.pop("metrics"), ranks[0]["rows"][row]
        assert ours.pop("metrics") == pytest.approx(metrics, abs=1e-6)
        assert ours == expected
    if "bytes" in reference:
        assert ranks[0]["bytes"] == reference["bytes"]
        assert ranks[0]["in_file"] == pytest.approx(reference["in_file"], abs=1e-6)
        assert ranks[0]["failure"] is None
        assert "bytes" not in ranks[1]
    record("sharded", *ROWS[name], "repeatable", "rows, bytes and metrics of one process")


@pytest.mark.slow
def test_a_report_leaves_the_module_sharded(found):
    for rank in found["ends:reported"]:
        assert rank["kinds"] == ["FSDPConv2d", "FSDPImages", "FSDPLinear", "Imaging"]
        assert "configure_model" not in rank["attributes"]


@pytest.mark.slow
def test_under_a_policy_the_file_holds_the_weights_in_full_precision(found):
    written = found[BF16][0]
    assert written["bytes"] == found["ends:ended"][0]["bytes"]
    assert written["in_file"] == pytest.approx(written["in_module"], abs=1e-6)
    record("sharded", "ExportCallback + CompressionReport", "bf16 policy", "works", "the file holds fp32 weights")


@pytest.mark.slow
def test_what_cannot_be_copied_is_told_before_the_first_step_on_all_ranks(found):
    first, second = found["ends:failing"]
    assert first["error"].startswith("ExportError: Imaging cannot be copied because of its attribute 'lock'")
    assert second["error"].startswith("RuntimeError: rank 0 failed: ExportError: Imaging cannot be copied")
    record("sharded", "CompressionReport", "a module that cannot be copied", "refused", "cannot be copied because of")


@pytest.mark.slow
def test_a_failing_end_of_fit_ends_all_ranks(found):
    first, second = found["ends:full_disk"]
    assert first["error"] == "OSError: no room"
    assert second["error"] == "RuntimeError: rank 0 failed: OSError: no room"


@pytest.mark.slow
def test_who_waits_at_the_end_of_fit_for_a_rank_that_failed_before_does_so_no_longer_than_the_user_says(found):
    first, second = found["ends:absent"]
    assert second["error"] == "KeyError: 'mine'"
    assert "gloo" in first["error"], first["error"]  # time is up; on a slow machine the connection is closed before
