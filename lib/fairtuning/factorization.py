"""Splitting a linear head in two under importance weights (Zhang & Zhou 2024, arXiv 2403.00625, eqs 2 to 4).

Everything is in the paper's layout, Z = X W + b with W [d, k]: rows of W are input features.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from fairtuning.fisher import row_importance


def _average(values: Tensor, weight: Tensor) -> Tensor:
    return (weight.unsqueeze(-1) * values).sum(-2)  # over the groups: [..., G, d] -> [..., d]


def _normalised(fisher: Tensor, weight: Tensor, *_) -> Tensor:
    rows = row_importance(fisher)
    return _average(rows / rows.mean(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny), weight)


def _pooled(fisher: Tensor, weight: Tensor, sizes: Tensor | None, generator: Generator | None) -> Tensor:
    if sizes is None:
        raise ValueError("sizes is None; permitted for variant 'pooled': the examples of each group, [..., groups]")
    share = sizes.to(fisher)  # before the division: whole numbers would divide in float32
    share = share / share.sum(-1, keepdim=True)
    rows = fisher.sum(-1)
    return _average(rows.where(share.unsqueeze(-1) > 0, 0), share).sqrt()  # a group without examples is NaN


def _random(fisher: Tensor, weight: Tensor, sizes: Tensor | None, generator: Generator | None) -> Tensor:
    if generator is None:
        raise ValueError("generator is None; permitted for variant 'random': a torch.Generator")
    shape = fisher[..., 0, :, 0].shape
    return torch.randn(shape, generator=generator, device=generator.device, dtype=fisher.dtype).exp().to(fisher)


# Ways from the groups' Fishers to one importance per input feature: (fisher, weight [..., G], sizes, generator).
VARIANTS: dict[str, Callable[..., Tensor]] = {
    "neutralised": lambda fisher, weight, *_: _average(row_importance(fisher), weight),  # eq. 2: root, then average
    "average_first": lambda fisher, weight, *_: _average(fisher.sum(-1), weight).sqrt(),
    "normalised": _normalised,  # every group's profile scaled to mean 1 first: none leads by its size alone
    "group_0": lambda fisher, *_: row_importance(fisher[..., 0, :, :]),
    "group_1": lambda fisher, *_: row_importance(fisher[..., 1, :, :]),
    "pooled": _pooled,  # all examples together, groups unknown: FWSVD (Hsu et al. 2022)
    "random": _random,  # log-normal: the control for "any weights would do"
}


def neutralise(
    fisher: Tensor,
    *,
    alpha: float | Tensor | None = None,
    variant: str = "neutralised",
    sizes: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """One importance per input feature from the groups' Fishers (Zhang & Zhou 2024, eq. 2).

    `fisher` [..., G, d, k] -> [..., d]: Σ_s α_s √(Σ_c I_s,jc), the roots before the average. `alpha` is the weight of
    group 0 of two, group 1 has 1 - alpha (a tensor gives each run its own); None is 1/G for every group. `variant`
    is a name in `VARIANTS`; "pooled" needs the groups' `sizes` [..., G], "random" a `generator`. A group without
    examples makes the result NaN, unless "pooled". Raises ValueError outside these.

    >>> fisher = torch.tensor([[[1.0, 0.0]], [[4.0, 5.0]]])   # two groups, one feature, two classes
    >>> neutralise(fisher), neutralise(fisher, variant="average_first")
    (tensor([2.]), tensor([2.2361]))
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; permitted: {', '.join(VARIANTS)}")
    groups = fisher.shape[-3]
    first = torch.as_tensor(1 / groups if alpha is None else alpha, dtype=fisher.dtype, device=fisher.device)
    if groups == 2 and ((first >= 0) & (first <= 1)).all():
        weight = torch.stack([first, 1 - first], -1)
    elif groups != 2 and first.allclose(first.new_tensor(1 / groups)):
        weight = first.unsqueeze(-1).expand(*first.shape, groups)
    else:
        permitted = "0 to 1" if groups == 2 else f"None or 1/{groups}"
        raise ValueError(f"alpha is {first.tolist()}; permitted for {groups} groups: {permitted}")
    return VARIANTS[variant](fisher, weight, sizes, generator)


def low_rank(
    W: Tensor, rank: int, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best A [..., d, rank], B [..., rank, k] for W [..., d, k] under weights (Zhang & Zhou 2024, eqs 3 and 4).

    Minimises Σ_ij (rows_i columns_j (W - A B)_ij)²; `rows` [..., d] >= 0, `columns` [..., k] > 0, None is 1. With
    rows only, A = W V and B = V^T, where V holds the top eigenvectors of W^T diag(rows)² W: the paper's
    A = diag(rows)^-1 U S wherever that exists, but a zero importance does no harm. Without weights it is the plain SVD,
    A = U S. Rows of B have their largest entry (the first of equals) positive. Leading axes are runs, and broadcast.
    Raises ValueError for a rank outside 1..min(d, k) and for weights that are negative or not finite.

    >>> A, B = low_rank(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1)
    >>> A, B
    (tensor([[5.],
            [0.]]), tensor([[0.6000, 0.8000]]))
    """
    d, k = W.shape[-2:]
    if not 1 <= rank <= min(d, k):
        raise ValueError(f"rank is {rank}; permitted for W of {d} x {k}: 1..{min(d, k)}")
    if rows is not None and not ((rows >= 0) & rows.isfinite()).all():
        raise ValueError(f"rows span {rows.min():.3g}..{rows.max():.3g}; permitted: finite and not negative")
    if columns is not None and not ((columns > 0) & columns.isfinite()).all():
        raise ValueError(f"columns span {columns.min():.3g}..{columns.max():.3g}; permitted: finite and positive")
    scaled = W if columns is None else W * columns.unsqueeze(-2)
    basis, core = None, scaled
    if d < k:  # work in W's row space: the smaller Gram matrix, and exact at full rank whatever the weights
        basis, core = torch.linalg.qr(scaled.mT)
        core = core.mT
    if rows is not None:  # the maximum to 1: squares of small importances would leave the range of float32
        core = core * (rows / rows.amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)).unsqueeze(-1)
    V = torch.linalg.eigh(core.mT @ core).eigenvectors[..., -rank:].flip(-1)
    V = V if basis is None else basis @ V
    A, B = scaled @ V, V.mT if columns is None else V.mT / columns.unsqueeze(-2)
    size = B.abs()
    first = (size > 0.999 * size.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1, keepdim=True)
    sign = B.gather(-1, first).sign()  # equal entries, as of a head with w_0 = -w_1, must not leave it to rounding
    return A * sign.mT, B * sign


class FactoredHead(nn.Module):
    """A head of two layers, X A B + b: r (d + k) + k parameters instead of d k + k (Zhang & Zhou 2024, Fig. 2).

    >>> head = FactoredHead(20, 2, rank=2)
    >>> sum(p.numel() for p in head.parameters())   # the paper's 46
    46
    """

    def __init__(self, d: int, k: int, *, rank: int) -> None:
        super().__init__()
        self.first = nn.Linear(d, rank, bias=False)
        self.second = nn.Linear(rank, k)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, bias: Tensor) -> "FactoredHead":
        """A head that starts at A [d, r], B [r, k], bias [k], copied, in their type and on their device."""
        (d, rank), k = A.shape, B.shape[-1]
        head = cls(d, k, rank=rank).to(A)
        state = {"first.weight": A.mT, "second.weight": B.mT, "second.bias": bias}
        head.load_state_dict(state)
        return head

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., d] -> logits [..., k]."""
        return self.second(self.first(x))
