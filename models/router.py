"""Which task a prompt belongs to, told by the frozen bottom layers: no task id, no training.

Their output never changes, so what is kept of a task stays valid whatever is learned later. A new
prompt goes to the nearest task by a linear discriminant with a shared covariance, one class added
at a time (Hayes & Kanan 2020, "Lifelong machine learning with deep streaming LDA").
"""

import torch

SHRINKAGE = 0.1


def prompt_feature(hidden: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Mean over a prompt of its tokens' directions, (length, width) any float -> (width,) fp32.

    Each token is scaled to a root mean square of 1: a few, such as the first, are a thousand
    times larger than the others and say nothing of the task.
    """
    tokens = hidden[:prompt_length].float()
    return (tokens / tokens.square().mean(-1, keepdim=True).sqrt()).mean(0)


class Router:
    """Means of the tasks seen so far and a factor of their pooled within-task scatter.

    Attributes:
        tasks: in the order in which they were added.
        means: (tasks, width) fp32.
        factor: (m, width) fp32 with m <= width; factor^T factor is the within-task scatter.
        num_samples: from which the scatter was estimated.
    """

    def __init__(self):
        self.tasks: list[str] = []
        self.means = self.factor = torch.empty(0, 0)
        self.num_samples = 0

    def add(self, task: str, features: torch.Tensor) -> None:
        """Adds `task` from the features of some of its prompts, (n, width)."""
        mean = features.float().mean(0)
        rows = [features.float() - mean, *([self.factor] if self.tasks else [])]
        # R^T R of the triangle is that of all rows, in at most `width` of them.
        self.factor = torch.linalg.qr(torch.cat(rows), mode="r").R.contiguous()
        self.means = torch.cat([*([self.means] if self.tasks else []), mean[None]])
        self.tasks.append(task)
        self.num_samples += len(features)

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distances, (n, width) -> (n, tasks).

        Under (1 - SHRINKAGE) S + SHRINKAGE diag(S): each direction of the hidden state has a scale
        of its own, which a shrinkage towards a multiple of the identity would drown.
        """
        scatter = self.factor.double().T @ self.factor.double() / self.num_samples
        variances = scatter.diag().clamp(min=torch.finfo(torch.float32).tiny)
        covariance = (1 - SHRINKAGE) * scatter + SHRINKAGE * torch.diag(variances)
        triangle = torch.linalg.cholesky(covariance)
        offsets = features.double()[:, None] - self.means.double()
        whitened = torch.linalg.solve_triangular(triangle, offsets.flatten(0, 1).T, upper=False)
        return whitened.square().sum(0).view(len(features), len(self.tasks))

    def route(self, features: torch.Tensor) -> list[str]:
        """The nearest task of each prompt, from features (n, width)."""
        return [self.tasks[i] for i in self.distances(features).argmin(1).tolist()]

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes up: tensors, the tasks' names as bytes."""
        if not self.tasks:
            return {}
        names = torch.tensor(list("\n".join(self.tasks).encode()), dtype=torch.uint8)
        number = torch.tensor(self.num_samples)
        return {
            "tasks": names,
            "means": self.means,
            "factor": self.factor,
            "num_samples": number,
        }

    def restore(self, tensors: dict[str, torch.Tensor], width: int | None = None) -> None:
        """Takes up what `state` gave; ValueError, and nothing taken up, where it is damaged.

        Args:
            width: of the features that will be routed; None: whatever it has.
        """
        if not tensors:
            return
        try:
            tasks = bytes(tensors["tasks"].tolist()).decode().split("\n")
            means, factor = tensors["means"], tensors["factor"]
            num_samples = int(tensors["num_samples"])
        except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise ValueError(f"it cannot be read ({error!r})") from error
        both = (means, factor)
        if not all(t.dtype == torch.float32 and t.dim() == 2 for t in both):
            raise ValueError("its means or factor are no matrices of float32")
        if len(means) != len(tasks) or means.shape[1] != factor.shape[1] or num_samples < 1:
            raise ValueError("its tasks, means, factor and number of samples do not go together")
        if len(set(tasks)) < len(tasks):
            raise ValueError("it holds a task twice")
        if width is not None and means.shape[1] != width:
            raise ValueError(f"it is of a model {means.shape[1]} wide, and this one is {width}")
        if not all(torch.isfinite(t).all() for t in both):
            raise ValueError("it holds numbers that are not finite")
        self.tasks, self.means, self.factor, self.num_samples = tasks, means, factor, num_samples
