"""Files are written whole, and JSON is strict."""

import json
import os

import pytest
import torch

from federation.protocol import append_json, read_json_lines, save_tensors, write_json


def test_a_number_that_json_does_not_know_becomes_null(tmp_path):
    value = {"loss": float("nan"), "all": [1.5, float("inf")], "nested": {"worst": -float("inf")}, "text": "NaN"}
    expected = {"loss": None, "all": [1.5, None], "nested": {"worst": None}, "text": "NaN"}
    write_json(tmp_path / "file.json", value)
    append_json(tmp_path / "lines.jsonl", value)
    for name in ("file.json", "lines.jsonl"):
        assert json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize("write", [write_json, save_tensors])
def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch, write):
    file = tmp_path / "file"
    write(file, {"w": 1})
    before = file.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(file, {"w": 2})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_value_that_is_no_json_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"w": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_still_being_written_is_not_read(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "lines.jsonl").write_text('{"round": 0}\n{"rou')
    assert read_json_lines(tmp_path / "lines.jsonl") == [{"round": 0}]
