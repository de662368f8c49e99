"""One check of what losses, metrics, Fisher information and resampling are given: what is refused, and what is not."""

import doctest
import re

import numpy
import pytest
import torch

from fairtuning import checks, fisher, losses, metrics, statistics

N, K, G = 4, 3, 2
LABEL, GROUP = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 0])
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LOSS = losses.cross_entropy(LOGITS, LABEL)
HALF = torch.full((G,), 0.5, dtype=torch.float64)
HEAD = torch.nn.Linear(K, K, bias=False, dtype=torch.float64)

#: Everything that takes a label [n] below K and a group [n] below G; of losses, a group alone.
BOTH = {
    "equalized odds": lambda y, s: losses.equalized_odds_penalty(LOGITS, y, s),
    "penalised": lambda y, s: losses.penalised_loss(LOGITS, y, group=s, penalty="equalized_odds", lam=0.5),
    "variance": lambda y, s: losses.variance_penalised_loss(LOGITS, y, group=s, groups=G, lam=1.0),
    "group Fisher": lambda y, s: fisher.group_fisher(HEAD, LOGITS, y, group=s, groups=G)[""],
    "head Fisher": lambda y, s: fisher.head_fisher(LOGITS, LOGITS, y, group=s, groups=G),
    "counts": lambda y, s: metrics.group_counts(LABEL, y, group=s, classes=K, groups=G),
    "resampled counts": lambda y, s: statistics.resampled_counts(LABEL, y, group=s, classes=K, groups=G, resamples=9),
}
OF_LABEL = BOTH | {
    "cross-entropy": lambda y, _: losses.cross_entropy(LOGITS, y),
    "score counts": lambda y, _: statistics.resampled_score_counts(LABEL[None], y, classes=K, levels=K, resamples=9),
}
OF_GROUP = BOTH | {
    "demographic parity": lambda _, s: losses.demographic_parity_penalty(LOGITS, s),
    "group means": lambda _, s: losses.group_means(LOSS, s, groups=G)[0],
    "variance of losses": lambda _, s: losses.group_loss_variance(LOSS, s, groups=G),
    "smoothed": lambda _, s: losses.smoothed_group_loss_variance(LOSS, s, average=HALF)[0],
    "DRO": lambda _, s: losses.group_dro_loss(LOSS, s, weights=HALF)[0],
    "signal": lambda _, s: torch.tensor(losses.penalty_and_signal(LOSS, s, groups=G, batch_size=2)),
}
#: What is wrong with an argument of four entries from 0 to `below` - 1, and what is said of it.
WRONG = {
    "length 1": (lambda good, below: good[1:2], "has shape [1]; permitted: ["),
    "scalar": (lambda good, below: good[1], "has shape []; permitted: ["),
    "too long": (lambda good, below: good.repeat(2), "has shape [8]; permitted: ["),
    "not of these runs": (lambda good, below: good.repeat(3, 1), "has shape [3, 4]; permitted: ["),
    "-100": (lambda good, below: torch.where(good == 1, -100, good), "has values from -100 to "),
    "too large": (lambda good, below: torch.where(good == 1, below, good), "to {below}; permitted are 0 to {last}"),
    "float": (lambda good, below: good.double(), "has dtype torch.float64; permitted: an integer type or bool"),
    "numpy": (lambda good, below: good.numpy(), "is of type ndarray; permitted: a tensor"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", OF_LABEL)
def test_labels_are_refused_with_their_value_and_what_is_permitted(name, wrong):
    change, message = WRONG[wrong]
    if (name, wrong) == ("head Fisher", "not of these runs"):
        return  # its leading axes broadcast both ways
    with pytest.raises(ValueError, match="^label " + ".*" + re.escape(message.format(below=K, last=K - 1))):
        OF_LABEL[name](change(LABEL, K), GROUP)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", OF_GROUP)
def test_groups_are_refused_with_their_value_and_what_is_permitted(name, wrong):
    change, message = WRONG[wrong]
    if (name, wrong) == ("head Fisher", "not of these runs"):
        return
    with pytest.raises(ValueError, match="^group " + ".*" + re.escape(message.format(below=G, last=G - 1))):
        OF_GROUP[name](LABEL, change(GROUP, G))


TYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OF_LABEL | OF_GROUP)
def test_every_type_of_integer_gives_the_same(name, dtype):
    function = (OF_LABEL | OF_GROUP)[name]
    assert torch.equal(function(LABEL.to(dtype), GROUP.to(dtype)), function(LABEL, GROUP))


@pytest.mark.parametrize("name", OF_GROUP)
def test_groups_may_be_bool(name):
    assert torch.equal(OF_GROUP[name](LABEL, GROUP.bool()), OF_GROUP[name](LABEL, GROUP))


def test_minus_100_is_no_label_to_leave_out():
    """torch's cross_entropy leaves it out of its mean; here the example had loss 0 and stayed in the mean."""
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="label has values from -100 to 2; permitted are 0 to 2"):
        losses.cross_entropy(logits, torch.tensor([0, 1, 2, 0, -100, 2]))
    # where values are not looked at, torch has to refuse it: under vmap here, on a GPU by an assertion there
    with pytest.raises((IndexError, RuntimeError)):
        torch.func.vmap(losses.cross_entropy)(logits[None], torch.tensor([[0, 1, 2, 0, -100, 2]]))


