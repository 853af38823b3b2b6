"""What a run leaves on disk: whole files or none, one JSON object a line, states to resume from."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import safetensors.torch

from configs.base_config import NOT_RESULTS
from configs.command_line import UserError, rank
from methods.method import JOINT

# Of what a saved state holds: another version's cannot be gone on from.
STATE_VERSION = 3


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
            remove(path)
        os.rename(partial, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class JsonlLog:
    """Appends one JSON object a line and flushes it; numbers must be finite or null.

    Args:
        written: {"size", "sha256"} of what a saved state knows to be there. Lines beyond it are
            cut: they come from after that state.
    """

    def __init__(self, path: str | Path, written: dict | None = None):
        path, size = Path(path), (written or {}).get("size", 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise UserError(
                f"{path} has {found} bytes and the saved state counts on {size}: put the log back, "
                "or give --overwrite true to start afresh"
            )
        self._digest = hashlib.sha256()
        if size:
            with open(path, "rb") as file:
                self._digest.update(file.read(size))
        if written and self._digest.hexdigest() != written["sha256"]:
            raise UserError(
                f"{path} is not what this run has written: put the log back, or give --overwrite "
                "true to start afresh"
            )
        self._file = open(path, "a", encoding="utf-8", newline="\n")
        self._file.truncate(size)

    def write(self, **row) -> None:
        """Raises ValueError where a number is not finite."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self._file.write(line)
        self._file.flush()
        self._digest.update(line.encode("utf-8", "surrogatepass"))

    def written(self) -> dict:
        """{"size", "sha256"} of what is written, which is on the disk when this returns."""
        os.fsync(self._file.fileno())
        size = os.fstat(self._file.fileno()).st_size
        return {"size": size, "sha256": self._digest.hexdigest()}

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

    def __init__(self, path: str | Path, written: dict | None = None):
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
        self._damaged: list[Path] = []

    def found(self) -> list[Path]:
        """The states, whole or not, oldest first."""
        names = re.compile(r"state-\d{8}-[0-9a-f]{16}")
        here = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in here if names.fullmatch(path.name))

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
        # What could not be read for a moment may be whole; what is damaged never will be.
        for damaged in self._damaged:
            remove(damaged)
        self._damaged = []
        for old in self.found()[:-keep]:
            remove(old)

    def load(self) -> tuple[dict, dict[str, dict]] | None:
        """(facts, parts) of the newest whole state, or None where there is no state.

        Reading removes nothing: damaged states are named, and go when a newer one is saved. Raises
        `UserError` where none is whole.
        """
        unread = 0
        for path in reversed(self.found()):
            try:
                return self._read(path)
            except (ValueError, KeyError, FileNotFoundError, safetensors.SafetensorError) as error:
                self._damaged.append(path)
                fault = f"is damaged ({error})"
            except OSError as error:
                fault = f"cannot be read ({error})"
            unread += 1
            print(f"warning: {path} {fault} and not used", file=sys.stderr)
        if unread:
            raise UserError(
                f"{self.folder}: none of {unread} saved states is whole; put one back, or "
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
                    remove(left)
        yield


def state_folder(cfg, run_name: str) -> Path:
    """Where the states of the run `run_name` ("seq" or "single_<task>") are."""
    return Path(cfg.save_dir) / f"{run_name}_state"


def _outputs(cfg, run_name: str) -> list[Path]:
    """What an earlier run left, by the exact names that the project gives; the state comes first.

    So a run that is killed while they are removed is not taken for a finished one.
    """
    stages = "|".join(map(re.escape, [*cfg.data_paths, JOINT]))
    if run_name == "seq":
        logs = "(train|eval)_loss|router|drift|samples|scores"
        logs = rf"({logs}|gen_(base|{stages})_({stages}))\.jsonl"
        own = rf"{run_name}_({stages}|state|{logs}|summary\.json|eval_loss\.png)"
    else:
        stages = rf"{run_name}_epoch\d+"
        own = rf"{stages}|{run_name}_(state|(train|eval)_loss\.jsonl|train_loss\.png)"
    # The answers of a stage are no longer true of it; those of the base are.
    ours = re.compile(rf"{own}|(gen|scores|recovery)_({stages})(_[\w-]+)?\.jsonl")
    # Both may be one folder.
    folders = dict.fromkeys((Path(cfg.log_dir), Path(cfg.save_dir)))
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    state = state_folder(cfg, run_name)
    found = [path for path in paths if ours.fullmatch(path.name)]
    found = [path for path in found if path != state or any(path.iterdir())]
    return sorted(found, key=lambda path: path != state)


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
    for path in _outputs(cfg, run_name):
        remove(path)


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_identity(cfg, tasks: list[str], about_base: dict) -> dict:
    """What makes a run the one that it is, whatever machine it is on: JSON values."""
    config = {
        name: value for name, value in dataclasses.asdict(cfg).items() if name not in NOT_RESULTS
    }
    data = {f"data of {task}": file_sha256(cfg.data_path(task)) for task in tasks}
    return {**config, **about_base, **data, "state": STATE_VERSION}


def differences(first: dict, second: dict) -> str:
    """What differs between two identities, in words; "" where nothing does."""
    return ", ".join(
        f"another {name}"
        if "data of" in name
        else f"{name} {first.get(name)} -> {second.get(name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    )


def check_identity(folder: Path, saved: dict | None, first: dict, own: dict) -> None:
    """Compares this process with the first one, and that with the saved state."""
    if differing := differences(first, own):
        raise UserError(
            f"process {rank()} is not like the first one ({differing}): give each machine the same "
            "files and packages"
        )
    if saved and saved.get("state") != STATE_VERSION:
        raise UserError(
            f"{folder} holds the state of another version of this program "
            f"({saved.get('state', 1)}, this is {STATE_VERSION}): finish the run with that one, or "
            "give --overwrite true to start afresh"
        )
    if saved and (differing := differences(saved, own)):
        raise UserError(
            f"{folder} holds the state of another run ({differing}): give --overwrite true to "
            "start afresh, or another --save_dir and --log_dir"
        )
