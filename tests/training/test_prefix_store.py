"""The frozen layers' output on disk: the same bits, shared by runs, bounded, damaged, killed."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import die_in_a_pass, inject, make_model, make_samples, outcome

import train_single_task
import train_slsd_seq
from models.frozen_prefix import FrozenPrefix
from training import prefix_store
from training.passes import make_passes
from training.prefix_store import ABANDONED, PrefixStore, open_store

# What tells the runs apart in their summaries.
WHERE = ("prefix_store", "prefix_store_gib", "prefix_cache_gib")


@pytest.fixture
def argv(flags, tmp_path):
    def build(name, **changes):
        here = {"log_dir": tmp_path / name / "logs", "save_dir": tmp_path / name / "checkpoints"}
        small = {"task_order": ["T1_general", "T2_math"], "save_steps": 2, "tokens_per_pass": 64}
        return flags(**{**small, "num_epochs": 2, **here, **changes})

    return build


@pytest.fixture
def results(tmp_path):
    def read(name):
        found = outcome(tmp_path / name)
        for knob in WHERE:
            found["logs/seq_summary.json"]["config"].pop(knob, None)
        return found

    return read


@pytest.fixture
def saves(monkeypatch):
    """The passes that were run for the store."""
    calls, save = [], PrefixStore.save
    monkeypatch.setattr(PrefixStore, "save", lambda *args: calls.append(1) or save(*args))
    return calls


def test_a_run_from_the_store_has_the_bits_of_one_in_memory(
    argv, tmp_path, results, saves, monkeypatch, capsys
):
    store = tmp_path / "store"
    assert train_slsd_seq.main(argv("memory")) == 0
    assert not saves
    assert train_slsd_seq.main(argv("first", prefix_store=store)) == 0
    files = sorted(store.rglob("*.safetensors"))
    assert len(files) == len(saves)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    damaged = bytearray(files[1].read_bytes())
    damaged[-1] ^= 1
    files[1].write_bytes(damaged)
    saves.clear()
    capsys.readouterr()
    die_in_a_pass(monkeypatch, 30, argv("cut", prefix_store=store))
    assert train_slsd_seq.main(argv("cut", prefix_store=store)) == 0
    assert len(saves) == 2 and capsys.readouterr().err.count("is damaged") == 2
    # Of another seed and method: the same texts in the same passes.
    assert train_slsd_seq.main(argv("other", prefix_store=store, method="seq_lora", seed=3)) == 0
    assert len(saves) == 2
    assert results("first") == results("cut") == results("memory")
    assert sorted(store.rglob("*")) == sorted([*files, files[0].parent])


def test_the_first_epoch_runs_no_frozen_layer(argv, tmp_path, saves, monkeypatch):
    """Nor, with fewer steps than an epoch, are samples read that the run never meets."""
    rows, run, sizes = [], FrozenPrefix.run_bottom, []

    def counted(self, ids, parents=None):
        rows.append(len(ids))
        return run(self, ids, parents)

    monkeypatch.setattr(FrozenPrefix, "run_bottom", counted)
    for steps in (1, 0):
        store = tmp_path / f"store{steps}"
        given = {"prefix_store": store, "num_epochs": 1, "max_steps_per_task": steps}
        given = ["--task", "T2_math", *argv("run", **given, overwrite=True)]
        assert train_single_task.main(given) == 0
        rows.clear()
        assert train_single_task.main(given) == 0
        # One token, for its width.
        assert rows == [1]
        sizes.append(sum(file.stat().st_size for file in store.rglob("*.safetensors")))
    assert len(saves) == 4 and 1.5 * sizes[0] < sizes[1]


def one_pass(seed=0, lengths=(20, 9)):
    samples = make_samples(lengths, seed=seed)
    for i, sample in enumerate(samples):
        sample["id"] = f"{10 * seed + i:064x}"
    ((indices, batch, _),) = make_passes(samples, 10**6, 2, torch.device("cpu"))
    return [samples[i] for i in indices], batch


def files_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("*.safetensors")}


def test_rows_are_mapped_and_outlive_their_files(tmp_path):
    model = inject(make_model())
    samples, batch = one_pass()
    kept = []
    for _ in range(2):
        prefix = FrozenPrefix(model, 2, 10**9, PrefixStore(tmp_path, "group", 10**9))
        prefix.keep(samples, batch)
        kept.append(prefix.outputs(samples, batch))
    (name,) = files_in(tmp_path)
    assert name in Path("/proc/self/maps").read_text()
    (tmp_path / "group" / name).unlink()
    (tmp_path / "group").rmdir()
    assert torch.equal(*kept) and torch.equal(kept[0], prefix.outputs(samples, batch))
    # The folder is made again.
    prefix.drop(prefix.sample_ids())
    prefix.keep(samples, batch)
    assert files_in(tmp_path).keys() == {name}


def test_what_was_used_longest_ago_gives_way(tmp_path):
    rows = [torch.randn(20, 32), torch.randn(9, 32)]
    (one, _), (two, _), (three, _) = map(one_pass, (1, 2, 3))
    store = PrefixStore(tmp_path, "group", 9000)
    for age, samples in ((10, one), (20, two)):
        store.save(samples, rows)
        os.utime(store._path(samples), (time.time() - age,) * 2)
    assert sum(files_in(tmp_path).values()) < 9000
    assert store.load(two) and store.load(three) is None
    # A row's bits depend on those beside it: half a pass is another pass.
    assert store.load(two[:1]) is None
    # Another run, of another group.
    PrefixStore(tmp_path, "other", 9000).save(three, rows)
    assert store.load(one) is None and store.load(two)
    assert sum(files_in(tmp_path).values()) < 9000


def test_another_base_depth_dtype_or_number_of_threads_is_kept_apart(make_config, tmp_path):
    model = inject(make_model())

    def group(base="tiny", **changes):
        cfg = make_config(prefix_store=str(tmp_path), **changes)
        return open_store(cfg, model, {"base_model": base}).group

    threads = torch.get_num_threads()
    groups = {group(), group("other"), group(num_frozen_layers=3)}
    try:
        torch.set_num_threads(threads + 1)
        groups.add(group())
    finally:
        torch.set_num_threads(threads)
    model.to(torch.bfloat16)
    assert len({*groups, group()}) == 5
    none = make_config(prefix_store=str(tmp_path), prefix_store_gib=0.0)
    assert open_store(none, model, {}) is None and open_store(make_config(), model, {}) is None


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    left, at_work = (tmp_path / "group" / f".{i}.safetensors.1.tmp" for i in range(2))
    left.parent.mkdir()
    for path in (left, at_work):
        path.touch()
    os.utime(left, (time.time() - ABANDONED - 1,) * 2)
    PrefixStore(tmp_path, "group", 10**9)
    assert at_work.exists() and not left.exists()


def test_what_another_run_has_just_renamed_is_no_fault(tmp_path, monkeypatch):
    at_work, stat = tmp_path / "group" / ".0.safetensors.1.tmp", Path.stat
    at_work.parent.mkdir()
    at_work.touch()

    def gone(path, **kwargs):
        if path == at_work:
            raise FileNotFoundError(errno.ENOENT, "it was renamed")
        return stat(path, **kwargs)

    monkeypatch.setattr(Path, "stat", gone)
    PrefixStore(tmp_path, "group", 10**9)


@pytest.mark.parametrize("module, name", [(prefix_store, "safe_open"), (os, "utime")])
def test_a_file_that_cannot_be_read_or_touched_is_not_damaged(
    tmp_path, monkeypatch, capsys, module, name
):
    samples, _ = one_pass()
    store = PrefixStore(tmp_path, "group", 10**9)
    store.save(samples, [torch.randn(20, 32), torch.randn(9, 32)])
    before = files_in(tmp_path)

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "of another user")

    monkeypatch.setattr(module, name, refused)
    assert (store.load(samples) is None) == (name == "safe_open")
    assert files_in(tmp_path) == before and not capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(argv, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train_slsd_seq.main(argv("run", prefix_store=tmp_path / "file" / "store")) == 2
    assert "--prefix_store" in capsys.readouterr().err
