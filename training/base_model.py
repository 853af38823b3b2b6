"""The base model and its tokenizer."""

import ctypes
import hashlib
import importlib.util
import logging
import re
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
    masking_utils,
)
from transformers.utils import logging as transformers_logging

from configs.command_line import UserError, shows_progress
from models.fused import fuse_norms
from training.device import is_out_of_memory
from training.saving import file_sha256

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def _location(cfg) -> dict:
    """Arguments of `from_pretrained` that say where the model is."""
    path = Path(cfg.model_name)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": cfg.model_name}
    if not path.is_file():
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
    if Path(name).exists():
        return UserError(f"--model_name {name}: {str(error).splitlines()[0]}")
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


def _ask_hub(name: str) -> None:
    """Raises what the hub says to a model that is neither a local path nor in the cache.

    Asked once: `from_pretrained` would try an unreachable hub for half a minute.
    """
    if Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str):
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
    try:
        _ask_hub(cfg.model_name)
        config = AutoConfig.from_pretrained(**location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _explain(cfg, error) from error
    kinds = config.architectures or []
    if kinds and not any(
        re.search("CausalLM|LMHead|ConditionalGeneration", kind) for kind in kinds
    ):
        raise UserError(f"--model_name {cfg.model_name}: {kinds[0]} is no causal language model")
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
    check_model(cfg)
    return load_model(cfg, device), load_tokenizer(cfg)


def load_tokenizer(cfg):
    """The base model's tokenizer, with a pad token; `UserError` where it has no eos token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_location(cfg), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _explain(cfg, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model_name {cfg.model_name}: its tokenizer has no eos token, which ends a response"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
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
    means bf16 on a GPU that has it, else fp16, and fp32 on a CPU. A GPU is spared, see
    `spare_the_gpu`. Raises `UserError` where the model or what it needs is missing.
    """
    check_device(cfg, device)
    if device.type == "cpu":
        _reuse_freed_memory()
    if cfg.quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
    dtype = model_dtype(cfg, device)
    if not shows_progress():
        transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **_location(cfg),
            trust_remote_code=False,
            output_loading_info=True,
            dtype=dtype,
            # Straight onto the device: no second copy in host memory.
            device_map={"": device},
            quantization_config=_quantization(cfg, dtype),
        )
    except (OSError, ValueError) as error:
        raise _explain(cfg, error) from error
    except SafetensorError as error:
        raise UserError(
            f"--model_name {cfg.model_name}: its weights cannot be read ({error}); get them anew"
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--model_name {cfg.model_name} in {dtype} does not fit {device}: give --quantization "
            "4bit (or 8bit), a GPU with more free memory, or --device cpu"
        ) from error
    if info["missing_keys"]:
        # transformers would go on with random numbers.
        names = sorted(info["missing_keys"])
        raise UserError(
            f"--model_name {cfg.model_name}: {len(names)} weights, such as {names[0]}, are missing"
        )
    if device.type == "cuda":
        spare_the_gpu(model)
    return model.eval()


def spare_the_gpu(model: torch.nn.Module) -> None:
    """What has the host wait for a GPU, or a GPU for the host, and changes no result, goes."""
    # It plans anew for every shape: tens of milliseconds, and a decoded token is a new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # It asks the device in every pass whether a row holds several samples: here none does.
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    fuse_norms(model)


class _Once(logging.Filter):
    """Lets each message through once: bitsandbytes repeats one in every layer of every pass."""

    def __init__(self):
        super().__init__()
        self._seen = set()

    def filter(self, record):
        is_new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return is_new


def _reuse_freed_memory() -> None:
    """Has glibc keep large freed blocks: mapping them anew in each pass takes a CPU a tenth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(threshold, 2**30)


def skeleton(config):
    """The model of this configuration without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def model_dtype(cfg, device: torch.device) -> torch.dtype:
    """The dtype of the base model on `device`."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type == "cpu":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


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


def _fingerprint(folder: Path) -> str:
    """sha256 of the sizes, beginnings and ends of the weight files: gigabytes take no time."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def describe_base(cfg) -> dict:
    """What a checkpoint says about its base: name, quantisation and, for a GGUF, sha256."""
    facts = {"base_model": cfg.model_name, "quantization": cfg.quantization}
    path = Path(cfg.model_name)
    if path.is_dir():
        facts["weights"] = _fingerprint(path)
    if path.suffix != ".gguf":
        return facts
    from gguf import GGUFReader

    # The hash tells the file; the hub id, from its header and name, is what others can load.
    owner = GGUFReader(path).get_field("general.organization")
    if owner:
        facts["base_model"] = (
            f"{owner.contents()}/{path.name.removesuffix('.gguf').rsplit('.', 1)[0]}"
        )
    facts["gguf_sha256"] = file_sha256(path)
    return facts
