"""arXiv 2503.05684 at compact scale: what Orth adds to a step, and what messages and transcripts take of a round.

    python benchmarks/collaboration.py     about two minutes on one core; writes benchmarks/results/collaboration.json

ViT-Tiny with adapters in the last four blocks, random pixels at 80 x 64, batches of 64. Times are medians of the
process's CPU time, one thread, the variants taking turns; those of messages are wall time, for they wait for the disk.
Weights are the pretrained ones where FAIRTUNING_WEIGHTS has them, else random: the times are the same.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from measuring import cpu_seconds, row, write  # which makes the checkout's fairtuning importable
from torch import Tensor

from fairtuning.collaboration.messages import Message, decode, encode
from fairtuning.collaboration.parties import Auditor, Developer, Plan, View
from fairtuning.collaboration.transcript import Transcript
from fairtuning.networks import Parameters
from fairtuning.paths import data_folder
from fairtuning.studies.kamalaruban2025.configuration import PROFILES
from fairtuning.vision import backbones
from fairtuning.vision.network import Network

PACKAGES = ("torch", "timm", "peft", "safetensors")
COMPACT = PROFILES["compact"]
SIZE, BATCH, RANK, EXAMPLES = (80, 64), 64, 16, 512
TRAINING = 10825  # images for training in CelebA, edition resized-64-20000
STEPS_TIMED = 4  # of each variant in its turn


def encoder(precision: str) -> Network:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (EXAMPLES, 3, *SIZE), dtype=torch.uint8, generator=generator)
    try:
        backbone = backbones.load("vit-tiny", classes=0, size=SIZE)
    except backbones.BackboneError:
        backbone = backbones.load("vit-tiny", classes=0, size=SIZE, weights="random")
    return Network(backbone, pixels, rank=RANK, blocks=COMPACT["settings"]["blocks"], precision=precision)


def view(seed: int) -> View:
    """All images, with values that have nothing to do with them."""
    value = torch.randint(2, (EXAMPLES,), generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(EXAMPLES)
    return View({"training": rows, "validation": rows[:BATCH]}, {"training": value, "validation": value[:BATCH]}, 2)


def plan(method: str, *, epochs: int = 1000) -> Plan:
    return Plan(method=method, strength=0.0 if method == "erm" else 1.0, batch_size=BATCH, epochs=epochs)


class Uncached(Developer):
    """Orth whose auditor's features are computed anew in each step."""

    def penalty(self, parameters: Parameters, features: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            self._features[index] = self.encoder.forward(self.sensitive, self.rows[index]) / self._spread
        return super().penalty(parameters, features, index)


def steps(frozen: Network) -> dict[str, Callable[[], None]]:
    """A few steps of the developer by each method, on the same images with the same adapter from the auditor."""
    adapter, _ = Auditor(frozen, view(1), plan("orth", epochs=1)).sensitive_step()
    kinds = {
        "Erm": ("erm", Developer),
        "Orth": ("orth", Developer),
        "Orth/cosine": ("orth-cosine", Developer),
        "Orth/weight": ("orth-weight", Developer),
        "Orth, features computed anew": ("orth", Uncached),
    }
    found = {}
    for name, (method, kind) in kinds.items():
        developer = kind(frozen, view(0), plan(method))
        if method != "erm":
            developer._use(adapter)
        found[name] = lambda one=developer: one.learner.advance(STEPS_TIMED, one.objective)
    return found


def compare_steps(precision: str, rounds: int) -> tuple[list[dict], float]:
    """Rows, and the seconds of a step of Erm."""
    variants = steps(encoder(precision))
    times = {name: t / STEPS_TIMED for name, t in cpu_seconds(variants, repeats=rounds).items()}
    case = f"developer's step, LoRA in the last {COMPACT['settings']['blocks']} of 12 blocks, {precision}"
    note = "ratio: this over Erm"
    found = [
        row(
            case,
            name,
            seconds=t,
            ratio=t / times["Erm"],
            target="<= 1.35" if name in ("Orth", "Orth/weight") else "",
            note=note if "anew" in name or name == "Erm" else f"{note}; the auditor's features computed once",
        )
        for name, t in times.items()
    ]
    return found, times["Erm"]


def crossing(frozen: Network, rounds: int, folder: Path) -> list[dict[str, float]]:
    """Wall seconds that each round takes the developer: one message out, one in, each written down with fsync."""
    adapters = {name: frozen.adapter(seed) for seed, name in enumerate(("developer", "auditor"))}
    transcript, found = Transcript(folder / "transcript.jsonl", party="developer"), []
    for number in range(rounds):
        answer = encode(Message("auditor", "developer", number, adapters["auditor"]))
        times = [time.perf_counter()]
        data = encode(Message("developer", "auditor", number, adapters["developer"]))
        times.append(time.perf_counter())
        transcript.append("sent", data)
        times.append(time.perf_counter())
        decode(answer, allowed=frozen.shapes, sender="auditor", receiver="developer", round=number)
        times.append(time.perf_counter())
        transcript.append("received", answer)
        times.append(time.perf_counter())
        encoded, sent, decoded, received = (b - a for a, b in zip(times, times[1:], strict=False))
        found.append({"encode": encoded, "decode": decoded, "append": sent + received})
    return found


def compare_transcript(frozen: Network, step: float, repeats: int) -> list[dict]:
    """The share of a round: what crossing takes, over the steps of one turn of the developer at compact scale."""
    rounds, epochs = COMPACT["rounds"], COMPACT["data"]["celeba"]["epochs"]
    turn = epochs * math.ceil(TRAINING / BATCH) // rounds
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=data_folder()) as folder:  # /tmp may be memory, where fsync is free
            found += crossing(frozen, rounds, Path(folder))
    taken = {part: statistics.median(times[part] for times in found) for part in found[0]}
    total = statistics.median(sum(times.values()) for times in found)
    size = len(encode(Message("developer", "auditor", 0, frozen.adapter(0))))
    parts = ", ".join(f"{part} {1000 * seconds:.2f} ms" for part, seconds in taken.items())
    note = (
        f"{parts}; ratio: over {turn} steps of Erm at {1000 * step:.1f} ms, the developer's turn in Adv and Ent with "
        f"{rounds} rounds, the shortest of any method (the auditor's turn is left out)"
    )
    case = f"messages and transcript, adapters of {size / 1000:,.0f} kB"
    return [row(case, "share of a round", seconds=total, ratio=total / (turn * step), target="<= 0.01", note=note)]


def main(
    rounds: int = typer.Option(15, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "collaboration.json", help="Where the results go."),
) -> None:
    """Time the developer's steps by method, and messages and transcripts beside them."""
    torch.set_num_threads(1)
    compact, step = compare_steps("bfloat16", rounds)
    plain, _ = compare_steps("float32", rounds)
    write(compact + plain + compare_transcript(encoder("bfloat16"), step, rounds), output, packages=PACKAGES)


if __name__ == "__main__":
    typer.run(main)
