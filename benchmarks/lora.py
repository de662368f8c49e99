"""LoRA steps on ViT-Tiny at 112 px: bf16 against float32, what the penalty costs, what a cached frozen prefix saves.

    python benchmarks/lora.py              about six minutes on one core; writes benchmarks/results/lora.json

Times are medians of the process's CPU time, one thread, the variants taking turns. `ratio` is what its row's target is
about. Weights are the pretrained ones where FAIRTUNING_WEIGHTS has them, else random: the times are the same.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from measuring import cpu_seconds, row, write  # which makes the checkout's fairtuning importable
from torch import Tensor, nn

from fairtuning import losses
from fairtuning.vision import adapters, backbones, network

PACKAGES = ("torch", "timm", "peft")
SIZE, BATCH, RANK, CLASSES = (112, 112), 32, 16, 2


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Stripes in noise, lying or standing: the label, of which a fifth is wrong so that the loss stays away from 0."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (n,), generator=generator)
    phase = 6.28 * torch.rand(n, 1, generator=generator) + torch.arange(SIZE[0]) / 2
    stripes = phase.sin()[:, :, None].expand(n, *SIZE)
    stripes = torch.where(label.bool()[:, None, None], stripes, stripes.mT)[:, None]
    images = 128 + 20 * stripes + 40 * torch.randn(n, 3, *SIZE, generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.2
    return images.clamp(0, 255).byte(), torch.where(wrong, 1 - label, label)


def backbone() -> backbones.Backbone:
    try:
        return backbones.load("vit-tiny", classes=CLASSES, size=SIZE)
    except backbones.BackboneError:
        return backbones.load("vit-tiny", classes=CLASSES, size=SIZE, weights="random")


class Training:
    """Steps of one model on batches that come round and round; `tokens`: on the frozen prefix's output, kept."""

    def __init__(self, images: Tensor, label: Tensor, *, seed: int = 0, **options):
        self.bf16, self.penalty = options.pop("bf16", False), options.pop("penalty", None)
        self.cached, full = options.pop("cached", False), options.pop("full", False)
        self.run = network.forward if options.pop("short", False) else lambda model, inputs: model(inputs)
        given, written_out = backbone(), options.pop("written_out", False)
        self.model = given.model if full else adapters.add(given.model, rank=RANK, seed=seed, **options)
        if written_out:
            backbones.write_out_attention(self.model)
        self.first = 12 - options.get("last", 12)
        self.model.train()
        inputs = given.prepare(images)
        if self.cached:
            with torch.no_grad(), self.precision():
                parts = [network.first_blocks(self.model, part, blocks=self.first) for part in inputs.split(BATCH)]
            inputs = torch.cat(parts)
        self.batches = list(zip(inputs.split(BATCH), label.split(BATCH), strict=True))
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.done, self.losses = 0, []

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.cached:
            return network.last_blocks(self.model, inputs, blocks=self.first)
        return self.run(self.model, inputs)

    def step(self) -> None:
        inputs, label = self.batches[self.done % len(self.batches)]
        with self.precision():
            logits = self.forward(inputs)
        logits, self.done = logits.float(), self.done + 1
        if self.penalty:  # a number of groups; the examples are spread over them
            group = torch.arange(len(label)) % self.penalty
            loss = losses.variance_penalised_loss(logits, label, group=group, groups=self.penalty, lam=1.0)
        else:
            loss = nn.functional.cross_entropy(logits, label)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())


def compare_precision(rounds: int) -> list[dict]:
    data = pictures(4 * BATCH)
    runs = {
        "LoRA, float32": Training(*data),
        "LoRA, bf16 autocast": Training(*data, bf16=True),
        "LoRA, float32, last block for the class token": Training(*data, short=True),
        "LoRA, bf16 autocast, last block for the class token": Training(*data, bf16=True, short=True),
        "LoRA, float32, attention written out": Training(*data, written_out=True),
        "LoRA, bf16 autocast, attention written out": Training(*data, bf16=True, written_out=True),
        "LoRA, bf16 autocast, as the runs have it": Training(*data, bf16=True, written_out=True, short=True),
        "LoRA on query and value, float32": Training(*data, layers="query_value"),
        "full fine-tuning, float32": Training(*data, full=True),
        "full fine-tuning, bf16 autocast": Training(*data, full=True, bf16=True),
    }
    times = cpu_seconds({name: run.step for name, run in runs.items()}, repeats=rounds)
    case = f"training step, ViT-Tiny 112 px, batch {BATCH}, rank {RANK}"
    found = [
        row(
            case,
            name,
            seconds=t,
            ratio=times["LoRA, float32"] / t,
            target=">= 1.25" if name == "LoRA, bf16 autocast, as the runs have it" else "",
            note=f"{BATCH / t:.0f} images/s; ratio: LoRA float32 over this",
        )
        for name, t in times.items()
    ]
    return found


