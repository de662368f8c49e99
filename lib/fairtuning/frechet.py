"""The Fréchet distance between two sets of features, each taken for a Gaussian (Heusel et al. 2017; arXiv 2410.17358,
Table 4). On Inception's features and with clean-fid's resizing it is the FID; on a backbone's it is our own number,
which compares with other distances on the same features only.
"""

import torch
from torch import Tensor


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features ``[n1, d]`` and ``[n2, d]``, in float64.

    m are means, C covariances (n - 1). It is biased upwards for few examples: compare sets of one size, n well above d.
    Raises ValueError for fewer than two examples, another number of features, or a value that is not finite.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [7.0]]))   # means 5 apart, variances alike
    25.0
    """
    for name, features in (("first", ours), ("second", theirs)):
        if features.dim() != 2 or len(features) < 2 or not features.isfinite().all():
            raise ValueError(
                f"the {name} features are {list(features.shape)}, finite: {bool(features.isfinite().all())}; "
                "permitted: finite [n, d], n of 2 or more"
            )
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} and {theirs.shape[1]} features; permitted: as many in both")
    ours, theirs = ours.double(), theirs.double()
    first, second = torch.cov(ours.T).reshape(2 * ours.shape[1:]), torch.cov(theirs.T).reshape(2 * theirs.shape[1:])
    # tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2), where each root is symmetric.
    root = torch.linalg.svdvals(_root(first) @ _root(second)).sum()
    squared = (ours.mean(0) - theirs.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root
    return max(float(squared), 0.0)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
