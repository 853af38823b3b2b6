"""What an evaluation has done so far, so that the same command goes on where a killed one was."""

import json
from dataclasses import asdict
from pathlib import Path

from configs.command_line import UserError, is_first
from evaluation.questions import Questions
from evaluation.readings import BASE, Stage
from training.identity import describe_base, differences, json_sha256, run_identity
from training.processes import all_succeed, from_first
from training.saving import file_sha256, write_json_lines


class Unfinished:
    """The parts of an evaluation that are done: a JSON line each, after one of what it is made of.

    Args:
        path: of the file, which is gone when the evaluation is finished.
        made_of: name -> JSON value of all that decides what comes out.
        afresh: what is there is not gone on from.

    Raises `UserError` where an evaluation of something else was begun there.
    """

    def __init__(self, path: Path, made_of: dict, afresh: bool):
        self.path, self._made_of = path, made_of
        here = path.exists() and not afresh
        (read,) = all_succeed([self._read if here and is_first() else dict])
        self._done: dict[str, dict] = from_first(read)

    def _read(self) -> dict[str, dict]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            first, *parts = (json.loads(line) for line in lines)
            differing = differences(first, self._made_of)
            done = {part["name"]: part for part in parts}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged: give --overwrite true") from error
        if differing:
            raise UserError(
                f"{self.path} is of an evaluation that was begun otherwise ({differing}): finish "
                "that, or give --overwrite true or another --log_dir"
            )
        return done

    def part(self, name: str, answers: Path | None = None) -> dict | None:
        """What was kept as `name`; None where it is to be done, or `answers` is not its file."""
        part = self._done.get(name)
        if part and answers:
            is_whole = is_first() and answers.exists() and file_sha256(answers) == part["answers"]
            part = part if from_first(is_whole) else None
        return part

    def keep(self, name: str, answers: Path | None = None, **values) -> None:
        """Keeps `values` as `name`, and the file `answers` with them as it is now."""
        if is_first():
            hashed = {"answers": file_sha256(answers)} if answers else {}
            self._done[name] = {"name": name, **hashed, **values}
            write_json_lines(self.path, [self._made_of, *self._done.values()])

    def finish(self) -> None:
        """All is done and kept elsewhere."""
        if is_first():
            self.path.unlink(missing_ok=True)


def ingredients(stage: Stage, wanted, all_questions: list[Questions]) -> dict:
    """Name -> JSON value of all that decides what an evaluation of `stage` says.

    Args:
        wanted: the options of the evaluation, a dataclass.
    """
    cfg = stage.cfg
    checkpoints = [stage.folder_of(task) for task in dict.fromkeys(stage.seen)]
    if stage.name != BASE:
        checkpoints.append(stage.folder_of(stage.name))
    hashes = {
        f"{folder.name}/{path.name}": file_sha256(path)
        for folder in dict.fromkeys(checkpoints)
        for path in sorted(folder.glob("*.safetensors"))
    }
    rows = {f"data of {q.name} as asked": json_sha256(q.rows) for q in all_questions}
    options = {k: v for k, v in asdict(wanted).items() if k not in ("checkpoint", "benchmarks")}
    base = {**describe_base(cfg), "dtype held": str(stage.passes.model.dtype)}
    trained_on = stage.seen[:-1] if wanted.recovery else []
    return {**run_identity(cfg, trained_on, base), **options, **hashes, **rows}
