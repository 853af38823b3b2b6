"""Files of others: what is no file, too large, damaged or nested is told before it is read."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file

from models.reading import MOST_LEVELS, parse_json, read_json, read_safetensors, tensor_problems


def link(path):
    path.symlink_to("/nowhere/blob")


def itself(path):
    path.symlink_to(path.name)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(60 << 30)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (link, "a link to /nowhere/blob, which is not there"),
        (itself, "Too many levels"),
        (lambda path: path.mkdir(), "is no file"),
        (os.mkfifo, "is no file"),
        (sparse, "64424509440 bytes"),
    ],
)
@pytest.mark.parametrize("read", [read_json, lambda path: read_safetensors(path, 100)])
def test_what_is_no_file_or_too_large_is_never_opened(tmp_path, make, message, read):
    make(tmp_path / "file")
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "file")
    assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested too deeply"),
        ("9" * 5000, "is no JSON"),
        (r'["\ud83d"]', "half a surrogate"),
        (r'{"a": {"\ud83d": 1}}', "half a surrogate"),
    ],
)
def test_json_that_nothing_can_use_is_one_line(text, message):
    with pytest.raises(ValueError, match=f"here.*{message}"):
        parse_json(text, "here")


def test_json_may_nest_as_a_schema_does_and_begin_with_a_mark(tmp_path):
    (tmp_path / "a").write_text("\ufeff" + "[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1))
    assert read_json(tmp_path / "a")
    (tmp_path / "a").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_json(tmp_path / "a")


@pytest.mark.parametrize(
    "blob", [b"", b"x", (1 << 50).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
)
def test_safetensors_that_are_none_are_one_line(tmp_path, blob):
    (tmp_path / "file").write_bytes(blob)
    with pytest.raises(ValueError, match="cannot be read"):
        read_safetensors(tmp_path / "file", 100)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 3), ""),
        (torch.ones(2, 3, dtype=torch.float16), ""),
        (torch.ones(3, 2), r"a is \(3, 2\), the model's \(2, 3\)"),
        (torch.full((2, 3), float("nan")), "not finite"),
        (torch.full((2, 3), float("inf")), "not finite"),
        (torch.ones(2, 3, dtype=torch.int8), "torch.int8"),
        (torch.ones(2, 3, dtype=torch.bool), "torch.bool"),
        (torch.ones(2, 3, dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_weights_are_real_finite_numbers_of_their_shape(tmp_path, value, message):
    save_file({"a": value}, tmp_path / "file")
    told = "; ".join(tensor_problems(read_safetensors(tmp_path / "file", 6), {"a": (2, 3)}))
    assert bool(told) == bool(message)
    assert re.search(message, told)
