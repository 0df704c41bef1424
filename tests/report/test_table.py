from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from lightning_compress.report import Picture, Report, Row, from_json, to_json

from .samples import full_report, nasty_report

DATA = Path(__file__).parent / "data"


def test_what_is_written_is_read():
    report = full_report()
    assert from_json(to_json(report)) == report


def test_the_keys_that_others_rely_on():
    document = json.loads(to_json(full_report()))
    assert list(document) == ["schema", "rows", "layers", "files", "notes", "versions", "recipe", "command", "pictures"]
    assert document["schema"] == 1
    assert {"name", "parameters", "nonzeros", "macs", "bytes", "bytes_compressed", "latency_ms", "metrics"} == set(
        document["rows"][0]
    )
    assert {"runtime", "batch", "median", "spread"} < set(document["rows"][0]["latency_ms"])
    assert {"name", "type", "sparsity", "bits", "filters", "parameters"} == set(document["layers"][0])
    assert {"path", "precision", "bytes", "max_logit_difference", "left_in_float", "model", "bytes_fp32"} | {
        "quantised",
        "speed_fp32",
        "speed_fp32_low",
        "speed_fp32_high",
    } == set(document["files"][0])


def test_pictures_are_kept_as_they_are():
    report = Report(rows=(), pictures=(Picture("at", "Bright.", bytes(range(256))),), command="run")
    assert from_json(to_json(report)) == report


def test_a_file_of_the_first_schema_loads():
    report = from_json((DATA / "schema_1.json").read_text(encoding="utf-8"))
    assert report == dataclasses.replace(full_report(), notes=("Kept to be read for ever.",))


def test_strict_json_keeps_nan_apart_from_missing():
    report = Report(rows=(Row("a", metrics={"x": math.nan, "y": math.inf, "z": -math.inf}), Row("b")))
    text = to_json(report)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    metrics = from_json(text).rows[0].metrics
    assert math.isnan(metrics["x"])
    assert (metrics["y"], metrics["z"]) == (math.inf, -math.inf)
    assert from_json(text).rows[1].latency_ms is None


def test_names_that_look_like_numbers_stay_names():
    assert from_json(to_json(Report(rows=(Row("NaN"),), notes=("Infinity",)))).rows[0].name == "NaN"
    nasty = nasty_report()
    assert from_json(to_json(nasty)).files == nasty.files


def test_unknown_keys_are_left_out_and_missing_ones_have_defaults():
    report = from_json('{"schema": 1, "colour": "red", "rows": [{"name": "a", "taste": 1}]}')
    assert report == Report(rows=(Row("a"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a compression report must be JSON"),
        ("[1]", "has a whole number from 1 under 'schema', got None"),
        ('{"rows": []}', "has a whole number from 1 under 'schema', got None"),
        ('{"schema": 0}', "has a whole number from 1 under 'schema', got 0"),
        ('{"schema": 2}', "has schema 2, this package reads up to 1: .* `pip install -U lightning-compress"),
        ('{"schema": 1, "rows": {}, "files": {"a": 1}}', "'files' of a compression report must be a list, got dict"),
        ('{"schema": 1, "rows": [3]}', "'rows' of a compression report must hold objects, got 3"),
        ('{"schema": 1, "rows": [{"bytes": 3}]}', "an entry of 'rows' lacks 'name'"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)
