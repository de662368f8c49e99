"""Losses of groups against slow loops, finite differences and the paper's own gradient; last-layer retraining."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtuning import last_layer, losses

NAN = float("nan")


def draw(*, runs=(3,), n=40, groups=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*runs, n, classes, generator=generator, dtype=torch.float64)
    label = torch.randint(classes, (*runs, n), generator=generator)
    group = torch.randint(groups, (*runs, n), generator=generator)
    return logits, label, group


def slow_group_means(loss, group):
    means = {}
    for g in set(group):
        inside = [value for value, h in zip(loss, group, strict=True) if h == g]
        means[g] = sum(inside) / len(inside)
    return means


def slow_variance(loss, group):
    """Eq. 1 for one run, plain Python."""
    means = list(slow_group_means(loss, group).values())
    centre = sum(means) / len(means) if means else 0.0
    return sum((mean - centre) ** 2 for mean in means)


# ------------------------------------------------------------------------------------------------ eq. 1, the penalty
@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 4)), max_size=8))
def test_penalty_equals_its_slow_twin_whatever_groups_are_absent(pairs):
    loss = torch.tensor([value for value, _ in pairs], dtype=torch.float64).requires_grad_()
    group = torch.tensor([g for _, g in pairs], dtype=torch.int64)
    value = losses.group_loss_variance(loss, group, groups=5)
    assert float(value.detach()) == pytest.approx(slow_variance(loss.tolist(), group.tolist()), abs=1e-12)
    (gradient,) = torch.autograd.grad(value, loss)
    assert gradient.isfinite().all()
    if len(group.unique()) < 2:
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("runs", [(), (3,), (2, 2)])
def test_runs_are_penalised_as_if_alone(runs):
    logits, label, group = draw(runs=runs)
    loss = losses.cross_entropy(logits, label)
    value = losses.group_loss_variance(loss, group, groups=4)
    expected = [
        slow_variance(*run) for run in zip(loss.view(-1, 40).tolist(), group.view(-1, 40).tolist(), strict=True)
    ]
    assert value.shape == runs and value.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_runs_may_share_their_groups():
    logits, label, group = draw()
    loss = losses.cross_entropy(logits, label)
    shared = losses.group_loss_variance(loss, group[0], groups=4)
    assert torch.equal(shared, losses.group_loss_variance(loss, group[:1].expand(3, -1), groups=4))


def test_penalty_is_the_number_of_groups_times_the_population_variance():
    logits, label, group = draw(runs=())
    loss = losses.cross_entropy(logits, label)
    mean, size = losses.group_means(loss, group, groups=4)
    assert size.tolist() == group.bincount(minlength=4).tolist()
    torch.testing.assert_close(
        losses.group_loss_variance(loss, group, groups=4), 4 * mean.var(correction=0), rtol=1e-12, atol=0
    )


def test_equal_group_losses_give_zero_and_a_zero_gradient():
    loss = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    value = losses.group_loss_variance(loss, torch.tensor([0, 0, 1, 2]), groups=3)
    assert value == 0 and not torch.autograd.grad(value, loss)[0].any()


def test_gradients_on_lora_factors_are_those_of_the_papers_appendix():
    """theta = theta_0 + A B: dJ/dA = sum of (dL/dtheta + lambda 2 (L_g - mean) dL_g/dtheta) B^T, dJ/dB likewise."""
    generator = torch.Generator().manual_seed(0)
    inputs, theta_0, a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((30, 6), (6, 3), (6, 2), (2, 3))
    )
    _, label, group = draw(runs=(), n=30)
    lam = 1.7
    a.requires_grad_()
    b.requires_grad_()
    objective = losses.variance_penalised_loss(inputs @ (theta_0 + a @ b), label, group=group, groups=4, lam=lam)
    by_autograd = torch.autograd.grad(objective, (a, b))

    theta = (theta_0 + a @ b).detach()
    delta = (inputs @ theta).softmax(-1) - torch.nn.functional.one_hot(label, 3)  # gradient at the logits
    loss = losses.cross_entropy(inputs @ theta, label)
    of_group = [inputs[group == g].T @ delta[group == g] / (group == g).sum() for g in range(4)]
    means = torch.stack([loss[group == g].mean() for g in range(4)])
    by_theta = inputs.T @ delta / 30 + sum(lam * 2 * (means[g] - means.mean()) * of_group[g] for g in range(4))
    torch.testing.assert_close(by_autograd[0], by_theta @ b.detach().T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_autograd[1], a.detach().T @ by_theta, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences_also_with_an_absent_group():
    logits, label, group = draw(runs=(2,), n=12, groups=3)
    lam = torch.tensor([0.5, 10.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: losses.variance_penalised_loss(z, label, group=group, groups=5, lam=lam), logits.requires_grad_()
    )


def test_lambda_zero_is_the_plain_loss_bit_for_bit_and_a_negative_one_is_refused():
    logits, label, group = draw()
    plain = losses.cross_entropy(logits, label).mean(-1)
    assert torch.equal(losses.variance_penalised_loss(logits, label, group=group, groups=4, lam=0.0), plain)
    with pytest.raises(ValueError, match=r"lam is -1.0; permitted: 0 or more"):
        losses.variance_penalised_loss(logits, label, group=group, groups=4, lam=torch.tensor([1.0, -1.0, 2.0]))


def test_groups_by_class_attribute_or_both():
    label, attribute = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 0, 1])
    groups = {by: losses.penalty_groups(label, attribute, by=by, classes=3, attributes=2) for by in losses.GROUPINGS}
    assert groups["class"] == (label, 3) and groups["attribute"] == (attribute, 2)
    both, number = groups["class x attribute"]
    assert both.tolist() == [1, 2, 4, 5] and number == 6
    with pytest.raises(ValueError, match="groups are by 'region'; permitted are class, attribute, class x attribute"):
        losses.penalty_groups(label, attribute, by="region", classes=3, attributes=2)


# ------------------------------------------------------------------------------------------------- moving averages
def test_without_memory_the_smoothed_penalty_is_eq_1():
    logits, label, group = draw()
    loss = losses.cross_entropy(logits, label).requires_grad_()
    start = torch.full((3, 4), NAN, dtype=torch.float64)
    for decay in (0.0, 0.9):  # at the first batch there is nothing to remember
        value, average = losses.smoothed_group_loss_variance(loss, group, average=start, decay=decay)
        plain = losses.group_loss_variance(loss, group, groups=4)
        torch.testing.assert_close(value, plain)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), loss)[0] for v in (value, plain)))
        assert torch.equal(average, losses.group_means(loss, group, groups=4)[0]) and not average.requires_grad


def test_moving_averages_equal_a_slow_loop_over_batches():
    average, slow = torch.full((6,), NAN, dtype=torch.float64), {}
    for seed in range(5):
        logits, label, group = draw(runs=(), n=5, groups=6, seed=seed)
        loss = losses.cross_entropy(logits, label).requires_grad_()
        value, average = losses.smoothed_group_loss_variance(loss, group, average=average, decay=0.8)
        means = slow_group_means(loss.tolist(), group.tolist())
        slow |= {g: 0.8 * slow[g] + 0.2 * mean if g in slow else mean for g, mean in means.items()}
        centre = sum(slow.values()) / len(slow)
        assert float(value.detach()) == pytest.approx(sum((mean - centre) ** 2 for mean in slow.values()), abs=1e-12)
        gradient = [2 * (slow[g] - centre) / group.tolist().count(g) for g in group.tolist()]
        assert torch.autograd.grad(value, loss)[0].tolist() == pytest.approx(gradient, abs=1e-12)
    assert {g: m for g, m in enumerate(average.tolist()) if not math.isnan(m)} == pytest.approx(slow)


def test_signal_of_the_penalty_equals_a_slow_loop_over_batches():
    generator = torch.Generator().manual_seed(0)
    loss, group = torch.rand(50, generator=generator).double(), torch.randint(5, (50,), generator=generator)
    found = losses.penalty_and_signal(loss, group, groups=5, batch_size=8)
    means = {g: float(loss[group == g].mean()) for g in range(5)}
    penalty, signal = [], []
    for start in range(0, 48, 8):  # the last two examples are no whole batch
        for values, into in ((loss, penalty), (torch.tensor([means[int(g)] for g in group]), signal)):
            here, there = values[start : start + 8].double(), group[start : start + 8]
            of_group = [float(here[there == g].mean()) for g in sorted(set(there.tolist()))]
            centre = sum(of_group) / len(of_group)
            into.append(sum((value - centre) ** 2 for value in of_group))
    assert found == pytest.approx((sum(penalty) / 6, sum(signal) / 6), rel=1e-6)
    assert all(math.isnan(value) for value in losses.penalty_and_signal(loss, group, groups=5, batch_size=64))


@pytest.mark.parametrize("spread, low, high", [(0.0, 0.97, 1.0), (100.0, 0.0, 0.01)])
def test_planted_noise_and_planted_differences_are_told_apart(spread, low, high):
    """70 groups, batches of 32: losses that differ within the groups alone, and almost between them alone."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(70, (32 * 400,), generator=generator)
    loss = torch.randn(len(group), generator=generator) + spread * torch.randn(70, generator=generator)[group]
    penalty, signal = losses.penalty_and_signal(loss, group, groups=70, batch_size=32)
    assert low <= 1 - signal / penalty <= high


