"""Training losses, batched over leading run axes: logits `[..., n, k]`, label and group `[..., n]` integers or bool.

label and group may leave out leading axes that the runs share. A penalty is a number per run, on soft
predictions (softmax probabilities), so that it has a gradient.

Raise ValueError for a label or group of another length or type, and for values outside 0 to k - 1, or to `groups` - 1,
where these are on the CPU (`checks`): no value, -100 neither, stands for an example to leave out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from . import checks

_NO_LABEL = torch.iinfo(torch.int64).min  # torch leaves -100 out, with loss 0; where nobody looks it has to fail too


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy in nats of each example, `[..., n]`; its mean is over all of them.

    >>> round(float(cross_entropy(torch.zeros(1, 2), torch.tensor([1]))), 4)        # ln 2
    0.6931
    """
    label = _checked("label", label, logits=logits).expand(logits.shape[:-1])
    flat = logits.flatten(0, -2), label.flatten()
    try:  # torch looks at every value itself; to look before it does would cost a small step another 5 %
        loss = functional.cross_entropy(*flat, reduction="none", ignore_index=_NO_LABEL)
    except (IndexError, RuntimeError):
        checks.integers("label", label, below=logits.shape[-1])
        raise
    return loss.reshape(label.shape)


def _checked(name: str, values: Tensor, *, logits: Tensor) -> Tensor:
    if logits.ndim < 2:
        raise ValueError(f"logits have shape {list(logits.shape)}; permitted: [..., n, k]")
    return checks.integers(name, values, below=None, shape=logits.shape[:-1]).long()


def _of_losses(group: Tensor, loss: Tensor) -> Tensor:
    if not loss.ndim:
        raise ValueError("loss is one number; permitted: [..., n], one for each example")
    return checks.integers("group", group, below=None, shape=loss.shape).long()


def demographic_parity_penalty(logits: Tensor, group: Tensor, *, groups: int = 2, positive: int = 1) -> Tensor:
    """Soft demographic parity gap, `[...]`, in [0, 1] (arXiv 2403.00625: Delta_DP; our reading).

    |mean p(positive | x) over group 0 - the same over group 1|; largest minus smallest for more groups. Only
    groups with an example in the batch count; with fewer than two the penalty is 0.

    >>> logits = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]).log()
    >>> round(float(demographic_parity_penalty(logits, torch.tensor([0, 0, 1]))), 4)
    0.2
    """
    checks.between("positive", positive, 0, logits.shape[-1] - 1)
    group = _checked("group", group, logits=logits)
    score = logits.softmax(-1)[..., positive]
    return _gap(score, _members(group, groups=groups))


def equalized_odds_penalty(
    logits: Tensor, label: Tensor, group: Tensor, *, groups: int = 2, positive: int = 1
) -> Tensor:
    """Soft equalized odds gap, `[...]`, in [0, 2] (arXiv 2403.00625: Delta_EO; our reading).

    Soft true positive gap (examples with label `positive`) plus soft false positive gap (the others). In each
    of the two only groups with an example in the batch count; with fewer than two it is 0.
    """
    label = checks.integers("label", label, below=logits.shape[-1])
    return _equalized_odds(logits, label, group, groups=groups, positive=positive)


def _equalized_odds(logits: Tensor, label: Tensor, group: Tensor, *, groups: int, positive: int = 1) -> Tensor:
    """The same once there was a look at the labels' values."""
    checks.between("positive", positive, 0, logits.shape[-1] - 1)
    label, group = (_checked(name, values, logits=logits) for name, values in (("label", label), ("group", group)))
    score = logits.softmax(-1)[..., positive]
    member, hit = _members(group, groups=groups), (label == positive).unsqueeze(-1)
    return _gap(score, member & hit) + _gap(score, member & ~hit)


def _members(group: Tensor, *, groups: int) -> Tensor:
    """Whether each example is of each group, bool `[..., n, groups]`."""
    nobody = group.new_zeros(*group.shape, groups, dtype=torch.bool)
    try:
        return nobody.scatter(-1, group.unsqueeze(-1), True)
    except RuntimeError:  # as in cross_entropy
        checks.integers("group", group, below=groups)
        raise


