"""Consolidation: what a task's fast branch learned is folded into the slow one, in closed form.

With F = (alpha / r) B A the fast branch, x a layer's inputs and G = mean x x^T, the least squares

    min over S'  c sum_old |(S' - S) x|^2 + sum_new |(S' - S - F) x|^2

has the solution S' = S + F G_new (c G_old + G_new + ridge I)^-1, so only A is multiplied from the
right: fast goes on acting on inputs that look like its task's, and falls silent on the others'. Of
the old tasks one Gram matrix a layer input is kept, however many they are. RegMean (Jin et al.
2023, "Dataless knowledge fusion by merging weights of language models", eq. 2), made recursive.
"""

import contextlib

import torch
from torch import nn

from models.ds_lora import ds_lora_layers
from models.forward import evaluation, response_logits, to_device


def gram_matrices(model: nn.Module, make_passes, samples, gather, add_up):
    """Mean of x x^T over all tokens of `samples` of each layer's input x, in eval mode.

    Layers that are given the same tensor, as q_proj and v_proj are, share one matrix, which stands
    under the name of the first.

    Args:
        make_passes, gather, add_up: see `methods.method.Tools`.

    Returns:
        name -> (in_features, in_features) fp32, symmetric, on the layer's device; the name under
        which the matrix of each layer stands.
    """
    layers = ds_lora_layers(model)
    sums: dict[str, torch.Tensor] = {}
    owners: dict[str, str] = {}
    of_pass: dict[str, torch.Tensor] = {}
    num_tokens = torch.zeros((), dtype=torch.float64)

    def add(name: str, x: torch.Tensor, positions: torch.Tensor) -> None:
        owners[name] = next((owner for owner, other in of_pass.items() if other is x), name)
        if owners[name] == name:
            of_pass[name] = x
            tokens = x.flatten(0, -2)[positions].float()
            sums[name] = sums.get(name, 0) + tokens.T @ tokens

    with evaluation(model):
        for indices, batch, _ in make_passes(samples):
            lengths = torch.tensor([len(samples[i]["input_ids"]) for i in indices])
            is_token = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
            # Found here and not on a GPU, which would have to answer in every layer.
            positions = to_device(is_token.flatten().nonzero().squeeze(1), model.device)
            with contextlib.ExitStack() as hooks:
                for name, layer in layers.items():
                    hook = layer.register_forward_pre_hook(
                        lambda _, args, name=name, here=positions: add(name, args[0], here)
                    )
                    hooks.callback(hook.remove)
                response_logits(model, **batch)
            of_pass.clear()
            num_tokens += lengths.sum()
    # A process without a sample has seen no layer.
    owners = next(filter(None, gather(owners)))
    grams = {}
    for name in dict.fromkeys(owners.values()):
        weight = layers[name].lora_A_fast
        empty = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        total = add_up(sums.get(name, empty))
        # Rounding is not symmetric.
        grams[name] = (total + total.T) / 2
    num_tokens = float(add_up(num_tokens))
    return {name: gram / num_tokens for name, gram in grams.items()}, owners


def gated(A: torch.Tensor, new: torch.Tensor, old: torch.Tensor, c: float, ridge: float):
    """A G_new (c G_old + G_new + ridge mean(diagonal) I)^-1, computed in double precision.

    Args:
        A: (r, d), any float dtype.
        new, old: Gram matrices, (d, d) fp32.
        ridge: relative to the mean of the diagonal of c G_old + G_new.

    Returns:
        (r, d) in the dtype of A.
    """
    total = c * old.double() + new.double()
    total += ridge * total.diagonal().mean() * torch.eye(len(total), device=total.device)
    solved = torch.cholesky_solve(new.double() @ A.double().T, torch.linalg.cholesky(total))
    return solved.T.to(A.dtype)


def cut_rank(A: torch.Tensor, B: torch.Tensor, gram: torch.Tensor, rank: int, ridge: float):
    """The A' (rank, d) and B' (n, rank) that keep most of what B A does to inputs of this Gram.

    They minimise |(B A - B' A') G^(1/2)|: an SVD in the metric of G.
    """
    metric = gram.double() + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    root = torch.linalg.cholesky(metric)
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr((A.double() @ root).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    half = s[:rank].sqrt()
    in_metric = half[:, None] * (v[:rank] @ q_a.T)
    new_A = torch.linalg.solve_triangular(root, in_metric, upper=False, left=False)
    return new_A.to(A.dtype), (q_b @ u[:, :rank] * half).to(B.dtype)


class Consolidation:
    """Folds fast into slow at each task's end, and keeps the Gram matrices of what was learned.

    Args:
        c: weight of the old inputs' outputs against the new ones'.
        ridge: see `gated`.
        rank: of slow at most; 0: it grows by fast's rank a task.

    Attributes:
        grams: sum over the tasks so far of their Gram matrices, by layer.
    """

    def __init__(self, model: nn.Module, c: float, ridge: float, rank: int = 0):
        self.model, self.c, self.ridge, self.rank = model, c, ridge, rank
        self.grams: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def fold(self, new: dict[str, torch.Tensor], owners: dict[str, str]) -> None:
        """Adds fast, gated where a task came before, to slow; fast adds nothing afterwards.

        Where it runs out of memory nothing is changed.
        """
        folded = []
        for name, layer in ds_lora_layers(self.model).items():
            (A_slow, B_slow), (A, B) = layer.branch("slow"), layer.branch("fast")
            gram, old = new[owners[name]], self.grams.get(owners[name])
            if old is None:
                A, B = A.clone(), B.clone()
            else:
                A = gated(A, gram, old, self.c, self.ridge)
                A, B = torch.cat([A_slow, A]), torch.cat([B_slow, B], dim=1)
                if self.rank and len(A) > self.rank:
                    A, B = cut_rank(A, B, old + gram, self.rank, self.ridge)
            folded.append((layer, A, B))
        for layer, A, B in folded:
            layer.set_branch("slow", A, B)
            layer.lora_B_fast.zero_()
        for name, gram in new.items():
            self.grams[name] = self.grams.get(name, 0) + gram

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes up."""
        return {name: gram.cpu() for name, gram in self.grams.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""
        layers = ds_lora_layers(self.model)
        self.grams = {n: gram.to(layers[n].lora_A_fast.device) for n, gram in tensors.items()}
