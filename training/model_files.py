"""What a base model's files hold, looked at before transformers takes them as they are."""

import re
from pathlib import Path

from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from models.reading import MIB, check_file, read_json

# A tokenizer of a quarter of a million tokens takes 40 MiB.
MOST_JSON_BYTES = 512 * MIB
JSON_OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
)


def check_folder(folder: str | Path) -> None:
    """Raises ValueError or SafetensorError where a file cannot be what its name says.

    A dangling link, as in a pruned cache, is one; so is a pipe, which would wait forever.
    """
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"):
            check_file(path)
        if path.name in JSON_OBJECTS:
            value = read_json(path, MOST_JSON_BYTES)
            if not isinstance(value, dict):
                raise ValueError(f"{path} is {type(value).__name__}, no JSON object")
        if path.suffix == ".safetensors":
            _check_weights(path)


def _check_weights(path: Path) -> None:
    """Raises ValueError where whole numbers stand for weights; they would be taken as they are."""
    with safe_open(path, "pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    if dtypes and not any("F" in dtype for dtype in dtypes):
        raise ValueError(f"{path} holds {', '.join(sorted(dtypes))} and no floating-point number")


TEKKEN = (
    "is Mistral's own (tekken), which cannot read special tokens as plain text; give a version of "
    "the model with a tokenizer.json"
)


def unfit_config(config) -> str:
    """Why the model of this configuration cannot be trained here; "" where it can."""
    kinds = list(map(str, config.architectures or [type(config).__name__.removesuffix("Config")]))
    names = "CausalLM|LMHead|ConditionalGeneration"
    is_named_so = not config.architectures or any(re.search(names, kind) for kind in kinds)
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    if not (is_named_so and is_decoder):
        return (
            f"{kinds[0]} is no causal language model of transformers (AutoModelForCausalLM): give "
            "a decoder-only one, such as the text model inside"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if type(layers) is not int or layers < 1:
        return f"its config.json says num_hidden_layers {layers}: give a model with layers"
    # bitsandbytes' layers are linear layers, which the branches can stand beside.
    if getattr(config, "quantization_config", None) and "bitsandbytes" not in str(
        config.quantization_config
    ):
        return "its weights are quantised in a way that is not read here; give the full model"
    # A name with a slash is code on the hub.
    attention = str(getattr(config, "_attn_implementation", ""))
    return f"its config.json wants code from {attention}" if "/" in attention else ""


def unfit_tokenizer(tokenizer, size: int) -> str:
    """Why a model with `size` tokens cannot be read with `tokenizer`; "" where it can."""
    if tokenizer.eos_token_id is None:
        return "has no eos token, which ends a response"
    if tokenizer.eos_token_id >= size:
        eos = tokenizer.eos_token
        return f"has eos token {tokenizer.eos_token_id} beyond {size} embeddings ({eos!r})"
    # A special token that no text holds, such as a padding added later, does no harm.
    added = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
    harmless = {str(t) for t in added} - {tokenizer.eos_token, tokenizer.bos_token}
    unknown = {t: i for t, i in tokenizer.get_vocab().items() if i >= size and t not in harmless}
    if unknown:
        first = min(unknown, key=unknown.get)
        return (
            f"has {len(unknown)} tokens, such as {first!r}, that the model does not know (it has "
            f"{size}); give the tokenizer that belongs to it"
        )
    try:
        texts = ["a", "[INST] a"]
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    except Exception as error:
        # tokenizers raises nothing narrower.
        if "MistralCommon" in str(error):
            return TEKKEN
        return f"cannot read ordinary text ({error})"
    if not all(ids):
        return "makes no token of ordinary text"
    templates = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w.-]+", name):
            return f"has a chat template with the name {name!r}, which can be no file"
    return ""
