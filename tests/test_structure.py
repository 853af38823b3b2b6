"""What may import what, what each room alone knows, and that a method and a task are one file."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest
from helpers import ROOT, command, errors, make_rows, read, write_rows

import train_slsd_seq
from configs.base_config import TASKS
from methods import METHODS
from methods.method import JOINT

# A file imports from its own floor or from one below.
FLOORS = (
    ("configs",),
    ("models",),
    ("methods", "tasks", "utils_data.py"),
    ("training",),
    ("evaluation",),
    ("scripts on top",),
)
LIBRARIES = {"torch", "safetensors", *sys.stdlib_module_names}


def room_of(path: Path) -> str:
    """The folder of a file below ROOT; of one on top itself, where it is no script."""
    names = [name for floor in FLOORS for name in floor]
    first = path.relative_to(ROOT).parts[0]
    if len(path.relative_to(ROOT).parts) == 1 and first not in names:
        return "scripts on top"
    return first


def floor_of(path: Path) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room_of(path) in rooms)


ROOMS = [name for floor in FLOORS for name in floor if (ROOT / name).is_dir()]
FILES = sorted(
    [*ROOT.glob("*.py"), *(file for name in ROOMS for file in ROOT.glob(f"{name}/*.py"))]
)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def file_of(module: str) -> Path | None:
    """The file of this repository that `module` is; None for any other."""
    place = ROOT.joinpath(*module.split("."))
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f in TREES), None)


def modules_imported(path: Path) -> set[str]:
    """By every import in `path`, inside functions too: the submodule where one is named."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if file_of(name) else node.module for name in names}
    return found


IMPORTS = {path: modules_imported(path) for path in TREES}


def test_every_file_is_in_a_room():
    packages = {path.parent.name for path in ROOT.glob("[!.]*/__init__.py")}
    assert packages == set(ROOMS)
    assert not [path for name in ROOMS for path in ROOT.glob(f"{name}/*/*.py")]
    assert len(FILES) > 30 and sum(len(IMPORTS[path]) for path in FILES) > 100


def test_imports_run_downwards_only():
    upwards = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module in IMPORTS[path]
        if (imported := file_of(module)) and floor_of(imported) > floor_of(path)
    ]
    assert not upwards


def test_nothing_imports_itself_by_a_detour():
    """No file, and no room: who imports one of its files runs its `__init__`, and so all of it."""
    files = {path: {file_of(module) for module in IMPORTS[path]} - {None} for path in FILES}
    rooms = {room: set() for room in {*map(room_of, FILES)}}
    for path, imported in files.items():
        rooms[room_of(path)] |= {*map(room_of, imported)} - {room_of(path)}
    for graph in (files, rooms):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            pytest.fail(" -> ".join(map(str, error.args[1])))


@pytest.mark.parametrize("room", ["models", "methods"])
def test_the_mathematics_imports_no_plumbing(room):
    """Neither files, logs, processes nor the hub: these are the business of those above."""
    settings = {ROOT / "configs" / name for name in ("command_line.py", "run_file.py")}
    allowed = {path for path in FILES if room_of(path) in ("models", room)} | settings
    others = {
        (path.name, module)
        for path in FILES
        if room_of(path) == room
        for module in IMPORTS[path]
        if file_of(module) not in allowed and module.partition(".")[0] not in LIBRARIES
    }
    assert not others


