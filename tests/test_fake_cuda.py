"""The CUDA path at LLaMA-2-7B's shape without a GPU, see `fake_cuda`: nothing is computed.

What a GPU would do all the same: which device a tensor is on, where the host waits, which attention
kernel runs, how much memory a run takes.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fake_cuda import CUDA, LLAMA_2_7B, LLAMA_3_8B, FakeCuda, llama
from helpers import make_samples
from transformers import masking_utils

from configs.base_config import BaseConfig
from evaluation.generate import generate
from evaluation.likelihood import option_losses
from methods import METHODS, find_method, knob_names, run_config
from methods.folding import Folding
from models.answers import read_answers
from models.forward import response_tokens
from train_slsd_seq import make_method, train_one_task_with_slsd
from training import base_model
from training.base_model import load_model
from training.journal import Journal
from training.logs import NoLog
from training.loop import TaskTraining, evaluate_loss
from training.memory import Shapes, flops_per_token, run_bytes
from training.passes import Passes, StopSignals
from training.saving import RunState
from training.session import Session, enable_checkpointing, inject
from utils_data import TaskData

GIB, BF16 = 2**30, torch.bfloat16
# LLaMA-2-7B with fewer layers, where time demands it.
SHORT = {**LLAMA_2_7B, "num_hidden_layers": 8}
TINY = {**LLAMA_2_7B, "num_hidden_layers": 3}
KNOBS = ("fisher", "gram", "kd_", "entropy")
# Where the host may wait for the device: as a run starts, logs, saves, and ends an evaluation.
MAY_WAIT = {
    "fused._fused",
    "ds_lora.DSLoRALinear.reset_branch",
    "ds_lora.DSLoRALinear.set_branch",
    "ds_lora.branch_tensors",
    "ds_lora.reset_branch",
    "telling.Watch.check",
    "telling.Window.line",
    "loop.TaskTraining.__init__",
    "loop.TaskTraining._log",
    "loop.evaluate_loss",
    "loop.load_optimizer",
    "loop.optimizer_tensors",
    "answers.read_answers",
    "frozen_prefix.FrozenPrefix._rows",
    "frozen_prefix.FrozenPrefix._check",
    "ewc.Anchor.estimate",
    "ewc.Anchor.restore",
}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What `spare_the_gpu` tells torch and transformers goes with the test."""
    monkeypatch.setattr(
        masking_utils,
        "find_packed_sequence_indices",
        masking_utils.find_packed_sequence_indices,
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


class Words:
    """A tokenizer of which only the special tokens are asked."""

    pad_token_id, eos_token_id, bos_token_id = 0, 2, None

    def __call__(self, texts, **_):
        return SimpleNamespace(input_ids=[[3] * len(text.split()) for text in texts])

    def batch_decode(self, replies, **_):
        return ["" for _ in replies]


def seven_billion(shape=LLAMA_2_7B, **settings):
    """(cfg, passes) of a run with the default settings but for `settings`."""
    method = find_method(settings.get("method", "ds_lora"))
    cfg = run_config(BaseConfig, method)(**{"max_steps_per_task": 1, **settings})
    loaded = llama(**shape), {"missing_keys": []}
    with mock.patch.object(base_model, "_loaded", lambda *_, **__: loaded):
        model = load_model(cfg, CUDA)
    assert not [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    inject(cfg, model)
    if cfg.gradient_checkpointing:
        enable_checkpointing(model)
    return cfg, Passes(cfg, model, Words(), CUDA, StopSignals())


def assert_sound(gpu, gib=24):
    """No wait but where one is due, no mask in attention, no vocabulary but at the response."""
    # What a `state` reads is saved.
    assert {where for where in gpu.waits if not where.endswith(".state")} <= MAY_WAIT, gpu.waits
    assert set(gpu.attention) == {("flash", False)}
    assert gpu.rows[torch.float32] <= 2**25 // gpu.vocabulary
    assert gpu.peak < gib * GIB


def train(cfg, passes, samples, **options):
    TaskTraining(cfg, passes, "T2_math", samples, NoLog(""), **options).run()


@pytest.mark.parametrize(
    ("shape", "length", "settings"),
    [
        (LLAMA_2_7B, 512, {}),
        (LLAMA_3_8B, 512, {}),
        (SHORT, 2048, {"num_frozen_layers": 4}),
        (SHORT, 512, {"num_frozen_layers": 4, "gradient_checkpointing": True}),
        (SHORT, 512, {"num_frozen_layers": 4, "tokens_per_pass": 1024}),
        (SHORT, 512, {"num_frozen_layers": 4, "tokens_per_pass": 4096}),
        (SHORT, 512, {"num_frozen_layers": 0, "lora_dropout": 0.0}),
    ],
)
def test_the_plan_is_what_training_takes(shape, length, settings):
    """Two passes, and AdamW's step; every second token is a response."""
    tokens = settings.get("tokens_per_pass", 2048)
    samples = make_samples([length] * (2 * tokens // length))
    with FakeCuda(shape["vocab_size"]) as gpu:
        settings = {**settings, "gradient_accumulation_steps": len(samples)}
        cfg, passes = seven_billion(shape, **settings)
        train(cfg, passes, samples)
        planned = run_bytes(cfg, passes.model, BF16, CUDA, tokens, 0.5)
        shapes = Shapes.of(passes.model, BF16, CUDA)
        checkpointing = cfg.gradient_checkpointing
        flops = sum(flops_per_token(passes.model, shapes, length, 0.5, checkpointing))
    assert planned == pytest.approx(gpu.peak, rel=0.1)
    assert flops == pytest.approx(gpu.flops / (2 * tokens), rel=0.1)
    assert gpu.rows[BF16] == tokens // 2
    assert_sound(gpu)


def test_four_bits_are_a_quarter_of_the_weights_and_more():
    """Estimated: bitsandbytes has no kernels here. 6.5e9 of 6.7e9 weights at 0.5625 bytes."""
    with FakeCuda(32000):
        cfg, passes = seven_billion()
        whole = run_bytes(cfg, passes.model, BF16, CUDA, 2048, 0.5)
        cfg.quantization = "4bit"
        held = run_bytes(cfg, passes.model, BF16, CUDA, 2048, 0.5)
    assert whole - held == pytest.approx(6.476e9 * (2 - 0.5625), rel=0.02)


def test_a_step_with_the_kept_prefix_and_distillation():
    samples = make_samples([300, 700, 512, 90] * 2)
    settings = {"num_frozen_layers": 4, "kd_every": 1, "entropy_threshold": 99.0}
    with FakeCuda(32000) as gpu:
        cfg, passes = seven_billion(SHORT, prefix_cache_gib=1.0, **settings)
        data = {task: TaskData(samples, samples) for task in cfg.task_order}
        method = make_method(cfg, Session(data, passes, None))
        passes.keep_prefix(samples, "prefix")
        assert samples[0]["id"] in passes.prefix
        method.read_task("T2_math", samples, "T1_general")
        assert len(method.probes) == len(samples)
        evaluate_loss(passes, samples)
        gpu.reset()
        train(cfg, passes, samples, method=method, stage="T2_math")
    assert gpu.waits.total() == 7
    # No layer is run forward but those that have a backward.
    assert gpu.kernels["flash_backward"] == 3 * gpu.kernels["flash"]
    assert gpu.rows[BF16] <= sum(map(response_tokens, samples))
    assert_sound(gpu)


def test_a_run_with_ewc_is_saved_and_resumed(tmp_path):
    """At eight layers: values of all 7B's branches would go to the disk and back."""
    samples = make_samples([300, 700, 512, 90])
    settings = {"method": "ewc", "fisher_samples": 2, "max_steps_per_task": 2, "save_steps": 1}
    folder = RunState(tmp_path / "state")
    with FakeCuda(32000) as gpu:
        cfg, passes = seven_billion(SHORT, num_frozen_layers=6, num_epochs=2, **settings)
        data = {task: TaskData(samples, samples) for task in cfg.task_order}
        journal = Journal(cfg, passes, {"base_model": "7B"}, folder, {})
        method = journal.attach("method", make_method(cfg, Session(data, passes, journal)))
        method.end_task("T1_general", samples, False)
        train(cfg, passes, samples, method=method, journal=journal)
        resumed = Journal(cfg, passes, {"base_model": "7B"}, folder, {})
        resumed.resume(*folder.load())
        method = resumed.attach("method", make_method(cfg, Session(data, passes, resumed)))
        assert all(tensor.is_cuda for tensor in method.anchor.fisher)
        task = TaskTraining(
            cfg, passes, "T2_math", samples, NoLog(""), method=method, journal=resumed
        )
        state = task.optimizer.state.values()
        assert task.start == 2 and all(moments["exp_avg"].is_cuda for moments in state)
    assert_sound(gpu)


@pytest.mark.parametrize(
    "settings",
    [
        *({"method": name} for name in METHODS if not METHODS[name].merges_tasks),
        {"use_slsd": False, "consolidate": "gram", "gram_rank": 256},
        {"kd_probes": "replay", "fast_init": "fresh"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_method_learns_two_tasks_and_the_plan_knows_what_it_takes(settings):
    """At a rank and with passes at which what it keeps shows: nothing is read but for training."""
    samples = make_samples([512] * 8)
    more = {"lora_r": 256, "prefix_cache_gib": 0.0, "gradient_accumulation_steps": 8}
    more |= {"num_frozen_layers": 1, "max_steps_per_task": 2}
    more |= {"fisher_samples": 4, "gram_samples": 4, "entropy_threshold": 99.0, "kd_every": 1}
    tasks = ["T1_general", "T2_math"]
    known = knob_names(find_method(settings.get("method", "ds_lora")))
    more = {k: v for k, v in more.items() if k in known or not any(map(k.__contains__, KNOBS))}
    with FakeCuda(32000) as gpu:
        cfg, passes = seven_billion(TINY, task_order=tasks, **more, **settings)
        data = {task: TaskData(samples, samples) for task in tasks}
        unwritten = SimpleNamespace(save=lambda *_: None)
        journal = Journal(cfg, passes, {"base_model": "7B"}, unwritten, {})
        session = Session(data, passes, journal)
        method = journal.attach("method", make_method(cfg, session))
        for previous, task in zip([None, *tasks], tasks, strict=False):
            train_one_task_with_slsd(cfg, session, task, NoLog(""), method, previous, False)
        planned = run_bytes(cfg, passes.model, BF16, CUDA, 2048, 0.5)
        if cfg.method == "ds_lora" and cfg.consolidate == "gram":
            grams = method.folding.consolidation.grams.values()
            assert Folding.kept_bytes(cfg, passes.model) == sum(gram.nbytes for gram in grams)
    # A slow branch that is not trained is planned as if it were.
    assert 0.99 < planned / gpu.peak < 1.05
    assert_sound(gpu)


@pytest.mark.parametrize("shape", [LLAMA_2_7B, LLAMA_3_8B])
def test_answers_and_probes_fit_where_training_does(shape):
    """Long prompts, padded, until the cache is full; probes whose every token is a response."""
    samples = make_samples([2048] * 4)
    for sample in samples:
        sample["labels"][1:] = sample["input_ids"][1:]
    with FakeCuda(shape["vocab_size"]) as gpu:
        cfg, passes = seven_billion(shape)
        read_answers(passes.model, passes.make, samples, 64, 1.0)
        assert_sound(gpu)
        room = Shapes.of(passes.model, BF16, CUDA).tokens_in_cache(cfg.tokens_per_pass, False)
        length = room // 8 - 4
        prompts = [[5] * length, *([[5] * (length - 9)] * 7)]
        gpu.reset()
        gpu.truths = itertools.chain([False] * 14, itertools.repeat(True))
        assert len(generate(passes, prompts, 4)) == 8
        assert gpu.attention["efficient", True] > 64
        option_losses(passes, prompts, [[6, 7], [8]])
    assert gpu.peak < 24 * GIB


def test_running_out_of_memory_leaves_nothing_behind_and_training_its_passes(capsys):
    samples = make_samples([512] * 16)
    with FakeCuda(32000) as gpu:
        cfg, passes = seven_billion(SHORT, num_frozen_layers=4)
        before = gpu.now
        gpu.capacity = before + 300 * 2**20
        evaluate_loss(passes, samples)
        assert passes.tokens_per_pass == cfg.tokens_per_pass and passes.divisor > 1
        assert gpu.now == before
        gpu.capacity = before + 1024 * 2**20
        train(cfg, passes, samples)
        assert passes.tokens_per_pass < cfg.tokens_per_pass
    assert "training is as before" in capsys.readouterr().out


def test_what_the_device_refuses_is_refused_here():
    """The pretended GPU itself."""
    with FakeCuda(32000) as gpu:
        here, there = torch.zeros(4, device="cuda"), torch.zeros(4)
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            here + there
        assert here.device == CUDA and not gpu.waits
        (here + 1).tolist()
        assert bool((here > 0).all())
        assert gpu.waits.total() == 2
    assert torch.zeros(1, device="meta").device.type == "meta"
