"""A model shared out over two processes gives the results of one that is whole in one process."""

import json
import os
import signal

import pytest
import torch
from helpers import ROOT, make_model, outcome
from safetensors.torch import load_file
from test_processes import finished, start, wait_for_state, workers
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Phi3Config

import evaluate_tasks
import train_slsd_seq
from configs.command_line import UserError
from evaluation import report
from training.base_model import check_model, skeleton
from training.shard import _make_buffers, _read_shares, weight_files

# Two processes are slow to start, so they do one thing after another; see `job`.
DRIVER = """
import contextlib, json, sys
from pathlib import Path
from torch.distributed.tensor import DTensor
import evaluate_tasks, train_slsd_seq
from configs.command_line import rank
from evaluation import report
from models.ds_lora import DSLoRALinear
from training import session
from training.processes import joined, leave

@contextlib.contextmanager
def joined_already():
    yield
    leave()

def load_and_remember(*args):
    models.append(load(*args))
    return models[-1]

# Once, after the first step, in the middle of a backward.
def failing(layer, x):
    global fails_in
    y = forward(layer, x)
    if fails_in and y.requires_grad and [*Path(fails_in).glob("seq_state/state-00000002-*")]:
        fails_in = ""
        y.register_hook(run_out)
    return y

def run_out(gradient):
    print("process 1 runs out of memory", file=sys.stderr)
    raise RuntimeError("out of memory")

report.ANSWER_TOKENS = 6
session.joined = evaluate_tasks.joined = joined_already
models, load, session.load_model = [], session.load_model, load_and_remember
forward, DSLoRALinear.forward = DSLoRALinear.forward, failing
told = Path(sys.argv[1])
with joined():
    for job in json.loads(told.read_text()):
        fails_in = job["fails_in"] if rank() == 1 else ""
        script = {"train": train_slsd_seq, "evaluate": evaluate_tasks}[job["script"]]
        if script.main(job["argv"]):
            sys.exit(2)
held = []
for model in models:
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    here = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in base)
    held.append(here / sum(p.nbytes for p in base))
told.with_name(f"held{rank()}.json").write_text(json.dumps(held))
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
sys.exit(f"left: {names}" if any("gloo" in name for name in names) else 0)
"""
# Nine samples in steps of 4: in the last one the second process has none.
SETTINGS = {"lora_dropout": 0.0, "task_order": ["T1_general", "T2_math"], "max_train_samples": 9}
SETTINGS |= {"eval_samples_per_task": 5, "save_steps": 1, "tokens_per_pass": 40}
RUNS = {
    # Killed, and gone on from.
    "slsd": {"all_readings": True},
    "slsd_plus": {"method": "slsd_plus", "consolidate": "gram", "anchor_lambda": 0.0},
    # Memory runs out in one process.
    "ewc": {"method": "ewc", "tokens_per_pass": 256},
    "ilora": {"method": "ilora", "gradient_checkpointing": True, "prefix_cache_gib": 0.0},
}


@pytest.fixture
def job(flags, tokenizer, tmp_path):
    """Makes {"script", "argv", "fails_in"} of the run `name` in "one" process or in "two"."""
    # Rows that two processes do not share evenly; one file, or several with what both ends share.
    for name, options in (("plain", {}), ("tied", {"tie_word_embeddings": True})):
        size = "20KB" if options else "1GB"
        model = make_model(vocab_size=321, intermediate_size=47, **options)
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        tokenizer.save_pretrained(tmp_path / name)
    assert len(weight_files_in(tmp_path / "tied")) > 1

    def build(where, name):
        folder = tmp_path / where / name
        model = tmp_path / ("tied" if name == "ilora" else "plain")
        share = {"per_device_batch_size": 1, "gradient_accumulation_steps": 4}
        if where == "two":
            share |= {"gradient_accumulation_steps": 2, "shard": True}
        dirs = {"log_dir": folder / "logs", "save_dir": folder / "checkpoints"}
        argv = flags(**{**SETTINGS, **RUNS[name], **share, **dirs, "model_name": model})
        fails_in = str(dirs["save_dir"]) if name == "ewc" else ""
        return {"script": "train", "argv": argv, "fails_in": fails_in}

    return build


def weight_files_in(folder):
    return sorted(folder.glob("*.safetensors"))


