"""Resampling against explicit row resampling, intervals against planted effects, tests against scipy."""

import doctest
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtuning import metrics, statistics
from fairtuning.statistics import Effect, Estimate, estimate

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
FAST = settings(deadline=None, max_examples=60)


def draw(*, runs=(), n=300, classes=2, groups=2, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (n,), generator=generator)
    group = torch.randint(groups, (n,), generator=generator)
    noise = torch.randint(classes, (*runs, n), generator=generator)
    keep = torch.rand(*runs, n, generator=generator) < 0.6
    return [t.to(device) for t in (torch.where(keep, label, noise), label, group)]


# --- resampled counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [2**23, 50])
@pytest.mark.parametrize(
    "runs, classes, groups", [((), 2, 2), ((3,), 2, 2), ((2, 3), 4, 3), ((2,), 1, 1), ((0,), 2, 2)]
)
def test_resampled_counts_equal_explicit_rows(runs, classes, groups, chunk, device, monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", chunk)  # a small one also cuts resamples and runs into blocks
    prediction, label, group = draw(runs=runs, n=40, classes=classes, groups=groups, device=device)
    options = dict(classes=classes, groups=groups)
    counts = statistics.resampled_counts(prediction.to(torch.uint8), label, group=group, **options, resamples=7, seed=3)
    assert counts.shape == (7, *runs, groups, classes, classes) and counts.device.type == device
    seen = 0
    for rows, weights in statistics._weights(40, resamples=7, seed=3):
        for b, weight in zip(range(rows.start, rows.stop), weights, strict=True):
            picked = torch.arange(40).repeat_interleave(weight.long())
            assert len(picked) == 40
            picked = picked.to(device)
            again = metrics.group_counts(prediction[..., picked], label[picked], group=group[picked], **options)
            assert torch.equal(counts[b].long(), again)
            seen += 1
    assert seen == 7


def test_resampled_score_counts_share_the_resampling_of_the_other_counts():
    """Scores that are the predictions: summed over groups, both kinds of counts are the same."""
    prediction, label, group = draw(runs=(3,), n=40, classes=3)
    whole = statistics.resampled_counts(prediction, label, group=group, classes=3, groups=2, resamples=7, seed=3)
    counts = statistics.resampled_score_counts(prediction, label, classes=3, levels=3, resamples=7, seed=3)
    assert torch.equal(counts, whole.sum(-3))


@pytest.mark.parametrize("device", DEVICES)
def test_one_resampling_is_shared_by_all_runs_and_calls(device):
    prediction, label, group = draw(runs=(3,), device=device)
    options = dict(group=group, classes=2, groups=2, resamples=50)
    together = statistics.resampled_counts(prediction, label, **options, seed=1)
    for run in range(3):
        alone = statistics.resampled_counts(prediction[run], label, **options, seed=1)
        assert torch.equal(together[:, run], alone)
    other = statistics.resampled_counts(prediction, label, **options, seed=2)
    assert not torch.equal(together, other)
    assert (together.sum((-3, -2, -1)) == len(label)).all()
    # the resample decides how many examples a cell holds, whatever a run predicts there
    assert torch.equal(together[:, 0].sum(-1), together[:, 1].sum(-1))


def test_resampled_counts_have_the_multinomial_law():
    prediction, label, group = draw(n=500)
    counts = statistics.resampled_counts(prediction, label, group=group, classes=2, groups=2, resamples=4000)
    p = metrics.group_counts(prediction, label, group=group, classes=2, groups=2).double().flatten() / 500
    counts = counts.double().flatten(1)
    covariance = 500 * (torch.diag(p) - torch.outer(p, p))
    torch.testing.assert_close(counts.mean(0), 500 * p, rtol=0, atol=5 * math.sqrt(60 / 4000))
    torch.testing.assert_close(counts.T.cov(), covariance, rtol=0.1, atol=3)


def test_resampled_counts_refuse_bad_input():
    prediction, label, group = draw(n=10)
    with pytest.raises(ValueError, match="group has values from 0 to 1; permitted are 0 to 0"):
        statistics.resampled_counts(prediction, label, group=group, classes=2, groups=1)
    with pytest.raises(ValueError, match="there are 0 examples"):
        statistics.resampled_counts(prediction[:0], label[:0], group=group[:0], classes=2, groups=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["error", "demographic_parity_difference", "accuracy"])
def test_single_run_interval_agrees_with_row_resampling(name, device):
    prediction, label, group = draw(n=2000, device=device)
    options = dict(group=group, classes=2, groups=2)
    metric = metrics.METRICS[name].function
    counts = metrics.group_counts(prediction, label, **options)
    low, high = statistics.single_run_interval(counts, metric, resamples=4000, confidence=0.9)
    by_rows = metric(statistics.resampled_counts(prediction, label, **options, resamples=4000))
    spread = float(by_rows.std())
    assert low == pytest.approx(float(by_rows.quantile(0.05)), abs=0.15 * spread)
    assert high == pytest.approx(float(by_rows.quantile(0.95)), abs=0.15 * spread)
    assert low < float(metric(counts)) < high
    again = statistics.single_run_interval(counts, metric, resamples=4000, confidence=0.9)
    assert again == (low, high)


def test_single_run_interval_is_nan_where_the_metric_is_not_defined():
    empty = torch.tensor([[[5, 1], [2, 4]], [[0, 0], [0, 0]]])
    for counts in (empty, torch.zeros_like(empty)):
        interval = statistics.single_run_interval(counts, metrics.demographic_parity_difference)
        assert all(map(math.isnan, interval))
    all_right = torch.tensor([[[5, 0], [0, 4]], [[7, 0], [0, 6]]])
    assert statistics.single_run_interval(all_right, metrics.accuracy) == (1.0, 1.0)


def test_single_run_interval_is_one_for_each_entry():
    """Each group's as it is for the metric of that group alone, not one interval of all groups' values together."""
    counts = torch.tensor([[[40, 10], [5, 45]], [[90, 1], [1, 8]]])
    low, high = statistics.single_run_interval(counts, metrics.group_accuracy, resamples=200)
    assert low.shape == high.shape == (2,) and low.dtype == torch.float64
    for group in range(2):
        alone = statistics.single_run_interval(
            counts, lambda c, g=group: metrics.group_accuracy(c)[:, g], resamples=200
        )
        assert (float(low[group]), float(high[group])) == alone
    assert high[0] < low[1]  # 0.85 and 0.98 of a hundred each
    matrix = statistics.single_run_interval(counts, lambda c: c.double(), resamples=200)
    assert matrix[0].shape == counts.shape and (matrix[0] < counts).all()
    counts[1] = 0  # what is not defined leaves the other entries alone
    low, high = statistics.single_run_interval(counts, metrics.group_accuracy, resamples=200)
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True]