def _gap(score: Tensor, member: Tensor) -> Tensor:
    """Largest minus smallest mean score over the groups that have a member; scores are in [0, 1]."""
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
    checks.between("lam", lam, 0, 1)
    task = cross_entropy(logits, label).mean(-1)
    form = _equalized_odds if penalty == "equalized_odds" else PENALTIES[penalty]  # cross_entropy looks at labels
    return (1 - lam) * task + lam * form(logits, label, group, groups=groups)


# ------------------------------------------------------------------------------------------------- losses of groups
GROUPINGS = ("class", "attribute", "class x attribute")


def penalty_groups(label: Tensor, attribute: Tensor, *, by: str, classes: int, attributes: int) -> tuple[Tensor, int]:
    """The groups that a penalty compares, `[..., n]` int64, and how many there are (arXiv 2410.17358 allows each).

    `by` is a name in GROUPINGS; class x attribute numbers them `label * attributes + attribute`.

    >>> penalty_groups(torch.tensor([0, 1]), torch.tensor([1, 0]), by="class x attribute", classes=2, attributes=2)
    (tensor([1, 2]), 4)
    """
    if by not in GROUPINGS:
        raise ValueError(f"groups are by {by!r}; permitted are {', '.join(GROUPINGS)}")
    if by != "attribute":
        label = checks.integers("label", label, below=classes).long()
    if by != "class":
        attribute = checks.integers("attribute", attribute, below=attributes, n=label.shape[-1]).long()
    if by == "class":
        return label, classes
    return (attribute, attributes) if by == "attribute" else (label * attributes + attribute, classes * attributes)


def group_means(loss: Tensor, group: Tensor, *, groups: int) -> tuple[Tensor, Tensor]:
    """Mean loss of each group and its number of examples, both `[..., groups]`, from `loss` and `group` `[..., n]`.

    The mean of a group without example is 0. The cost does not depend on how many groups there are.
    """
    group = _of_losses(group, loss).expand(loss.shape)
    zeros = loss.new_zeros(*loss.shape[:-1], groups)
    try:
        size = zeros.scatter_add(-1, group, torch.ones_like(loss))
    except RuntimeError:  # as in cross_entropy
        checks.integers("group", group, below=groups)
        raise
    return zeros.scatter_add(-1, group, loss) / size.clamp(min=1), size


def group_loss_variance(loss: Tensor, group: Tensor, *, groups: int) -> Tensor:
    """Sum over groups of (L_g - mean of the L_g)^2, `[...]` (arXiv 2410.17358, eq. 1: the penalty, without lambda).

    `loss` `[..., n]` per example, L_g its mean over group g. A sum as in the paper, hence |G| times the population
    variance of the group losses. Only groups with an example in the batch count; with fewer than two it is 0.

    >>> round(float(group_loss_variance(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 1]), groups=3)), 3)
    10.125
    """
    mean, size = group_means(loss, group, groups=groups)
    return _spread(mean, size > 0)


def _spread(mean: Tensor, present: Tensor) -> Tensor:
    number = present.sum(-1, keepdim=True).clamp(min=1)
    centre = (mean * present).sum(-1, keepdim=True) / number
    return ((mean - centre).square() * present).sum(-1)


def penalty_and_signal(loss: Tensor, group: Tensor, *, groups: int, batch_size: int) -> tuple[float, float]:
    """Mean over batches of eq. 1's penalty, and of what is left of it once every loss is its group's mean (ours).

    `loss` and `group` `[n]`, in the order in which they are cut into batches; what is over is dropped. The group's mean
    is over all n, so that the second number has no noise from the few examples of a batch: the share 1 - second / first
    of the penalty is noise within the groups. Two NaN where there is no whole batch.

    >>> loss, group = torch.tensor([0.0, 2.0, 2.0, 0.0]), torch.tensor([0, 1, 0, 1])   # both groups have mean 1
    >>> penalty_and_signal(loss, group, groups=2, batch_size=2)
    (2.0, 0.0)
    """
    group = _of_losses(group, loss)
    whole = len(loss) // batch_size * batch_size
    batches, members = loss[:whole].reshape(-1, batch_size), group[:whole].reshape(-1, batch_size)
    mean, _ = group_means(loss, group, groups=groups)
    signal = group_loss_variance(mean[members], members, groups=groups).mean()
    return float(group_loss_variance(batches, members, groups=groups).mean()), float(signal)


