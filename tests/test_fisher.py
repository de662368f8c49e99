"""Every closed form against its slow, obvious twin: one backward pass per example, in float64."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fairtuning import fisher as module
from fairtuning.fisher import BLOCK, KINDS, group_fisher, head_fisher, row_importance

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
FEW = settings(deadline=None, max_examples=40, derandomize=True)


class Attention(nn.Module):
    """A small transformer over token numbers: linear layers see [n, T, d], [n, T, T', d] and [n, d]."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        self.dropout = nn.Dropout(0.5)
        self.pair = nn.Linear(width, 2)
        self.head = nn.Linear(width + 2, classes)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.dropout(self.mlp(self.norm(x)))
        pairs = self.pair(x.unsqueeze(1) * x.unsqueeze(2)).tanh().mean((1, 2))
        return self.head(torch.cat([x.mean(1), pairs], -1))


class Shared(nn.Module):
    """One layer used three times: its gradient is the sum over the calls, squared afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(torch.tanh(self.body(torch.relu(self.body(x))))))


class Sequence(nn.Module):
    """Puts the tokens before the examples, as older sequence models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x.transpose(0, 1)).mean(0))


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 9, bias=False), nn.ELU(), nn.Linear(9, 3))


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
        *(nn.Conv2d(5, 4, (3, 2), padding=(0, 1), dilation=(1, 2)), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


CASES = {
    "mlp": (mlp, lambda n: torch.randn(n, 6), 3),
    "tokens": (Attention, lambda n: torch.randint(0, 11, (n, 5)), 3),
    "convolutions": (convolutions, lambda n: torch.randn(n, 2, 9, 8), 3),
    "shared": (Shared, lambda n: torch.randn(n, 6), 2),
}


def example(case, *, n=17, groups=3, device="cpu", seed=0):
    make, inputs, classes = CASES[case]
    torch.manual_seed(seed)
    model, x = make().to(device, torch.float64), inputs(n).to(device)
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        for buffer in model.buffers():  # batch norm's statistics: anything but their start values
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return model, x, torch.randint(0, classes, (n,), device=device), torch.randint(0, groups, (n,), device=device)


def naive(model, x, label, *, group, groups, kind="empirical"):
    """Zhang & Zhou 2024, eq. 1, word for word: for each example differentiate, square, average over its group."""
    model.eval()
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    total = {name: torch.zeros(groups, *w.shape, dtype=w.dtype, device=w.device) for name, w in weights.items()}
    for i in range(len(x)):
        p = model(x[i : i + 1]).softmax(-1)[0].tolist()
        shares = enumerate(p) if kind == "true" else [(label[i].item(), 1.0)]
        for y, share in shares:
            loss = cross_entropy(model(x[i : i + 1]), torch.tensor([y], device=x.device))
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[name][group[i]] += share * gradient**2
    sizes = group.bincount(minlength=groups)
    return {name: t / sizes.view(-1, *[1] * (t.ndim - 1)) for name, t in total.items()}


def assert_same(ours, theirs, *, rtol=1e-12):
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].nan_to_num().abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=rtol * scale, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_group_fisher_is_the_loop_over_examples(case, kind, device):
    model, x, y, s = example(case, device=device)
    ours = group_fisher(model, x, y, group=s, groups=3, kind=kind)
    assert_same(ours, naive(model, x, y, group=s, groups=3, kind=kind))


@FEW
@given(n=st.integers(1, 12), groups=st.integers(1, 4), chunk=st.integers(1, 13), seed=st.integers(0, 2**16))
def test_group_fisher_for_any_sizes(n, groups, chunk, seed):
    model, x, y, s = example("mlp", n=n, groups=groups, seed=seed)
    ours = group_fisher(model, x, y, group=s, groups=groups, chunk=chunk)
    assert_same(ours, naive(model, x, y, group=s, groups=groups))


