"""A tiny random LLaMA and a tiny tokenizer, made once a session; nothing is downloaded."""

import os
import signal
from pathlib import Path

import pytest

# Before any Hugging Face import: a test that reaches for the hub fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from helpers import make_model, make_rows, write_rows
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.base_config import TASKS, BaseConfig
from configs.command_line import UserError
from evaluation.sandbox import check_sandbox
from methods import METHODS, find_method, knob_names, run_config

# A tiny model gains nothing from a second thread, and threads that wait for one another spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Started by nohup: what is ignored stays so, and tests send it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption(
        "--faults",
        type=int,
        default=2,
        help="kills in the fault harness; from 50 on, longer fuzzing",
    )


def pytest_configure(config):
    examples = 2000 if config.getoption("--faults") >= 50 else 200
    settings.register_profile(
        "ours", max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("ours")


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE without bos, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [" ".join(row.values()) for task in TASKS for row in make_rows(task, 30)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny_llama")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_rows(folder / f"{task}.jsonl", make_rows(task, 30))
    return folder


@pytest.fixture
def run_settings(model_folder, data_folder, tmp_path) -> dict:
    """Fields of a run on the tiny model that takes a second or two."""
    return {
        "model_name": str(model_folder),
        "data_dir": str(data_folder),
        "use_toy_data": True,
        "device": "cpu",
        "num_frozen_layers": 2,
        "lora_r": 4,
        "lora_alpha": 8,
        "lr_slow": 1e-3,
        "lr_fast": 5e-3,
        "num_epochs": 1,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "holdout_fraction": 0.3,
        "max_seq_len": 64,
        "probe_size_per_task": 4,
        "kd_batch_size": 2,
        "kd_every": 1,
        "entropy_threshold": 100.0,
        "logging_steps": 1,
        "log_dir": str(tmp_path / "logs"),
        "save_dir": str(tmp_path / "checkpoints"),
    }


@pytest.fixture
def make_config(run_settings):
    """Builds the tiny run's configuration with some fields changed."""

    def build(**changes) -> BaseConfig:
        method = find_method(changes.get("method", "ds_lora"))
        return run_config(BaseConfig, method)(**{**run_settings, **changes})

    return build


@pytest.fixture
def flags(run_settings):
    """Builds the tiny run's command line with some fields changed.

    Of the tiny run's fields those that the run's method does not use are left out.
    """

    def build(**changes) -> list[str]:
        unused = set().union(*map(knob_names, METHODS.values()))
        unused -= knob_names(find_method(changes.get("method", "ds_lora")))
        settings = {name: run_settings[name] for name in run_settings if name not in unused}
        argv = []
        for name, value in {**settings, **changes}.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return argv

    return build


@pytest.fixture(scope="session")
def sandbox():
    """Skips what runs a model's programs, on a machine that cannot isolate them."""
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))
