"""Group-wise Fisher against its peers: time, exactness and memory, all in one run.

    python benchmarks/fisher.py            about five minutes on one core; writes benchmarks/results/fisher.json

Times are medians of the process's CPU time, one thread, the variants taking turns. `ratio` is a variant's time over
`group_fisher`'s: above 1, the variant is slower. Before timing, every peer's result is compared in float64.
"""

import copy
import json
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))
from fairtuning.fisher import group_fisher  # noqa: E402

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


def seconds(variants: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each variant, taking turns, after one round that is not counted."""
    times = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def largest_difference(ours: Fisher, theirs: Fisher) -> float:
    """Over the largest entry of each layer."""
    return max(((ours[name] - t).abs().max() / t.abs().max()).item() for name, t in theirs.items())


def rows(case: str, times: dict[str, float], notes: dict[str, str]) -> list[dict]:
    ours = times["group_fisher"]
    return [
        {"case": case, "variant": name, "ratio": t / ours, "seconds": t, "note": notes.get(name, "")}
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
    fast = seconds(variants, 5 * repeats)
    both = {"group_fisher": variants["group_fisher"]}
    both |= {name: peer(model, x, y, group, groups) for name, peer in PEERS.items() if peer is not by_loop}
    both["autograd loop over examples"] = by_loop(model, x[few], y[few], group[few], groups)
    times = seconds(both, repeats)
    times["autograd loop over examples"] *= examples / sample
    notes["autograd loop over examples"] += f"; {sample} examples timed, x{examples // sample}"
    # Steps took turns with group_fisher alone: peers that fill gigabytes leave either a cold cache.
    steps = {name: t / fast["group_fisher"] * times["group_fisher"] for name, t in fast.items()}
    return rows(f"MLP 108-256-256-2, {examples} examples, {groups} groups", steps | times, notes)


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
    times = seconds(
        {
            "group_fisher": lambda: group_fisher(model, x, y, group=group, groups=groups, chunk=batch),
            "training step, SGD": training_step(model, x, y, torch.optim.SGD, batch),
            "training step, Adam": training_step(model, x, y, torch.optim.Adam, batch),
        },
        repeats,
    )
    case = f"ViT-Tiny, 112 px, {examples} images in batches of {batch}, {groups} groups"
    return rows(case, times, {"group_fisher": f"float64 difference to the loop {difference:.0e} (4 images)"})


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
        {
            "case": f"memory, MLP 108-256-256-2, {examples} examples",
            "variant": variant,
            "ratio": mebibytes / found[0][-1],
            "seconds": None,
            "note": f"{mebibytes:.0f} MiB at the peak beside the data; ratio: to group_fisher at {sizes[0]} examples",
        }
        for variant, examples, mebibytes in found
    ]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, 1 thread"


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
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    found = [row | {"hardware": processor(), "versions": versions} for row in found]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    for row in found:
        print(f"{row['case']:65} {row['variant']:42} {row['ratio']:8.2f}  {row['note']}")


if __name__ == "__main__":
    typer.run(main)