@pytest.mark.parametrize("block", [1, 60, 2**30])
@pytest.mark.parametrize("case", CASES)
def test_chunks_and_blocks_change_nothing(case, block, monkeypatch):
    model, x, y, s = example(case)
    whole = group_fisher(model, x, y, group=s, groups=3)
    monkeypatch.setitem(BLOCK, "cpu", block)
    for chunk in (1, 4, 17):
        assert_same(group_fisher(model, x, y, group=s, groups=3, chunk=chunk), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_single_precision(device):
    model, x, y, s = example("tokens", device=device)
    double = group_fisher(model, x, y, group=s, groups=3)
    single = group_fisher(model.float(), x, y, group=s, groups=3)
    assert all(t.dtype == torch.float32 for t in single.values())
    assert_same({name: t.double() for name, t in single.items()}, double, rtol=1e-5)


def test_order_of_the_examples_changes_nothing():
    model, x, y, s = example("tokens")
    p = torch.randperm(len(x))
    ours = group_fisher(model, x[p], y[p], group=s[p], groups=3)
    assert_same(ours, group_fisher(model, x, y, group=s, groups=3))


def test_group_without_examples_is_nan_and_the_others_are_not():
    model, x, y, s = example("mlp", groups=2)
    ours = group_fisher(model, x, y, group=2 * s, groups=4)
    for t in ours.values():
        assert t.isnan().flatten(1).all(1).tolist() == [False, True, False, True]
        assert t[::2].isfinite().all()
    nobody = group_fisher(model, x[:0], y[:0], group=s[:0], groups=2)
    assert all(t.isnan().all() for t in nobody.values())


def test_groups_average_to_the_whole():
    model, x, y, s = example("convolutions")
    by_group, whole = (group_fisher(model, x, y, group=g, groups=k) for g, k in ((s, 3), (torch.zeros_like(s), 1)))
    share = s.bincount(minlength=3).double() / len(s)
    assert_same({name: torch.tensordot(share, t, 1)[None] for name, t in by_group.items()}, whole)


def test_true_and_empirical_fisher_differ_unless_labels_follow_the_model():
    model, x, _, _ = example("mlp", n=1)
    p = model(x).softmax(-1)[0].detach()
    draws = torch.arange(3).repeat_interleave((p * 20_000).round().long())  # labels in the model's own proportions
    many = dict(group=torch.zeros_like(draws), groups=1)
    empirical = group_fisher(model, x.expand(len(draws), -1), draws, **many)
    true = group_fisher(model, x, draws[:1], group=draws[:1] * 0, groups=1, kind="true")
    assert_same(empirical, true, rtol=1e-3)
    fixed = group_fisher(model, x, draws[:1], group=draws[:1] * 0, groups=1)
    assert any((fixed[name] - true[name]).abs().max() > 0.1 * true[name].max() for name in true)


def test_model_is_left_as_it_was():
    model, x, y, s = example("convolutions")
    model.train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def state():
        flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
        return flags, [m._forward_hooks for m in model.modules()], model[0].weight.grad.sum().item()

    found = state()
    with torch.no_grad():
        group_fisher(model, x, y, group=s, groups=3)
    assert state() == found
    with pytest.raises(ValueError, match="label has values from 3 to"):
        group_fisher(model, x, y + 3, group=s, groups=3)
    assert state() == found
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_chosen_layers_only_and_inputs_that_want_a_gradient():
    model, x, y, s = example("mlp")
    every = group_fisher(model, x, y, group=s, groups=3)
    some = group_fisher(model, x.requires_grad_(), y, group=s, groups=3, layers=["4", "2"])
    assert list(some) == ["4", "2"]
    assert x.grad is None
    assert_same(some, {name: every[name] for name in some})


class Largest(TorchDispatchMode):
    """The largest tensor of floating-point numbers that any operation made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.size = max(self.size, t.untyped_storage().nbytes() * (t._base is None))
        return result


@pytest.mark.parametrize("case", CASES)
def test_memory_does_not_grow_with_the_examples(case, monkeypatch):
    monkeypatch.setitem(BLOCK, "cpu", 64)
    sizes = []
    for n in (8, 80):
        model, x, y, s = example(case, n=n, groups=2)
        with Largest() as largest:
            group_fisher(model, x, y, group=s, groups=2, chunk=8)
        sizes.append(largest.size)
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "exact"}, "kind is 'exact'; permitted: empirical, true"),
        ({"groups": 2}, "group has values from 0 to 2; permitted are 0 to 1"),
        ({"layers": ["body"]}, "layer is 'body'; permitted: 0, 2, 4"),
        ({"chunk": 0}, "chunk is 0; permitted: 1 or more"),
        ({"group": torch.zeros(3, dtype=torch.int64)}, r"group has shape \[3\]; permitted: \[17\]"),
        ({"group": torch.zeros(1, dtype=torch.int64)}, r"group has shape \[1\]; permitted: \[17\]"),
        ({"group": torch.zeros(17)}, "group has dtype torch.float32; permitted: an integer type or bool"),
        ({"layers": "0"}, "layers is '0'; permitted: a list of names"),
    ],
)
def test_errors_name_the_value_and_what_is_permitted(change, message):
    model, x, y, s = example("mlp")
    with pytest.raises(ValueError, match=message):
        group_fisher(model, x, y, **({"group": s, "groups": 3} | change))


def test_layers_that_cannot_be_served_are_refused():
    y = s = torch.zeros(4, dtype=torch.int64)
    grouped = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten())
    with pytest.raises(ValueError, match="permitted: groups=1"):
        group_fisher(grouped, torch.randn(4, 2, 1, 1), y, group=s, groups=1)
    idle = nn.ModuleDict({"used": nn.Linear(6, 2), "idle": nn.Linear(6, 2)})
    idle.forward = lambda x: idle["used"](x)
    with pytest.raises(ValueError, match=r"\['idle'\] have no part in the logits; permitted: \['used'\]"):
        group_fisher(idle, torch.randn(4, 6), y, group=s, groups=1)
    with pytest.raises(ValueError, match="'body' sees 5 rows; permitted: 4"):
        group_fisher(Sequence(), torch.randn(4, 5, 6), y, group=s, groups=1)


# The head alone


def head_example(*lead, n=12, d=5, k=3, groups=2, device="cpu"):
    z = torch.randn(*lead, n, d, dtype=torch.float64, device=device)
    logits = z @ torch.randn(*lead, d, k, dtype=torch.float64, device=device)
    label, group = (torch.randint(0, c, (*lead, n), device=device) for c in (k, groups))
    return z, logits, label, group


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_head_fisher_is_the_autograd_one(kind, device):
    torch.manual_seed(0)
    head = nn.Linear(5, 3).to(device, torch.float64)
    z, _, label, group = head_example(device=device)
    ours = head_fisher(z, head(z), label, group=group, groups=3, kind=kind)
    slow = naive(head, z, label, group=group, groups=3, kind=kind)[""]
    assert_same({"": ours.mT}, {"": slow})
    assert_same({"": ours.mT}, group_fisher(head, z, label, group=group, groups=3, kind=kind))
    assert ours[2].isnan().all()


@FEW
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.sampled_from(KINDS))
def test_head_fisher_is_batched(runs, d, k, groups, kind):
    z, logits, label, group = head_example(2, runs, d=d, k=k, groups=groups)
    ours = head_fisher(z, logits, label, group=group, groups=groups, kind=kind)
    assert ours.shape == (2, runs, groups, d, k)
    for i in range(2):
        for j in range(runs):
            one = head_fisher(z[i, j], logits[i, j], label[i, j], group=group[i, j], groups=groups, kind=kind)
            torch.testing.assert_close(ours[i, j], one, equal_nan=True)
    shared = head_fisher(z[0, 0], logits, label[0, 0], group=group[0, 0], groups=groups, kind=kind)  # runs share data
    torch.testing.assert_close(
        shared[1, 0],
        head_fisher(z[0, 0], logits[1, 0], label[0, 0], group=group[0, 0], groups=groups, kind=kind),
        equal_nan=True,
    )


def test_head_fisher_refuses_labels_outside_the_classes():
    z, logits, label, group = head_example()
    with pytest.raises(ValueError, match="label has values from 0 to 5; permitted are 0 to 2"):
        head_fisher(z, logits, torch.arange(12) // 2, group=group, groups=2)
    with pytest.raises(ValueError, match="kind is 'both'"):
        head_fisher(z, logits, label, group=group, groups=2, kind="both")


@pytest.mark.parametrize("device", DEVICES)
def test_row_importance_is_the_root_of_the_row_sum(device):
    fisher = torch.rand(2, 4, 3, dtype=torch.float64, device=device)
    slow = torch.tensor([[sum(c.item() for c in row) ** 0.5 for row in run] for run in fisher])
    torch.testing.assert_close(row_importance(fisher).cpu(), slow.double())


def test_doctests():
    assert doctest.testmod(module).failed == 0
