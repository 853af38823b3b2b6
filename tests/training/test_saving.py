"""Files are whole or not there."""

import copy
import errno
import fcntl
import json
import os
import resource
import weakref
from pathlib import Path

import pytest
import torch
from helpers import contents, inject, make_journal, make_model
from transformers import AutoTokenizer

from configs.command_line import UserError
from training.logs import JsonlLog
from training.outputs import own_names
from training.saving import RunState, atomic_file, atomic_folder, file_sha256, run_lock, write_json


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


def test_a_checkpoint_that_fails_half_way_is_not_there(
    make_config, tmp_path, tokenizer, monkeypatch
):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    cfg = make_config(save_dir=str(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        make_journal(cfg, inject(make_model()), tokenizer).save_checkpoint("c")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_several_chat_templates_is_saved_whole(make_config, tmp_path, tokenizer):
    """As Command-R's and Hermes': transformers makes a folder of them."""
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": "a", "tool_use": "b"}
    journal = make_journal(make_config(save_dir=str(tmp_path)), inject(make_model()), several)
    journal.save_checkpoint("c")
    # It is prompted as it was trained; the tokenizer itself keeps its own.
    found = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert "[INST]" in found.chat_template
    assert several.chat_template == {"default": "a", "tool_use": "b"}
    with atomic_folder(tmp_path / "d") as folder:
        several.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(tmp_path / "d").chat_template == several.chat_template


@pytest.mark.parametrize("limit", [1000, 60_000])
def test_a_full_disk_is_told_as_such(make_config, tmp_path, tokenizer, limit):
    """At the adapter, or at the file that goes with it: a limit on file sizes stands in for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = make_journal(make_config(save_dir=str(tmp_path)), inject(make_model()), tokenizer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.save_checkpoint("c", router={"mean": torch.zeros(100_000)})
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


def damaged_newest(folder, is_missing=False) -> list:
    """The two states of `folder`, the newer one with a part that is empty or missing."""
    state = RunState(folder)
    for position in range(3):
        state.save({"position": position}, {"branches": {"a": torch.zeros(2)}})
    older, newest = state.found()
    part = newest / "branches.safetensors"
    part.unlink() if is_missing else part.write_bytes(b"")
    return [older, newest]


@pytest.mark.parametrize("is_missing", [False, True])
def test_reading_removes_nothing_and_what_is_damaged_goes_with_the_next_state(
    tmp_path, capsys, is_missing
):
    older, newest = damaged_newest(tmp_path, is_missing)
    before, state = contents(tmp_path), RunState(tmp_path)
    assert state.load()[0] == {"position": 1}
    assert f"{newest.name} is damaged" in capsys.readouterr().err
    assert contents(tmp_path) == before
    state.save({"position": 3}, {})
    assert state.found()[0] == older and newest not in state.found()
    assert state.load()[0] == {"position": 3}


def test_only_exact_names_are_states(tmp_path):
    older, newest = damaged_newest(tmp_path)
    names = [f"{older.name}.bak", "state-1", f"my-{older.name}", older.name.upper()]
    for name in names:
        (tmp_path / name).mkdir()
    state = RunState(tmp_path)
    assert state.found() == [older, newest]
    state.save({}, {}, keep=1)
    assert len(state.found()) == 1 and all((tmp_path / name).is_dir() for name in names)


def test_a_lock_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".seq.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a symbolic link"), run_lock([tmp_path], "seq"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_lock_that_was_removed_is_told(tmp_path):
    with run_lock([tmp_path], "seq") as check:
        check()
        (tmp_path / ".seq.lock").unlink()
        with pytest.raises(UserError, match="was removed during the run"):
            check()
        with run_lock([tmp_path], "seq"), pytest.raises(UserError):
            check()


def test_a_run_whose_name_begins_alike_keeps_what_it_is_writing(make_config, tmp_path):
    ours = [".single_law_epoch1.12.tmp", ".single_law_config.yaml.tmp"]
    # Of the runs single_law_de and single_law_epoch1.
    theirs = [".single_law_de_epoch1.12.tmp", ".single_law_epoch1_epoch1.12.tmp"]
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir()
    with run_lock([tmp_path], "single_law", own_names(make_config(), "single_law")):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {*theirs, ".single_law.lock"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_folder_without_locks_is_one_line(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match="cannot be written"), run_lock([tmp_path], "seq"):
        pass


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_log_that_was_removed_or_replaced_is_told(tmp_path, is_replaced):
    path = tmp_path / "log.jsonl"
    with JsonlLog(path) as log:
        log.write(loss=1.0)
        assert log.written()["size"] == 14
        path.unlink()
        if is_replaced:
            path.write_text('{"loss": 1.0}\n')
        with pytest.raises(UserError, match="was removed or replaced"):
            log.written()


def test_copies_of_what_was_resumed_go_with_the_first_save(make_config, tokenizer):
    first, second = (make_journal(make_config(), inject(make_model()), tokenizer) for _ in range(2))
    first.save()
    facts, parts = RunState(Path(make_config().save_dir) / "state").load()
    copies = [weakref.ref(tensor) for tensor in parts["branches"].values()]
    second.resume(facts, parts)
    del parts
    second.save()
    assert copies and not any(reference() is not None for reference in copies)


def test_what_was_made_meanwhile_is_not_replaced_unless_that_is_wanted(tmp_path):
    with pytest.raises(UserError, match="has been made meanwhile"):
        with atomic_folder(tmp_path / "c", replaces=False):
            (tmp_path / "c").mkdir()
            (tmp_path / "c" / "mine").write_text("mine")
    assert list(tmp_path.rglob("*")) == [tmp_path / "c", tmp_path / "c" / "mine"]


def test_a_folder_takes_the_place_of_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "c").symlink_to(tmp_path / "gone")
    with atomic_folder(tmp_path / "c") as folder:
        (folder / "whole").write_text("")
    assert (tmp_path / "c" / "whole").exists() and not (tmp_path / "gone").exists()
