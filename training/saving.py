"""What a run leaves on disk: whole files or none, one JSON object a line, states to resume from."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import safetensors.torch
from filelock import FileLock, Timeout

from configs.command_line import UserError


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

    Until then `path` is what it was: the text goes to a sibling, is fsynced and renamed. One writer
    at a time: what a killed one left is written over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
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
def atomic_folder(path: str | Path, replaces: bool = True):
    """Yields an empty folder that takes the place of `path` when the block ends without a fault.

    Raises `UserError` where something is there by then that it must not replace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for made in sorted(partial.rglob("*")):
            # A tokenizer with several chat templates makes a folder of them.
            if made.is_dir():
                _sync_folder(made)
            else:
                with open(made, "rb") as written:
                    os.fsync(written.fileno())
        _sync_folder(partial)
        if os.path.lexists(path):
            if not replaces:
                raise UserError(f"{path} has been made meanwhile: give another, or remove it")
            # Of a stage that is being done again: the state to resume from is older than it.
            remove(path)
        os.rename(partial, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_same_file(path: str | Path, known: os.stat_result) -> bool:
    """Whether the file at `path` is the one that `known` was asked of."""
    try:
        return os.path.samestat(os.stat(path), known)
    except FileNotFoundError:
        return False


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
def run_lock(folders: list[str], run_name: str, makes: str = ""):
    """Holds the folders for this run; the lock of a dead process holds nothing.

    Removes what a killed run left half-written: in its folder of states, and of the names that the
    regular expression `makes` finds. A run whose name only begins alike may be at work beside it.
    Yields a function that raises `UserError` where a folder or its lock is gone, so that another
    run may be at work there. Raises `UserError` where one is, or where a folder cannot be written.
    """
    locks: dict[Path, os.stat_result] = {}
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
            path = folder / f".{run_name}.lock"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if path.is_symlink():
                    raise UserError(f"{path} is a symbolic link: remove it")
                stack.enter_context(FileLock(path, timeout=0))
                locks[path] = os.stat(path)
            except Timeout:
                raise UserError(
                    f"{folder}: another run is at work there; wait for it, or give another folder"
                ) from None
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error.strerror}") from None
            half_written = re.compile(rf"\.({makes})(\.\d+)?\.tmp")
            lefts = [path for path in folder.glob(".*.tmp") if half_written.fullmatch(path.name)]
            for left in [*lefts, *folder.glob(f"{run_name}_state/.*.tmp")]:
                remove(left)

        def check() -> None:
            for path, known in locks.items():
                if not is_same_file(path, known):
                    raise UserError(
                        f"{path} was removed during the run, and another may have begun there: "
                        "see that none has, and give the same command again"
                    )

        yield check


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
