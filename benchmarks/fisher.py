"""Group-wise Fisher against its peers: time, exactness and memory, all in one run.

    python benchmarks/fisher.py            about five minutes on one core; writes benchmarks/results/fisher.json

Times are medians of the process's CPU time, one thread, the variants taking turns. `ratio` is a peer's time over
`group_fisher`'s, and `group_fisher`'s over a training step's. Every peer's result is first compared in float64.
"""

import copy
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from measuring import cpu_seconds, row, write  # which makes the checkout's fairtuning importable
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fairtuning.fisher import group_fisher

PACKAGES = ("torch", "opacus", "backpack-for-pytorch", "timm")
Fisher = dict[str, Tensor]


def mlp(hidden: int = 256) -> nn.Module:
    return nn.Sequential(nn.Linear(108, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def weights_only(model: nn.Module) -> nn.Module:
    """A copy in which the peers need no gradients of the biases: `group_fisher` computes none either."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    return model


def mean_square(per_example: Tensor, group: Tensor, groups: int) -> Tensor:
    """[N, out, in] -> [groups, out, in], example by example: faster than masks, or than squares and one product."""
    total = per_example.new_zeros(groups, *per_example.shape[1:])
    for g, s in zip(per_example.detach().unbind(), group.tolist(), strict=True):
        total[s].addcmul_(g, g)
    return total / group.bincount(minlength=groups)[:, None, None]


# The peers: each makes a function of no arguments, with all that is done once done beforehand.


def by_loop(model: nn.Module, x: Tensor, y: Tensor, group: Tensor, groups: int) -> Callable[[], Fisher]:
    model = weights_only(model)
    weights = {name: m.weight for name, m in linear_layers(model).items()}

    def run() -> Fisher:
        total = {name: w.new_zeros(groups, *w.shape) for name, w in weights.items()}
        for i in range(len(x)):
            loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[name][group[i]] += g.square()
        sizes = group.bincount(minlength=groups)
        return {name: t / sizes[:, None, None] for name, t in total.items()}

    return run


def by_vmap(model: nn.Module, x: Tensor, y: Tensor, group: Tensor, groups: int) -> Callable[[], Fisher]:
    model = weights_only(model)
    wanted = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters: Fisher, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters | fixed, (x[None],)), y[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> Fisher:
        found = gradients(wanted, x, y)
        return {name.removesuffix(".weight"): mean_square(g, group, groups) for name, g in found.items()}

    return run


def by_opacus(model: nn.Module, x: Tensor, y: Tensor, group: Tensor, groups: int) -> Callable[[], Fisher]:
    from opacus import GradSampleModule

    model = GradSampleModule(weights_only(model).train(), loss_reduction="sum")

    def run() -> Fisher:
        model.zero_grad()
        cross_entropy(model(x), y, reduction="sum").backward()
        layers = linear_layers(model._module)
        return {name: mean_square(m.weight.grad_sample, group, groups) for name, m in layers.items()}

    return run


def by_backpack(model: nn.Module, x: Tensor, y: Tensor, group: Tensor, groups: int) -> Callable[[], Fisher]:
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    model, loss = extend(weights_only(model)), extend(nn.CrossEntropyLoss(reduction="sum"))
    layers = linear_layers(model)

    def run() -> Fisher:
        found = {name: [] for name in layers}
        for s in range(groups):
            member = group == s
            model.zero_grad()
            with backpack(SumGradSquared()):
                loss(model(x[member]), y[member]).backward()
            for name, m in layers.items():
                found[name].append(m.weight.sum_grad_squared / member.sum())
        return {name: torch.stack(t) for name, t in found.items()}

    return run


PEERS = {
    "opacus GradSampleModule": by_opacus,
    "torch.func vmap(grad)": by_vmap,
    "BackPACK SumGradSquared, once per group": by_backpack,
    "autograd loop over examples": by_loop,
}


def training_step(model: nn.Module, x: Tensor, y: Tensor, optimiser: type, batch: int) -> Callable[[], None]:
    model = copy.deepcopy(model).train()
    optimiser = optimiser(model.parameters(), lr=1e-4)

    def run() -> None:
        for part, label in zip(x.split(batch), y.split(batch), strict=True):
            optimiser.zero_grad()
            cross_entropy(model(part), label).backward()
            optimiser.step()

    return run


def largest_difference(ours: Fisher, theirs: Fisher) -> float:
    """Over the largest entry of each layer."""
    return max(((ours[name] - t).abs().max() / t.abs().max()).item() for name, t in theirs.items())


def rows(case: str, times: dict[str, float], notes: dict[str, str], targets: dict[str, str]) -> list[dict]:
    """A peer's ratio is its time over ours; a training step's the other way round: what we cost beside it."""
    ours = times["group_fisher"]
    return [
        row(
            case,
            name,
            seconds=t,
            ratio=ours / t if "step" in name else t / ours,
            target=targets.get(name, ""),
            note=notes.get(name, "group_fisher over this" if "step" in name else ""),
        )
        for name, t in times.items()
    ]


def compare_mlp(groups: int, repeats: int, examples: int = 1024, sample: int = 64) -> list[dict]:
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(examples, 108), torch.randint(0, 2, (examples,))
    group = torch.randint(0, groups, (examples,))
    notes = {}
    few = slice(0, sample)  # the loop is timed on these only
    for name, peer in PEERS.items():
        part = few if peer is by_loop else slice(None)
        double = copy.deepcopy(model).double(), x[part].double(), y[part]
        theirs = peer(*double, group[part], groups)()
        difference = largest_difference(group_fisher(*double, group=group[part], groups=groups), theirs)
        assert difference < 1e-12, f"{name} differs by {difference:.1e} in float64"
        notes[name] = f"float64 difference {difference:.0e}"
    variants = {
        "group_fisher": lambda: group_fisher(model, x, y, group=group, groups=groups),
        "training step, SGD": training_step(model, x, y, torch.optim.SGD, examples),
        "training step, Adam": training_step(model, x, y, torch.optim.Adam, examples),
    }
    fast = cpu_seconds(variants, repeats=5 * repeats)
    both = {"group_fisher": variants["group_fisher"]}
    both |= {name: peer(model, x, y, group, groups) for name, peer in PEERS.items() if peer is not by_loop}
    both["autograd loop over examples"] = by_loop(model, x[few], y[few], group[few], groups)
    times = cpu_seconds(both, repeats=repeats)
    times["autograd loop over examples"] *= examples / sample
    notes["autograd loop over examples"] += f"; {sample} examples timed, x{examples // sample}"
    # Steps took turns with group_fisher alone: peers that fill gigabytes leave either a cold cache.
    steps = {name: t / fast["group_fisher"] * times["group_fisher"] for name, t in fast.items()}
    targets = {
        "opacus GradSampleModule": ">= 20",
        "torch.func vmap(grad)": ">= 20",
        "BackPACK SumGradSquared, once per group": ">= 1.3" if groups == 2 else ">= 2",
    } | ({"training step, SGD": "<= 1.15"} if groups == 2 else {})
    return rows(f"MLP 108-256-256-2, {examples} examples, {groups} groups", steps | times, notes, targets)


def compare_vit(repeats: int, examples: int = 64, batch: int = 32, groups: int = 2) -> list[dict]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, num_classes=10)
    x, y = torch.randn(examples, 3, 112, 112), torch.randint(0, 10, (examples,))
    group = torch.randint(0, groups, (examples,))
    double = copy.deepcopy(model).double().eval(), x[:4].double(), y[:4]
    ours = group_fisher(*double, group=group[:4] * 0, groups=1)
    difference = largest_difference(ours, by_loop(*double, group[:4] * 0, 1)())
    assert difference < 1e-12, f"ViT-Tiny differs by {difference:.1e} in float64"
    times = cpu_seconds(
        {
            "group_fisher": lambda: group_fisher(model, x, y, group=group, groups=groups, chunk=batch),
            "training step, SGD": training_step(model, x, y, torch.optim.SGD, batch),
            "training step, Adam": training_step(model, x, y, torch.optim.Adam, batch),
        },
        repeats=repeats,
    )
    case = f"ViT-Tiny, 112 px, {examples} images in batches of {batch}, {groups} groups"
    notes = {"group_fisher": f"float64 difference to the loop {difference:.0e} (4 images)"}
    return rows(case, times, notes, {"training step, SGD": "<= 1.15"})


def peak(variant: str, examples: int) -> float:
    """MiB by which one computation raises the peak memory of this process, which should be a fresh one (Linux)."""
    torch.set_num_threads(1)
    x, y, group = torch.randn(examples, 108), torch.randint(0, 2, (examples,)), torch.randint(0, 2, (examples,))
    model = mlp()
    compute = {
        "group_fisher": lambda x, y, g: group_fisher(model, x, y, group=g, groups=2),
        "torch.func vmap(grad)": lambda x, y, g: by_vmap(model, x, y, g, 2)(),
    }[variant]
    compute(x[:8], y[:8], group[:8])  # what the first call alone loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use now
    before = _status("VmRSS")
    compute(x, y, group)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def compare_memory(sizes: tuple[int, ...] = (1024, 8192, 65536)) -> list[dict]:
    found = []
    for variant, many in (("group_fisher", sizes), ("torch.func vmap(grad)", (sizes[0], 2 * sizes[0]))):
        for examples in many:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append((variant, examples, pool.apply(peak, (variant, examples))))
    return [
        row(
            f"memory, MLP 108-256-256-2, {examples} examples",
            variant,
            seconds=None,
            ratio=mebibytes / found[0][-1],
            note=f"{mebibytes:.0f} MiB at the peak beside the data; ratio: to group_fisher at {sizes[0]} examples",
        )
        for variant, examples, mebibytes in found
    ]


def main(
    repeats: int = typer.Option(15, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "fisher.json", help="Where the results go."),
    vit: bool = typer.Option(True, help="Also ViT-Tiny (needs timm)."),
) -> None:
    """Time group_fisher against opacus, torch.func, BackPACK, a loop and a training step."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # opacus and BackPACK, on inputs that are data
    found = compare_mlp(2, repeats) + compare_mlp(8, repeats)
    if vit:
        found += compare_vit(repeats)
    found += compare_memory()
    write(found, output, packages=PACKAGES)


if __name__ == "__main__":
    typer.run(main)
