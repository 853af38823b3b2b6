"""The checkpoints of a run on the Hugging Face hub, where --push_to_hub asks for it."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from configs.command_line import UserError, is_first
from configs.ending import one_line

# The last two are how an upload says that a part of it failed, and that a folder is gone.
FAULTS = (OSError, HTTPError, RuntimeError, ValueError)


def check_hub(cfg) -> None:
    """Raises `UserError` where --push_to_hub cannot work: at the start, not after days."""
    name = cfg.push_to_hub
    if not name or not is_first():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name}: give OWNER/NAME ({error})") from error
    if name.count("/") != 1:
        raise UserError(f"--push_to_hub {name}: give OWNER/NAME")
    if not get_token():
        raise UserError(f"--push_to_hub {name}: log in first, with `hf auth login`")


def check_new(cfg) -> None:
    """Raises `UserError` where the repository of a run that begins is there already."""
    if not cfg.push_to_hub or not is_first() or cfg.overwrite:
        return
    try:
        is_there = HfApi().repo_exists(cfg.push_to_hub)
    except FAULTS as error:
        raise UserError(f"--push_to_hub {cfg.push_to_hub}: {one_line(error)}") from error
    if is_there:
        raise UserError(
            f"--push_to_hub {cfg.push_to_hub} is there already: give another name, or --overwrite "
            "true to write over it"
        )


def push_checkpoints(cfg, names: list[str]) -> None:
    """Uploads the checkpoints `names`, each in a folder, and the last as the repository itself.

    A repository that is made is private. Raises `UserError` where the hub cannot be had or refuses;
    what was uploaded is not uploaded again.
    """
    if not cfg.push_to_hub or not is_first():
        return
    api, name = HfApi(), cfg.push_to_hub
    try:
        api.create_repo(name, private=True, exist_ok=True)
        for place, checkpoint in [*zip(names, names, strict=True), (None, names[-1])]:
            folder = Path(cfg.save_dir) / checkpoint
            api.upload_folder(repo_id=name, folder_path=folder, path_in_repo=place)
    except FAULTS as error:
        raise UserError(
            f"--push_to_hub {name}: {one_line(error)}; all is saved here, and the same command "
            "tries again"
        ) from error
    print(f"uploaded {len(names)} checkpoints to https://huggingface.co/{name}")