def test_single_run_interval_is_of_one_run_and_of_each_resample():
    counts = torch.tensor([[[40, 10], [5, 45]], [[90, 1], [1, 8]]])
    with pytest.raises(ValueError, match=r"counts have shape \[3, 2, 2, 2\]; permitted: \[groups, classes, classes\]"):
        statistics.single_run_interval(counts.expand(3, -1, -1, -1), metrics.accuracy)
    with pytest.raises(ValueError, match=r"the metric gives shape \[\] for 50 counts; permitted: \[B, ...\]"):
        statistics.single_run_interval(counts, lambda c: metrics.accuracy(c).mean(), resamples=50)


# --- estimate --------------------------------------------------------------------------------------------


def slow_estimate(by_seed, resampled, confidence):
    """Plain Python, by the formulas; resampled: list of rows with one value per seed, or of numbers."""

    def variance(x):
        mean = sum(x) / len(x)
        return sum((v - mean) ** 2 for v in x) / (len(x) - 1)

    n = len(by_seed)
    seeds, shared = variance(by_seed) / n, 0.0
    if isinstance(resampled[0], list):
        examples = variance([sum(row) / n for row in resampled])
        own = sum(variance([row[i] for row in resampled]) for i in range(n)) / n
        shared = max(0.0, own - examples) / (n - 1)
    else:
        examples = variance(resampled)
    total = max(seeds + examples - shared, seeds, examples)
    freedom = total**2 / (seeds**2 / (n - 1) + examples**2 / (len(resampled) - 1))
    half = scipy.stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(total)
    mean = sum(by_seed) / n
    return mean, mean - half, mean + half, math.sqrt(total), freedom


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, by_seed_too", [(2, False), (7, False), (7, True), (10, True)])
def test_estimate_equals_its_slow_twin(n, by_seed_too, device):
    generator = torch.Generator().manual_seed(n)
    by_seed = torch.randn(n, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, n, generator=generator, dtype=torch.float64)
    resampled = by_seed + noise + torch.randn(200, 1, generator=generator, dtype=torch.float64)
    if not by_seed_too:
        resampled = resampled.mean(1)
    got = estimate(Effect(by_seed.to(device), resampled.to(device)), confidence=0.9)
    expected = slow_estimate(by_seed.tolist(), resampled.tolist(), 0.9)
    values = (got.effect, got.low, got.high, got.standard_error, got.degrees_of_freedom)
    assert values == pytest.approx(expected, rel=1e-9) and got.n == n


