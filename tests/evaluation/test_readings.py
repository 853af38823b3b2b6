"""A stage checkpoint that does not fit is one line, and the stage stays what it was."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from helpers import inject, make_model, randomise
from safetensors.torch import load_file, save_file

import chat
from configs.command_line import UserError
from evaluation.readings import open_stage
from models.ds_lora import branch_tensors
from models.router import Router
from training.identity import describe_base
from training.journal import Journal
from training.passes import Passes, StopSignals
from training.saving import RunState


@pytest.fixture
def checkpoints(make_config, tokenizer, tmp_path):
    """(config, folder) with the stages T1 and T2 of a run, of random branches."""
    cfg = make_config(task_order=["T1_general", "T2_math"], save_dir=str(tmp_path / "checkpoints"))
    router, device = Router(), torch.device("cpu")
    for seed, task in enumerate(cfg.task_order):
        passes = Passes(
            cfg, randomise(inject(make_model()), seed), tokenizer, device, StopSignals()
        )
        journal = Journal(cfg, passes, describe_base(cfg), RunState(tmp_path / "state"), {})
        router.add(task, torch.randn(40, 32))
        journal.save_checkpoint(f"seq_{task}", router=router.state())
    return cfg, tmp_path / "checkpoints"


def facts(name, **changes):
    def change(folder):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **changes}))

    return change


def tensors(name, **changes):
    def change(folder):
        found = load_file(folder / name)
        for key, new in changes.items():
            found[key] = new(found[key])
        save_file({key: value for key, value in found.items() if value is not None}, folder / name)

    return change


def weights(new):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        save_file({key: new(value) for key, value in load_file(path).items()}, path)

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


ROUTER, ADAPTER = "router.safetensors", "adapter_model.safetensors"
BROKEN = {
    "int8": (weights(lambda t: t.to(torch.int8)), "torch.int8"),
    "NaN": (weights(lambda t: t * float("nan")), "not finite"),
    "transposed": (weights(lambda t: t.T.contiguous()), "the model's"),
    "adapter a pipe": (pipe(ADAPTER), "is no file"),
    "ds_lora a pipe": (pipe("ds_lora.json"), "is no file"),
    "ds_lora a list": (text("ds_lora.json", "[]"), "no JSON object"),
    "ds_lora deep": (text("ds_lora.json", "[" * 100_000), "nested too deeply"),
    "config deep": (text("adapter_config.json", "[" * 100_000), "nested too deeply"),
    "r_slow": (facts("ds_lora.json", r_slow=3 * 10**6), "r_slow is 3000000"),
    "r_slow text": (facts("ds_lora.json", r_slow="4"), "r_slow is 4"),
    "method": (facts("ds_lora.json", method="evil.py"), "trained by --method 'evil.py'"),
    "template": (facts("ds_lora.json", prompt_template="chat"), "chat"),
    "holdout": (facts("ds_lora.json", holdout_fraction=2), "holdout_fraction is 2"),
    "order": (facts("ds_lora.json", task_order=[5]), "task_order is"),
    "router cut": (text(ROUTER, "x"), "router does not fit"),
    "router a pipe": (pipe(ROUTER), "is no file"),
    "router width": (
        tensors(ROUTER, means=lambda t: torch.zeros(2, 8), factor=lambda t: torch.zeros(8, 8)),
        "of a model 8 wide",
    ),
    "router NaN": (tensors(ROUTER, factor=lambda t: t * float("nan")), "not finite"),
    "router without means": (tensors(ROUTER, means=lambda t: None), "router does not fit"),
    "router of others": (
        tensors(ROUTER, tasks=lambda t: torch.tensor(list(b"../a\nT2_math"), dtype=torch.uint8)),
        "it knows the tasks ../a, T2_math, not T1_general, T2_math",
    ),
    "router of fewer": (
        tensors(
            ROUTER,
            tasks=lambda t: torch.tensor(list(b"T1_general"), dtype=torch.uint8),
            means=lambda t: t[:1].clone(),
        ),
        "it knows the tasks T1_general, not",
    ),
}


def test_a_stage_that_does_not_fit_leaves_the_model_where_it_was(checkpoints):
    """Each fault by itself, told as it is opened and as another stage goes to it."""
    cfg, folder = checkpoints
    stage = open_stage(cfg, str(folder / "seq_T1_general"))
    before, router = branch_tensors(stage.passes.model), stage.router
    for name, (damage, message) in BROKEN.items():
        shutil.copytree(folder / "seq_T2_math", folder / "broken" / "seq_T2_math")
        damage(folder / "broken" / "seq_T2_math")
        with pytest.raises(UserError, match=message) as caught:
            stage.take_up(folder / "broken" / "seq_T2_math")
        assert "\n" not in str(caught.value), name
        assert stage.name == "T1_general" and stage.cfg == cfg and stage.router is router
        assert stage.router.tasks == ["T1_general"]
        now = branch_tensors(stage.passes.model)
        assert all(torch.equal(now[key], before[key]) for key in before), name
        with pytest.raises(UserError) as caught:
            open_stage(cfg, str(folder / "broken" / "seq_T2_math"))
        assert "\n" not in str(caught.value), name
        shutil.rmtree(folder / "broken")
    stage.take_up(folder / "seq_T2_math")
    assert stage.name == "T2_math" and stage.router.tasks == ["T1_general", "T2_math"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, "lora_r is 1000000000"),
        ({"r": 0}, "lora_r is 0"),
        ({"alpha": 10**400}, "lora_alpha is 1000"),
        ({"alpha": None}, "lora_alpha is None"),
    ],
)
def test_a_checkpoint_with_impossible_settings_is_told_before_anything_is_loaded(
    checkpoints, changes, message, monkeypatch
):
    cfg, folder = checkpoints
    facts("ds_lora.json", **changes)(folder / "seq_T2_math")
    monkeypatch.setattr("evaluation.readings.load_model", None)
    with pytest.raises(UserError, match=message) as caught:
        open_stage(cfg, str(folder / "seq_T2_math"))
    assert "\n" not in str(caught.value)


OWN = {"toy": "own.jsonl", "full": "own.jsonl", "test": "test.jsonl"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], OWN),
        (["T1_general.test=other.jsonl"], OWN | {"test": "other.jsonl"}),
        (["T1_general=other.jsonl"], {"toy": "other.jsonl", "full": "other.jsonl"}),
    ],
)
def test_a_checkpoints_own_files_give_way_to_those_that_are_given_alone(
    checkpoints, make_config, given, expected
):
    """Not to the defaults: it would be judged on what it was trained on."""
    cfg, folder = checkpoints
    facts("ds_lora.json", data_paths={"T1_general": OWN})(folder / "seq_T2_math")
    stage = open_stage(make_config(task_data=given), str(folder / "seq_T2_math"))
    assert stage.cfg.data_paths["T1_general"] == expected
    assert stage.cfg.data_paths["T2_math"] == cfg.data_paths["T2_math"]


def test_a_checkpoint_keeps_the_judges_of_its_tasks_and_older_ones_open(checkpoints, make_config):
    cfg, folder = checkpoints
    facts("ds_lora.json", task_judges=["amazon=choice", "T2_math=exact"])(folder / "seq_T2_math")
    stage = open_stage(make_config(), str(folder / "seq_T2_math"))
    assert stage.cfg.task_judges == ["T2_math=exact"]
    cfg = dataclasses.replace(cfg, task_judges=["T3_code=exact", "T2_math=exact"])
    Journal(cfg, stage.passes, {"base_model": "tiny"}, None, {}).save_checkpoint("seq_new")
    saved = json.loads((folder / "seq_new" / "ds_lora.json").read_text())
    assert saved["task_judges"] == ["T2_math=exact"]


def test_another_base_is_refused_by_the_next_stage_too_and_doubt_is_told(checkpoints, capsys):
    cfg, folder = checkpoints
    stage, other = open_stage(cfg, "base"), folder / "seq_T2_math"
    facts("ds_lora.json", weights="0" * 64)(other)
    with pytest.raises(UserError, match="has another base model .another weights.: give its own"):
        stage.take_up(other)
    # As one trained on a hub id, which has no hashes.
    found = json.loads((other / "ds_lora.json").read_text())
    kept = {k: v for k, v in found.items() if k not in ("weights", "config.json", "tokenizer")}
    (other / "ds_lora.json").write_text(json.dumps(kept))
    stage.take_up(other)
    assert not capsys.readouterr().err
    facts("ds_lora.json", base_model="meta-llama/Llama-2-7b-hf")(other)
    stage.take_up(other)
    (line,) = capsys.readouterr().err.splitlines()
    assert "was trained on meta-llama/Llama-2-7b-hf" in line and line.startswith("warning: ")


def test_a_failed_stage_command_leaves_the_chat_where_it_was(
    checkpoints, flags, monkeypatch, capsys
):
    cfg, folder = checkpoints
    (folder / "seq_T1_general" / ROUTER).write_text("x")
    said, prompts = iter(["/stage T1_general", "/stage \0", "/quit"]), []

    def ask(prompt):
        prompts.append(prompt)
        return next(said)

    monkeypatch.setattr("builtins.input", ask)
    argv = flags(task_order=cfg.task_order, save_dir=folder)
    assert chat.main([*argv, "--checkpoint", str(folder / "seq_T2_math")]) == 0
    assert prompts == ["T2_math latest> "] * 3
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