def evaluation_of(train: dict, folder) -> dict:
    """What is asked of the last stage of a run: a question a task, none for the second process."""
    options = ["--checkpoint", folder / "checkpoints" / "seq_T2_math", "--log_dir", folder / "logs"]
    options += ["--branches", "latest", "routed", "--max_samples", "1", "--max_new_tokens", "5"]
    return {"script": "evaluate", "argv": [*train["argv"], *map(str, options)], "fails_in": ""}


def launch(jobs, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    # The same time as other tests of two processes have: what waits for ever fails.
    return finished(start([str(tmp_path / "jobs.json")], tmp_path / "driver.py"))


def assert_alike(one: dict, two: dict) -> None:
    logs = [name for name in one if name.endswith(".jsonl")]
    assert len(logs) >= 5 and one.keys() == two.keys()
    for name in logs:
        for ours, expected in zip(two[name], one[name], strict=True):
            for key, value in expected.items():
                is_float = isinstance(value, float)
                same = pytest.approx(value, rel=1e-5, abs=1e-6) if is_float else value
                assert ours[key] == same, (name, key)


def test_two_processes_that_share_the_model_give_the_results_of_one(job, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(report, "ANSWER_TOKENS", 6)
    jobs = [job("two", name) for name in RUNS]
    run = start(jobs[0]["argv"])
    wait_for_state(tmp_path / "two" / "slsd", 2, run)
    os.kill(workers(run)[1], signal.SIGKILL)
    code, _, err = finished(run)
    assert code != 0 and f'File "{ROOT}' not in err
    assert "process 0: another process of this run has ended" in err
    asked = evaluation_of(jobs[0], tmp_path / "two" / "slsd")
    code, out, err = launch([*jobs, asked], tmp_path)
    assert code == 0, err
    assert out.count("going on from") == 1 and "process 1 runs out of memory" in err
    for rank in range(2):
        held = json.loads((tmp_path / f"held{rank}.json").read_text())
        assert len(held) == len(RUNS) and 0.45 < min(held) and max(held) < 0.51
    alone = [job("one", name) for name in RUNS]
    for run in alone:
        assert train_slsd_seq.main(run["argv"]) == 0
    assert evaluate_tasks.main(evaluation_of(alone[0], tmp_path / "one" / "slsd")["argv"]) == 0
    for name in RUNS:
        assert_alike(outcome(tmp_path / "one" / name), outcome(tmp_path / "two" / name))
        for task in SETTINGS["task_order"]:
            file = f"{name}/checkpoints/seq_{task}/adapter_model.safetensors"
            first, second = (load_file(tmp_path / where / file) for where in ("one", "two"))
            for key, tensor in first.items():
                assert (tensor - second[key]).norm() <= 1e-4 * tensor.norm(), (name, key)


def test_what_cannot_be_shared_out_is_refused(make_config, model_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="one process has nobody to share"):
        make_config(shard=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for change in ({"quantization": "8bit"}, {"model_name": "a.gguf"}):
        with pytest.raises(UserError, match="held whole"):
            make_config(shard=True, **change)
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = make_config(shard=True, model_name=str(tmp_path))
    with pytest.raises(UserError, match="has no model.safetensors"):
        check_model(cfg)
    check_model(make_config(shard=False, model_name=str(tmp_path)))


def test_weights_by_other_names_or_of_other_shapes_are_told(make_config, model_folder):
    cfg = make_config()
    files = weight_files(cfg)
    read = make_model(vocab_size=320)
    with torch.no_grad():
        read.lm_head.weight.zero_()
    _read_shares(read, files)
    assert torch.equal(read.lm_head.weight, make_model().lm_head.weight)
    with pytest.raises(UserError, match=r"is \(320, 32\), the model's \(321, 32\)"):
        _read_shares(make_model(vocab_size=321), files)
    with pytest.raises(UserError, match="9 weights, such as model.layers.4.input_layernorm.weight"):
        _read_shares(make_model(num_hidden_layers=5), files)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SMALL, rope_parameters=STRETCHED), GemmaConfig(**SMALL), Phi3Config(**SMALL)],
    ids=lambda config: config.model_type,
)
def test_what_no_file_holds_is_made_as_the_model_makes_it(config, make_config):
    """Frequencies of the positions, the scale of the embeddings."""
    model = skeleton(make_config(), config)
    _make_buffers(model, torch.device("cpu"))
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    assert expected
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert all(p.is_meta for p in model.parameters())