def test_leading_axes_that_runs_share_may_be_left_out_or_1_and_no_other():
    logits = torch.stack([LOGITS, 2 * LOGITS, -LOGITS]).expand(2, 3, N, K)
    whole = losses.cross_entropy(logits, LABEL.expand(2, 3, N))
    for shape in ([N], [3, N], [1, N], [2, 1, N], [1, 3, N]):
        assert torch.equal(losses.cross_entropy(logits, LABEL.expand(shape)), whole)
    for shape in ([2, N], [3, 1, N], [1, 2, 3, N], [2, 3, 1]):
        label = LABEL[:1].expand(shape) if shape[-1] == 1 else LABEL.expand(shape)
        message = f"label has shape {shape}; permitted: [2, 3, 4], leading axes left out or 1"
        with pytest.raises(ValueError, match=re.escape(message)):
            losses.cross_entropy(logits, label)


def test_features_of_one_example_stand_for_no_others():
    task, sensitive = LOGITS, LOGITS.flip(0)
    for penalty in (losses.cross_covariance_penalty, losses.squared_cosine_penalty):
        for one, other in ((task[:1], sensitive), (task, sensitive[:1]), (task[0], sensitive[0])):
            with pytest.raises(ValueError, match="task, sensitive have shapes .*; permitted: .*, one n"):
                penalty(one, other)
    with pytest.raises(ValueError, match="sensitive is 1 wide; permitted: 3, the width of task"):
        losses.squared_cosine_penalty(task, sensitive[:, :1])
    with pytest.raises(ValueError, match="features, logits have shapes"):
        fisher.head_fisher(LOGITS[:1], LOGITS, LABEL, group=GROUP, groups=G)
    assert losses.cross_covariance_penalty(task, sensitive[:, :1]) > 0  # of another width: as documented


def test_losses_without_examples_and_logits_without_classes_are_refused():
    with pytest.raises(ValueError, match=r"loss is one number; permitted: \[..., n\]"):
        losses.group_loss_variance(LOSS.mean(), GROUP, groups=G)
    with pytest.raises(ValueError, match=r"logits have shape \[4\]; permitted"):
        losses.cross_entropy(LOGITS[:, 0], LABEL)


def test_groups_of_penalties_and_of_weights():
    for by in losses.GROUPINGS:
        label, attribute = (torch.tensor([0, 2, 5]), GROUP) if by == "class" else (LABEL, GROUP + 1)
        with pytest.raises(ValueError, match="label has values from 0 to 5|attribute has values from 1 to 2"):
            losses.penalty_groups(label, attribute, by=by, classes=K, attributes=G)
    with pytest.raises(ValueError, match=r"attribute has shape \[1\]; permitted: \[..., 4\]"):
        losses.penalty_groups(LABEL, GROUP[:1], by="class x attribute", classes=K, attributes=G)
    cells, _ = losses.penalty_groups(LABEL.int(), GROUP.bool(), by="class x attribute", classes=K, attributes=G)
    assert cells.tolist() == [0, 3, 5, 2] and cells.dtype == torch.int64
    with pytest.raises(ValueError, match="group has values from 0 to 1; permitted are 0 to 0"):
        losses.balanced_weights(GROUP, groups=1)


