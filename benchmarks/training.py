"""Many runs in one training loop against the same runs one by one, on one thread.

    python benchmarks/training.py          about two minutes on one core; writes benchmarks/results/training.json

The network, batch size, optimiser and precision are those of the Adult study: an MLP 13-H-H-2, batches of 128, Adam,
float64. The index loops train in plain matrices, data in memory: one as one would write it first, one tuned by hand
(a single shuffle per epoch, batches that are views, bias inside the product, fused Adam). Every variant must end with
the same weights. Wide layers train a few runs at a time: the activations of more would leave the processor's cache.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import typer
from measuring import cpu_seconds, row, write  # before fairtuning, which it makes importable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fairtuning import losses, networks, training

BATCH, EPOCHS, RATE, N = 128, 3, 0.003, 20 * 128
CASES = ((8, 25, 4.0), (20, 25, 4.0), (64, 9, 2.0))  # H, runs at a time, the ratio that is asked for
Weights = dict[str, Tensor]  # each with a leading run axis


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 13, generator=generator, dtype=torch.float64)
    return inputs, (inputs[:, 0] + torch.randn(N, generator=generator) > 1).long()


def start(seed: int, hidden: int) -> Weights:
    return networks.mlp_parameters((13, hidden, hidden, 2), seed=seed)


def together(inputs: Tensor, label: Tensor, seeds: range, hidden: int) -> Weights:
    """The library's loop: one run axis."""
    return training.train(
        networks.stack([start(seed, hidden) for seed in seeds]),
        networks.mlp,
        lambda logits, label, group: losses.cross_entropy(logits, label).mean(-1),
        batch=lambda index: (inputs[index], label[index], label[index]),
        n=N,
        order_seeds=list(seeds),
        optimiser_name="adam",
        learning_rate=RATE,
        epochs=EPOCHS,
        batch_size=BATCH,
    )


def plain_index_loop(inputs: Tensor, label: Tensor, seeds: range, hidden: int) -> Weights:
    """The same runs, one after the other."""
    finished = []
    for seed in seeds:
        weights = {name: value.requires_grad_() for name, value in start(seed, hidden).items()}
        steps = torch.optim.Adam(weights.values(), lr=RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for index in torch.randperm(N, generator=generator).split(BATCH):
                loss = cross_entropy(networks.mlp(weights, inputs[index]), label[index])
                steps.zero_grad()
                loss.backward()
                steps.step()
        finished.append({name: value.detach() for name, value in weights.items()})
    return networks.stack(finished)


def tuned_index_loop(inputs: Tensor, label: Tensor, seeds: range, hidden: int) -> Weights:
    """The same, with all that makes it faster and does not mix runs."""
    finished = []
    for seed in seeds:
        weights = {name: value.requires_grad_() for name, value in start(seed, hidden).items()}
        w0, b0, w1, b1, w, b = weights.values()
        steps = torch.optim.Adam(weights.values(), lr=RATE, fused=True)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            order = torch.randperm(N, generator=generator)
            for x, y in zip(inputs[order].split(BATCH), label[order].split(BATCH), strict=True):
                z = torch.relu(torch.addmm(b0, x, w0))
                z = torch.relu(torch.addmm(b1, z, w1))
                loss = cross_entropy(torch.addmm(b, z, w), y)
                steps.zero_grad()
                loss.backward()
                steps.step()
        finished.append({name: value.detach() for name, value in weights.items()})
    return networks.stack(finished)


def data_loader_loop(inputs: Tensor, label: Tensor, seeds: range, hidden: int) -> Weights:
    """As in tutorials: torch.nn modules, a DataLoader, Adam by default."""
    finished = []
    for seed in seeds:
        model = nn.Sequential(
            nn.Linear(13, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
        ).double()
        values = list(start(seed, hidden).values())
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.copy_(value.T if value.shape[0] > 1 else value[0])
        steps = torch.optim.Adam(model.parameters(), lr=RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            order = torch.randperm(N, generator=generator).tolist()  # as given, so that the results can be compared
            for x, y in DataLoader(TensorDataset(inputs, label), batch_size=BATCH, sampler=order):
                loss = cross_entropy(model(x), y)
                steps.zero_grad()
                loss.backward()
                steps.step()
        trained = [p.detach().T if p.ndim == 2 else p.detach()[None] for p in model.parameters()]
        finished.append(dict(zip(start(seed, hidden), trained, strict=True)))
    return networks.stack(finished)


PEERS: dict[str, Callable[..., Weights]] = {
    "index loop, tuned": tuned_index_loop,
    "index loop": plain_index_loop,
    "DataLoader loop": data_loader_loop,
}


def compare(hidden: int, at_once: int, target: float, *, runs: int, repeats: int) -> list[dict]:
    inputs, label = examples()
    units = [range(first, min(first + at_once, runs)) for first in range(0, runs, at_once)]

    def train() -> Weights:
        parts = [together(inputs, label, seeds, hidden) for seeds in units]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    ours, mine = train(), f"fairtuning, {min(at_once, runs)} runs at a time"
    variants: dict[str, Callable] = {mine: train}
    timed, notes = {mine: runs}, {}
    for name, peer in PEERS.items():
        timed[name] = 1 if peer is data_loader_loop else 5  # each run costs a loop the same: a few stand for all
        few = range(timed[name])
        theirs = peer(inputs, label, few, hidden)
        difference = max(float((ours[key][: len(few)] - theirs[key]).abs().max()) for key in ours)
        assert difference < 1e-10, f"{name} differs by {difference:.1e}"
        notes[name] = f"weights differ by {difference:.0e} at most; {len(few)} of {runs} runs timed, scaled"
        variants[name] = lambda peer=peer, few=few: peer(inputs, label, few, hidden)
    times = cpu_seconds(variants, repeats=repeats)
    case = f"{runs} runs of an MLP 13-{hidden}-{hidden}-2, {EPOCHS * N // BATCH} steps"
    rows = []
    for name, seconds in times.items():
        seconds *= runs / timed[name]
        ratio = seconds / times[mine]
        asked = f">= {target:g}" if name == "index loop" else ""
        rows.append(row(case, name, seconds=seconds, ratio=ratio, target=asked, note=notes.get(name, "")))
    return rows


def main(
    runs: int = typer.Option(25, help="Runs that train at once."),
    repeats: int = typer.Option(15, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "training.json", help="Where the results go."),
) -> None:
    """Time the training loop with a run axis against loops that train the same runs one by one."""
    torch.set_num_threads(1)
    found = [one for case in CASES for one in compare(*case, runs=runs, repeats=repeats)]
    write(found, output, packages=("torch",))


if __name__ == "__main__":
    typer.run(main)