def test_estimate_without_examples_is_the_one_sample_t_interval():
    values = [0.3, 0.1, 0.5, 0.25, 0.4]
    got = estimate(Effect(torch.tensor(values, dtype=torch.float64)))
    test = scipy.stats.ttest_1samp(values, 0.2, alternative="greater")
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high))
    assert got.degrees_of_freedom == pytest.approx(4)
    assert statistics.p_above(got, 0.2) == pytest.approx(test.pvalue)
    assert statistics.p_below(got, 0.2) == pytest.approx(1 - test.pvalue)


def test_fewer_than_two_seeds_give_no_interval():
    for by_seed in (torch.tensor([0.3]), torch.tensor([])):
        got = estimate(Effect(by_seed, torch.rand(100)))
        assert all(map(math.isnan, (got.low, got.high, got.standard_error, got.degrees_of_freedom)))
        assert math.isnan(statistics.p_above(got, 0)) and math.isnan(statistics.p_equivalent(got, 1))
        assert math.isnan(statistics.smallest_detectable_effect(got))
    assert estimate(Effect(torch.tensor([0.25]))).effect == 0.25


@pytest.mark.parametrize("resampled", [None, torch.full((100,), 0.5), torch.full((100, 5), 0.5)])
def test_zero_variance_collapses_to_the_point(resampled):
    got = estimate(Effect(torch.full((5,), 0.5), resampled))
    assert got == Estimate(0.5, 0.5, 0.5, 0.0, 4.0, 5)
    assert [statistics.p_above(got, b) for b in (0.4, 0.5, 0.6)] == [0, 1, 1]
    assert [statistics.p_below(got, b) for b in (0.4, 0.5, 0.6)] == [1, 1, 0]
    assert statistics.p_equivalent(got, 0.6) == 0 and statistics.p_equivalent(got, 0.5) == 1
    assert statistics.smallest_detectable_effect(got) == 0


def test_tiny_variances_do_not_underflow():
    got = estimate(Effect(torch.tensor([0.0, 1e-160, 2e-160], dtype=torch.float64)))
    assert got.degrees_of_freedom == pytest.approx(2)


def test_resamples_with_an_empty_group_are_left_out_while_they_are_few():
    by_seed, resampled = torch.tensor([0.1, 0.2, 0.3]), torch.linspace(0, 1, 100)
    few, many = resampled.clone(), resampled.clone()
    few[:4], many[:6] = math.nan, math.nan
    assert estimate(Effect(by_seed, few)) == estimate(Effect(by_seed, resampled[4:]))
    assert math.isnan(estimate(Effect(by_seed, many)).low)
    assert math.isnan(estimate(Effect(torch.tensor([0.1, math.nan]), resampled)).low)


