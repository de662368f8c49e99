"""What an adapter gives away: attacks find what is planted, and nothing where nothing is; clip and noise."""

from itertools import permutations

import numpy as np
import pytest
import sklearn.metrics
import torch

from fairtuning.collaboration.leakage import (
    ATTACKS,
    LEVELS,
    byte_levels,
    clip_and_noise,
    clusters,
    log_loss,
    matching,
    membership_scores,
    reader,
    true_positive_rate,
)
from fairtuning.metrics import auroc


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def size(tensor):
    return float(tensor.square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------ clip and noise
ADAPTER = {"A": 3 * draw(40, 50, seed=1), "B": 0.01 * draw(60, 40, seed=2)}


def test_without_clip_an_adapter_is_as_it_was_bit_for_bit():
    found = clip_and_noise(ADAPTER, seed=3)
    assert found.keys() == ADAPTER.keys() and all(torch.equal(found[name], ADAPTER[name]) for name in ADAPTER)
    loose = clip_and_noise(ADAPTER, clip=100.0)
    assert all(torch.equal(loose[name], ADAPTER[name]) for name in ADAPTER)


def test_each_tensor_is_clipped_by_itself_and_keeps_its_direction():
    found = clip_and_noise(ADAPTER, clip=0.5)
    assert size(found["A"]) == pytest.approx(0.5, rel=1e-5) and torch.equal(found["B"], ADAPTER["B"])
    torch.testing.assert_close(found["A"] / found["A"].norm(), ADAPTER["A"] / ADAPTER["A"].norm())


def test_noise_has_the_scale_that_was_asked_for_and_one_direction_by_seed():
    plain, one, four, other = (
        clip_and_noise(ADAPTER, clip=0.5, noise=noise, seed=seed) for noise, seed in ((0, 0), (1, 0), (4, 0), (1, 1))
    )
    for name in ADAPTER:
        noise = one[name] - plain[name]
        assert size(noise) == pytest.approx(0.5, rel=0.06) and abs(float(noise.mean())) < 0.05
        torch.testing.assert_close(four[name] - plain[name], 4 * noise, rtol=1e-3, atol=1e-5)
        assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("settings", [dict(noise=1.0), dict(clip=-1.0), dict(clip=1.0, noise=-1.0)])
def test_noise_without_a_bound_is_an_error(settings):
    with pytest.raises(ValueError, match="allowed: 0 or more, and noise with a clip above 0 only"):
        clip_and_noise(ADAPTER, **settings)


# ---------------------------------------------------------------------------------------------------------- attribute
def blobs(n, *, apart, groups=2, seed=0):
    """Features whose mean tells the attribute, and the attribute."""
    attribute = torch.randint(groups, (n,), generator=torch.Generator().manual_seed(seed))
    return draw(n, 6, seed=seed + 1) + apart * torch.eye(groups, 6)[attribute], attribute


@pytest.mark.parametrize("groups", [2, 3])
def test_clusters_find_groups_that_lie_apart_without_a_label(groups):
    public, known = blobs(300, apart=8.0, groups=groups)
    target, truth = blobs(200, apart=8.0, groups=groups, seed=10)
    of_public, of_target = clusters(public, target, number=groups)
    named = matching(of_public, known, number=groups)
    assert (named[of_target] == truth).double().mean() > 0.98
    assert sorted(named.tolist()) == list(range(groups))


def test_clusters_of_noise_tell_nothing():
    rights = []
    for seed in range(5):
        (public, known), (target, truth) = (blobs(400, apart=0.0, seed=50 * seed + s) for s in (0, 20))
        of_public, of_target = clusters(public, target, seed=seed)
        rights.append(float((matching(of_public, known)[of_target] == truth).double().mean()))
    assert abs(np.mean(rights) - 0.5) < 0.04


def test_the_matching_is_the_best_of_all():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cluster, attribute = torch.from_numpy(rng.integers(0, 3, (2, 30)))
        best = max(permutations(range(3)), key=lambda names: int((torch.tensor(names)[cluster] == attribute).sum()))
        right = [
            int((torch.as_tensor(names)[cluster] == attribute).sum())
            for names in (best, matching(cluster, attribute, number=3))
        ]
        assert right[0] == right[1]


def test_a_reader_of_one_attribute_always_says_it():
    public, target = draw(10, 3), draw(5, 3, seed=1)
    assert reader(public, torch.ones(10, dtype=torch.long)).predict(target.numpy()).tolist() == [1] * 5
    loss = log_loss(public, torch.ones(10, dtype=torch.long), target, torch.tensor([1, 1, 0, 1, 0]))
    assert loss[[0, 1, 3]].tolist() == [0.0] * 3 and (loss[[2, 4]] > 20).all()


# --------------------------------------------------------------------------------------------------------- membership
def scored(remembered, *, n=300):
    """Membership scores of n members and n others; an adapter that moves members' features to their attribute's side,
    by ``remembered``, as over-fitting does."""
    frozen, attribute = blobs(2 * n, apart=1.0, seed=1)
    public, known = blobs(500, apart=1.0, seed=5)
    moves = torch.eye(2, 6)[attribute] * torch.cat([torch.ones(n), torch.zeros(n)])[:, None]
    noise = 0.1 * draw(2 * n, 6, seed=9)
    return membership_scores(
        frozen + remembered * moves + noise, frozen, attribute,
        public_adapted=public, public_frozen=public, public_attribute=known,
    )  # fmt: skip


def counts_of(levels, member):
    counts = torch.zeros(2, LEVELS)
    return counts.index_put_((member, levels), torch.ones(()), accumulate=True)


MEMBER = torch.tensor([1] * 300 + [0] * 300)


def area(scores):
    return float(auroc(counts_of(byte_levels(scores), MEMBER)))


def test_a_planted_memory_is_found_and_none_is_found_where_there_is_none():
    found, nothing = scored(3.0), scored(0.0)
    assert set(found) == set(nothing) == set(ATTACKS)
    assert area(found["loss"]) > 0.7 and area(found["calibrated"]) > 0.9 and area(found["distance"]) > 0.99
    assert all(abs(area(scores) - 0.5) < 0.07 for scores in nothing.values())
    assert torch.equal(found["frozen"], nothing["frozen"])  # the control never sees the adapter


def test_the_loss_is_that_of_the_head():
    public, known = blobs(200, apart=1.0)
    target, truth = blobs(50, apart=1.0, seed=4)
    fitted = reader(public, known)
    slow = [
        sklearn.metrics.log_loss([y], fitted.predict_proba(x[None].double().numpy()), labels=[0, 1])
        for x, y in zip(target, truth.tolist(), strict=True)
    ]
    assert log_loss(public, known, target, truth).tolist() == pytest.approx(slow)


def test_bytes_keep_the_order_and_the_roc_curve():
    scores = torch.cat([draw(3000) + 0.3, draw(3000, seed=1)]).double().exp()
    member = torch.tensor([1] * 3000 + [0] * 3000)
    levels = byte_levels(scores)
    assert int(levels.min()) >= 0 and int(levels.max()) < LEVELS
    assert (levels[scores.argsort()].diff() >= 0).all()
    counts = counts_of(levels, member)
    assert float(auroc(counts)) == pytest.approx(sklearn.metrics.roc_auc_score(member, scores), abs=1e-3)
    false, true, _ = sklearn.metrics.roc_curve(member, scores)
    assert float(true_positive_rate(counts)) == pytest.approx(np.interp(0.01, false, true), abs=4e-3)
    assert byte_levels(torch.tensor([1.0, 1.0, 2.0, 1.0])).unique().numel() == 2


def test_the_true_positive_rate_lies_on_the_roc_curve():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (40, 2, 9))
    counts[..., 4] += 1  # no class is empty
    for at in (0.01, 0.25, 1.0):
        found = true_positive_rate(torch.from_numpy(counts), at=at)
        for one, table in zip(found, counts, strict=True):
            label, score = (
                np.repeat([0, 1], table.sum(1)),
                np.concatenate([np.repeat(np.arange(9), row) for row in table]),
            )
            false, true, _ = sklearn.metrics.roc_curve(label, score, drop_intermediate=False)
            first = int((false < at).sum())  # where a step goes straight up, the curve is read at its foot
            share = (at - false[first - 1]) / (false[first] - false[first - 1])
            assert float(one) == pytest.approx(true[first - 1] + share * (true[first] - true[first - 1]))