def smoothed_group_loss_variance(
    loss: Tensor, group: Tensor, *, average: Tensor, decay: float = 0.9
) -> tuple[Tensor, Tensor]:
    """The penalty of eq. 1 on moving averages of the group losses `[...]`, and the new averages `[..., groups]` (ours).

    In a small batch L_g is mostly noise. Here every group in the batch moves its `average` to
    decay * average + (1 - decay) * L_g; NaN stands for a group not seen yet. The penalty is taken over the groups
    seen so far; its gradient is eq. 1's with averages in place of batch means: 2 (average_g - mean) dL_g, over the
    groups in the batch. `decay=0` gives eq. 1 where every group is in the batch. Start with `torch.full(..., nan)`.

    >>> start = torch.tensor([1.0, float("nan")])
    >>> smoothed_group_loss_variance(torch.tensor([3.0, 4.0]), torch.tensor([0, 1]), average=start, decay=0.5)
    (tensor(2.), tensor([2., 4.]))
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; permitted: 0 to below 1")
    mean, size = group_means(loss, group, groups=average.shape[-1])
    moved = torch.where(average.isnan(), mean, decay * average + (1 - decay) * mean)
    average = torch.where(size > 0, moved, average).detach()
    seen = ~average.isnan()
    value = average.nan_to_num() + (mean - mean.detach())  # the value of the average, the gradient of the batch
    return _spread(value, seen), average


def variance_penalised_loss(
    logits: Tensor, label: Tensor, *, group: Tensor, groups: int, lam: float | Tensor
) -> Tensor:
    """J = mean cross-entropy + lam * group_loss_variance, `[...]` (arXiv 2410.17358, eq. 1: FairLoRA and FairFFT).

    lam, 0 or more, is a number or a tensor `[...]` with a value per run. Raises ValueError for a negative one (of a
    tensor: on the CPU).

    >>> logits, label = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    >>> round(float(variance_penalised_loss(logits, label, group=label, groups=2, lam=1.0)), 4)   # .4100 + .1603
    0.5703
    """
    checks.between("lam", lam, 0)
    loss = cross_entropy(logits, label)
    return loss.mean(-1) + lam * group_loss_variance(loss, group, groups=groups)


def group_dro_loss(
    loss: Tensor, group: Tensor, *, weights: Tensor, step: float = 0.01, adjustment: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum over groups of q_g L_g, `[...]`, and the new weights q `[..., groups]` (Sagawa et al. 2020, algorithm 1).

    First q_g <- q_g exp(step (L_g + adjustment_g)), normalised to sum 1; then the loss. `adjustment` is the paper's
    C / sqrt(n_g), n_g counted over the training set. As in the authors' code L_g is 0 for a group that the batch
    lacks, and batches are meant to be balanced (`balanced_weights`). Start with q = 1 / groups.

    >>> loss, q = group_dro_loss(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), weights=torch.ones(2) / 2, step=1.0)
    >>> round(float(loss), 4)   # e / (1 + e)
    0.7311
    """
    mean, _ = group_means(loss, group, groups=weights.shape[-1])
    weights = (weights.log() + step * (mean.detach() + adjustment)).softmax(-1)
    return (weights * mean).sum(-1), weights


def balanced_weights(group: Tensor, *, groups: int) -> Tensor:
    """A weight for each of the n examples, mean 1, with the same total for every group that has any; `[n]` float64.

    Multiplied with the losses it reweights; as probabilities it balances the batches:
    `torch.multinomial(balanced_weights(group, groups=G), n, replacement=True)`.

    >>> balanced_weights(torch.tensor([0, 0, 0, 1]), groups=2).tolist()
    [0.6666666666666666, 0.6666666666666666, 0.6666666666666666, 2.0]
    """
    group = checks.integers("group", group, below=groups, shape=[group.numel()], wait=True).long()
    size = group.bincount(minlength=groups).double()
    return len(group) / ((size > 0).sum() * size[group])


# ------------------------------------------------------- apart from a sensitive adapter (arXiv 2503.05684, our reading)
# No equation of the paper could be had: each of these is our reading of what it says in words. z_t are features with
# the task's adapter, z_s with the sensitive one, which was trained elsewhere: no gradient flows through z_s.


