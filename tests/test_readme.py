"""Both READMEs give the same commands, and the commands are ones that there are."""

import re
import shlex

import pytest
from helpers import ROOT, Killed, fail_at, outcome, read

import chat
import evaluate_tasks
import export_checkpoint
import plot_loss
import prepare_datasets
import run_experiments
import train_single_task
import train_slsd_seq
from configs.base_config import TASKS
from methods import METHODS
from training.loop import TaskTraining

MAINS = {
    f"{script.__name__}.py": script.main
    for script in (
        chat,
        evaluate_tasks,
        export_checkpoint,
        plot_loss,
        prepare_datasets,
        run_experiments,
        train_single_task,
        train_slsd_seq,
    )
}


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(name: str) -> list[str]:
    """Without the comments, which may be in another language."""
    lines = "\n".join(blocks(name, "bash")).splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.strip()]


def test_both_languages_give_the_same_commands_and_name_one_another():
    assert commands("README.md") == commands("README.zh-CN.md")
    for language in ("python", "math"):
        assert blocks("README.md", language) == blocks("README.zh-CN.md", language)
    assert "(README.zh-CN.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(README.md)" in (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def test_both_languages_give_the_same_numbers():
    """Tables of figures are copied, not translated: a cell with a decimal is in both."""

    def decimals(name):
        rows = re.findall(r"^\|.*\|$", (ROOT / name).read_text(encoding="utf-8"), re.M)
        return [re.findall(r"\d+\.\d+", row) for row in rows if re.search(r"\d\.\d", row)]

    assert decimals("README.md") == decimals("README.zh-CN.md")


@pytest.mark.parametrize(
    "command", [line for line in commands("README.md") if ".py" in line and "pip" not in line]
)
def test_every_command_of_the_readme_is_understood(command, capsys):
    """Its options are known: an unknown one would be refused before --help is looked at."""
    # What is given to a scheduler in quotes is a command too.
    words = [word for part in shlex.split(command) for word in part.split()]
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[place] not in MAINS:
        assert (ROOT / words[place]).exists()
        return
    options = [word for word in words[place + 1 :] if word.startswith("--")]
    with pytest.raises(SystemExit) as end:
        MAINS[words[place]](["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert all(re.search(rf"{option}\b", told) for option in options)


def test_the_method_of_the_readme_goes_on_inside_a_task(flags, tmp_path, monkeypatch):
    """Killed between two steps of the second task, it leaves what it leaves in one go."""
    (block,) = [text for text in blocks("README.md", "python") if "(Method):" in text]
    (tmp_path / "my_method.py").write_text(block, encoding="utf-8")
    common = {
        "method": str(tmp_path / "my_method.py"),
        "pull": 0.5,
        "lr_lora": 5e-3,
        "save_steps": 1,
    }
    common |= {"task_order": ["T1_general", "T2_math"], "max_steps_per_task": 3}

    def argv(name):
        return flags(**common, log_dir=tmp_path / name, save_dir=tmp_path / name)

    assert train_slsd_seq.main(argv("whole")) == 0
    with monkeypatch.context() as patch:
        # The last of the six.
        fail_at(patch, TaskTraining, "_step", 5)
        with pytest.raises(Killed):
            train_slsd_seq.main(argv("cut"))
    assert read(tmp_path / "cut" / "seq_train_loss.jsonl")[-1]["stage"] == "T2_math"
    assert train_slsd_seq.main(argv("cut")) == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_every_file_of_the_code_is_named(name):
    """But for the methods and the tasks, which are one file each, found by its name."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not [script.name for script in ROOT.glob("*.py") if f"`{script.name}`" not in text]
    rows = dict(re.findall(r"^\| `(\w+)/` \| (.*) \|$", text, re.M))
    by_name = {"methods": {*METHODS}, "tasks": {task.partition("_")[2] for task in TASKS}}
    folders = [path.parent for path in ROOT.glob("[!.]*/__init__.py")]
    assert len(folders) >= 6
    for folder in folders:
        there = {path.stem for path in folder.glob("[!_]*.py")} - by_name.get(folder.name, set())
        assert set(re.findall(r"(\w+)\.py", rows[folder.name])) == there


@pytest.mark.parametrize(
    ("name", "count"), [("README.md", "all {}"), ("README.zh-CN.md", "全部 {} 种")]
)
def test_all_that_a_table_may_compare_is_named_and_counted(name, count):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not [variant for variant in run_experiments.VARIANTS if f"`{variant}`" not in text]
    assert count.format(len(run_experiments.VARIANTS)) in text