@pytest.mark.parametrize("lam", [-1.0, float("nan"), torch.tensor(-1.0), torch.tensor([0.5, float("nan")])])
def test_intensities_are_numbers_in_their_range(lam):
    with pytest.raises(ValueError, match="lam is (-1.0|nan); permitted: 0 or more"):
        losses.variance_penalised_loss(LOGITS, LABEL, group=GROUP, groups=G, lam=lam)
    for value in (lam, 1.5 if isinstance(lam, float) else torch.tensor([0.5, 1.5])):
        with pytest.raises(ValueError, match="lam is (-1.0|nan|1.5); permitted: 0 to 1"):
            losses.penalised_loss(LOGITS, LABEL, group=GROUP, penalty="equalized_odds", lam=value)


def test_the_positive_class_is_a_class():
    counts = metrics.group_counts(LABEL, LABEL, group=GROUP, classes=K, groups=G)
    rates = (metrics.base_rate, metrics.selection_rate, metrics.true_positive_rate, metrics.false_positive_rate)
    for function in (*rates, metrics.positive_class_f1, metrics.equalized_odds_one_vs_rest_max):
        for positive in (-1, K):
            with pytest.raises(ValueError, match=f"positive is {positive}; permitted: 0 to 2"):
                function(counts, positive)
    with pytest.raises(ValueError, match="positive is -1; permitted: 0 to 2"):
        losses.demographic_parity_penalty(LOGITS, GROUP, positive=-1)
    with pytest.raises(ValueError, match="positive is 3; permitted: 0 to 2"):
        losses.equalized_odds_penalty(LOGITS, LABEL, GROUP, positive=3)


COMPILED = {
    "variance": lambda z, y, s, lam: losses.variance_penalised_loss(z, y, group=s, groups=G, lam=lam),
    "penalised": lambda z, y, s, lam: losses.penalised_loss(z, y, group=s, penalty="equalized_odds", lam=lam),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole_without_a_branch_on_values(name):
    function, lam = COMPILED[name], torch.tensor(0.5, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for strength in (0.5, 0.25, lam):
        assert torch.equal(compiled(LOGITS, LABEL, GROUP, strength), function(LOGITS, LABEL, GROUP, strength))
    runs = [torch.stack([value, value.flip(0)]) for value in (LOGITS, LABEL, GROUP)]
    mapped = torch.func.vmap(function, in_dims=(0, 0, 0, None))(*runs, lam)
    torch.testing.assert_close(mapped, function(*runs, lam))


def test_no_value_is_looked_at_that_is_not_on_the_host():
    """A tensor of the meta device has no values at all: to look at one is an error, as to wait for a GPU is a loss."""
    z, y, s = (value.to("meta") for value in (LOGITS, LABEL, GROUP))
    lam = torch.tensor(0.5, device="meta")
    assert losses.variance_penalised_loss(z, y, group=s, groups=G, lam=lam).device.type == "meta"
    assert losses.penalised_loss(z, y, group=s, penalty="demographic_parity", lam=lam).device.type == "meta"
    assert losses.group_dro_loss(z[:, 0], s, weights=HALF.to("meta"))[0].device.type == "meta"
    with pytest.raises(ValueError, match=r"group has shape \[1\]"):
        losses.variance_penalised_loss(z, y, group=s[:1], groups=G, lam=lam)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_step_does_not_wait_for_the_gpu():
    z, y, s = (value.cuda() for value in (LOGITS, LABEL, GROUP))
    lam = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function in COMPILED.values():
            function(z.requires_grad_(), y, s, lam).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_numpy_scalars_and_empty_tensors_pass():
    checks.between("lam", numpy.float32(0.5), 0, 1)
    checks.between("lam", torch.zeros(0), 0, 1)
    assert losses.cross_entropy(LOGITS[:0], LABEL[:0]).shape == (0,)


def test_docstring_examples():
    assert doctest.testmod(checks).failed == 0