def test_estimate_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"by_seed has shape \(2, 2\)"):
        estimate(Effect(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match=r"resampled has shape \(9, 4\); expected \[B\] or \[B, 3\]"):
        estimate(Effect(torch.zeros(3), torch.zeros(9, 4)))


# --- planted effects -------------------------------------------------------------------------------------


def planted_runs(generator, *, seeds, n, shared, own, between):
    """Rightness of `seeds` runs on one test set of `n` examples, and the accuracy they have in the long run.

    A run is right on an example where mean + difficulty (shared by the runs) + luck (of one run) + quality of
    the run is above 0. `shared`, `own`, `between` are the three standard deviations, all normal.
    """
    mean = 0.2  # near the middle, where accuracy is not skewed by the bounds of [0, 1]
    score = mean + shared * torch.randn(n, generator=generator)
    score = score + own * torch.randn(seeds, n, generator=generator)
    score = score + between * torch.randn(seeds, 1, generator=generator)
    truth = scipy.stats.norm.cdf(mean / math.sqrt(shared**2 + own**2 + between**2))
    return (score > 0).long(), float(truth)


def coverage(how, *, studies=400, seeds=10, n=150, **spread):
    """Share of simulated studies whose 95 % interval holds the truth, and their mean width."""
    generator = torch.Generator().manual_seed(0)
    held, width = 0, 0.0
    label, group = torch.ones(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    options = dict(group=group, classes=2, groups=1, resamples=200)
    for study in range(studies):
        runs, truth = planted_runs(generator, seeds=seeds, n=n, **spread)
        by_seed = metrics.accuracy(metrics.group_counts(runs, label, group=group, classes=2, groups=1))
        if how == "independent":  # each seed on a resampling of its own: what must not be done
            resampled = torch.stack(
                [
                    metrics.accuracy(statistics.resampled_counts(r, label, **options, seed=study * seeds + i))
                    for i, r in enumerate(runs)
                ],
                dim=1,
            ).mean(1)
        else:
            resampled = metrics.accuracy(statistics.resampled_counts(runs, label, **options, seed=study))
            resampled = resampled if how == "by seed" else resampled.mean(1)
        got = estimate(Effect(by_seed, resampled))
        held += got.low <= truth <= got.high
        width += (got.high - got.low) / studies
    return held / studies, width


def test_interval_covers_when_examples_are_shared_and_independent_resampling_does_not():
    spread = dict(shared=1.0, own=0.2, between=0.15)
    assert 0.92 <= coverage("seed mean", **spread)[0] <= 0.98
    assert 0.92 <= coverage("by seed", **spread)[0] <= 0.98
    # resampled seed by seed, the variance that the seeds share is divided by their number
    assert coverage("independent", **spread)[0] < 0.85


def test_interval_covers_when_seeds_dominate():
    spread = dict(shared=0.5, own=0.5, between=0.6)
    assert 0.92 <= coverage("seed mean", **spread)[0] <= 0.98
    assert 0.92 <= coverage("by seed", **spread)[0] <= 0.98


def test_interval_is_less_wide_when_luck_dominates_and_the_seeds_are_kept_apart():
    spread = dict(shared=0.1, own=1.0, between=0.0)
    kept, narrow = coverage("by seed", **spread)
    merged, wide = coverage("seed mean", **spread)
    assert 0.93 <= kept <= merged and narrow < 0.9 * wide


def test_paired_parity_difference_of_two_methods_is_covered():
    """The effect a study reports: the demographic parity difference of one method minus that of another."""
    generator = torch.Generator().manual_seed(1)
    n, seeds, studies, held = 300, 5, 250, 0
    shift = torch.tensor([[-0.6, 0.4], [-0.3, 0.3]])  # [method, group]
    noise = dict(shared=0.8, own=0.5, between=0.2)
    rate = scipy.stats.norm.cdf(shift.double().numpy() / math.sqrt(sum(v**2 for v in noise.values())))
    truth = abs(rate[1, 1] - rate[1, 0]) - abs(rate[0, 1] - rate[0, 0])
    label = torch.zeros(n, dtype=torch.int64)
    for study in range(studies):
        group = torch.randint(2, (n,), generator=generator)
        score = shift[:, group][:, None] + noise["shared"] * torch.randn(n, generator=generator)
        score = score + noise["own"] * torch.randn(2, seeds, n, generator=generator)
        score = score + noise["between"] * torch.randn(1, seeds, 1, generator=generator)
        prediction = (score > 0).long()
        options = dict(group=group, classes=2, groups=2)
        point = metrics.demographic_parity_difference(metrics.group_counts(prediction, label, **options))
        again = metrics.demographic_parity_difference(
            statistics.resampled_counts(prediction, label, **options, resamples=200, seed=study)
        )
        got = estimate(Effect(point[1] - point[0], again[:, 1] - again[:, 0]))
        held += got.low <= truth <= got.high
    assert 0.91 <= held / studies <= 0.99


# --- tests -----------------------------------------------------------------------------------------------

ESTIMATES = st.builds(
    lambda effect, error, freedom: Estimate(effect, math.nan, math.nan, error, freedom, 5),
    st.floats(-3, 3),
    st.floats(0.01, 3),
    st.floats(1, 200),
)


@FAST
@given(ESTIMATES, st.floats(-3, 3))
def test_one_sided_p_values_equal_scipy_and_mirror_each_other(e, bound):
    above, below = statistics.p_above(e, bound), statistics.p_below(e, bound)
    t = (e.effect - bound) / e.standard_error
    assert above == pytest.approx(scipy.stats.t.sf(t, e.degrees_of_freedom), abs=1e-12)
    assert above + below == pytest.approx(1)


@FAST
@given(ESTIMATES, st.floats(0.01, 3))
def test_equivalence_is_the_worse_of_the_two_sides(e, margin):
    p = statistics.p_equivalent(e, margin)
    assert p == max(statistics.p_above(e, -margin), statistics.p_below(e, margin))
    assert abs(e.effect) < margin or p >= 0.5 - 1e-9


@FAST
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=10))
def test_interval_and_p_values_say_the_same(values):
    e = estimate(Effect(torch.tensor(values, dtype=torch.float64)))
    if e.standard_error > 1e-9:
        assert statistics.p_above(e, e.low) == pytest.approx(0.025, abs=1e-6)
        assert statistics.p_below(e, e.high) == pytest.approx(0.025, abs=1e-6)