def compare_losses(steps: int, seeds: int = 3) -> list[dict]:
    """One run in float32 and in bf16 wander apart by more than their losses do on average: several seeds."""
    means = []
    for seed in range(seeds):
        data = pictures(steps * BATCH, seed=seed)
        runs = [Training(*data, seed=seed, bf16=bf16) for bf16 in (False, True)]
        for run in runs:
            for _ in range(steps):
                run.step()
        means.append([statistics.mean(run.losses) for run in runs])
    plain, bf16 = (statistics.mean(each) for each in zip(*means, strict=True))
    apart = abs(bf16 / plain - 1)
    each = ", ".join(f"{100 * (theirs / ours - 1):+.2f} %" for ours, theirs in means)
    note = f"mean loss over {steps} steps, {seeds} seeds: {plain:.4f} and {bf16:.4f}; each seed {each}"
    case, variant = "loss, LoRA in bf16 against float32", "relative difference"
    return [row(case, variant, seconds=None, ratio=apart, target="<= 0.01", note=note)]


def compare_penalty(rounds: int) -> list[dict]:
    data, counts = pictures(4 * BATCH), (2, 4, 40, 100)
    whole = {"no penalty": Training(*data), "penalty, 4 groups": Training(*data, penalty=4)}
    steps = cpu_seconds({name: run.step for name, run in whole.items()}, repeats=rounds)
    logits, label = torch.randn(BATCH, CLASSES, requires_grad=True), data[1][:BATCH]

    def plain() -> None:
        nn.functional.cross_entropy(logits, label).backward()

    def ours(groups: int) -> Callable:
        group = torch.arange(BATCH) % groups
        return lambda: losses.variance_penalised_loss(logits, label, group=group, groups=groups, lam=1.0).backward()

    def by_loop(groups: int) -> Callable:
        group = torch.arange(BATCH) % groups

        def run() -> None:
            loss = losses.cross_entropy(logits, label)
            means = torch.stack([loss[group == g].mean() for g in range(groups) if (group == g).any()])
            (loss.mean() + (means - means.mean()).square().sum()).backward()

        return run

    variants = {"plain": plain} | {g: ours(g) for g in counts} | {f"loop {g}": by_loop(g) for g in counts}
    many = {name: (lambda run=run: [run() for _ in range(100)]) for name, run in variants.items()}
    alone = {name: t / 100 for name, t in cpu_seconds(many, repeats=rounds).items()}
    case = "FairLoRA penalty, batch 32"
    step, extra = steps["no penalty"], {g: alone[g] - alone["plain"] for g in counts}
    found = [
        row(
            case,
            f"{g} groups",
            seconds=extra[g],
            ratio=1 + extra[g] / step,
            target="<= 1.02",
            note="loss and its gradient with the penalty less without, over a step without; "
            f"loop over groups: {1 + (alone[f'loop {g}'] - alone['plain']) / step:.4f}",
        )
        for g in counts
    ]
    flat = extra[100] / extra[2]
    both = steps["penalty, 4 groups"] / step
    return found + [
        row(case, "100 groups over 2 groups", seconds=None, ratio=flat, target="<= 1.3", note="flat in the groups"),
        row(case, "whole steps in turn", seconds=steps["penalty, 4 groups"], ratio=both, note="within noise of 1"),
    ]


def compare_prefix(rounds: int, seeds: int = 4) -> list[dict]:
    data = pictures(2 * BATCH)
    found = []
    for last, target in ((1, 6.0), (4, 1.8)):
        for bf16 in (False, True):
            options = {"last": last, "bf16": bf16}
            apart = [Training(*data, seed=seed, **options) for seed in range(seeds)]
            kept = [Training(*data, seed=seed, cached=True, **options) for seed in range(seeds)]
            for run in kept[1:]:  # one cache for all: frozen blocks give every seed the same
                run.batches = kept[0].batches
            times = cpu_seconds(
                {
                    "apart": lambda runs=apart: [r.step() for r in runs],
                    "kept": lambda runs=kept: [r.step() for r in runs],
                },
                repeats=rounds,
            )
            ratio = times["apart"] / times["kept"]
            differ = max(
                abs(a / b - 1)
                for r, s in zip(apart, kept, strict=True)
                for a, b in zip(r.losses, s.losses, strict=True)
            )
            found.append(
                row(
                    f"{seeds} seeds, LoRA in the last {last} of 12 blocks, {'bf16' if bf16 else 'float32'}",
                    "cached prefix; ratio: whole forward over this",
                    seconds=times["kept"] / seeds,
                    ratio=ratio,
                    target=f">= {target:g}",
                    note=f"{BATCH * seeds / times['kept']:.0f} images/s, one forward pass for the cache not counted; "
                    f"losses differ by at most {differ:.0e}",
                )
            )
    return found


def main(
    rounds: int = typer.Option(9, help="Rounds in which each variant is timed once."),
    steps: int = typer.Option(40, help="Steps over which the losses of float32 and bf16 are compared."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "lora.json", help="Where the results go."),
) -> None:
    """Time LoRA steps: precision, penalty, cached prefix."""
    torch.set_num_threads(1)
    found = compare_precision(rounds) + compare_losses(steps) + compare_penalty(rounds) + compare_prefix(rounds)
    write(found, output, packages=PACKAGES)


if __name__ == "__main__":
    typer.run(main)
