"""What a run takes on its device, in bytes and FLOPs, from the shapes of the model: nothing is run.

After the decoder layers of the LLaMA family; others come near where their layers are alike.
"""

from dataclasses import dataclass

import torch
from torch import nn

from configs.command_line import num_processes
from methods import find_method
from models.ds_lora import BRANCHES, branch_parameters, ds_lora_layers, find_decoder_layers
from training.shard import parameters_of, units_of

# Passes without gradients keep no activations: a GPU takes them larger. A CPU gains nothing.
PASS_WITHOUT_GRADIENTS = 4
# Classes of a row, times rows, that are worked on at a time in fp32, and how many such blocks are
# alive in the loss and in the entropy; see `models.forward.block_rows`.
BLOCK, BLOCKS_OF_LOSS, BLOCKS_OF_ENTROPY = 4 * 2**25, 2, 4
# Gathered units of a model that is shared out: the weights of one, where they arrive and where the
# next ones do, and what is gathered for others only.
GATHERED = 4


def _width(config, name: str, usual: int) -> int:
    """A number of the configuration, the largest where each layer has its own; else `usual`."""
    value = getattr(config, name, None) or usual
    return max(value) if isinstance(value, list | tuple) else value


@dataclass
class Shapes:
    """Of a decoder with branches: widths in numbers, `itemsize` in bytes of an activation."""

    layers: int
    upper: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    trainable: int
    branch_inputs: int
    has_dropout: bool
    itemsize: int
    on_gpu: bool

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype, device: torch.device) -> "Shapes":
        """Those of `model`, which may be a skeleton; `dtype` is its activations'."""
        config, branches = model.config.get_text_config(), list(ds_lora_layers(model).values())
        decoder = find_decoder_layers(model)[1]
        with_branches = [any(module in branches for module in layer.modules()) for layer in decoder]
        hidden, heads = config.hidden_size, _width(config, "num_attention_heads", 1)
        head = _width(config, "head_dim", hidden // heads)
        return cls(
            layers=len(decoder),
            upper=len(decoder) - with_branches.index(True) if branches else 0,
            hidden=hidden,
            intermediate=_width(config, "intermediate_size", 4 * hidden),
            queries=heads * head,
            keys=head * _width(config, "num_key_value_heads", heads),
            heads=heads,
            vocabulary=config.vocab_size,
            trainable=sum(p.numel() for b in BRANCHES for p in branch_parameters(model, b)),
            branch_inputs=sum(layer.base_layer.in_features for layer in branches),
            has_dropout=any(layer.dropout.p for layer in branches),
            itemsize=dtype.itemsize,
            on_gpu=device.type == "cuda",
        )

    @property
    def kept_of_layer(self) -> int:
        """Bytes a token that one upper layer keeps for its backward."""
        size = self.itemsize
        # Fused, a norm keeps its input and a number; else an fp32 copy of it.
        norms = 2 * (size * self.hidden + 4 if self.on_gpu else 4 * self.hidden)
        attention = size * 2 * (self.queries + self.keys) + 4 * self.heads
        # silu keeps the gate, the product what it multiplies.
        mlp = 3 * size * self.intermediate
        branches = self.branch_inputs * (size + self.has_dropout) // max(1, self.upper)
        return norms + attention + mlp + branches

    @property
    def passing(self) -> int:
        """Bytes a token that live while one layer is at work, forward or backward."""
        return self.itemsize * (3 * self.intermediate + 4 * self.hidden)

    @property
    def cached(self) -> int:
        """Bytes that a token takes in generation's cache, and while its prompt is read."""
        return 2 * self.layers * self.keys * self.itemsize + self.passing

    def kept(self, checkpointing: bool) -> int:
        """Bytes a token of a pass with gradients keeps in all upper layers."""
        inputs = self.upper * self.hidden * self.itemsize
        return inputs + self.kept_of_layer if checkpointing else self.upper * self.kept_of_layer

    def tokens_in_cache(self, tokens_per_pass: int, checkpointing: bool) -> int:
        """Tokens of a cache that takes no more than a training pass of `tokens_per_pass`."""
        return max(1, tokens_per_pass * (self.kept(checkpointing) + self.passing) // self.cached)

    def training_pass(self, tokens: int, positions: int, checkpointing: bool) -> int:
        """Bytes of a pass of `tokens`, `positions` of which meet the vocabulary."""
        logits = positions * self.vocabulary * self.itemsize
        blocks = BLOCKS_OF_LOSS * min(BLOCK, 4 * positions * self.vocabulary)
        # Both at the end of the forward: the last layer is done, and its backward has not begun.
        at_end = logits + blocks + 2 * positions * self.hidden * self.itemsize
        return tokens * self.kept(checkpointing) + max(at_end, tokens * self.passing)

    def reading_pass(self, tokens: int, positions: int) -> int:
        """Bytes of a pass without gradients, with the entropy of each position."""
        logits = positions * self.vocabulary * self.itemsize
        blocks = BLOCKS_OF_ENTROPY * min(BLOCK, 4 * positions * self.vocabulary)
        return max(logits + blocks, tokens * self.passing) + tokens * self.hidden * self.itemsize


def weight_bytes(model: nn.Module, quantization: str, itemsize: int) -> int:
    """Bytes of the frozen base, by how it is held; the vocabulary and the norms stay whole."""
    frozen = {id(p): p.numel() for p in model.parameters() if not p.requires_grad}
    # 4 bits and an fp32 number for each 64 of them; 8 bits.
    width = {"none": itemsize, "8bit": 1, "4bit": 0.5 + 4 / 64}[quantization]
    linear = {
        id(module.weight): module.weight.numel()
        for module in find_decoder_layers(model)[1].modules()
        if isinstance(module, nn.Linear)
    }
    held = sum(linear.values())
    return int(held * width + (sum(frozen.values()) - held) * itemsize)


def held_bytes(cfg, model: nn.Module, itemsize: int) -> int:
    """Bytes that the frozen base takes in one process."""
    whole = weight_bytes(model, cfg.quantization, itemsize)
    if not cfg.shard:
        return whole
    frozen = (
        [p.numel() for p in unit if not p.requires_grad] for unit in parameters_of(units_of(model))
    )
    return whole // num_processes() + GATHERED * itemsize * max(map(sum, frozen))


def run_bytes(cfg, model: nn.Module, dtype: torch.dtype, device, tokens: int, share: float) -> int:
    """Most bytes of the device that a run takes at once.

    Args:
        model: with branches; may be a skeleton.
        tokens: of a training pass, padding included.
        share: of the tokens that are response.
    """
    shapes, positions = Shapes.of(model, dtype, device), round(tokens * share)
    steady = held_bytes(cfg, model, dtype.itemsize)
    steady += find_method(cfg.method).device_bytes(cfg, model, positions)
    # fp32 branches, gradients and AdamW's two moments; each pass casts the branches down.
    steady += shapes.trainable * (16 + dtype.itemsize)
    if cfg.quantization != "none":
        # A weight is whole while it multiplies.
        steady += shapes.hidden * shapes.intermediate * dtype.itemsize
    training = shapes.training_pass(tokens, positions, cfg.gradient_checkpointing)
    more = PASS_WITHOUT_GRADIENTS if shapes.on_gpu else 1
    return steady + max(training, shapes.reading_pass(more * tokens, more * positions))


def flops_per_token(
    model: nn.Module, shapes: Shapes, length: float, share: float, checkpointing: bool
) -> tuple[float, float]:
    """(FLOPs of the frozen layers, of all above them) for a trained token of samples of `length`.

    The weights of the base get no gradient: a backward costs what a forward does. A causal
    attention meets half the positions, and its backward takes 2.5 times its forward.
    """
    decoder = find_decoder_layers(model)[1]
    weights = [
        sum(2 * m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
        for layer in decoder
    ]
    bottom = shapes.layers - shapes.upper
    attention = 2 * length * shapes.queries
    frozen = sum(weights[:bottom]) + bottom * attention
    again = 1 if checkpointing else 0
    upper = sum(weights[bottom:]) * (2 + again) + shapes.upper * attention * (3.5 + again)
    head = share * 4 * shapes.vocabulary * shapes.hidden
    return frozen, upper + head + (6 + 2 * again) * shapes.trainable
