"""Last-layer retraining on frozen features with balanced groups (DFR: Kirichenko et al. 2022, arXiv 2204.02937)."""

from collections.abc import Sequence

import torch
from torch import Tensor

STRENGTHS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)  # C, the inverse of the l1 penalty's weight; the paper's grid


def balanced_subset(group: Tensor, *, groups: int, generator: torch.Generator) -> Tensor:
    """Indices of a random subset in which every group has as many examples as the smallest has.

    Raises ValueError for a group without example.
    """
    if int(size := group.bincount(minlength=groups).min()) == 0:
        empty = [g for g in range(groups) if not (group == g).any()]
        raise ValueError(f"no example of group {empty[0]}; permitted: one or more of each of the {groups} groups")
    shuffled = torch.randperm(len(group), generator=generator)
    return torch.cat([shuffled[group[shuffled] == g][:size] for g in range(groups)])


def retrain_last_layer(
    features: Tensor,
    label: Tensor,
    *,
    group: Tensor,
    groups: int,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    refits: int = 20,
    seed: int = 0,
) -> tuple[Tensor, Tensor, float]:
    """A new linear head from ``features [n, d]``, ``label`` and ``group [n]`` (on the CPU), usually of validation.

    Half of the examples, cut to balanced groups, fit an l1-penalised logistic regression for each of ``strengths``;
    the one with the best worst-group accuracy on the other half is refitted on ``refits`` balanced subsets of all
    examples, and the refits are averaged. Features are standardised for the fits, and the head undoes that.

    Returns weight ``[classes, d]`` and bias ``[classes]``, float64, for ``features @ weight.T + bias``, and the chosen
    strength. Raises ValueError for a group without example, also in the half that fits, and for a single class.
    """
    if len(label.unique()) < classes or classes < 2:
        raise ValueError(f"labels are {label.unique().tolist()}; permitted: all of 0 to {classes - 1}, two or more")
    generator = torch.Generator().manual_seed(seed)
    features = features.double()
    centre, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)  # a constant feature carries nothing
    inputs = (features - centre) / scale

    shuffled = torch.randperm(len(label), generator=generator)
    kept, fitted = shuffled[: len(label) // 2], shuffled[len(label) // 2 :]
    fitted = fitted[balanced_subset(group[fitted], groups=groups, generator=generator)]

    def worst_group(strength: float) -> float:
        weight, bias = _fit(inputs[fitted], label[fitted], classes, strength, seed)
        right = (inputs[kept] @ weight.T + bias).argmax(-1) == label[kept]
        return min(float(right[group[kept] == g].double().mean()) for g in group[kept].unique())

    chosen = max(strengths, key=worst_group)
    subsets = [balanced_subset(group, groups=groups, generator=generator) for _ in range(refits)]
    heads = [_fit(inputs[subset], label[subset], classes, chosen, seed) for subset in subsets]
    weight, bias = (torch.stack(parts).mean(0) for parts in zip(*heads, strict=True))
    weight = weight / scale
    return weight, bias - weight @ centre, chosen


def _fit(inputs: Tensor, label: Tensor, classes: int, strength: float, seed: int) -> tuple[Tensor, Tensor]:
    """Weight ``[classes, d]`` and bias ``[classes]`` of a logistic regression; of two classes the first has zeros."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    # l1 has a new name since 1.8; liblinear, the authors' solver, knows two classes only
    new = tuple(int(part) for part in sklearn.__version__.split(".")[:2]) >= (1, 8)
    l1 = {"l1_ratio": 1.0} if new else {"penalty": "l1"}
    solver = {"solver": "liblinear"} if classes == 2 else {"solver": "saga", "max_iter": 1000}
    model = LogisticRegression(**l1, C=strength, random_state=seed, **solver)
    model.fit(inputs.numpy(), label.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if classes == 2:
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    return weight, bias
