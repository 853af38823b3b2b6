"""The base model and its tokenizer."""

import contextlib
import importlib.util
import logging
import os
import pickle
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
)
from transformers.utils import logging as transformers_logging

from configs.command_line import UserError, num_processes, shows_progress
from configs.ending import is_out_of_memory
from models.fused import take_onednn
from training.device import model_dtype, spare_the_cpu, spare_the_gpu
from training.model_files import TEKKEN, check_folder, unfit_config, unfit_tokenizer
from training.processes import all_succeed
from training.shard import begin, share_out, weight_files


def _location(cfg) -> dict:
    """Arguments of `from_pretrained` that say where the model is."""
    path = Path(cfg.model_name)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": cfg.model_name}
    if not os.path.isfile(path):
        raise UserError(f"--model_name {path}: there is no such file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {path.name} needs the gguf package: pip install gguf")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _explain(cfg, error: Exception) -> UserError:
    """One line for what `from_pretrained` says in many."""
    causes = []
    cause = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    name = cfg.model_name
    if isinstance(error, pickle.UnpicklingError):
        return UserError(
            f"--model_name {name}: its .bin weights are damaged or hold more than numbers; give a "
            "model with .safetensors"
        )
    # Only an OSError can be the hub's.
    if os.path.isabs(name) and not os.path.lexists(name):
        return UserError(
            f"--model_name {name}: there is no such folder; give one, a hub id, or try --config "
            "smollm2"
        )
    if os.path.exists(name) or not isinstance(error, OSError):
        first, *more = str(error).strip().splitlines() or ["no reason given"]
        reason = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
        if "ignore_mismatched_sizes" in reason:
            return UserError(
                f"--model_name {name}: its weights have not the shapes that its config.json says"
            )
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        return UserError(f"--model_name {name}: it cannot be used ({kind}{reason})")
    if any(isinstance(cause, EntryNotFoundError) for cause in causes):
        fault = "has no config.json on the hub: it is no transformers model"
    elif any(isinstance(cause, GatedRepoError) for cause in causes):
        fault = f"is gated: request access at https://huggingface.co/{name} and run `hf auth login`"
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        fault = (
            "is not on the hub: check the name, or run `hf auth login` where it is private or gated"
        )
    else:
        fault = (
            "is no local folder, and the hub cannot be reached: check the network (LLaMA-2 also "
            "needs access requested on its hub page and `hf auth login`)"
        )
    return UserError(
        f"--model_name {name} {fault}; or set HF_ENDPOINT to a mirror, give a local folder, or try "
        "--config smollm2"
    )


def _loaded(cfg, load, **arguments):
    """What `load` makes of the base model's files; `UserError` for whatever it raises.

    Whoever wrote these files, and transformers says what is wrong with them in many kinds of
    exception: KeyError for an unknown activation, RuntimeError for a shape.
    """
    try:
        return load(**arguments)
    except (MemoryError, SafetensorError, UserError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        is_import = isinstance(error, ImportError) and "mistral" in str(error).lower()
        if is_import or "MistralCommon" in str(error):
            raise UserError(f"--model_name {cfg.model_name}: its tokenizer {TEKKEN}") from error
        raise _explain(cfg, error) from error


def _check_files(cfg) -> None:
    """Raises `UserError` where a file of a local model folder cannot be what its name says."""
    try:
        if os.path.isdir(cfg.model_name):
            check_folder(cfg.model_name)
    except SafetensorError as error:
        raise _unreadable_weights(cfg, error) from error
    except ValueError as error:
        raise UserError(f"--model_name {cfg.model_name}: {error}; get the model anew") from error


def _unreadable_weights(cfg, error: SafetensorError) -> UserError:
    return UserError(
        f"--model_name {cfg.model_name}: its weights cannot be read ({error}); get them anew"
    )


def _ask_hub(name: str) -> None:
    """Raises what the hub says to a model that is neither a local path nor in the cache.

    Asked once: `from_pretrained` would try an unreachable hub for half a minute.
    """
    if os.path.exists(name) or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except (OSError, ValueError):
        raise
    except Exception as error:
        # httpx's errors, or httpx2's: huggingface_hub changes its HTTP library by version.
        raise ConnectionError(str(error)) from error


def check_model(cfg):
    """The base model's configuration; `UserError` where the model cannot be had or does not fit."""
    if cfg.quantization != "none" and cfg.model_name.endswith(".gguf"):
        raise UserError(
            f"--quantization {cfg.quantization}: a .gguf file is held in full; give none, or "
            "another model"
        )
    if cfg.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantization {cfg.quantization} needs bitsandbytes: pip install bitsandbytes"
        )
    location = _location(cfg)
    _check_files(cfg)
    if cfg.shard and os.path.isdir(cfg.model_name):
        _loaded(cfg, lambda: weight_files(cfg))
    try:
        _ask_hub(cfg.model_name)
    except (OSError, ValueError) as error:
        raise _explain(cfg, error) from error
    config = _loaded(cfg, AutoConfig.from_pretrained, **location, trust_remote_code=False)
    if fault := unfit_config(config):
        raise UserError(f"--model_name {cfg.model_name}: {fault}")
    if cfg.shard and getattr(config, "quantization_config", None):
        raise UserError(
            f"--shard true: {cfg.model_name} is quantised and held whole; give the full model"
        )
    text = config.get_text_config()
    layers, positions = text.num_hidden_layers, getattr(text, "max_position_embeddings", None)
    problems = []
    if cfg.num_frozen_layers >= layers:
        problems.append(f"--num_frozen_layers {cfg.num_frozen_layers}: give 0 to {layers - 1}")
    if positions and cfg.max_seq_len > positions:
        problems.append(f"--max_seq_len {cfg.max_seq_len}: give at most {positions}")
    if problems:
        model = f"{Path(cfg.model_name).name} has {layers} layers and {positions} positions"
        raise UserError("\n".join(f"{problem}; {model}" for problem in problems))
    return config


