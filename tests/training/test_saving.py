"""Files are whole or not there."""

import json
import resource

import pytest
import torch
from helpers import inject, make_model

from training.saving import (
    JsonlLog,
    atomic_file,
    atomic_folder,
    file_sha256,
    save_checkpoint,
    write_json,
)


def test_a_fault_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk full"), atomic_file(path) as file:
        file.write("half")
        raise OSError("disk full")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_fault_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "c") as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_fails_half_way_is_not_there(tmp_path, tokenizer, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "c", inject(make_model()), tokenizer, {"base_model": "b"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [1000, 60_000])
def test_a_full_disk_is_told_as_such(tmp_path, tokenizer, limit):
    """At the adapter, or at the file that goes with it: a limit on file sizes stands in for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, extra = inject(make_model()), {"router": {"mean": torch.zeros(100_000)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path / "c", model, tokenizer, {"base_model": "b"}, **extra)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.write(loss=1.0, kd_loss=None)
        with pytest.raises(ValueError):
            log.write(loss=float("nan"))
        # Flushed line by line: a run that is killed keeps its log.
        assert (tmp_path / "log.jsonl").read_text() == '{"loss": 1.0, "kd_loss": null}\n'
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", [float("inf")])
    assert not (tmp_path / "x.json").exists()


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")
