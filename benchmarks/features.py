"""Frozen features computed once and kept in a file, against a bare loop of forward passes over prepared tensors.

    python benchmarks/features.py          about a minute on one core; writes benchmarks/results/features.json

ViT-Tiny without a head in bfloat16 on random pixels at 80 x 64, in batches of 256. The cached extraction is all of
``features.load`` with an empty folder: the backbone's weights read, pixels from a memory-mapped file prepared batch by
batch, features written with their facts. Its peers have the model and all float32 inputs in memory and keep what comes
out. Times are medians of the process's CPU time, one thread, the variants taking turns; the values must be the same.
Weights are the pretrained ones where FAIRTUNING_WEIGHTS has them, else random: the times are the same.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import typer
from measuring import cpu_seconds, row, write  # which makes the checkout's fairtuning importable
from torch import Tensor

from fairtuning.datasets import GroupedData
from fairtuning.vision import backbones, features, network

PACKAGES = ("torch", "timm", "numpy")
SIZE, BATCH, TARGET = (80, 64), 256, 0.9
READS = 100  # of a millisecond, as one


def pictures(number: int, folder: Path) -> GroupedData:
    """Random pixels in a memory-mapped file, as an image data set has them."""
    path = folder / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (number, 3, *SIZE), dtype=np.uint8))
    pixels = torch.from_numpy(np.load(path, mmap_mode="c"))
    value = torch.arange(number) % 2
    names = ("no", "yes")
    return GroupedData("random", "generated", "0" * 64, pixels, value, value, value, names, names, ("one", "other"))


def weights() -> str:
    try:
        features.headless("vit-tiny", size=SIZE)
    except backbones.BackboneError:
        return "random"
    return "pretrained"


def forward_loop(data: GroupedData, given: str, *, short: bool) -> Callable[[], Tensor]:
    """Forward passes and nothing else; ``short``: the last block for the class token alone, as ours."""
    made = features.headless("vit-tiny", size=SIZE, weights=given)
    batches = made.prepare(data.inputs).split(BATCH)
    run = network.forward if short else lambda model, inputs: model(inputs)

    @torch.inference_mode()
    def loop() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([run(made.model, inputs) for inputs in batches])

    return loop


def compare(data: GroupedData, rounds: int, folder: Path) -> list[dict]:
    given = weights()

    def load() -> Tensor:
        return features.load(data, weights=given, batch_size=BATCH)

    def extract() -> Tensor:
        for path in folder.glob("*/features/*.npy"):
            path.unlink()
        return load()

    bare = forward_loop(data, given, short=True)
    variants = {
        "features.load, nothing kept yet": extract,
        "forward passes alone": bare,
        "forward passes alone, last block for all tokens": forward_loop(data, given, short=False),
        "features.load, kept: mapped, every value read": lambda: [load().float().sum() for _ in range(READS)],
    }
    assert torch.equal(extract(), bare().to(features.PRECISIONS["bfloat16"])), "other values than the bare loop's"
    times = cpu_seconds(variants, repeats=rounds)
    times["features.load, kept: mapped, every value read"] /= READS
    size = next(folder.glob("*/features/*.npy")).stat().st_size
    ours = times["features.load, nothing kept yet"]
    case = f"{len(data.inputs)} images at {SIZE[0]} x {SIZE[1]}, ViT-Tiny, bfloat16"
    rows = []
    for name, seconds in times.items():
        speed = f"{len(data.inputs) / seconds:,.0f} images/s"
        if "kept: " in name:
            speed = f"{1000 * seconds:.2f} ms for a file of {size / 1e6:.1f} MB that the system has in memory"
        bound = f">= {TARGET:g}" if name == "forward passes alone" else ""
        rows.append(row(case, name, seconds=seconds, ratio=seconds / ours, target=bound, note=speed))
    return rows


def main(
    number: int = typer.Option(2048, help="Images."),
    rounds: int = typer.Option(5, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "features.json", help="Where the results go."),
) -> None:
    """Time the extraction of frozen features against forward passes alone, and reading them back."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FAIRTUNING_DATA"] = folder
        data = pictures(number, Path(folder))
        found = compare(data, rounds, Path(folder))
    write(found, output, packages=PACKAGES)


if __name__ == "__main__":
    typer.run(main)
