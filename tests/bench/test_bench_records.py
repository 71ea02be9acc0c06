"""Records say on what they were measured, and every row holds what the docs and the plot read."""

import json
from pathlib import Path

import pytest

from sphkv_compile.bench.record import MODEL_ROW, ROW, header, missing, save

RECORDS = Path(__file__).parents[2] / "examples/bench/records"


@pytest.mark.parametrize("path", sorted(RECORDS.glob("attention*.json")), ids=lambda path: path.stem)
def test_attention_records_hold_every_key(path):
    record = json.loads(path.read_text())
    assert record["card"] and record["torch"] and record["triton"] and record["date"]
    assert record["rows"] and not any(missing(row) for row in record["rows"])


@pytest.mark.parametrize("path", sorted(RECORDS.glob("model*.json")), ids=lambda path: path.stem)
def test_model_records_hold_every_key(path):
    record = json.loads(path.read_text())
    assert record["rows"] and not any(missing(row, MODEL_ROW) for row in record["rows"])


def test_a_key_that_lacks_is_named():
    assert missing({key: 0 for key in ROW if key != "rel_err"}) == ["rel_err"]


def test_a_record_is_written_under_its_name_only(tmp_path):
    record = header("cpu") | {"rows": []}
    assert save(record, "attention", None, tmp_path) is None and not list(tmp_path.iterdir())
    path = save(record, "attention", "here", tmp_path / "new")
    assert path.name == "attention_here.json" and json.loads(path.read_text())["card"]
