"""What every pass over samples needs: the response's logits, its cross entropy, eval mode."""

import contextlib
import hashlib

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# The label of a token that is not predicted: the prompt's and padding's, as in transformers.
IGNORE = -100


def response_tokens(sample: dict) -> int:
    """How many tokens of a sample are supervised, its last ones, from "labels" (length,) long."""
    return int((sample["labels"] != IGNORE).sum())


def seed_torch(*what) -> None:
    """Seeds torch from `what` alone: a step draws the same wherever the run started."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


def told_of_branches(model, parents: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What `model` is told beside the ids of a batch, some of whose rows branch like a tree.

    A token sees the tokens that lead to it and no others, and its position is their number.

    Args:
        parents: (batch, length) long, the token that each one follows, an earlier one; None where
            each follows the one before it: nothing need be told.

    Returns:
        "attention_mask" (batch, 1, length, length), added to the scores, and "position_ids"
        (batch, length).
    """
    if parents is None:
        return {}
    number, length = parents.shape
    sees = torch.eye(length, dtype=torch.bool, device=parents.device).repeat(number, 1, 1)
    ancestors = parents
    # Those 1, then 2, 4, 8 and more steps up.
    for _ in range(length.bit_length()):
        sees = sees | sees.gather(1, ancestors[..., None].expand_as(sees))
        ancestors = ancestors.gather(1, ancestors)
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=parents.device)
    mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": sees.sum(-1) - 1}


def response_logits(
    model,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    start=contextlib.nullcontext,
    parents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits at the positions that predict response tokens, row by row.

    Only these positions meet the vocabulary: a hook in front of the output embedding selects them,
    which is exact for every family, whatever the model does to its logits afterwards.

    Args:
        input_ids: (batch, length) long, padded on the right; a causal mask needs no other mask.
        positions: (n,) long, into the flattened batch.
        start: makes a context in which the model runs, see `FrozenPrefix.start`.
        parents: see `told_of_branches`.

    Returns:
        (n, vocabulary) in the model's dtype.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1)[positions],)
    )
    try:
        with start():
            told = told_of_branches(model, parents)
            return model(input_ids=input_ids, use_cache=False, **told).logits
    finally:
        hook.remove()


def are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors of logits differ by rounding alone, for their dtype."""
    tolerance = 1e-4 if found.dtype == torch.float32 else 1e-2
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    # NaN is not.
    return bool(difference <= tolerance)


class _PickedLogProbs(torch.autograd.Function):
    """A few rows at a time, and the gradient takes the place of the logits.

    Nothing of the logits' size is made: no fp32 copy, no log-softmax, no zero-filled gradient.
    d log p_j / d x_i = ([i = j] - p_i) / temperature.
    """

    @staticmethod
    def forward(ctx, logits, ids, temperature):
        log_sums = [
            _scaled(rows, temperature).logsumexp(-1, keepdim=True)
            for rows in logits.split(block_rows(logits))
        ]
        log_sum = torch.cat(log_sums) if log_sums else logits[:, :1].float()
        ctx.save_for_backward(logits, ids, log_sum)
        ctx.temperature, ctx.is_leaf = temperature, logits.is_leaf
        return logits.gather(-1, ids).float() / temperature - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, ids, log_sum = ctx.saved_tensors
        result = logits.clone() if ctx.is_leaf else logits
        step = block_rows(logits)
        parts = (tensor.split(step) for tensor in (result, ids, log_sum, grad / ctx.temperature))
        for rows, of_ids, of_sum, of_grad in zip(*parts, strict=True):
            in_place = rows if rows.dtype == torch.float32 else None
            p = torch.sub(_scaled(rows, ctx.temperature), of_sum, out=in_place).exp_()
            p.mul_(-of_grad.sum(-1, keepdim=True)).scatter_add_(-1, of_ids, of_grad)
            if in_place is None:
                rows.copy_(p)
        return result, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    # Where nothing is to be done, no copy either.
    return logits.float() if temperature == 1 else logits.float() / temperature


def block_rows(logits: torch.Tensor) -> int:
    """How many rows of (n, vocabulary) logits are worked on at a time.

    On a CPU they stay in the cache; on a GPU they are worth their launches.
    """
    return max(1, (2**25 if logits.is_cuda else 2**20) // logits.shape[-1])


def picked_log_probs(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log softmax(logits / temperature) at `ids`, in nats.

    Args:
        logits: (n, vocabulary), any float dtype.
        ids: (n, k) long, each class at most once a row.

    Returns:
        (n, k) fp32. Its gradient can be taken once; unless `logits` is a leaf, that overwrites it.
    """
    return _PickedLogProbs.apply(logits, ids, temperature)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target), summed: (n, vocabulary) any float dtype, (n,) long -> a scalar, fp32.

    The backward overwrites `logits`, see `picked_log_probs`.
    """
    return -picked_log_probs(logits, targets[:, None]).sum()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, where it arrives in the order of the work there: nothing waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextlib.contextmanager
def evaluation(model: nn.Module):
    """Within the block `model` is in eval mode and no gradient is kept."""
    before = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def dropout_off(model: nn.Module):
    """Within the block dropout modules pass everything on; the model keeps its mode.

    Putting the whole model in eval mode would switch gradient checkpointing off too.
    """
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    try:
        for module in dropouts:
            module.training = False
        yield
    finally:
        for module in dropouts:
            module.training = True
