"""Where a run may be watched: TensorBoard, trackio and W&B, through accelerate's trackers.

They get what the JSON lines get, which stay the record.
"""

import dataclasses
import importlib
import json
import os
import uuid
from importlib.util import find_spec
from pathlib import Path

from configs.command_line import UserError, is_first
from configs.ending import one_line

PROJECT = "ds-lora-slsd"


def check_trackers(cfg) -> None:
    """Raises `UserError` where what --report_to names is not installed; the first process asks."""
    if missing := [name for name in cfg.trackers if is_first() and not find_spec(name)]:
        raise UserError(
            "\n".join(
                f"--report_to {name}: it is not installed; `pip install {name}`, or leave it out"
                for name in missing
            )
        )


def tracker_folder(cfg, run_name: str) -> Path:
    """Of TensorBoard's files."""
    return Path(cfg.log_dir) / f"{run_name}_tensorboard"


def numbers_of(kind: str, row: dict) -> dict[str, float]:
    """The numbers of a line of the log `kind` by name: eval_loss/TASK/latest/loss.

    Texts are part of the names, but for the stage, which the step tells; counts are left out.
    """
    texts = [text for key, text in row.items() if isinstance(text, str) and key != "stage"]
    return {
        "/".join([kind, *texts, key]): number
        for key, number in row.items()
        if isinstance(number, float)
    }


class Trackers:
    """The trackers of a run; none until `start`.

    Args:
        state: what a saved state knows of them.

    Attributes:
        state: the run's name there, and how many optimizer steps it has done: of the stages
            "before" this one, and "at" it.
    """

    def __init__(self, state: dict | None = None):
        self.state = state or {"id": uuid.uuid4().hex[:8], "stage": "", "before": 0, "at": 0}
        self._trackers: list = []

    def __bool__(self) -> bool:
        return bool(self._trackers)

    @property
    def step(self) -> int:
        """Optimizer steps of all stages so far."""
        return self.state["before"] + self.state["at"]

    def start(self, cfg, run_name: str, is_new: bool) -> None:
        """Starts those of --report_to, or goes on with them."""
        if not cfg.trackers:
            return
        from accelerate import PartialState, tracking

        # Their own log wants it.
        PartialState()
        place = [*Path(cfg.log_dir).resolve().parts[1:][-2:], run_name, self.state["id"]]
        name = "-".join(place)
        folder = tracker_folder(cfg, run_name)
        options = {
            "tensorboard": (tracking.TensorBoardTracker, folder.name)
            + ({"logging_dir": cfg.log_dir, "purge_step": self.step + 1},),
            "trackio": (tracking.TrackioTracker, PROJECT, {"name": name, "resume": "allow"}),
            # Offline unless the environment says otherwise.
            "wandb": (tracking.WandBTracker, PROJECT)
            + (
                {"name": name, "id": self.state["id"], "resume": "allow", "dir": cfg.log_dir}
                | {"mode": os.environ.get("WANDB_MODE", "offline")},
            ),
        }
        for kind in cfg.trackers:
            make, project, more = options[kind]
            try:
                tracker = make(project, **more)
                tracker.start()
            except Exception as error:
                # Whatever a library that others wrote finds wrong.
                raise UserError(
                    f"--report_to {kind}: it does not start ({one_line(error)}); mend that, or "
                    "leave it out"
                ) from error
            self._trackers.append(tracker)
            # TensorBoard has it from before; trackio would forget it.
            if is_new or kind != "tensorboard":
                tracker.store_init_configuration(_flat(cfg))

    def write(self, kind: str, row: dict) -> None:
        """Takes a line of the log `kind`."""
        if "step" in row:
            self._count(row.get("stage", row["task"]), row["step"])
        numbers = numbers_of(kind, row)
        for tracker in self._trackers if numbers else ():
            tracker.log(numbers, step=self.step)

    def _count(self, stage: str, step: int) -> None:
        if stage != self.state["stage"]:
            self.state |= {"stage": stage, "before": self.step}
        self.state["at"] = step

    def picture(self, path: Path) -> None:
        """Takes a PNG."""
        import matplotlib.image

        pixels = (matplotlib.image.imread(path)[None, ..., :3] * 255).round().astype("uint8")
        for tracker in self._trackers:
            if tracker.name == "trackio":
                image = importlib.import_module("trackio").Image(str(path))
                tracker.log({path.stem: image}, step=self.step)
                continue
            more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({path.stem: pixels}, step=self.step, **more)

    def finish(self) -> None:
        """Waits until all is written."""
        while self._trackers:
            self._trackers.pop().finish()


def _flat(cfg) -> dict:
    """The fields of `cfg`, those of several values as JSON: trackers know no others."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in dataclasses.asdict(cfg).items()
    }
