"""The command lines: what a run leaves behind, and what a user sees when something is wrong."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch
from helpers import ROOT, command, contents, errors, make_model, read
from peft import PeftModel
from safetensors.torch import load_file

import chat
import plot_loss
import train_single_task
import train_slsd_seq
from configs.base_config import TASKS, BaseConfig
from configs.command_line import UserError
from configs.ending import command_line
from configs.smollm2_config import SmolLM2Config
from evaluation.matrix import forgetting, loss_matrix
from methods import METHODS, find_method, knob_names, parse_config, run_config

SETTINGS = (
    "--use_toy_data --device cpu --num_frozen_layers 2 --lora_r 4 --num_epochs 1 --max_seq_len 64 "
    "--gradient_accumulation_steps 8 --logging_steps 2 --entropy_threshold 99 --lr_slow 1e-3 "
    "--probe_size_per_task 4 --holdout_fraction 0.3 --lr_fast 5e-3 --kd_every 1 "
    "--lora_target_modules q_proj v_proj"
)
SEQUENCE: list[str] = []

# Fields that a config alone changes: no flag holds them.
IN_CONFIGS = ("data_paths", "task_orders")


def flags_of(values: dict) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def sequence(tmp_path_factory, model_folder, data_folder):
    """The real command line, once: five tasks with SLSD on the tiny model."""
    folder = tmp_path_factory.mktemp("run")
    where = {
        "model_name": model_folder,
        "data_dir": data_folder,
        "log_dir": folder / "logs",
        "save_dir": folder / "checkpoints",
    }
    SEQUENCE[:] = [*SETTINGS.split(), *flags_of(where)]
    result = command("train_slsd_seq.py", *SEQUENCE)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_sequence_leaves_what_the_contract_says(sequence):
    folder, _ = sequence
    names = sorted(p.name for p in (folder / "checkpoints").glob("[!.]*"))
    assert names == [*(f"seq_{task}" for task in TASKS), "seq_state"]
    for task in TASKS:
        names = {p.name for p in (folder / "checkpoints" / f"seq_{task}").iterdir()}
        assert names >= {"adapter_model.safetensors", "adapter_config.json", "ds_lora.json"}
        assert "tokenizer.json" in names and not any("model-" in name for name in names)
    train = read(folder / "logs" / "seq_train_loss.jsonl")
    keys = "task epoch step loss lr_slow lr_fast grad_norm_slow grad_norm_fast tokens_per_second"
    for line in train:
        assert set(line) == {*keys.split(), "stage", "kd_loss"} and line["stage"] == line["task"]
        assert (line["kd_loss"] is None) == (line["task"] == "T1_general")
        assert line["lr_fast"] == pytest.approx(5 * line["lr_slow"])
    evaluations = read(folder / "logs" / "seq_eval_loss.jsonl")
    expected = [("base", task) for task in TASKS]
    expected += [(stage, task) for t, stage in enumerate(TASKS, 1) for task in TASKS[:t]]
    latest = [line for line in evaluations if line["branches"] == "latest"]
    assert [(line["stage"], line["eval_task"]) for line in latest] == expected
    assert all(
        set(line) == {"stage", "eval_task", "branches", "loss", "tokens"} for line in evaluations
    )
    # The other readings come once, after the last stage.
    others = [line for line in evaluations if line["branches"] != "latest"]
    assert [(line["branches"], line["eval_task"]) for line in others] == [
        (reading, task) for reading in ("own", "slow", "fast", "stage", "routed") for task in TASKS
    ]
    assert {line["stage"] for line in others} == {"T5_safety"}


def test_the_sequence_learns_and_its_summary_says_what_it_printed(sequence):
    folder, printed = sequence
    matrix = loss_matrix(read(folder / "logs" / "seq_eval_loss.jsonl"), list(TASKS))
    for i in range(5):
        assert matrix[i + 1][i] < matrix[0][i]
    summary = json.loads((folder / "logs" / "seq_summary.json").read_text())
    assert summary["matrix"][5] == matrix[5] and summary["matrix"][1][4] is None
    assert summary["forgetting"] == pytest.approx(forgetting(matrix))
    assert [stage["probes"] for stage in summary["stages"].values()] == [0, 4, 4, 4, 4]
    assert summary["config"]["lora_r"] == 4 and summary["device"] == "cpu"
    assert f"forgetting         {forgetting(matrix):+.3f} (positive = forgotten)" in printed
    table = printed.partition("kept for later tasks")[0].splitlines()
    last = [line for line in table if line.startswith("T5_safety  ")][-1]
    assert f"{matrix[5][0]:.3f}" in last


def test_peft_gives_the_losses_of_the_last_stage(sequence, tokenizer):
    folder, _ = sequence
    checkpoint = folder / "checkpoints" / "seq_T5_safety"
    peft = PeftModel.from_pretrained(make_model(), checkpoint)
    B = load_file(checkpoint / "adapter_model.safetensors")
    key = "base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"
    assert B[key].shape == (16, 8) and (B[key][:, :4] != 0).any() and (B[key][:, 4:] != 0).any()
    with torch.no_grad():
        ids = tokenizer("[INST] add 1 and 2 [/INST]", return_tensors="pt").input_ids
        assert (peft(ids).logits - make_model()(ids).logits).abs().max() > 1e-3


def test_pictures_come_from_the_logs(sequence, capsys):
    folder, _ = sequence
    assert plot_loss.main(["seq", "--log_dir", str(folder / "logs")]) == 0
    assert (folder / "logs" / "seq_eval_loss.png").stat().st_size > 20_000


def test_earlier_outputs_are_kept_unless_overwriting_is_asked_for(flags, tmp_path, capsys):
    earlier = tmp_path / "checkpoints" / "seq_T1_general" / "adapter_model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("mine")
    assert train_slsd_seq.main(flags()) == 2
    (line,) = errors(capsys)
    assert "outputs of an earlier run" in line and "--overwrite true" in line
    assert earlier.read_text() == "mine" and not list(tmp_path.rglob("*.jsonl"))


def test_a_finished_run_says_so_and_touches_nothing(sequence, flags, capsys):
    folder, _ = sequence
    before = contents(folder)
    here = {"log_dir": folder / "logs", "save_dir": folder / "checkpoints"}
    assert train_slsd_seq.main([*SEQUENCE, *flags_of(here)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert train_slsd_seq.main([*SEQUENCE, *flags_of(here), "--lora_r", "2", "--seed", "1"]) == 2
    (line,) = errors(capsys)
    assert "state of another run" in line and "lora_r 4 -> 2, seed 42 -> 1" in line
    assert "--overwrite true" in line and "another --save_dir" in line
    assert contents(folder) == before


def test_overwriting_replaces_the_run_and_spares_what_is_not_its_own(flags, tmp_path):
    mine = tmp_path / "checkpoints" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    short = {"task_order": ["T2_math", "T1_general"], "max_steps_per_task": 1}
    assert train_slsd_seq.main(flags(**short)) == 0
    first = read(tmp_path / "logs" / "seq_eval_loss.jsonl")
    stale = tmp_path / "checkpoints" / "seq_T5_safety"
    stale.mkdir()
    scores = [tmp_path / "logs" / f"scores_{name}.jsonl" for name in ("T1_general", "base")]
    other = tmp_path / "logs" / "seq_lora" / "seed1" / "seq_eval_loss.jsonl"
    other.parent.mkdir(parents=True)
    for path in (*scores, other):
        path.touch()
    assert train_slsd_seq.main(flags(**short, overwrite=True)) == 0
    # What the replaced model said goes, what the base said and the runs of others stay.
    assert [path.exists() for path in (*scores, other)] == [False, True, True]
    assert read(tmp_path / "logs" / "seq_eval_loss.jsonl") == first
    assert mine.read_text() == "mine" and not stale.exists()
    assert [(line["stage"], line["eval_task"]) for line in first[2:5]] == [
        ("T2_math", "T2_math"),
        ("T1_general", "T2_math"),
        ("T1_general", "T1_general"),
    ]


def test_logs_and_checkpoints_may_share_a_folder(flags, tmp_path):
    argv = flags(
        log_dir=tmp_path / "x",
        save_dir=tmp_path / "x",
        max_steps_per_task=1,
        task_order=["T2_math"],
    )
    assert train_slsd_seq.main(argv) == 0 == train_slsd_seq.main([*argv, "--overwrite", "true"])


def test_a_single_task_leaves_what_the_contract_says(flags, tmp_path, capsys):
    argv = ["--task", "T2_math", *flags(num_epochs=2, logging_steps=2)]
    assert train_single_task.main(argv) == 0
    train = read(tmp_path / "logs" / "single_T2_math_train_loss.jsonl")
    assert [(line["epoch"], line["step"]) for line in train] == [(1, 2), (2, 4), (2, 6)]
    assert "kd_loss" not in train[0] and "stage" not in train[0]
    evaluations = read(tmp_path / "logs" / "single_T2_math_eval_loss.jsonl")
    assert [set(line) for line in evaluations] == [{"task", "epoch", "loss", "tokens"}] * 2
    assert [line["epoch"] for line in evaluations] == [1, 2]
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("[!.]*"))
    assert names == [f"single_T2_math_{name}" for name in ("epoch1", "epoch2", "state")]
    assert plot_loss.main(["single", "T2_math", "--log_dir", str(tmp_path / "logs")]) == 0
    assert (tmp_path / "logs" / "single_T2_math_train_loss.png").stat().st_size > 10_000


def test_without_slsd_nothing_is_distilled(flags, tmp_path):
    short = {"task_order": ["T1_general", "T2_math"], "max_steps_per_task": 1}
    assert train_slsd_seq.main(flags(**short, use_slsd=False)) == 0
    lines = read(tmp_path / "logs" / "seq_train_loss.jsonl")
    assert [line["kd_loss"] for line in lines] == [None, None]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rank", "4"], "unknown option --lora_rank"),
        (["--lora", "4"], "unknown option --lora"),
        (["--use_slsd", "perhaps"], "--use_slsd"),
        (["--lr_slow", "fast"], "invalid float value: 'fast'"),
        (["--quantization", "3bit"], "invalid choice: '3bit'"),
        (
            ["--config", "none"],
            "--config none: there is no such file; give absa or base",
        ),
        (["--config", "../base"], "--config ../base: there is no such file; give absa"),
        (["--task_order", "T1_general", "T9"], "give each task once, out of T1_general"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--num_frozen_layers", "4"], "--num_frozen_layers 4: give 0 to 3"),
        (
            ["--lora_target_modules", "x_proj"],
            "no linear layer of model.layers is called x_proj; there are mlp.",
        ),
    ],
)
def test_a_wrong_option_is_one_line(argv, message, flags, capsys, tmp_path):
    assert train_slsd_seq.main([*flags(), *argv]) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.jsonl"))


def test_the_task_is_checked(flags, capsys):
    assert train_single_task.main(["--task", "T9", *flags()]) == 2
    assert "--task T9: give one of T1_general" in errors(capsys)[0]
    assert train_single_task.main(flags()) == 2
    assert "--task is missing" in errors(capsys)[0]


def test_all_impossible_values_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        BaseConfig(lora_r=0, lr_slow=float("nan"), lora_dropout=1.0, kd_lambda=-1.0, task_order=[])
    lines = str(caught.value).splitlines()
    assert [line.split(" is ")[0] for line in lines] == [
        "lora_r",
        "lora_dropout",
        "lr_slow",
        "kd_lambda",
        "task_order",
    ]
    assert [line.split(": ")[1] for line in lines] == [
        "give 1 or more, at most 8192",
        "give 0 or more, below 1",
        "give more than 0",
        "give 0 or more",
        "give a name",
    ]


@pytest.mark.parametrize("value", [10**9, 10**400, 1e300])
def test_what_memory_or_time_depends_on_has_an_upper_bound(value):
    names = [field.name for field in fields(BaseConfig) if field.type is type(value)]
    # A run takes no more samples, steps and places than there are.
    unbounded = {"num_frozen_layers", "kd_every", "max_train_samples", "eval_samples_per_task"}
    unbounded |= {"max_steps_per_task", "seed", "logging_steps", "save_steps"}
    unbounded |= {"lr_slow", "lr_fast", "lr_lora", "weight_decay", "max_grad_norm", "kd_lambda"}
    unbounded |= {"entropy_threshold"}
    for name in set(names) - unbounded:
        with pytest.raises(UserError, match=f"^{name} is 1.*(at most|below)"):
            BaseConfig(**{name: value})
    # Nor does a whole number that no float can hold end in a traceback.
    for name in unbounded & set(names) - {"seed"}:
        BaseConfig(**{name: value})


def test_wrong_types_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        BaseConfig(
            lora_r="8", lr_slow=True, num_epochs=1.5, dtype="half", task_order="T2_math", use_slsd=1
        )
    lines = str(caught.value).splitlines()
    names = ["dtype", "lora_r", "lr_slow", "use_slsd", "task_order", "num_epochs"]
    assert [line.split(" is ")[0] for line in lines] == names
    assert BaseConfig(kd_lambda=2).kd_lambda == 2


def test_lists_booleans_and_configs_on_the_command_line():
    words = "--lora_target_modules q_proj k_proj --use_slsd false --use_toy_data --lr_slow=1e-4"
    (cfg,) = parse_config(words.split(), description="")
    assert cfg.lora_target_modules == ["q_proj", "k_proj"]
    assert (cfg.use_slsd, cfg.use_toy_data, cfg.lr_slow) == (False, True, 1e-4)
    (small,) = parse_config(["--config=smollm2", "--seed", "7"], description="")
    assert isinstance(small, SmolLM2Config)
    assert (small.num_frozen_layers, small.seed) == (15, 7)
    paths = [
        BaseConfig(data_dir="d", use_toy_data=toy).data_path("T2_math") for toy in (True, False)
    ]
    assert paths == ["d/T2_math.jsonl", "d/full/T2_math_full.jsonl"]


def test_every_field_has_help():
    """But the paths of the tasks, which a file changes and no flag."""
    for cls in (BaseConfig, SmolLM2Config):
        for field in fields(run_config(cls, *METHODS.values())):
            assert bool(field.metadata["help"]) == (field.name not in IN_CONFIGS)


def users_of(knob):
    return [name for name in METHODS if knob in knob_names(find_method(name))]


def test_a_knob_of_another_method_is_refused_unless_it_has_its_default():
    """All of them at once; --config decides what a default is."""
    argv = ["--method", "bank", "--lr_lora", "3", "--kd_lambda", "1", "--ewc_lambda", "1000"]
    (cfg,) = parse_config(argv, description="")
    assert cfg.lr_lora == 3 and not hasattr(cfg, "ewc_lambda")
    with pytest.raises(UserError) as caught:
        parse_config([*argv, "--kd_lambda", "2", "--ewc_lambda", "3"], description="")
    assert {"ds_lora", "lwf"} <= set(users_of("kd_lambda")) and users_of("ewc_lambda") == ["ewc"]
    assert sorted(str(caught.value).splitlines()) == [
        f"--{name} belongs to --method {', '.join(users_of(name))}, and this run's is bank: leave "
        "it out, or choose one of them"
        for name in ("ewc_lambda", "kd_lambda")
    ]
    with pytest.raises(UserError, match="^--lr_lora belongs to --method .*bank, .*is ds_lora"):
        parse_config(["--lr_lora", "1e-4"], description="")
    small = ["--config", "smollm2", "--method", "bank", "--kd_every"]
    assert parse_config([*small, "1"], description="")[0].kd_every == 1
    with pytest.raises(UserError, match="^--kd_every belongs to --method"):
        parse_config([*small, "4"], description="")


def test_a_method_has_the_defaults_and_bounds_of_its_knobs():
    (cfg,) = parse_config(["--method", "ewc"], description="")
    assert (cfg.ewc_lambda, cfg.fisher_samples) == (1000, 500)
    argv = ["--method", "ewc", "--ewc_lambda", "-1", "--fisher_samples", "0", "--lora_r", "0"]
    with pytest.raises(UserError) as caught:
        parse_config(argv, description="")
    assert sorted(str(caught.value).splitlines()) == [
        "ewc_lambda is -1.0: give 0 or more",
        "fisher_samples is 0: give 1 or more",
        "lora_r is 0: give 1 or more, at most 8192",
    ]


def test_the_knobs_of_a_method_stand_under_a_heading_of_their_own(capsys):
    with pytest.raises(SystemExit):
        train_slsd_seq.main(["--help"])
    parts = re.split(r"^(?=\S.*:$)", capsys.readouterr().out, flags=re.M)[1:]
    told = {
        name: part.partition(":\n")[0]
        for part in parts
        for name in re.findall(r"^  --(\w+)", part, re.M)
    }
    for name in [field.name for field in fields(run_config(BaseConfig, *METHODS.values()))]:
        users = users_of(name)
        heading = f"with --method {', '.join(users)}" if users else "options"
        assert name in IN_CONFIGS or told[name] == heading
    assert told["ewc_lambda"] == "with --method ewc" and told["lora_r"] == "options"


def test_all_problems_of_a_start_come_at_once(flags, tmp_path, capsys):
    broken = tmp_path / "data"
    broken.mkdir()
    (broken / "T1_general.jsonl").write_text('{"instruction": 1}\n')
    argv = flags(data_dir=broken, model_name=tmp_path / "nowhere", task_order=list(TASKS[:2]))
    assert train_slsd_seq.main(argv) == 2
    model, first, second = errors(capsys)
    assert "nowhere" in model and "--config smollm2" in model
    assert "T1_general.jsonl, line 1: 'instruction' is int" in first
    assert "T2_math.jsonl is missing: run python prepare_datasets.py" in second


def test_the_default_without_hub_and_data_stops_within_seconds(tmp_path):
    start = time.monotonic()
    argv = ["--data_dir", tmp_path, "--log_dir", tmp_path, "--save_dir", tmp_path]
    result = command(
        "train_slsd_seq.py", *map(str, argv), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)
    )
    assert time.monotonic() - start < 30
    assert result.returncode == 2 and "Traceback" not in result.stderr
    model, *data = result.stderr.strip().splitlines()
    assert "meta-llama/Llama-2-7b-hf" in model and "HF_ENDPOINT" in model and "smollm2" in model
    assert len(data) == 5 and all("prepare_datasets.py" in line for line in data)


@pytest.mark.parametrize("script", ["train_slsd_seq.py", "train_single_task.py"])
def test_help_is_quick_and_names_every_field(script):
    start = time.monotonic()
    result = command(script, "--help")
    assert result.returncode == 0 and time.monotonic() - start < 15
    names = [field.name for field in fields(run_config(BaseConfig, *METHODS.values()))]
    assert "ewc_lambda" in names
    for name in [name for name in names if name not in IN_CONFIGS]:
        assert f"--{name} " in result.stdout or f"--{name}," in result.stdout


def test_ctrl_c_exits_130(flags, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_slsd_seq, "set_up", interrupt)
    assert train_slsd_seq.main(flags()) == 130


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "start with torchrun, or `unset RANK WORLD_SIZE`"),
        ({"RANK": "first"}, "RANK is 'first' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment"),
        ({"RANK": "-1"}, "RANK is '-1' in the environment"),
        # It would leave out the first two samples of each pass, and write nothing.
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 1 in the environment: start with torchrun, or"),
    ],
)
def test_a_launchers_environment_without_a_launcher_is_one_line(
    flags, monkeypatch, capsys, environment, message
):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train_slsd_seq.main(flags()) == 2
    (line,) = errors(capsys)
    assert message in line


def test_a_chat_with_a_rank_alone_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert chat.main(flags()) == 2
    (line,) = errors(capsys)
    assert "`unset RANK WORLD_SIZE`" in line


def test_no_memory_on_a_cpu_is_one_line_and_faults_of_ours_are_not_hidden(monkeypatch, capsys):
    def failing(error):
        def main(argv):
            raise error

        return command_line(main)

    full = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    for error in (MemoryError(), RuntimeError(full)):
        assert failing(error)([]) == 2
        assert errors(capsys) == ["error: out of memory; the last saved state is whole"]
    for error in (RuntimeError("a fault"), OSError("no number")):
        with pytest.raises(type(error)):
            failing(error)([])


def test_an_error_cannot_steer_the_terminal(capsys):
    assert train_slsd_seq.main(["--config", "a\x1b]0;b\x07"]) == 2
    assert "--config a ]0;b : there is no such file" in errors(capsys)[0]


def test_ctrl_c_before_main_is_quiet_in_every_script():
    """The hook of `configs` is there before anything that takes seconds."""
    result = command("-c", "import configs\nraise KeyboardInterrupt")
    assert result.returncode == -signal.SIGINT and result.stderr == "interrupted\n"
    quick = {*sys.stdlib_module_names, "plot_loss", "tqdm"}
    for path in ROOT.glob("*.py"):
        text, names = path.read_text(encoding="utf-8"), []
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names += [getattr(node, "module", None) or node.names[0].name]
        slow = [name for name in names if name.partition(".")[0] not in quick]
        assert slow[0].startswith("configs.") or "def main" not in text, path


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr", "reader"])
def test_streams_that_are_closed_are_quiet(closed, tmp_path):
    """`<&-`, `>&-`, `2>&-` and `| head`: nothing is told of it, and no file gets its number."""
    script = (
        "import os, sys, time\n"
        "from configs.ending import command_line\n"
        "@command_line\n"
        "def main(argv):\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "    assert file.fileno() > 2\n"
        f"    time.sleep({0.5 if closed == 'reader' else 0})\n"
        "    print('said')\n"
        "    print('told', file=sys.stderr)\n"
        "sys.exit(main())"
    )
    (tmp_path / "script.py").write_text(script)
    ending = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "reader": "| true"}[closed]
    line = f"set -o pipefail; {sys.executable} {tmp_path / 'script.py'} {ending}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == (141 if closed == "reader" else 0)
    assert done.stderr == ("" if closed == "stderr" else "told\n")
    assert done.stdout == ("" if closed in ("stdout", "reader") else "said\n")
