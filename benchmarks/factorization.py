"""Row-weighted low-rank factorisation of every layer of a ViT-B against torch.linalg.svd, and its share of a run.

    python benchmarks/factorization.py     about two minutes on one core; writes benchmarks/results/factorization.json

The layers of one block, with random float32 weights and log-normal importances, factorised to rank 16; a ViT-B has
twelve such blocks, and seconds are of all twelve. Errors are weighted, ||diag(rows) (W - A B)||, and relative to the
smallest possible one, of singular values in float64. The share is of a run of profile compact on CelebA: the start of
one ViT-Tiny against its training steps. Times are medians of the process's CPU time, one thread, the variants taking
turns; weights are the pretrained ones where FAIRTUNING_WEIGHTS has them, else random: the times are the same.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import typer
from measuring import cpu_seconds, row, write  # which makes the checkout's fairtuning importable
from torch import Tensor

from fairtuning.datasets import GroupedData, images
from fairtuning.factorization import low_rank
from fairtuning.studies import sukumaran2024
from fairtuning.vision import adapters, backbones

PACKAGES = ("torch", "timm", "peft")
BLOCKS, RANK = 12, 16
LAYERS = {"qkv": (768, 2304), "projection": (768, 768), "MLP, first": (768, 3072), "MLP, second": (3072, 768)}
TRAINING = 10_825  # training images of the compact CelebA
STEPS = 32  # that are timed

Factors = tuple[Tensor, Tensor]


def by_svd(W: Tensor, rows: Tensor) -> Factors:
    """Eq. 4 of arXiv 2403.00625 without its inverse."""
    V = torch.linalg.svd(rows[:, None] * W, full_matrices=False).Vh[:RANK].mT
    return W @ V, V.mT


def by_random_projection(W: Tensor, rows: Tensor) -> Factors:
    V = torch.svd_lowrank(rows[:, None] * W, q=RANK, niter=2)[2]
    return W @ V, V.mT


VARIANTS: dict[str, Callable[[Tensor, Tensor], Factors]] = {
    "low_rank": lambda W, rows: low_rank(W, RANK, rows=rows),
    "torch.linalg.svd": by_svd,
    "torch.svd_lowrank (random projections)": by_random_projection,
}


def compare(rounds: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found, total, worst = [], dict.fromkeys(VARIANTS, 0.0), dict.fromkeys(VARIANTS, 0.0)
    for layer, (d, k) in LAYERS.items():
        W = torch.randn(d, k, generator=generator)
        rows = torch.randn(d, generator=generator).exp()
        least = torch.linalg.svdvals(rows.double()[:, None] * W.double())[RANK:].square().sum().sqrt()
        variants = {name: partial(factorise, W, rows) for name, factorise in VARIANTS.items()}
        times = cpu_seconds(variants, repeats=rounds)
        for name, factorise in variants.items():
            A, B = (factor.double() for factor in factorise())
            excess = float((rows.double()[:, None] * (W.double() - A @ B)).norm() / least) - 1
            total[name] += times[name]
            worst[name] = max(worst[name], excess)
            note = f"error {excess:.0e} above the smallest"
            ratio = times[name] / times["low_rank"]
            found.append(
                row(f"{BLOCKS} x {layer}, {d} x {k}", name, seconds=BLOCKS * times[name], ratio=ratio, note=note)
            )
    for name, seconds in total.items():
        note = f"error at most {worst[name]:.0e} above the smallest"
        ratio = seconds / total["low_rank"]
        found.append(row("all layers of a ViT-B", name, seconds=BLOCKS * seconds, ratio=ratio, note=note))
    return found


def share() -> list[dict]:
    """What the information and the factorisation of every qkv add to one run, against its training steps."""
    work = import_module("fairtuning.studies.sukumaran2024.work")
    run, _ = sukumaran2024.selected("LoRA/fisher/celeba", "compact", lambda run: None)
    size = images.parse_size(run.size)
    n = max(work.INFORMING, STEPS * run.batch_size)
    generator = torch.Generator().manual_seed(0)
    label, group = torch.randint(2, (2, n), generator=generator)
    data = GroupedData(
        name="noise", edition="", digest="", label=label, group=group, split=torch.zeros(n, dtype=torch.int64),
        inputs=torch.randint(256, (n, 3, *size), generator=generator, dtype=torch.uint8),
        label_names=("no", "yes"), group_names=("a", "b"), split_names=("training",),
    )  # fmt: skip
    try:
        backbone = backbones.load(run.backbone, classes=2, size=size)
    except backbones.BackboneError:
        run = replace(run, weights="random")
        backbone = backbones.load(run.backbone, classes=2, size=size, weights="random")

    def seconds(function: Callable) -> tuple[float, object]:
        start = time.process_time()
        result = function()
        return time.process_time() - start, result

    information, rows = seconds(lambda: work.importance(backbone, run, data))
    weights = {name: module.weight.double().mT for name, module in adapters.adapted(backbone.model).items()}
    factorisation, _ = seconds(lambda: [low_rank(W, run.rank, rows=rows[name].to(W)) for name, W in weights.items()])
    training = work.Training(work.network_of(replace(run, method="lora", epochs=1), data), run, data)
    forward, objective, steps = training.forward, training.objective, []
    trained = {name: value.requires_grad_() for name, value in training.network.trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-3)
    for index in torch.arange(n).split(run.batch_size)[:STEPS]:

        def step(index: Tensor = index) -> None:
            optimiser.zero_grad()
            inputs, label, group = training.batch(index[None])
            objective(forward(trained, inputs), label, group).sum().backward()
            optimiser.step()

        steps.append(seconds(step)[0])
    whole = sorted(steps)[len(steps) // 2] * run.epochs * math.ceil(TRAINING / run.batch_size)
    case = f"start of ViT-Tiny, {run.size} px, {len(weights)} qkv, rank {run.rank}; ratio: share of the training steps"
    parts = {f"head and information, {work.INFORMING:,} images": information, "low_rank, float64": factorisation}
    note = f"training steps of a run of profile compact: {whole:.0f} s"
    return [row(case, name, seconds=found, ratio=found / whole, note=note) for name, found in parts.items()]


def main(
    rounds: int = typer.Option(3, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "factorization.json", help="Where results go."),
) -> None:
    """Time the weighted factorisation of whole networks, and what share of a run it has."""
    torch.set_num_threads(1)
    write(compare(rounds) + share(), output, packages=PACKAGES)


if __name__ == "__main__":
    typer.run(main)
