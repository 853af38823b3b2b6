"""What a run leaves on disk: whole files or none, one JSON object a line, states to resume from."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import safetensors.torch

from configs.base_config import TASKS, UserError
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
    """Yields an empty folder that takes the place of `path` when the block ends without a fault."""
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
        if path.exists():
            # Of a stage that is being done again: the state to resume from is older than it.
            shutil.rmtree(path)
        os.rename(partial, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class JsonlLog:
    """Appends one JSON object a line and flushes it; numbers must be finite or null.

    Lines beyond the first `size` bytes are cut: they come from after the state that is resumed.
    """

    def __init__(self, path: str | Path, size: int = 0):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise UserError(
                f"{path} has {found} bytes and the saved state counts on {size}: put the log back, "
                "or give --overwrite true to start afresh"
            )
        self._file = open(path, "a", encoding="utf-8", newline="\n")
        self._file.truncate(size)

    def write(self, **row) -> None:
        """Raises ValueError where a number is not finite."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes written so far, which are on the disk when this returns."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def read(self) -> list[dict]:
        """All lines so far."""
        with open(self._file.name, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class NoLog:
    """A `JsonlLog` that writes nothing: that of every process but the first."""

    def __init__(self, path: str | Path, size: int = 0):
        pass

    def write(self, **row) -> None:
        pass

    def close(self) -> None:
        pass


def write_json(path: str | Path, value) -> None:
    """Writes `value` as readable JSON, atomically; ValueError where a number is not finite."""
    with atomic_file(path) as file:
        json.dump(value, file, ensure_ascii=False, allow_nan=False, indent=2)
        file.write("\n")


def write_json_lines(path: str | Path, rows: list[dict]) -> None:
    """Writes one JSON object a line, atomically; ValueError where a number is not finite."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


class RunState:
    """The states of one run, to resume it from: each is whole, or known not to be.

    A state is a folder `state-NUMBER-HASH` of safetensors parts and `manifest.json`, which holds
    the sha256 of each part; HASH is that of the manifest. The newest and the one before it stay.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def found(self) -> list[Path]:
        """The states, whole or not, oldest first."""
        return sorted(self.folder.glob("state-*"))

    def save(self, facts: dict, parts: dict[str, dict], keep: int = 2) -> None:
        """Writes `facts` (JSON values) and `parts` (name -> tensors) as the newest state."""
        blobs = {
            f"{name}.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"})
            for name, tensors in parts.items()
        }
        hashes = {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()}
        manifest = json.dumps({**facts, "parts": hashes}, allow_nan=False, indent=2).encode()
        earlier = self.found()
        number = int(earlier[-1].name.split("-")[1]) + 1 if earlier else 0
        name = f"state-{number:08d}-{hashlib.sha256(manifest).hexdigest()[:16]}"
        with atomic_folder(self.folder / name) as folder:
            for file_name, blob in {**blobs, "manifest.json": manifest}.items():
                (folder / file_name).write_bytes(blob)
        for old in self.found()[:-keep]:
            shutil.rmtree(old)

    def load(self) -> tuple[dict, dict[str, dict]] | None:
        """(facts, parts) of the newest whole state, or None where there is no state.

        Damaged states are named and removed. Raises `UserError` where none is whole.
        """
        damaged = []
        for path in reversed(self.found()):
            try:
                state = self._read(path)
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                print(f"warning: {path} is damaged ({error}) and not used", file=sys.stderr)
                damaged.append(path)
                continue
            for other in damaged:
                shutil.rmtree(other)
            return state
        if damaged:
            raise UserError(
                f"{self.folder}: none of {len(damaged)} saved states is whole; put one back, or "
                "give --overwrite true to start afresh"
            )
        return None

    @staticmethod
    def _read(path: Path) -> tuple[dict, dict[str, dict]]:
        manifest = (path / "manifest.json").read_bytes()
        if not path.name.endswith(hashlib.sha256(manifest).hexdigest()[:16]):
            raise ValueError("manifest.json is not what was written")
        facts, parts = json.loads(manifest), {}
        for name, expected in facts.pop("parts").items():
            blob = (path / name).read_bytes()
            if hashlib.sha256(blob).hexdigest() != expected:
                raise ValueError(f"{name} is not what was written")
            parts[name.removesuffix(".safetensors")] = safetensors.torch.load(blob)
        return facts, parts


@contextlib.contextmanager
def run_lock(folders: list[str], run_name: str):
    """Holds the folders for this run; the lock of a dead process holds nothing.

    Removes what a killed run left half-written. Raises `UserError` where another run holds a folder
    or where it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder / f".{run_name}.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another run is at work there; wait for it, or give another folder"
                ) from None
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error.strerror}") from None
            for pattern in (f".{run_name}_*.tmp", f"{run_name}_state/.*.tmp"):
                for left in folder.glob(pattern):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def state_folder(cfg, run_name: str) -> Path:
    """Where the states of the run `run_name` ("seq" or "single_<task>") are."""
    return Path(cfg.save_dir) / f"{run_name}_state"


def _outputs(cfg, run_name: str) -> list[Path]:
    stages = "|".join([*TASKS, "joint", r"epoch\d+"])
    named = "" if run_name == "seq" else f"{run_name}_"
    # The answers of a stage are no longer true of it. A folder seq_lora/ holds other runs.
    ours = re.compile(
        rf"{run_name}_({stages}|state)|(gen|scores|recovery)_{named}({stages})(_.*)?\.jsonl"
    )
    # Both may be one folder.
    folders = dict.fromkeys((Path(cfg.log_dir), Path(cfg.save_dir)))
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    found = [
        path
        for path in paths
        if ours.fullmatch(path.name) or (path.name.startswith(f"{run_name}_") and path.is_file())
    ]
    return [path for path in found if path != state_folder(cfg, run_name) or any(path.iterdir())]


def check_outputs(cfg, run_name: str) -> None:
    """Raises `UserError` where an earlier run left outputs and no state to resume it from."""
    found = _outputs(cfg, run_name)
    if found and not cfg.overwrite and not RunState(state_folder(cfg, run_name)).found():
        folders = " and ".join(sorted({str(path.parent) for path in found}))
        raise UserError(
            f"{folders}: {len(found)} outputs of an earlier run ({found[0].name} ...); give "
            "--overwrite true to replace them, or another --log_dir and --save_dir"
        )


def clear_outputs(cfg, run_name: str) -> None:
    """Removes the outputs of an earlier run."""
    # The state goes last: a run that is killed here is still known as one that can be resumed.
    for path in sorted(_outputs(cfg, run_name), key=lambda p: p == state_folder(cfg, run_name)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_checkpoint(path: str | Path, model, tokenizer, about: dict, **tensors: dict) -> None:
    """Writes the branches of `model` as a PEFT adapter, with the tokenizer, as one atomic folder.

    Args:
        about: what `models.ds_lora.save_adapter` is told about the base model.
        tensors: name -> tensors (by their names) of a further safetensors file.
    """
    with atomic_folder(path) as folder:
        save_adapter(model, folder, **about)
        tokenizer.save_pretrained(folder)
        for name, of_file in tensors.items():
            blob = safetensors.torch.save(of_file, metadata={"format": "pt"})
            (folder / f"{name}.safetensors").write_bytes(blob)