def test_equivalence_needs_a_margin():
    with pytest.raises(ValueError, match="margin is 0"):
        statistics.p_equivalent(Estimate(0, -1, 1, 1, 4, 5), 0)


def test_false_alarms_and_power_come_at_the_promised_rates():
    generator = torch.Generator().manual_seed(0)
    n, studies, spread = 6, 600, 0.4
    known = Estimate(0.0, math.nan, math.nan, spread / math.sqrt(n), n - 1.0, n)
    planted = statistics.smallest_detectable_effect(known)
    found, alarms = 0, 0
    for values in spread * torch.randn(studies, n, generator=generator, dtype=torch.float64):
        alarms += statistics.p_above(estimate(Effect(values)), 0) < 0.025
        found += statistics.p_above(estimate(Effect(values + planted)), 0) < 0.025
    assert alarms / studies == pytest.approx(0.025, abs=0.02)
    assert found / studies == pytest.approx(0.8, abs=0.05)


@FAST
@given(st.floats(1.5, 300), st.floats(0.01, 3), st.sampled_from([0.5, 0.8, 0.95]))
def test_smallest_detectable_effect_has_the_power_asked_for(freedom, error, power):
    e = Estimate(0.0, math.nan, math.nan, error, freedom, 5)
    effect = statistics.smallest_detectable_effect(e, power=power, confidence=0.9)
    critical = scipy.stats.t.ppf(0.95, freedom)
    assert scipy.stats.nct.sf(critical, freedom, effect / error) == pytest.approx(power, abs=1e-5)


def slow_holm(p_values):
    """Hypothesis i is refused at level a iff every hypothesis with a p as small is: try the levels."""
    adjusted = []
    for p in p_values:
        smaller = sorted(q for q in p_values if q <= p)
        adjusted.append(min(1.0, max((len(p_values) - rank) * q for rank, q in enumerate(smaller))))
    return adjusted


@FAST
@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.01, 0.02, 0.3, 1.0]) | st.floats(0, 1), max_size=8))
def test_holm_equals_its_slow_twin(p_values):
    adjusted = statistics.holm(p_values).tolist()
    assert adjusted == pytest.approx(slow_holm(p_values), abs=1e-15)
    bonferroni = [min(1.0, p * len(p_values)) for p in p_values]
    for p, a, b in zip(p_values, adjusted, bonferroni, strict=True):
        assert p <= a <= b + 1e-15


def test_holm_refuses_what_is_no_p_value():
    for bad in ([0.1, math.nan], [1.2], [-0.1], [[0.1]]):
        with pytest.raises(ValueError, match="expected a list of numbers from 0 to 1"):
            statistics.holm(bad)


@pytest.mark.parametrize("device", DEVICES)
def test_holm_keeps_the_device(device):
    adjusted = statistics.holm(torch.tensor([0.04, 0.01], device=device))
    assert adjusted.device.type == device and adjusted.tolist() == pytest.approx([0.04, 0.02])


@FAST
@given(*[st.floats(-5, 5), st.floats(0.01, 5), st.integers(2, 30)] * 2)
def test_welch_equals_scipy(mean_a, spread_a, n_a, mean_b, spread_b, n_b):
    summary = (mean_a, spread_a, n_a, mean_b, spread_b, n_b)
    difference, t, freedom, p = statistics.welch(*summary)
    expected = scipy.stats.ttest_ind_from_stats(*summary, equal_var=False)
    assert difference == mean_a - mean_b
    assert (t, p) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-12)
    assert min(n_a, n_b) - 1 - 1e-9 <= freedom <= n_a + n_b - 2 + 1e-9


def test_welch_degrees_of_freedom_equal_scipy_on_samples():
    a, b = [1.0, 2.5, 2.0, 3.1], [0.2, 0.4, 0.9, 0.1, 0.3]
    test = scipy.stats.ttest_ind(a, b, equal_var=False)
    va, vb = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    got = statistics.welch(float(va.mean()), float(va.std()), 4, float(vb.mean()), float(vb.std()), 5)
    assert got[1:] == pytest.approx((test.statistic, test.df, test.pvalue))


def test_welch_without_spread_or_runs():
    assert statistics.welch(1.0, 0.0, 3, 1.0, 0.0, 4) == (0.0, 0.0, 5.0, 1.0)
    assert statistics.welch(2.0, 0.0, 3, 1.0, 0.0, 4) == (1.0, math.inf, 5.0, 0.0)
    difference, *rest = statistics.welch(2.0, math.nan, 1, 1.0, 0.5, 10)
    assert difference == 1.0 and all(map(math.isnan, rest))


def test_docstring_examples():
    assert doctest.testmod(statistics).failed == 0