def texts_outside(*rooms: str) -> list[tuple[str, str]]:
    """(file, line and text) of every string constant, also of parts of f-strings and docstrings."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node.value)
        for path in FILES
        if room_of(path) not in rooms
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_only_tasks_and_configs_name_a_task():
    texts = texts_outside("tasks", "configs")
    assert len(texts) > 500
    assert not [(where, text) for where, text in texts if any(task in text for task in TASKS)]


def test_only_methods_and_configs_name_a_method():
    """The stage that learns all tasks at once has a constant; it is spelt as its method is."""
    assert JOINT in METHODS and len(METHODS) >= 7
    texts = texts_outside("methods", "configs")
    assert not [(where, text) for where, text in texts if text in METHODS]


METHOD = '''"""A pull towards where the last task ended: pull times the squared distance."""

from dataclasses import dataclass

from configs.command_line import Knobs, knob
from methods.method import Method
from models.ds_lora import BRANCHES, branch_parameters


@dataclass
class PullKnobs(Knobs):
    pull: float = knob(0.1, "weight of the squared distance", at_least=0)


class Pull(Method):
    knobs = (PullKnobs,)
    end = ()

    def aux_backward(self, step, backward):
        pairs = list(zip(self.params(), self.end, strict=False))
        if pairs:
            backward(self.cfg.pull * sum(((p - end) ** 2).sum() for p, end in pairs))

    def end_task(self, task, samples, is_last):
        self.end = [p.detach().clone() for p in self.params()]

    def params(self):
        return [p for branch in BRANCHES for p in branch_parameters(self.model, branch)]
'''
CONFIG = """from __future__ import annotations

from dataclasses import dataclass

from configs.base_config import BaseConfig


@dataclass
class MyConfig(BaseConfig):
    data_paths = {
        **BaseConfig().data_paths,
        "poems": {"toy": "poems.jsonl", "full": "{data_dir}/all_poems.jsonl"},
    }
    task_order = ["T2_math", "poems"]
    lora_dropout: float = 0.0
"""


def test_a_method_and_a_task_come_from_outside_the_repository(flags, tmp_path, monkeypatch, capsys):
    """Files in another folder, and a knob of its own that changes what is learned."""
    monkeypatch.chdir(tmp_path)
    assert len(METHOD.splitlines()) <= 30
    (tmp_path / "pull.py").write_text(METHOD)
    (tmp_path / "my_config.py").write_text(CONFIG)
    write_rows(tmp_path / "poems.jsonl", make_rows("T5_poems", 30))

    def argv(name: str, *more: str) -> list[str]:
        where = {"log_dir": tmp_path / name, "save_dir": tmp_path / name}
        own = {"method": str(tmp_path / "pull.py"), "lr_lora": 5e-3}
        # The last --method counts.
        return [*flags(**own, **where), "--method", "pull.py", "--config", "my_config.py", *more]

    done = command(str(ROOT / "train_slsd_seq.py"), *argv("default"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = {}
    for name, more in {"default": (), "same": ("--pull", "0.1"), "more": ("--pull", "50")}.items():
        assert not more or train_slsd_seq.main(argv(name, *more)) == 0
        for task in ("T2_math", "poems"):
            file = tmp_path / name / f"seq_{task}" / "adapter_model.safetensors"
            weights[name, task] = file.read_bytes()
    assert weights["default", "poems"] == weights["same", "poems"] != weights["more", "poems"]
    # There is no last task's end in the first.
    assert weights["default", "T2_math"] == weights["more", "T2_math"]
    losses = read(tmp_path / "default" / "seq_eval_loss.jsonl")
    base, last = (
        next(row["loss"] for row in losses if (row["stage"], row["eval_task"]) == (stage, "poems"))
        for stage in ("base", "poems")
    )
    assert last < base
    for more, message in (
        (("--pull", "-1"), "error: pull is -1.0: give 0 or more"),
        (("--pull", "1", "--method", "seq_lora"), "error: unknown option --pull; "),
        (("--kd_lambda", "3"), "error: --kd_lambda belongs to --method "),
    ):
        capsys.readouterr()
        assert train_slsd_seq.main(argv("refused", *more)) == 2
        assert errors(capsys)[0].startswith(message)
        assert not (tmp_path / "refused").exists()
    with pytest.raises(SystemExit):
        train_slsd_seq.main(argv("help", "--help"))
    told = capsys.readouterr().out
    assert "with --method pull.py:\n  --pull PULL" in told