def test_smoothing_by_one_or_more_is_refused():
    with pytest.raises(ValueError, match="decay is 1.0; permitted: 0 to below 1"):
        losses.smoothed_group_loss_variance(torch.ones(1), torch.zeros(1).long(), average=torch.ones(1), decay=1.0)


# --------------------------------------------------------------------------------------------- group DRO, reweighting
def test_group_dro_follows_algorithm_1():
    logits, label, group = draw(runs=())
    loss = losses.cross_entropy(logits, label).requires_grad_()
    q, adjustment = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.tensor([0.0, 0.1, 0.2, 0.3])
    value, after = losses.group_dro_loss(loss, group, weights=q, step=0.5, adjustment=adjustment)
    means = losses.group_means(loss, group, groups=4)[0].tolist()
    raised = [w * math.exp(0.5 * (m + c)) for w, m, c in zip(q.tolist(), means, adjustment.tolist(), strict=True)]
    expected = [w / sum(raised) for w in raised]
    assert after.tolist() == pytest.approx(expected) and not after.requires_grad
    assert float(value.detach()) == pytest.approx(sum(w * m for w, m in zip(expected, means, strict=True)))
    sizes = group.bincount()
    torch.testing.assert_close(torch.autograd.grad(value, loss)[0], (after / sizes)[group])


