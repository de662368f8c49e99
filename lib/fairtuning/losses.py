"""Training losses, batched over leading run axes: logits `[..., n, k]`, label and group `[..., n]` int64.

label and group may leave out leading axes that the runs share. A penalty is a number per run, on soft
predictions (softmax probabilities), so that it has a gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy in nats of each example, `[..., n]`.

    >>> round(float(cross_entropy(torch.zeros(1, 2), torch.tensor([1]))), 4)        # ln 2
    0.6931
    """
    label = label.expand(logits.shape[:-1])
    flat = functional.cross_entropy(logits.flatten(0, -2), label.flatten(), reduction="none")
    return flat.reshape(label.shape)


def demographic_parity_penalty(logits: Tensor, group: Tensor, *, groups: int = 2, positive: int = 1) -> Tensor:
    """Soft demographic parity gap, `[...]`, in [0, 1] (arXiv 2403.00625: Delta_DP; our reading).

    |mean p(positive | x) over group 0 - the same over group 1|; largest minus smallest for more groups. Only
    groups with an example in the batch count; with fewer than two the penalty is 0.

    >>> logits = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]).log()
    >>> round(float(demographic_parity_penalty(logits, torch.tensor([0, 0, 1]))), 4)
    0.2
    """
    score = logits.softmax(-1)[..., positive]
    return _gap(score, group, counted=torch.ones_like(group, dtype=torch.bool), groups=groups)


def equalized_odds_penalty(
    logits: Tensor, label: Tensor, group: Tensor, *, groups: int = 2, positive: int = 1
) -> Tensor:
    """Soft equalized odds gap, `[...]`, in [0, 2] (arXiv 2403.00625: Delta_EO; our reading).

    Soft true positive gap (examples with label `positive`) plus soft false positive gap (the others). In each
    of the two only groups with an example in the batch count; with fewer than two it is 0.
    """
    score = logits.softmax(-1)[..., positive]
    hit = label == positive
    true_gap = _gap(score, group, counted=hit, groups=groups)
    false_gap = _gap(score, group, counted=~hit, groups=groups)
    return true_gap + false_gap


def _gap(score: Tensor, group: Tensor, *, counted: Tensor, groups: int) -> Tensor:
    """Largest minus smallest mean score over the groups that have a counted example; scores are in [0, 1]."""
    member = (group.unsqueeze(-1) == torch.arange(groups, device=group.device)) & counted.unsqueeze(-1)
    size = member.sum(-2)
    mean = (score.unsqueeze(-1) * member).sum(-2) / size.clamp(min=1)
    # an absent group takes the value that can be neither largest nor smallest; none present: 0 - 1, cut to 0
    high = mean.masked_fill(size == 0, 0).amax(-1)
    low = mean.masked_fill(size == 0, 1).amin(-1)
    return (high - low).clamp(min=0)


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "demographic_parity": lambda logits, label, group, **options: demographic_parity_penalty(logits, group, **options),
    "equalized_odds": equalized_odds_penalty,
}


def penalised_loss(
    logits: Tensor, label: Tensor, *, group: Tensor, penalty: str, lam: float | Tensor, groups: int = 2
) -> Tensor:
    """(1 - lam) * mean cross-entropy + lam * penalty, `[...]` (arXiv 2403.00625, our reading of "intensity").

    `penalty` is a name in PENALTIES; lam, in [0, 1], is a number or a tensor `[...]` with a value per run.

    >>> logits, label = torch.zeros(2, 2), torch.tensor([0, 1])
    >>> round(float(penalised_loss(logits, label, group=label, penalty="equalized_odds", lam=0.5)), 4)
    0.3466
    """
    if penalty not in PENALTIES:
        raise ValueError(f"penalty is {penalty!r}; permitted are {sorted(PENALTIES)}")
    task = cross_entropy(logits, label).mean(-1)
    return (1 - lam) * task + lam * PENALTIES[penalty](logits, label, group, groups=groups)
