"""What makes a run the one that it is: its configuration, its data and its base model."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from configs.base_config import NOT_RESULTS
from configs.command_line import UserError, rank
from training.saving import file_sha256

# Of what a saved state holds: another version's cannot be gone on from.
STATE_VERSION = 4
# Of a model folder, beside the weights: what decides its answers, and what training reads.
WEIGHTS = re.compile(r".+\.(safetensors|bin)")
CONFIG = re.compile(r"config\.json")
TOKENIZER = re.compile(
    r"(.*token.*|.*vocab.*|merges|tekken|spiece)\.(json|txt|model|tiktoken)|.*\.model"
)


def _fingerprint(folder: Path, names: re.Pattern) -> str:
    """sha256 of the sizes, beginnings and ends of the files `names`: gigabytes take no time."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if names.fullmatch(path.name)):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def describe_base(cfg) -> dict:
    """What a checkpoint says about its base: its name, how it is held, and hashes of its files.

    Of a folder those of the weights, `config.json` and the tokenizer; of a GGUF that of the file.
    """
    facts = {"base_model": cfg.model_name, "quantization": cfg.quantization}
    path = Path(cfg.model_name)
    if path.is_dir():
        kinds = {"weights": WEIGHTS, "config.json": CONFIG, "tokenizer": TOKENIZER}
        facts |= {name: _fingerprint(path, names) for name, names in kinds.items()}
    if path.suffix != ".gguf":
        return facts
    from gguf import GGUFReader

    # The hash tells the file; the hub id, from its header and name, is what others can load.
    header = GGUFReader(path).fields
    known = {key: field.contents() for key, field in header.items() if key.startswith("general.")}
    facts["base_model"] = hub_id_of_gguf(path.name, known) or cfg.model_name
    facts["gguf_sha256"] = file_sha256(path)
    return facts


def hub_id_of_gguf(file_name: str, header: dict) -> str | None:
    """The hub id of the model that a GGUF file was made from; None where nothing tells it.

    `general.base_model.*` is that model, or the one that it was fine-tuned from: the file's name
    and `general.finetune` tell which.
    """
    name = re.sub(r"(?i)[.-](i?q\d\w*|b?f(16|32))?$", "", file_name.removesuffix(".gguf"))
    url = str(header.get("general.base_model.0.repo_url", ""))
    base = url.partition("huggingface.co/")[2].strip("/")
    owner, _, base_name = base.partition("/")
    organization = str(header.get("general.organization", "")).strip()
    if base and (base_name.lower() == name.lower() or "general.finetune" not in header):
        return base
    if base and re.sub(r"\W+", "-", organization).lower() == owner.lower():
        return f"{owner}/{name}"
    return f"{organization}/{name}" if re.fullmatch(r"[\w.-]+", organization) else None


def json_sha256(value) -> str:
    """sha256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def base_identity(about_base: dict) -> dict:
    """Of `describe_base` what tells one base from another: of hashed files not where they lie."""
    is_hashed = about_base.keys() & {"weights", "gguf_sha256"}
    return {k: v for k, v in about_base.items() if k != "base_model" or not is_hashed}


def run_identity(cfg, tasks: list[str], about_base: dict) -> dict:
    """What makes a run the one that it is, whatever machine it is on: JSON values."""
    config = {
        name: value for name, value in dataclasses.asdict(cfg).items() if name not in NOT_RESULTS
    }
    if cfg.dtype == "auto":
        # It is not the same everywhere: a run adds what it comes to on its device.
        del config["dtype"]
    data = {f"data of {task}": file_sha256(cfg.data_path(task)) for task in tasks}
    tests = {f"test data of {t}": file_sha256(cfg.test_path(t)) for t in tasks if cfg.test_path(t)}
    # Fields that the states of older runs do not have: they count where they are given.
    later = ("task_judges", "use_rslora", "light_evaluation")
    given = {k: v for k in later if (v := getattr(cfg, k))}
    own = {"method file": file_sha256(cfg.method)} if cfg.method.endswith(".py") else {}
    base = base_identity(about_base)
    return {**config, **base, **data, **tests, **given, **own, "state": STATE_VERSION}


def differences(first: dict, second: dict) -> str:
    """What differs between two identities, in words; "" where nothing does."""
    is_hash = re.compile("[0-9a-f]{64}").fullmatch
    return ", ".join(
        f"another {name}"
        if all(is_hash(str(of.get(name))) for of in (first, second))
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
