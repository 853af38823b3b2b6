"""Writes a stage checkpoint as others serve it: one reading as a stock PEFT adapter, or merged.

--reading latest is slow + fast, slow the shared branch alone, own:TASK slow and the fast branch
that TASK left; every_task writes own:TASK of each task learned, one adapter a folder of --out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from configs.command_line import Knobs, UserError, knob, num_processes
from configs.ending import command_line
from evaluation.readings import BASE, LATEST, READINGS, Stage, open_stage, read_as
from methods import parse_config
from models.adapter import save_peft
from models.ds_lora import BRANCHES, ds_lora_layers, merge_branches
from training.identity import describe_base
from training.journal import prompts_as_trained
from training.saving import atomic_folder

EVERY_TASK, OWN = "every_task", "own"
UNQUANTISED = "export the adapter and merge it into the full model, with PEFT's merge_and_unload"


@dataclass
class Export(Knobs):
    checkpoint: str = knob("", "a stage checkpoint, such as checkpoints/seq_TASK", not_empty=True)
    reading: str = knob(
        LATEST, f"latest, slow, own:TASK, or {EVERY_TASK}: own:TASK of each task", not_empty=True
    )
    merge: bool = knob(False, "add it to the base's weights, and write the whole model")
    out: str = knob("", "folder to write, which must not be there yet", not_empty=True)


@command_line
def main(argv=None):
    cfg, wanted = parse_config(argv, Export, description=__doc__)
    check(cfg, wanted)
    stage = open_stage(cfg, wanted.checkpoint)
    if wanted.merge and stage.passes.model.config.to_dict().get("quantization_config"):
        raise UserError(f"--merge true: {cfg.model_name} is quantised; {UNQUANTISED}")
    for folder, (reading, task) in exports(stage, wanted).items():
        with read_as(stage, reading, task):
            export(stage, folder, wanted.merge)
        print(f"wrote {folder}: {READINGS[reading].meaning} {task}".rstrip())


def check(cfg, wanted: Export) -> None:
    """Raises `UserError` with all that shows before the base model is loaded."""
    problems = []
    if num_processes() > 1:
        problems.append("this is for one process: start it without torchrun")
    if wanted.checkpoint == BASE:
        problems.append("--checkpoint base: it has no branches; give a stage checkpoint")
    if Path(wanted.out).exists() or Path(wanted.out).is_symlink():
        problems.append(f"--out {wanted.out} is there already: give another, or remove it")
    if wanted.merge and cfg.quantization != "none":
        problems.append(f"--merge true: a base in {cfg.quantization} is quantised; {UNQUANTISED}")
    if wanted.merge and wanted.reading == EVERY_TASK:
        problems.append(f"--merge true makes one model: give one reading, not {EVERY_TASK}")
    if problems:
        raise UserError("\n".join(problems))


def exports(stage: Stage, wanted: Export) -> dict[Path, tuple[str, str]]:
    """Folder -> (reading, the task whose own branches it takes, "" for none).

    Raises `UserError` where `stage` has no such reading, or has not learned the task.
    """
    out = Path(wanted.out)
    if wanted.reading == EVERY_TASK:
        found = {out / task: (OWN, task) for task in stage.seen}
        if not found:
            raise UserError(f"--reading {EVERY_TASK}: {stage.name} is no stage of a sequence")
    else:
        reading, _, task = wanted.reading.partition(":")
        found = {out: (reading, task)}
    for reading, task in found.values():
        known = [name for name in stage.readings if not READINGS[name].is_routed]
        if reading not in known:
            own = [f"{name}:TASK" if READINGS[name].own else name for name in known]
            raise UserError(f"--reading {wanted.reading}: {stage.name} has {', '.join(own)}")
        tasks = stage.seen if READINGS[reading].own else [""]
        if task not in tasks:
            given = " or ".join(f"{reading}:{name}".rstrip(":") for name in tasks)
            raise UserError(f"--reading {wanted.reading}: give {given}")
        if task and not stage.folder_of(task).is_dir():
            raise UserError(f"--reading {wanted.reading}: {stage.folder_of(task)} is missing")
    return found


def export(stage: Stage, folder: Path, merge: bool) -> None:
    """Writes the model as it is now, with the tokenizer that prompts as in training."""
    model, template = stage.passes.model, stage.passes.template
    active = next(iter(ds_lora_layers(model).values())).active
    with atomic_folder(folder, replaces=False) as partial:
        if merge:
            merge_branches(model).save_pretrained(partial)
        else:
            branches = [branch for branch in BRANCHES if branch in active]
            save_peft(model, partial, describe_base(stage.cfg)["base_model"], branches)
        with prompts_as_trained(template):
            template.tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    sys.exit(main())
