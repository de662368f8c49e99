"""Many runs in one training loop against the same runs one by one, on one thread.

    python benchmarks/training.py          about two minutes on one core; writes benchmarks/results/training.json

The network, batch size, optimiser and precision are those of the Adult study: an MLP 13-H-H-2, batches of 128, Adam,
float64. ``index loop`` is what one would write by hand at its best: data in memory, one shuffle per epoch, batches
that are views, matrices without a run axis, fused Adam. Every variant must end with the same weights.
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
HIDDEN_AND_TARGET = ((8, 4.0), (20, 4.0), (64, 2.0))
Weights = dict[str, Tensor]  # each with a leading run axis


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 13, generator=generator, dtype=torch.float64)
    return inputs, (inputs[:, 0] + torch.randn(N, generator=generator) > 1).long()


def start(seed: int, hidden: int) -> Weights:
    return networks.mlp_parameters((13, hidden, hidden, 2), seed=seed)


def all_at_once(inputs: Tensor, label: Tensor, seeds: range, hidden: int) -> Weights:
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


def index_loop(inputs: Tensor, label: Tensor, seeds: range, hidden: int) -> Weights:
    """The same runs, one after the other, in plain matrices."""
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


PEERS: dict[str, Callable[..., Weights]] = {"index loop": index_loop, "DataLoader loop": data_loader_loop}


def compare(hidden: int, target: float, *, runs: int, repeats: int) -> list[dict]:
    inputs, label = examples()
    seeds = range(runs)
    ours = all_at_once(inputs, label, seeds, hidden)
    notes = {}
    for name, peer in PEERS.items():
        few = range(2) if peer is data_loader_loop else seeds
        theirs = peer(inputs, label, few, hidden)
        difference = max(float((ours[key][: len(few)] - theirs[key]).abs().max()) for key in ours)
        assert difference < 1e-10, f"{name} differs by {difference:.1e}"
        notes[name] = f"weights differ by {difference:.0e} at most"
    one = range(1)  # each run costs the loops the same, so one stands for all
    times = cpu_seconds(
        {
            "all at once": lambda: all_at_once(inputs, label, seeds, hidden),
            "index loop": lambda: index_loop(inputs, label, range(5), hidden),
            "DataLoader loop": lambda: data_loader_loop(inputs, label, one, hidden),
        },
        repeats=repeats,
    )
    times["index loop"] *= runs / 5
    times["DataLoader loop"] *= runs
    notes["index loop"] += f"; 5 runs timed, x{runs // 5}"
    notes["DataLoader loop"] += f"; 1 run timed, x{runs}"
    steps = EPOCHS * N // BATCH
    case = f"{runs} runs of an MLP 13-{hidden}-{hidden}-2, {steps} steps"
    asked = {"index loop": target}
    return [
        row(case, name, seconds=t, ratio=t / times["all at once"], target=asked.get(name), note=notes.get(name, ""))
        for name, t in times.items()
    ]


def main(
    runs: int = typer.Option(25, help="Runs that train at once."),
    repeats: int = typer.Option(15, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "training.json", help="Where the results go."),
) -> None:
    """Time the training loop with a run axis against loops that train the same runs one by one."""
    torch.set_num_threads(1)
    found = [r for hidden, target in HIDDEN_AND_TARGET for r in compare(hidden, target, runs=runs, repeats=repeats)]
    write(found, output, packages=("torch",))


if __name__ == "__main__":
    typer.run(main)
