"""The frozen layers' output on disk, for the runs that come after this one and those beside it."""

import contextlib
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open

from configs.command_line import UserError

# A run looks at what others have written whenever it has written this share of the room.
LOOKS = 64
# Seconds after which a half-written file is taken for what a killed run left.
ABANDONED = 3600


def open_store(cfg, model: torch.nn.Module, about_base: dict):
    """The `PrefixStore` in `cfg.prefix_store` for `model`; None where none is asked for.

    Raises `UserError` where the folder cannot be written.
    """
    if not (cfg.prefix_store and cfg.prefix_store_gib and cfg.num_frozen_layers):
        return None
    # All that the bits depend on beside the tokens of a pass.
    computed_by = {
        **about_base,
        "commit": getattr(model.config, "_commit_hash", None),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype),
        "frozen": cfg.num_frozen_layers,
        "device": _describe(model.device),
        "versions": [torch.__version__, transformers.__version__],
    }
    group = hashlib.sha256(repr(sorted(computed_by.items())).encode()).hexdigest()[:16]
    return PrefixStore(Path(cfg.prefix_store), group, int(cfg.prefix_store_gib * 2**30))


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {capability}, {torch.get_num_threads()} threads"


class PrefixStore:
    """Files `folder/group/HASH.safetensors`, each what one pass gave; HASH is that of its samples.

    A row's bits depend on the rows beside it, so a pass is stored and found as a whole: what is
    read is what this run would have computed, and no result depends on what is there already.
    Files appear whole, are never changed and stay readable while they are mapped, whoever removes
    them. Those that were used longest ago give way.

    Args:
        group: names what computed it: the base, its dtype, the depth, the device.
        room: bytes of all files, at most; less where the disk is smaller.
    """

    def __init__(self, folder: Path, group: str, room: int):
        self.folder, self.group = folder, folder / group
        try:
            self.group.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*/.*.tmp"):
                # Another run may be through with it.
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > ABANDONED:
                        path.unlink()
            used, free = sum(self._sizes().values()), shutil.disk_usage(folder).free
        except OSError as error:
            raise self._unusable(error) from error
        # The rest of the disk is for adapters, states and other programs.
        self.room = min(room, used + free - free // 4)
        self._unseen = self.room

    def load(self, samples: list[dict]) -> list[torch.Tensor] | None:
        """Memory-mapped (length, width) of each row of a pass, or None where it is not here.

        A damaged file is told and removed; one that cannot be read may be whole, and stays.
        """
        path = self._path(samples)
        try:
            with safe_open(path, framework="pt") as file:
                rows, written = file.get_tensor("rows"), file.metadata()["sha256"]
            if _sha256(rows) != written:
                raise ValueError("it is not what was written")
            # Another user's: it seems older than it is.
            with contextlib.suppress(OSError):
                os.utime(path)
            return list(rows.split([len(sample["input_ids"]) for sample in samples]))
        except OSError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            print(f"warning: {path} is damaged ({error}): it is made anew", file=sys.stderr)
            path.unlink(missing_ok=True)
            return None

    def save(self, samples: list[dict], rows: list[torch.Tensor]) -> None:
        """Stores the (length, width) of each row of a pass, in host memory."""
        path, tensor = self._path(samples), torch.cat(rows)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self._make_room(tensor.nbytes)
            # Whoever removes the folder may do so at any time.
            self.group.mkdir(parents=True, exist_ok=True)
            metadata = {"sha256": _sha256(tensor)}
            safetensors.torch.save_file({"rows": tensor}, partial, metadata=metadata)
            os.replace(partial, path)
        except (SafetensorError, OSError) as error:
            raise self._unusable(error) from error
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, samples: list[dict]) -> Path:
        digest = hashlib.sha256()
        for sample in samples:
            for name in ("input_ids", "parents"):
                if name in sample:
                    numbers = sample[name].to(torch.int64).numpy().tobytes()
                    digest.update(len(numbers).to_bytes(8, "little") + numbers)
        return self.group / f"{digest.hexdigest()}.safetensors"

    def _sizes(self) -> dict[Path, int]:
        """Bytes of each file of any group, those used longest ago first."""
        found = []
        for path in self.folder.glob("*/[!.]*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime_ns, path, stat.st_size))
        return {path: size for _, path, size in sorted(found)}

    def _make_room(self, needed: int) -> None:
        """Removes files where `needed` bytes more would be too many; looks only now and then."""
        self._unseen += needed
        if LOOKS * self._unseen < self.room:
            return
        self._unseen = 0
        sizes = self._sizes()
        total = sum(sizes.values()) + needed
        for path, size in sizes.items():
            if total <= self.room - self.room // LOOKS:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _unusable(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or error
        return UserError(
            f"--prefix_store {self.folder} cannot be written ({reason}): make room, give a smaller "
            "--prefix_store_gib (0: none), or another folder"
        )


def _sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
