"""What is exported answers as the reading does, in stock PEFT and as a plain model."""

import shutil

import pytest
import torch
from helpers import errors
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_checkpoint
import train_slsd_seq
from configs.base_config import BaseConfig
from evaluation.readings import open_stage, read_as

TASKS = ["T1_general", "T2_math"]
IDS = torch.arange(3, 43).view(2, 20)
# Every linear layer, and a scale that is no whole number.
HARD = {"use_rslora": True, "lora_target_modules": "all-linear"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder, data_folder):
    """Folder of checkpoints of a short run whose branches do something, and its base's flags."""
    folder = tmp_path_factory.mktemp("run")
    base = ["--model_name", str(model_folder), "--device", "cpu", "--max_seq_len", "64"]
    argv = ["--data_dir", str(data_folder), "--use_toy_data", "true", "--num_frozen_layers", "2"]
    argv += ["--log_dir", str(folder), "--save_dir", str(folder), "--task_order", *TASKS]
    argv += ["--lr_slow", "5e-3", "--lr_fast", "5e-3", "--max_steps_per_task", "4"]
    argv += [word for name, value in HARD.items() for word in (f"--{name}", str(value))]
    argv += ["--gradient_accumulation_steps", "4", "--lora_r", "3"]
    assert train_slsd_seq.main([*base, *argv]) == 0
    return folder, base


@torch.no_grad()
def logits(model):
    return model.double()(IDS).logits


def expected(run, reading, task=""):
    folder, base = run
    cfg = BaseConfig(model_name=base[1], device="cpu", max_seq_len=64)
    stage = open_stage(cfg, f"{folder}/seq_{TASKS[-1]}")
    with read_as(stage, reading, task):
        return logits(stage.passes.model)


def export(run, out, *argv, stage=TASKS[-1]):
    folder, base = run
    given = ["--checkpoint", f"{folder}/seq_{stage}", "--out", str(out), *base, *argv]
    return export_checkpoint.main(given)


def test_every_task_is_an_adapter_of_its_own(run, tmp_path, model_folder):
    assert export(run, tmp_path / "all", "--reading", "every_task") == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == TASKS
    found = {}
    for task in TASKS:
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        peft = PeftModel.from_pretrained(model, tmp_path / "all" / task)
        found[task] = logits(peft)
        torch.testing.assert_close(found[task], expected(run, "own", task), atol=1e-9, rtol=0)
        assert "[INST]" in AutoTokenizer.from_pretrained(tmp_path / "all" / task).chat_template
    assert (found[TASKS[0]] - found[TASKS[1]]).abs().max() > 0.01
    # All on one base, as a server has them.
    several = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "all" / TASKS[0], TASKS[0]
    )
    several.load_adapter(tmp_path / "all" / TASKS[1], TASKS[1])
    for task in TASKS:
        several.set_adapter(task)
        torch.testing.assert_close(logits(several), found[task], atol=1e-9, rtol=0)


@pytest.mark.parametrize("reading", ["latest", "slow", "own:T1_general", "fast:T1_general"])
def test_a_reading_is_an_adapter_and_a_merged_model(run, tmp_path, model_folder, reading):
    wanted = expected(run, *reading.split(":"))
    assert export(run, tmp_path / "adapter", "--reading", reading) == 0
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    before = logits(model)
    model.float().load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), wanted, atol=1e-9, rtol=0)
    assert (wanted - before).abs().max() > 0.01
    assert export(run, tmp_path / "merged", "--reading", reading, "--merge", "true") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == (
        load_file(model_folder / "model.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reading", "own"], "--reading own: give own:T1_general or own:T2_math"),
        (["--reading", "own:T3_code"], "give own:T1_general or own:T2_math"),
        (["--reading", "latest:T1_general"], "give latest"),
        (["--reading", "routed"], "T2_math has latest, own:TASK, slow, fast:TASK, stage:TASK"),
        (["--reading", "every_task", "--merge", "true"], "--merge true makes one model"),
        (["--merge", "true", "--quantization", "4bit"], "a base in 4bit is quantised"),
        (["--checkpoint", "base"], "it has no branches"),
        (["--checkpoint", "nowhere"], "nowhere is no stage checkpoint"),
    ],
)
def test_what_cannot_be_exported_is_a_line(run, tmp_path, capsys, argv, message):
    assert export(run, tmp_path / "out", *argv) == 2
    (line,) = errors(capsys)
    assert message in line and not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert export(run, tmp_path) == 2
    assert "is there already" in errors(capsys)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_base_that_is_quantised_by_itself_takes_nothing_up(run, tmp_path, capsys, monkeypatch):
    def quantised(*args):
        stage = open_stage(*args)
        stage.passes.model.config.quantization_config = {"load_in_8bit": True}
        return stage

    monkeypatch.setattr(export_checkpoint, "open_stage", quantised)
    assert export(run, tmp_path / "out", "--merge", "true") == 2
    assert "is quantised; export the adapter" in errors(capsys)[0]
    assert not (tmp_path / "out").exists()


def test_a_task_whose_checkpoint_is_gone_is_told_before_anything_is_written(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / f"seq_{TASKS[0]}")
    assert export((folder, run[1]), tmp_path / "out", "--reading", "every_task") == 2
    assert f"seq_{TASKS[0]} is missing" in errors(capsys)[0] and not (tmp_path / "out").exists()