def cross_covariance_penalty(task: Tensor, sensitive: Tensor) -> Tensor:
    """||Z_t^T Z_s||_F^2 / n^2 of centred batches, `[...]` (arXiv 2503.05684: Orth; our reading).

    `task` `[..., n, p]` and `sensitive` `[..., n, q]` are features of the same n examples. 0 where no linear function
    of the one is correlated with one of the other. Through whichever Gram matrices, p x q or n x n, are cheaper.
    ValueError where n differs.

    >>> float(cross_covariance_penalty(torch.tensor([[1.0], [-1.0]]), torch.tensor([[3.0], [-3.0]])))   # (2 * 3 / 2)^2
    9.0
    """
    checks.examples(task=task, sensitive=sensitive)
    task, sensitive = _centred(task), _centred(sensitive.detach())
    n, p, q = *task.shape[-2:], sensitive.shape[-1]
    if p * q <= n * (p + q):
        return (task.mT @ sensitive).square().sum((-2, -1)) / n**2
    return ((task @ task.mT) * (sensitive @ sensitive.mT)).sum((-2, -1)) / n**2


def squared_cosine_penalty(task: Tensor, sensitive: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Mean over the batch of cos^2(z_t, z_s), `[...]` in [0, 1], both centred (arXiv 2503.05684: Orth; our reading).

    `task` and `sensitive` `[..., n, p]`; ValueError where n or p differs. Centred, for features of a transformer share
    a large mean.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> float(squared_cosine_penalty(z, z)), float(squared_cosine_penalty(z, z.flip(-1)))
    (1.0, 0.0)
    """
    checks.examples(task=task, sensitive=sensitive)
    if task.shape[-1] != sensitive.shape[-1]:
        raise ValueError(f"sensitive is {sensitive.shape[-1]} wide; permitted: {task.shape[-1]}, the width of task")
    task, sensitive = _centred(task), _centred(sensitive.detach())
    product = (task * sensitive).sum(-1).square()
    return (product / (task.square().sum(-1) * sensitive.square().sum(-1) + eps)).mean(-1)


def _centred(features: Tensor) -> Tensor:
    return features - features.mean(-2, keepdim=True)


Factors = Sequence[tuple[Tensor, Tensor]]  # of an adapter, a layer each: B [..., out, r] and A [..., r, in]


def subspace_overlap_penalty(task: Factors, sensitive: Factors, *, eps: float = 1e-6) -> Tensor:
    """sum_l ||dW_s^T dW_t||_F^2 / (||dW_s||_F^2 ||dW_t||_F^2 + eps), dW = B A (arXiv 2503.05684: Orth; our reading).

    `[...]`, from 0 to the number of layers: 0 where what the two adapters write lies in orthogonal subspaces. From
    r x r Gram matrices, never from dW. It is about dW alone, so (B R, R^-1 A) gives the same for any invertible R, and
    it is finite, with a finite gradient, at B = 0. The factor alpha / rank is left out: but for eps it cancels.

    >>> one, other = torch.eye(2)[:, :1], torch.eye(2)[:, 1:]      # B writes to the first axis, or to the second
    >>> a = torch.ones(1, 3)
    >>> [round(float(subspace_overlap_penalty([(b, a)], [(one, a)])), 4) for b in (one, other)]
    [1.0, 0.0]
    """
    total = 0.0
    for (b_t, a_t), (b_s, a_s) in zip(task, sensitive, strict=True):
        b_s, a_s = b_s.detach(), a_s.detach()
        between, read_t, read_s = b_s.mT @ b_t, a_t @ a_t.mT, a_s @ a_s.mT
        overlap = ((read_s @ between) * (between @ read_t)).sum((-2, -1))
        sizes = [((b.mT @ b) * read).sum((-2, -1)) for b, read in ((b_t, read_t), (b_s, read_s))]
        total = total + overlap / (sizes[0] * sizes[1] + eps)
    return total


def prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each example's predicted distribution, `[..., n]` (the follow-up's "entropy"; our reading).

    >>> round(float(prediction_entropy(torch.zeros(1, 2))), 4)        # ln 2, the most there can be
    0.6931
    """
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def cross_entropy_to_uniform(logits: Tensor) -> Tensor:
    """Cross-entropy in nats of each prediction to the uniform distribution, `[..., n]`, ln k or more (our reading).

    Least where the entropy is largest; unlike that its gradient does not vanish where a prediction is certain.

    >>> round(float(cross_entropy_to_uniform(torch.zeros(1, 2))), 4)
    0.6931
    """
    return -logits.log_softmax(-1).mean(-1)
