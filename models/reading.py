"""Files that somebody else may have made: looked at before they are read, and told in one line."""

import json
import os
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

MIB = 2**20
# No file that this program reads nests its JSON deeper than a schema of a function does.
MOST_LEVELS = 100
# Names and shapes of the tensors, in front of them.
HEADER_BYTES = 16 * MIB


def check_file(path: str | Path, most_bytes: int | None = None) -> None:
    """Raises ValueError where `path` is no readable file of at most `most_bytes`.

    A pipe or a device is not opened: that could wait forever.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        reason = error.strerror
        if os.path.islink(path) and isinstance(error, FileNotFoundError):
            reason = f"a link to {os.readlink(path)}, which is not there"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise ValueError(f"{path} has {found.st_size} bytes, and {most_bytes} are the most it may")


def read_bytes(path: str | Path, most_bytes: int) -> bytes:
    """The bytes of a file; ValueError where it is none, has more or cannot be read."""
    check_file(path, most_bytes)
    try:
        with open(path, "rb") as file:
            return file.read(most_bytes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: str | Path, most_bytes: int) -> str:
    """UTF-8, with or without a byte-order mark; ValueError as in `read_bytes`."""
    try:
        return read_bytes(path, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error


def read_json(path: str | Path, most_bytes: int = MIB):
    """The JSON value in a file; ValueError where it is none, or as in `parse_json`."""
    return parse_json(read_text(path, most_bytes), str(path))


def parse_json(text: str, where: str):
    """The JSON value in `text`; ValueError, with `where`, where it is none.

    Refused too: more than MOST_LEVELS of nesting, and half a surrogate pair, which no file and no
    tokenizer can hold.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error})") from error
    level = [value]
    for _ in range(MOST_LEVELS):
        inner = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, where)
            elif isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
        if not inner:
            return value
        level = inner
    raise ValueError(f"{where} is nested too deeply")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a surrogate pair") from error


def read_safetensors(path: str | Path, most_numbers: int) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, on the CPU; ValueError where it cannot be read.

    Args:
        most_numbers: in all tensors together; a larger file is refused before it is read.
    """
    try:
        return load(read_bytes(path, HEADER_BYTES + 8 * most_numbers))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def tensor_problems(
    tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """What keeps `tensors` from being real, finite numbers of exactly these shapes: one of a kind.

    Whole numbers would be what was rounded, and what is not finite would be scored without a word.
    """
    problems = [
        f"{len(keys)} tensors {what}, such as {min(keys)}"
        for what, keys in (
            ("missing", shapes.keys() - tensors.keys()),
            ("unexpected", tensors.keys() - shapes.keys()),
        )
        if keys
    ]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, the model's {shape}"
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ][:1]
    problems += [
        f"{key} holds {'numbers that are not finite' if t.is_floating_point() else t.dtype}"
        for key, t in tensors.items()
        if not t.is_floating_point() or not torch.isfinite(t).all()
    ][:1]
    return problems
