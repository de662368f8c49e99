"""What an adapter gives away to somebody who holds it, the frozen backbone and public images.

In arXiv 2503.05684 the auditor sends an adapter that was trained on the attribute of its images, and no head. The
attacks here are simple ones, on features with and without that adapter, so what they find is the least that leaks;
stronger ones exist (adapters trained by the attacker for comparison, arXiv 2112.03570). None of this is in the paper.
"""

import torch
from torch import Tensor

from fairtuning.networks import Parameters

#: Scores of membership, higher for members, with what an attacker needs besides the adapter and public images.
ATTACKS = {
    "loss": "the candidate's attribute; a head fitted to public images of known attribute (arXiv 1709.01604)",
    "calibrated": "the same; the loss is compared with that of a head without the adapter (arXiv 2111.08440)",
    "distance": "the candidate's image alone: how far the adapter moves its features",
    "frozen": "a control: the loss of a head on the backbone alone, which has seen neither half",
}
KNOWN = (10, 100, 1000)  # public images whose attribute an attacker knows (or all images that there are)
LEVELS = 256  # a score is kept as one byte
REACH = 7.0  # of the log odds of its rank: ranks from 0.001 to 0.999 are told apart best at both ends


def clip_and_noise(adapter: Parameters, *, clip: float = 0.0, noise: float = 0.0, seed: int = 0) -> Parameters:
    """An adapter made harder to read: every tensor clipped by itself, then Gaussian noise on every number.

    A tensor whose root mean square is above ``clip`` (0: none) is scaled down to it; the noise has standard deviation
    ``noise * clip``, and one ``seed`` draws the same directions at every scale. This is not differential privacy: how
    far one image can move the adapter is not bounded, and nothing is accounted for. Clipping alone can be undone by
    whoever scales back. Raises ValueError for noise without a bound to measure it by.
    """
    if min(clip, noise) < 0 or (noise and not clip):
        raise ValueError(f"clip is {clip} and noise {noise}; allowed: 0 or more, and noise with a clip above 0 only")
    if not clip:
        return adapter
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in adapter.items():
        drawn = torch.randn(value.shape, generator=generator).to(value)
        size = value.square().mean().sqrt()
        found[name] = value * (clip / size if size > clip else 1.0) + noise * clip * drawn
    return found


# ---------------------------------------------------------------------------------------------------------- attribute
def reader(features: Tensor, attribute: Tensor):
    """A linear classifier of the attribute ``[n]`` from features ``[n, p]``: standardised, logistic, l2 with C = 1.

    Where all examples have one attribute, it always says that one.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(max_iter=2000) if len(attribute.unique()) > 1 else DummyClassifier()
    return make_pipeline(StandardScaler(), classifier).fit(_array(features), attribute.numpy())


def clusters(public: Tensor, target: Tensor, *, number: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``number`` clusters (k-means, the best of 10 starts) of public features ``[n, p]``, without any attribute.

    Returns the cluster of each public example ``[n]`` and of each target ``[m]``, 0 to ``number`` - 1.
    """
    from sklearn.cluster import KMeans

    found = KMeans(number, n_init=10, random_state=seed).fit(_array(public))
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.predict(_array(target))).long()


def matching(cluster: Tensor, attribute: Tensor, *, number: int = 2) -> Tensor:
    """Which attribute each cluster stands for, ``[number]``: of all one-to-one matchings the one that is right most
    often. Two clusters have two names to choose from, so this tells an attacker one bit.

    >>> matching(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 1]))
    tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    together = torch.bincount(cluster * number + attribute, minlength=number**2).reshape(number, number)
    return torch.from_numpy(linear_sum_assignment(together.numpy(), maximize=True)[1])


# --------------------------------------------------------------------------------------------------------- membership
def membership_scores(
    adapted: Tensor,
    frozen: Tensor,
    attribute: Tensor,
    *,
    public_adapted: Tensor,
    public_frozen: Tensor,
    public_attribute: Tensor,
) -> dict[str, Tensor]:
    """The scores of ATTACKS for candidates, ``[n]`` each.

    ``adapted`` and ``frozen`` ``[n, p]`` are the candidates' features with and without the adapter; the heads are
    fitted to the public ones ``[m, p]``, whose attribute ``[m]`` is known.
    """
    with_adapter = log_loss(public_adapted, public_attribute, adapted, attribute)
    without = log_loss(public_frozen, public_attribute, frozen, attribute)
    distance = (adapted - frozen).double().norm(dim=-1)
    return {"loss": -with_adapter, "calibrated": without - with_adapter, "distance": distance, "frozen": -without}


def log_loss(public: Tensor, public_attribute: Tensor, features: Tensor, attribute: Tensor) -> Tensor:
    """Cross-entropy ``[n]`` of each candidate under a ``reader`` of the public examples."""
    fitted = reader(public, public_attribute)
    probability = torch.zeros(len(features), int(max(attribute.max(), public_attribute.max())) + 1).double()
    probability[:, fitted.classes_] = torch.from_numpy(fitted.predict_proba(_array(features)))
    return -probability.gather(1, attribute[:, None])[:, 0].clamp(min=1e-12).log()


def byte_levels(scores: Tensor) -> Tensor:
    """Scores ``[n]`` as levels 0 to 255 of their ranks, even in log odds: fine where few are above, or few below.

    The order is kept but for ties, and the ROC curve with it.
    """
    from scipy.stats import rankdata

    share = (torch.from_numpy(rankdata(scores.numpy())) - 0.5) / len(scores)
    return ((share.logit() + REACH) / (2 * REACH) * LEVELS).long().clamp(0, LEVELS - 1)


def true_positive_rate(counts: Tensor, *, at: float = 0.01) -> Tensor:
    """True positive rate where the false positive rate is ``at``, ``[...]``, of counts ``[..., 2, levels]``.

    Counts of true class by score, from low to high. Between the points of the ROC curve straight lines, as for ties.

    >>> float(true_positive_rate(torch.tensor([[2, 1, 1], [0, 1, 3]]), at=0.375))      # (1/4, 3/4), (2/4, 4/4)
    0.875
    """
    above = counts.double().flip(-1).cumsum(-1)
    rates = above / above[..., -1:]
    rates = torch.cat([torch.zeros_like(rates[..., :1]), rates], -1)
    false, true = rates.unbind(-2)
    after = (false < at).sum(-1, keepdim=True)
    (x0, x1), (y0, y1) = ([rate.gather(-1, after - 1), rate.gather(-1, after)] for rate in (false, true))
    return (y0 + (y1 - y0) * (at - x0) / (x1 - x0))[..., 0]


def _array(features: Tensor):
    return features.double().cpu().numpy()
