"""What a run leaves, by the exact names that the project gives."""

import re
from pathlib import Path

from configs.command_line import UserError
from configs.run_file import as_run_file
from methods.method import JOINT
from training.saving import RunState, atomic_file, remove


def state_folder(cfg, run_name: str) -> Path:
    """Where the states of the run `run_name` ("seq" or "single_<task>") are."""
    return Path(cfg.save_dir) / f"{run_name}_state"


def summary_path(cfg) -> Path:
    """Of a sequence, written last: the run is finished where it is."""
    return Path(cfg.log_dir) / "seq_summary.json"


def write_settings(cfg, run_name: str, tasks: list[str]) -> None:
    """Writes the run file with all that the run `run_name` uses, to be run again."""
    # A sequence names its tasks, a script for one of them asks for it.
    further = {} if run_name == "seq" else {"task": tasks[0]}
    with atomic_file(Path(cfg.log_dir) / f"{run_name}_config.yaml") as file:
        file.write(as_run_file(cfg, **further))


def check_finished(cfg, run_name: str, facts: dict) -> None:
    """Raises `UserError` where the finished run of the state `facts` has lost what it wrote."""
    paths = [Path(cfg.log_dir) / f"{name}.jsonl" for name in facts["logs"]]
    paths += [summary_path(cfg)] if run_name == "seq" else []
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(
            f"{state_folder(cfg, run_name)} says that this run is finished, but {missing[0]} is "
            "missing: put it back, give the run's own --log_dir, or --overwrite true"
        )


def own_names(cfg, run_name: str) -> str:
    """A regular expression of the names that the run `run_name` itself makes."""
    stages = "|".join(map(re.escape, [*cfg.data_paths, JOINT]))
    always = r"state|config\.yaml|tensorboard"
    if run_name == "seq":
        logs = "(train|eval)_loss|router|drift|samples|scores"
        logs = rf"({logs}|gen_(base|{stages})_({stages}))\.jsonl"
        return rf"{run_name}_({stages}|{always}|{logs}|summary\.json|eval_loss\.png)"
    return rf"{run_name}_(epoch\d+|{always}|(train|eval)_loss\.jsonl|train_loss\.png)"


def _outputs(cfg, run_name: str) -> list[Path]:
    """What an earlier run left, by the exact names that the project gives.

    First what says that the run is finished: one that is killed while they are removed is not.
    """
    stages = "|".join(map(re.escape, [*cfg.data_paths, JOINT]))
    if run_name != "seq":
        stages = rf"{run_name}_epoch\d+"
    # The answers of a stage are no longer true of it; those of the base are.
    answers = rf"(gen|scores|recovery)_({stages})(_[\w-]+)?\.jsonl"
    ours = re.compile(f"{own_names(cfg, run_name)}|{answers}")
    # Both may be one folder.
    folders = dict.fromkeys((Path(cfg.log_dir), Path(cfg.save_dir)))
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    state = state_folder(cfg, run_name)
    found = [path for path in paths if ours.fullmatch(path.name)]
    found = [path for path in found if path != state or not path.is_dir() or any(path.iterdir())]
    first = [summary_path(cfg), state]
    return sorted(found, key=lambda path: first.index(path) if path in first else len(first))


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
