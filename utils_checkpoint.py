"""What a run leaves on disk: whole files or none, one JSON object a line, PEFT adapters."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from configs.base_config import UserError
from models.ds_lora import save_adapter


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path):
    """Yields a UTF-8 text file that takes the place of `path` when the block ends without a fault.

    Until then `path` is what it was: the text goes to a sibling, is fsynced and renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path):
    """Yields an empty folder that becomes `path`, which must not exist, when no fault occurs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        _sync_folder(partial)
        os.rename(partial, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class JsonlLog:
    """Appends one JSON object a line and flushes it; numbers must be finite or null."""

    def __init__(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8", newline="\n")

    def write(self, **row) -> None:
        """Raises ValueError where a number is not finite."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def write_json(path: str | Path, value) -> None:
    """Writes `value` as readable JSON, atomically; ValueError where a number is not finite."""
    with atomic_file(path) as file:
        json.dump(value, file, ensure_ascii=False, allow_nan=False, indent=2)
        file.write("\n")


def _earlier_outputs(cfg, run_name: str) -> list[Path]:
    return [*Path(cfg.log_dir).glob(f"{run_name}_*"), *Path(cfg.save_dir).glob(f"{run_name}_*")]


def check_outputs(cfg, run_name: str) -> None:
    """Raises `UserError` where an earlier run `run_name` ("seq", "single_<task>") left outputs."""
    found = _earlier_outputs(cfg, run_name)
    if found and not cfg.overwrite:
        folders = " and ".join(sorted({str(path.parent) for path in found}))
        raise UserError(
            f"{folders}: {len(found)} outputs of an earlier run ({found[0].name} ...); give "
            "--overwrite true to replace them, or another --log_dir and --save_dir"
        )


def clear_outputs(cfg, run_name: str) -> None:
    """Removes the outputs of an earlier run, once `check_outputs` has let this one pass."""
    for path in _earlier_outputs(cfg, run_name):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_checkpoint(path: str | Path, model, tokenizer, about: dict) -> None:
    """Writes the branches of `model` as a PEFT adapter, with the tokenizer, as one atomic folder.

    `about` is what `models.ds_lora.save_adapter` is told about the base model.
    """
    with atomic_folder(path) as folder:
        save_adapter(model, folder, **about)
        tokenizer.save_pretrained(folder)