def load_model_and_tokenizer(cfg, device: torch.device):
    """(model in eval mode on `device`, tokenizer with a pad token); see `load_model`."""
    config = check_model(cfg)
    return load_model(cfg, device), load_tokenizer(cfg, config)


def load_tokenizer(cfg, model_config):
    """The base model's tokenizer, with a pad token that the embeddings of the model have.

    Raises `UserError` where it has no eos token, cannot read special tokens as plain text, or makes
    tokens that the model does not know.
    """
    place = _location(cfg)
    tokenizer = _loaded(cfg, AutoTokenizer.from_pretrained, **place, trust_remote_code=False)
    size = getattr(model_config.get_text_config(), "vocab_size", None) or len(tokenizer)
    if fault := unfit_tokenizer(tokenizer, size):
        raise UserError(f"--model_name {cfg.model_name}: its tokenizer {fault}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id >= size:
        # It is never learned and never looked at, but the embeddings are asked for it.
        tokenizer.pad_token = tokenizer.eos_token
    # Under a causal mask padding on the right needs no attention mask.
    tokenizer.padding_side = "right"
    return tokenizer


def check_device(cfg, device: torch.device) -> None:
    """Raises `UserError` where the model cannot be trained on `device` as it is to be held."""
    if cfg.quantization == "4bit" and device.type == "cpu":
        # bitsandbytes repacks the weights at the first evaluation for a kernel without a gradient:
        # training would go on and learn nothing.
        raise UserError("--quantization 4bit needs a GPU: give 8bit or none on a CPU")


def load_model(cfg, device: torch.device):
    """The base model in eval mode on `device`.

    `cfg.model_name` is a hub id, a folder or a .gguf file. The dtype is the configuration's; "auto"
    means bf16 on a GPU that has it, else fp16, and fp32 on a CPU. Raises `UserError` where the
    model or what it needs is missing.
    """
    check_device(cfg, device)
    if device.type == "cpu":
        spare_the_cpu()
    if cfg.quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
    dtype = model_dtype(cfg, device)
    if not shows_progress():
        transformers_logging.disable_progress_bar()
    if cfg.shard:
        return _load_shares(cfg, device, dtype)
    cure = "--quantization 4bit (or 8bit), a GPU with more free memory, or --device cpu"
    try:
        with _fitting(cfg, dtype, device, cure):
            model, info = _loaded(
                cfg,
                AutoModelForCausalLM.from_pretrained,
                **_location(cfg),
                trust_remote_code=False,
                output_loading_info=True,
                dtype=dtype,
                # Straight onto the device: no second copy in host memory.
                device_map={"": device},
                quantization_config=_quantization(cfg, dtype),
            )
    except (OSError, ValueError, ImportError) as error:
        raise _explain(cfg, error) from error
    except SafetensorError as error:
        raise _unreadable_weights(cfg, error) from error
    if info["missing_keys"]:
        # transformers would go on with random numbers.
        names = sorted(info["missing_keys"])
        raise UserError(
            f"--model_name {cfg.model_name}: {len(names)} weights, such as {names[0]}, are missing"
        )
    _take_kernels(model, device)
    return model.eval()


def _take_kernels(model, device: torch.device) -> None:
    if device.type == "cuda":
        spare_the_gpu(model)
    elif device.type == "cpu":
        take_onednn(model)


def _load_shares(cfg, device: torch.device, dtype: torch.dtype):
    """The base model, of which this process holds its share; see `training.shard`."""
    cure = f"more processes than {num_processes()}"

    def read():
        model = skeleton(cfg, check_model(cfg), dtype=dtype)
        if model._get_dtype_plan(dtype):
            raise UserError(
                f"--shard true: some weights of {cfg.model_name} are held in float32, and those of "
                "a layer are gathered in one dtype; give --dtype float32 or --shard false"
            )
        _take_kernels(model, device)
        files = _loaded(cfg, lambda: weight_files(cfg))
        try:
            with _fitting(cfg, dtype, device, cure):
                return share_out(model, files, device)
        except SafetensorError as error:
            raise _unreadable_weights(cfg, error) from error

    (model,) = all_succeed([read])
    with _fitting(cfg, dtype, device, cure):
        return begin(model, device).eval()


@contextlib.contextmanager
def _fitting(cfg, dtype: torch.dtype, device: torch.device, cure: str):
    """Raises `UserError` where memory runs out in the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--model_name {cfg.model_name} in {dtype} does not fit {device}: give {cure}"
        ) from error


class _Once(logging.Filter):
    """Lets each message through once: bitsandbytes repeats one in every layer of every pass."""

    def __init__(self):
        super().__init__()
        self._seen = set()

    def filter(self, record):
        is_new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return is_new


def skeleton(cfg, config, **options):
    """The model of the configuration `config` without weights, on the meta device.

    Raises `UserError` where it makes none.
    """
    with torch.device("meta"):
        load = AutoModelForCausalLM.from_config
        return _loaded(cfg, load, config=config, trust_remote_code=False, **options)


def _quantization(cfg, dtype: torch.dtype):
    if cfg.model_name.endswith(".gguf"):
        return GgufConfig(dequantize=True)
    if cfg.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if cfg.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return None