def test_group_dro_ends_at_the_worst_group_and_survives_absent_ones():
    loss, group = torch.tensor([1.0, 3.0]), torch.tensor([0, 2])
    q = torch.ones(3) / 3
    for _ in range(400):
        value, q = losses.group_dro_loss(loss, group, weights=q, step=0.1)
    assert q.isfinite().all() and float(q[2]) == pytest.approx(1) and float(value) == pytest.approx(3)


def test_group_dro_is_batched_over_runs():
    logits, label, group = draw()
    loss = losses.cross_entropy(logits, label)
    q = torch.rand(3, 4, dtype=torch.float64)
    together = losses.group_dro_loss(loss, group, weights=q)
    for run in range(3):
        alone = losses.group_dro_loss(loss[run], group[run], weights=q[run])
        for one, all_runs in zip(alone, together, strict=True):
            torch.testing.assert_close(all_runs[run], one)


def test_balanced_weights_give_every_group_the_same_total():
    group = torch.tensor([3] * 7 + [0] * 2 + [1])
    weights = losses.balanced_weights(group, groups=5)
    totals = torch.zeros(5, dtype=torch.float64).index_add(0, group, weights)
    assert totals.tolist() == pytest.approx([10 / 3, 10 / 3, 0, 10 / 3, 0]) and float(weights.mean()) == 1


# --------------------------------------------------------------------------------------------- last-layer retraining
def shortcut(n, agreement, seed):
    """Label in feature 0, an attribute that mostly agrees with it, and is easier to see, in feature 1."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (n,), generator=generator)
    attribute = torch.where(torch.rand(n, generator=generator) < agreement, label, 1 - label)
    features = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    features[:, 0] += 3 * label - 1.5
    features[:, 1] += 6 * attribute - 3
    features[:, 5] = 7.0  # tells nothing
    return features, label, 2 * label + attribute


def worst_group(weight, bias, features, label, group):
    right = (features @ weight.T + bias).argmax(-1) == label
    return min(float(right[group == g].double().mean()) for g in range(4))


def test_retraining_on_balanced_groups_lets_go_of_the_shortcut():
    features, label, group = shortcut(800, 0.95, seed=0)
    weight, bias, strength = last_layer.retrain_last_layer(features, label, group=group, groups=4, classes=2, refits=5)
    assert weight.shape == (2, 6) and bias.shape == (2,) and strength in last_layer.STRENGTHS
    plain, plain_bias = last_layer._fit(features, label, 2, 1.0, 0)
    test = shortcut(4000, 0.5, seed=1)
    assert worst_group(plain, plain_bias, *test) < 0.75 < 0.88 < worst_group(weight, bias, *test)
    again = last_layer.retrain_last_layer(features, label, group=group, groups=4, classes=2, refits=5)
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias)


def test_retraining_with_three_classes():
    features = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    label = features[:, :3].argmax(-1)
    weight, bias, _ = last_layer.retrain_last_layer(
        features, label, group=label, groups=3, classes=3, refits=2, strengths=(1.0,)
    )
    assert weight.shape == (3, 4)
    assert float(((features @ weight.float().T + bias.float()).argmax(-1) == label).float().mean()) > 0.9


def test_balanced_subset_is_balanced_and_an_empty_group_is_named():
    group = torch.tensor([0] * 9 + [1] * 3 + [2] * 5)
    subset = last_layer.balanced_subset(group, groups=3, generator=torch.Generator().manual_seed(0))
    assert group[subset].bincount().tolist() == [3, 3, 3] and len(set(subset.tolist())) == 9
    with pytest.raises(ValueError, match="no example of group 3; permitted: one or more of each of the 4 groups"):
        last_layer.balanced_subset(group, groups=4, generator=torch.Generator())


def test_retraining_refuses_a_single_class():
    features, label, group = shortcut(20, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"labels are \[0\]; permitted: all of 0 to 1, two or more"):
        last_layer.retrain_last_layer(features, 0 * label, group=group, groups=4, classes=2)


def test_docstring_examples():
    assert doctest.testmod(losses).failed == 0
