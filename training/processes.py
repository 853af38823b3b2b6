"""The processes of one run, as torchrun or accelerate launch started them.

Every process holds the whole model (or its share, see `training.shard`) and all data, and works on
its share of the samples; the first one writes. Alone, each function here does nothing.
"""

import contextlib
import os

import torch
import torch.distributed as dist

# Its functions keep the group that is there when it is imported, and with it the group's threads:
# they outlive `destroy_process_group` and can abort the process as it ends. transformers imports
# it with the model, so it comes here, before there is a group.
import torch.distributed.nn

from configs.command_line import UserError, is_first, num_processes, rank

# What torchrun and accelerate launch tell each process beside WORLD_SIZE.
LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Models that are shared out, see `training.shard`: `wait()` comes before all meet, `leave()` last.
sharers: list = []


@contextlib.contextmanager
def joined():
    """Within the block the processes of the run can call one another; only the first one prints.

    Raises `UserError` where the environment is not as a launcher makes it.
    """
    rank()
    if num_processes() == 1:
        yield
        return
    if missing := [name for name in LAUNCHER if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {num_processes()} in the environment, and {', '.join(missing)} "
            "missing: start with torchrun, or `unset RANK WORLD_SIZE`"
        )
    # What is no tensor goes through gloo, from host to host.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield
    except UserError as error:
        error.is_of_process = True
        raise
    except RuntimeError as error:
        # In the middle of a model that is shared out.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        lost = _lost(error)
        lost.is_of_process = True
        raise lost from error
    finally:
        leave()
        # After an error too: its threads would abort the process as it ends.
        dist.destroy_process_group()


def leave() -> None:
    """No model is shared out any more."""
    while sharers:
        sharers.pop().leave()


def _lost(error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"process {rank()}: another process of this run has ended ({reason}); its own message "
        "says why, and the same command goes on from the last saved state"
    )


def _call(collective, *args):
    for sharer in sharers:
        sharer.wait()
    return _try(collective, *args)


def _try(collective, *args):
    try:
        return collective(*args)
    except RuntimeError as error:
        raise _lost(error) from error


def least_of_all(number: int) -> int:
    """The least of what the processes gave, without meeting: see `sharers`."""
    tensor = torch.tensor(number)
    _try(dist.all_reduce, tensor, dist.ReduceOp.MIN)
    return int(tensor)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, summed in place over all processes."""
    if num_processes() > 1:
        _call(dist.all_reduce, tensor)
    return tensor


def gather(value) -> list:
    """What each process gave as `value` (any object), by rank."""
    if num_processes() == 1:
        return [value]
    values = [None] * num_processes()
    _call(dist.all_gather_object, values, value)
    return values


def from_first(value):
    """What the first process gave as `value` (any object)."""
    if num_processes() == 1:
        return value
    box = [value]
    _call(dist.broadcast_object_list, box)
    return box[0]


def sum_gradients(params: list[torch.nn.Parameter], *scalars) -> list[torch.Tensor]:
    """Sums the gradients of `params` over all processes, and returns the sums of `scalars`.

    One flat fp32 vector a step; a parameter without a gradient here counts as zero. Tensors stay
    on their device.
    """
    device = params[0].device
    # Filled there: a copy to the GPU would wait.
    scalars = [
        value.float()
        if isinstance(value, torch.Tensor)
        else torch.full((), float(value), device=device)
        for value in scalars
    ]
    if num_processes() == 1:
        return scalars
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([grad.flatten() for grad in grads] + [torch.stack(scalars)])
    sum_over_processes(flat)
    *summed, rest = flat.split([p.numel() for p in params] + [len(scalars)])
    for parameter, grad in zip(params, summed, strict=True):
        parameter.grad = grad.view_as(parameter)
    return list(rest)


def all_succeed(checks: list) -> list:
    """The results of all `checks` here, where they succeed in every process.

    Otherwise one `UserError` with the problems of all checks and processes; it is empty in all
    processes but the first, so that each problem is told once.
    """
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except UserError as error:
            problems += str(error).splitlines()
    everywhere = dict.fromkeys(problem for listed in gather(problems) for problem in listed)
    if everywhere:
        raise UserError("\n".join(everywhere) if is_first() else "")
    return results
