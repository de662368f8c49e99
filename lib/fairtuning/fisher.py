"""The diagonal Fisher information of each group (Zhang & Zhou 2024, arXiv 2403.00625, eq. 1).

`group_fisher` serves a model made of linear and convolutional layers, `head_fisher` a head alone, from its features.
Neither keeps per-example gradients. A linear layer with input a_i and output gradient g_i has the gradient g_i a_i^T,
so the squares of all examples add up to one matrix product, (G*G)^T (A*A).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise, starmap

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, unfold

from . import checks

KINDS = ("empirical", "true")
BLOCK = {"cpu": 2**17, "cuda": 2**26}  # numbers in a temporary; on a CPU it has to stay in a core's own cache


def group_fisher(
    model: nn.Module,
    inputs: Tensor,
    label: Tensor,
    *,
    group: Tensor,
    groups: int,
    layers: Iterable[str] | None = None,
    kind: str = "empirical",
    chunk: int = 1024,
) -> dict[str, Tensor]:
    """Mean square of the per-example gradients of the cross-entropy, by group (Zhang & Zhou 2024, eq. 1).

    `inputs` [N, ...], `label` [N] and `group` [N] (integers) share a device; `model(inputs)` gives logits [N, k].
    Returns {layer: [groups, *weight.shape]}: [groups, out, in] for a linear layer; `.mT` is the paper's layout.
    `layers` names `nn.Linear` or plain `nn.Conv2d` modules; None takes all. Biases are left out (the paper
    factors weights only). A group without examples is NaN.

    `kind="empirical"` squares the gradient at the given label, as the paper does; `"true"` is the expectation over
    the model's own label distribution, by one backward pass per class. `chunk` examples are in work at a time.
    The model runs in evaluation mode, where an example's gradient depends on that example only, and is left as
    it was found.

    Raises ValueError for a label, group, kind or layer outside the permitted ones, for a layer whose input does
    not hold the examples along its first axis, and for a layer (or a call of it) without part in the logits.

    >>> head = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(head.weight)
    >>> x, y, s = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), torch.tensor([0, 1])
    >>> group_fisher(head, x, y, group=s, groups=2)[""].flatten(1)   # x² (½ - [y = c])²
    tensor([[0.2500, 0.2500],
            [1.0000, 1.0000]])
    """
    _check(kind)
    label = checks.integers("label", label, below=None, shape=[len(inputs)]).long()
    group = checks.integers("group", group, below=groups, shape=[len(inputs)], wait=True).long()
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; permitted: 1 or more")
    squares = _Squares(_layers(model, layers), groups)
    squares.copy = any(getattr(module, "inplace", False) for module in model.modules())
    device = next(model.parameters()).device
    sizes = group.bincount(minlength=groups)
    edges = [0, *sizes.cumsum(0).tolist()]
    with _frozen(model), squares:
        for number, index in enumerate(group.argsort(stable=True).split(chunk)):  # sorted: a group is a slice
            squares.expect([min(max(edge - number * chunk, 0), len(index)) for edge in edges])
            with torch.enable_grad():
                logits = model(inputs[index].detach().to(device))
            own = checks.integers("label", label[index], below=logits.shape[-1], wait=True)
            for delta, last in _deltas(logits.detach(), own.to(device), kind):
                squares.last = last
                logits.backward(delta, retain_graph=not last)  # weights are frozen: no gradient of theirs
                squares.check()
            del logits  # its graph would live on through the next forward pass
    return {name: t.div_(sizes.to(t).view(-1, *[1] * (t.ndim - 1))) for name, t in squares.total.items()}


def head_fisher(
    features: Tensor, logits: Tensor, label: Tensor, *, group: Tensor, groups: int, kind: str = "empirical"
) -> Tensor:
    """Diagonal Fisher of a linear head from its features: the mean of z_j² δ_c² over a group's examples.

    With cross-entropy example i has the gradient z_i δ_i^T, δ = softmax(logits) - onehot(label); in expectation
    over the model's own labels (`kind="true"`) δ_c² becomes p_c (1 - p_c). `features` [..., n, d], `logits`
    [..., n, k], `label`, `group` [..., n] -> [..., groups, d, k], the paper's layout (rows are input features).
    Leading axes broadcast. A group without examples is NaN. Raises ValueError as `group_fisher` does (values: on the
    CPU).

    >>> z, y, s = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), torch.tensor([0, 0])
    >>> head_fisher(z, torch.zeros(2, 2), y, group=s, groups=1)   # ½ (1 + 4) ¼
    tensor([[[0.6250, 0.6250]]])
    """
    _check(kind)
    n, k = checks.examples(features=features, logits=logits), logits.shape[-1]
    label = checks.integers("label", label, below=k, n=n).long()
    group = checks.integers("group", group, below=groups, n=n).long()
    p = logits.softmax(-1)
    square = (p - one_hot(label, k).to(p)).square() if kind == "empirical" else p * (1 - p)
    member = one_hot(group, groups).to(p)
    by_group = (member.unsqueeze(-1) * square.unsqueeze(-2)).flatten(-2)  # [..., n, groups k]
    total = (features.square().mT @ by_group).unflatten(-1, (groups, k)).movedim(-2, -3)
    return total / member.sum(-2)[..., None, None]


def row_importance(fisher: Tensor) -> Tensor:
    """√(Σ_c I_jc), one importance per input feature (Zhang & Zhou 2024, step before eq. 2): [..., d, k] -> [..., d].

    >>> row_importance(torch.tensor([[9.0, 16.0], [0.0, 4.0]]))
    tensor([5., 2.])
    """
    return fisher.sum(-1).sqrt()


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; permitted: {', '.join(KINDS)}")


def _deltas(logits: Tensor, label: Tensor, kind: str) -> Iterator[tuple[Tensor, bool]]:
    """Gradients of the summed cross-entropy with respect to the logits, each with whether it is the last."""
    p, k = logits.softmax(-1), logits.shape[-1]
    if kind == "empirical":
        yield p - one_hot(label, k).to(p), True
        return
    for c in range(k):  # a factor √p_c on the gradient is a weight p_c on its square
        yield p[:, c, None].sqrt() * (p - one_hot(torch.full_like(label, c), k).to(p)), c == k - 1


def _layers(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise ValueError(f"layers is {names!r}; permitted: a list of names, or None for all")
    known = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    chosen = {name: known.get(name) for name in (known if names is None else names)}
    for name, m in chosen.items():
        if m is None:
            raise ValueError(f"layer is {name!r}; permitted: {', '.join(known)}")
        if isinstance(m, nn.Conv2d) and (m.groups > 1 or m.padding_mode != "zeros" or isinstance(m.padding, str)):
            raise ValueError(f"layer {name!r} is {m}; permitted: groups=1, zero padding given as numbers")
    return chosen


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    try:
        model.requires_grad_(False).eval()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:  # one by one: .train() would reach children that were in evaluation mode
            module.training = True


class _Squares:
    """Adds up the squared gradients of each layer as soon as the backward pass reaches it, then frees them."""

    copy = False  # some module of the model writes in place
    last = True  # no other backward pass follows through this graph

    def __init__(self, modules: dict[str, nn.Module], groups: int) -> None:
        self.modules = modules
        self.total = {name: m.weight.new_zeros(groups, *m.weight.shape) for name, m in modules.items()}

    def __enter__(self) -> None:
        self.handles = [m.register_forward_hook(self._hook(name)) for name, m in self.modules.items()]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def expect(self, bounds: list[int]) -> None:
        """Make ready for a batch in which group s is the rows bounds[s] to bounds[s + 1]."""
        self.bounds, self.calls, self.done = bounds, defaultdict(list), set()

    def check(self) -> None:
        if missing := self.modules.keys() - self.done:
            raise ValueError(f"{sorted(missing)} have no part in the logits; permitted: {sorted(self.done)}")
        self.done.clear()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if len(args[0]) != self.bounds[-1]:
                raise ValueError(f"{name!r} sees {len(args[0])} rows; permitted: {self.bounds[-1]}, the examples")
            if not output.requires_grad:  # a first layer: the graph starts here, which saves a product
                output = output.requires_grad_()
                output = output.clone() if self.copy else output  # nobody may write into a leaf
            calls, call = self.calls[name], {"input": args[0].detach()}
            calls.append(call)

            def arrived(gradient: Tensor) -> None:
                call["gradient"] = gradient
                if all("gradient" in c for c in calls):  # a shared layer's calls add up before the square
                    pairs = [(c.pop("input") if self.last else c["input"], c.pop("gradient")) for c in calls]
                    _add_squares(self.total[name], module, pairs, self.bounds)
                    self.done.add(name)

            output.register_hook(arrived)
            return output

        return hook


@torch.no_grad()
def _add_squares(total: Tensor, module: nn.Module, pairs: list[tuple], bounds: list[int]) -> None:
    block, (a, g), size = BLOCK.get(total.device.type, BLOCK["cpu"]), pairs[0], module.weight.numel()
    one_row = len(pairs) == 1 and a.ndim == 2
    if one_row:
        size = max(a.shape[1], g.shape[1])
    elif isinstance(module, nn.Conv2d):  # an unfolded input may be larger than the weight
        size = max(size, module.weight[0].numel() * g[0, 0].numel())
    step = max(1, block // size)
    buffer = total.new_empty(0 if one_row else step, *module.weight.flatten(1).shape)
    for s, (start, stop) in enumerate(pairwise(bounds)):
        squares = total[s].flatten(1)
        pieces = -(-(stop - start) // step)  # of even length: a last piece of a few rows would cost as much
        cuts = [start + (stop - start) * i // pieces for i in range(pieces + 1)] if pieces else []
        for rows in starmap(slice, pairwise(cuts)):
            if one_row:  # the square of a product is the product of the squares
                squares.addmm_(g[rows].square().T, a[rows].square())
                continue
            parts = [_tokens(module, a[rows], g[rows]) for a, g in pairs]
            left, right = parts[0] if len(parts) == 1 else (torch.cat(p, 1) for p in zip(*parts, strict=True))
            gradients = torch.bmm(right.mT, left, out=buffer[: len(left)])
            if step > 16:
                squares += gradients.square_().sum(0)
            else:  # large layers: no pass over memory between the two
                for gradient in gradients.unbind():
                    squares.addcmul_(gradient, gradient)


def _tokens(module: nn.Module, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The T vectors that the weight multiplies, [n, T, in], and the gradients of the results, [n, T, out]."""
    if isinstance(module, nn.Linear):
        return a.reshape(len(a), -1, module.in_features), g.reshape(len(g), -1, module.out_features)
    return unfold(a, module.kernel_size, module.dilation, module.padding, module.stride).mT, g.flatten(2).mT
