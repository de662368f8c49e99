"""Training steps on a GPU: images a second, and what fraction of the card's measured matrix peak they reach.

    python benchmarks/gpu.py              a minute on one GPU; writes benchmarks/results/gpu.json

Times are medians over rounds in which the variants take turns, by the clock, the GPU awaited. Weights are random: the
times are the same. The work of a step is counted by torch (matrix products and attention, forwards and backwards); the
peak is that of a product of two bfloat16 matrices of 8192 x 8192 random numbers.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import typer
from measuring import row, write  # which makes the checkout's fairtuning importable
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fairtuning import losses
from fairtuning.vision import adapters, backbones, network

PACKAGES = ("torch", "timm", "peft")
SIZE, RANK, CLASSES, SIDE = (224, 224), 16, 2, 8192
IMAGES = 2048  # uint8, in the processor's memory


def seconds(variants: Mapping[str, Callable], *, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of one call, of ``steps`` calls in a row, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, variant in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                variant()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


class Step:
    """A training step of a backbone on one batch; ``images``: on another batch each time, out of these uint8 ones."""

    def __init__(
        self,
        backbone: str,
        *,
        batch: int,
        full: bool = False,
        bf16: bool = True,
        groups: int = 0,
        images: Tensor | None = None,
    ):
        self.given = backbones.load(backbone, classes=CLASSES, size=SIZE, weights="random")
        model = self.given.model if full else adapters.add(self.given.model, rank=RANK, seed=0)
        self.model, self.bf16, self.groups, self.images, self.batch = model.cuda().eval(), bf16, groups, images, batch
        self.inputs = torch.randn(batch, 3, *SIZE, device="cuda")
        self.label = torch.arange(batch, device="cuda") % CLASSES
        self.group = torch.arange(batch, device="cuda") % max(groups, 1)
        trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def __call__(self) -> None:
        if self.images is not None:
            self.inputs = self.given.prepare(self.images[torch.randint(len(self.images), (self.batch,))].cuda())
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            logits = network.forward(self.model, self.inputs)
        loss = (
            losses.variance_penalised_loss(
                logits.float()[None], self.label[None], group=self.group[None], groups=self.groups, lam=1.0
            )
            if self.groups
            else torch.nn.functional.cross_entropy(logits.float(), self.label)
        )
        self.optimiser.zero_grad()
        loss.sum().backward()
        self.optimiser.step()

    def work(self) -> float:
        """Floating-point operations of a step."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


def matrix_peak(rounds: int) -> float:
    """Operations a second of a large matrix product in bfloat16."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIDE**3 / seconds({"product": lambda: a @ b}, rounds=rounds, steps=10)["product"]


def compare_steps(backbone: str, name: str, peak: float, *, batch: int, rounds: int) -> list[dict]:
    images = torch.randint(256, (IMAGES, 3, *SIZE), dtype=torch.uint8)
    steps = {
        "LoRA, bf16 autocast": Step(backbone, batch=batch),
        "LoRA, bf16 autocast, penalty of 4 groups": Step(backbone, batch=batch, groups=4),
        "LoRA, bf16 autocast, penalty of 100 groups": Step(backbone, batch=batch, groups=100),
        "LoRA, bf16 autocast, images from memory": Step(backbone, batch=batch, images=images),
        "LoRA, float32": Step(backbone, batch=batch, bf16=False),
        "full fine-tuning, bf16 autocast": Step(backbone, batch=batch, full=True),
        "full fine-tuning, float32": Step(backbone, batch=batch, full=True, bf16=False),
    }
    times = seconds(steps, rounds=rounds, steps=5)
    found, float32 = [], times["LoRA, float32"]
    for variant, t in times.items():
        work = steps[variant].work()
        note = f"{batch / t:,.0f} images/s; {work / t / 1e12:.0f} TFLOP/s, {100 * work / t / peak:.0f} % of the peak"
        case = f"training step, {name} {SIZE[0]} px, batch {batch}, rank {RANK}"
        found.append(row(case, variant, seconds=t, ratio=float32 / t, note=note + "; ratio: LoRA float32 over this"))
    return found


def main(
    rounds: int = typer.Option(3, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "gpu.json", help="Where the results go."),
) -> None:
    """Time training steps on a GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} finds no GPU here; this benchmark needs one")
    peak, card = matrix_peak(rounds), torch.cuda.get_device_name()
    found = [
        row(
            f"{SIDE} x {SIDE} bf16 matrix product",
            "torch",
            seconds=2 * SIDE**3 / peak,
            note=f"{peak / 1e12:.0f} TFLOP/s",
        )
    ]
    for backbone, name in (("vit-tiny", "ViT-Tiny/16"), ("vit", "ViT-B/16")):
        for batch in (128, 512):
            found += compare_steps(backbone, name, peak, batch=batch, rounds=rounds)
    write(found, output, packages=PACKAGES, hardware=card)


if __name__ == "__main__":
    typer.run(main)
