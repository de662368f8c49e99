"""What one of P3's runs does: developer and auditor exchange adapters, an evaluator looks at what came of it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairtuning import datasets
from fairtuning.collaboration import exchange, leakage
from fairtuning.collaboration.parties import (
    ONCE,
    Auditor,
    Developer,
    Evaluator,
    Plan,
    auditor_view,
    developer_view,
    parties,
    turns,
)
from fairtuning.collaboration.transcript import Transcript
from fairtuning.datasets import images
from fairtuning.networks import Parameters, head
from fairtuning.plan import task_of
from fairtuning.records import examples_line, make_record
from fairtuning.runs import Record, RunError, environment, pack
from fairtuning.studies.kamalaruban2025.configuration import STUDY, Run
from fairtuning.vision import backbones, small
from fairtuning.vision.network import Network

LEVELS = 256  # a score is kept as one byte
KNOWN = 100  # images with a known attribute, for someone who would fit a predictor to an adapter that was sent
CANDIDATES = 4000  # of each half whose membership is guessed, at most


def work(unit: Sequence[Run]) -> list[Record]:
    """The records (and the lines they refer to) of the runs of a unit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(unit[0].threads)
    try:
        lines = [environment(unit[0].device)]
        for run in unit:
            data = load(run)
            lines += [examples_line(data, split, task_of(run)) for split in ("validation", "test")]
            lines.append(_record(run, data))
        return lines
    finally:
        torch.set_num_threads(threads)


def load(run: Run) -> datasets.GroupedData:
    """Images, label and attribute of a run; "" for either is the data set's default, for who does not look at it."""
    return _load(run.data, run.label, run.attribute, run.size, run.edition)


@cache
def _load(name: str, label: str, attribute: str, size: int | str, edition: str) -> datasets.GroupedData:
    if datasets.source(name).needs == "nothing":
        return datasets.load(name)
    wanted = {what: value for what, value in (("label", label), ("group", attribute)) if value}
    return datasets.load(name, size=size, edition=edition, **wanted)


# ------------------------------------------------------------------------------------------------- what runs share
def encoder(run: Run) -> Network:
    """The frozen backbone of a run, with what it makes of all images before its first adapter; kept by a process."""
    return _encoder(untrained(run))


def untrained(run: Run) -> Run:
    """What matters of a run before an adapter is trained."""
    names = ("data", "size", "edition", "backbone", "weights", "layers", "blocks", "rank", "alpha", "precision")
    return Run(label="", attribute="", device=run.device, **{name: getattr(run, name) for name in names})


@lru_cache(maxsize=1)
def _encoder(run: Run) -> Network:
    if run.backbone == "small":
        backbone = small.load(classes=0)
    else:
        size = images.parse_size(run.size)
        backbone = backbones.load(run.backbone, classes=0, size=size, weights=run.weights)
    names = ("rank", "alpha", "layers", "blocks", "precision", "device")
    return Network(backbone, load(run).inputs, **{name: getattr(run, name) for name in names})


def plan_of(run: Run) -> Plan:
    """What the two parties agree on."""
    return Plan(**{field.name: getattr(run, field.name) for field in fields(Plan) if hasattr(run, field.name)})


@dataclass(frozen=True, eq=False)
class Sensitive:
    """A sensitive adapter and head as the auditor trained them, its accuracy on validation images, seconds taken."""

    known: tuple[Parameters, Parameters]
    accuracy: float
    seconds: float


def sensitive(run: Run) -> Sensitive:
    """The auditor's sensitive step, which many runs of one seed share; kept by a process."""
    trained = "trained" if run.sensitive == "random" else run.sensitive
    alike = {"strength": 0.0, "rounds": 1, "clip": 0.0, "noise": 0.0, "leaks": False, "evaluate": "validation"}
    return _sensitive(replace(run, method="orth", label="", sensitive=trained, **alike))


@lru_cache(maxsize=64)
def _sensitive(run: Run) -> Sensitive:
    before = time.perf_counter()
    view, frozen = auditor_view(load(run), images=run.images), encoder(run)
    adapter, own_head = Auditor(frozen, view, plan_of(run)).sensitive_step()
    features = frozen.forward_all(adapter, view.rows["validation"])
    right = head(own_head, features).argmax(-1).cpu() == view.target["validation"]
    return Sensitive((adapter, own_head), round(float(right.double().mean()), 6), time.perf_counter() - before)


@lru_cache(maxsize=2)
def _frozen_features(run: Run) -> dict[str, Tensor]:
    """Of validation and test images by the backbone alone: a new adapter changes nothing."""
    frozen, data = encoder(run), load(run)
    return {split: frozen.forward_all(frozen.adapter(0), data.part(split)).cpu() for split in ("validation", "test")}


def party(name: str, settings: Mapping[str, Any], transcript: Transcript) -> Developer | Auditor:
    """The party ``name`` of a run, as ``collaboration.flower`` makes it on its own machine: a factory for its nodes.

    ``settings``: ``profile``; ``run``, a label such as Orth; the fields of Run that a search would select
    (``learning_rate``, ``strength``), and any other. ``turns(plan_of(run))`` has the order and the number of turns.
    """
    run, _ = STUDY.selected(settings["run"], settings["profile"], lambda run: None)
    run = replace(run, **{field.name: settings[field.name] for field in fields(Run) if field.name in settings})
    view = {"developer": developer_view, "auditor": auditor_view}[name](load(run), images=run.images)
    kind = {"developer": Developer, "auditor": Auditor}[name]
    return kind(encoder(run), view, plan_of(run), transcript=transcript)


# --------------------------------------------------------------------------------------------------------------- a run
def exchanged(run: Run, *, folder: Path | None = None) -> tuple[dict[str, Developer | Auditor], dict[str, str]]:
    """The parties of a run after their last turn, and the heads of their transcripts, which ``folder`` keeps."""
    plan, shared = plan_of(run), sensitive(run) if run.method in ONCE else None
    found = parties(encoder(run), load(run), plan, images=run.images, known=shared and shared.known, folder=folder)
    return found, exchange(found, turns(plan))["heads"]


def _record(run: Run, data: datasets.GroupedData) -> Record:
    frozen = encoder(run)
    shared = sensitive(run) if run.method in ONCE else None  # kept from here on: its seconds are told apart
    before = time.perf_counter()
    try:
        found, heads = exchanged(run)
        developer = found["developer"]
        features = {split: developer.features(data.part(split)) for split in ("validation", run.evaluate)}
        scores = {split: developer.classify(values) for split, values in features.items()}
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise RunError(f"out of memory at batch_size {run.batch_size}, size {run.size}; lower one of them") from None
    evaluator = Evaluator(data)
    sizes = [line["size"] for one in found.values() for line in one.transcript.lines if line["direction"] == "sent"]
    record = make_record(
        run,
        data,
        version=STUDY.version(run),
        scores=scores,
        history=[round(accuracy, 4) for accuracy in developer.curve],
        parameters=sum(developer.model[name].numel() for name in (*frozen.shapes, "W", "b")),
        seconds=time.perf_counter() - before,
    )
    record |= {
        "oracle": {name: round(value, 6) for name, value in evaluator.gaps(scores["validation"], "validation").items()},
        "kept": developer.kept,
        "messages": {"number": len(sizes), "bytes": sum(sizes), "heads": heads},
        "backbone": {
            "name": frozen.backbone.name,
            "weights": frozen.backbone.digest,
            "packages": {name: metadata.version(name) for name in ("timm", "peft")},
        },
    }
    if shared is not None:
        record["auditor"] = {"accuracy": {"validation": shared.accuracy}, "seconds": round(shared.seconds, 3)}
    if run.evaluate == "test":
        record |= _looked_at(run, evaluator, developer, features, scores["test"])
    return record


def _looked_at(
    run: Run, evaluator: Evaluator, developer: Developer, features: dict[str, Tensor], scores: Tensor
) -> Record:
    """What else the evaluator sees in test images: scores, and what features tell of the attribute."""
    plain, groups = _frozen_features(untrained(run)), len(evaluator.data.group_names)
    probes = {"trained": evaluator.probe(features), "frozen": evaluator.probe(plain)}
    leaks: Record = {}
    if developer.sensitive:  # an adapter that was sent: what it is worth to someone who knows the attribute of a few
        rows = {split: evaluator.data.part(split) for split in plain}
        sent = {split: developer.encoder.forward_all(developer.sensitive, index) for split, index in rows.items()}
        few = {"examples": KNOWN, "seed": run.seed}
        probes |= {"sent, few": evaluator.probe(sent, **few), "frozen, few": evaluator.probe(plain, **few)}
        if run.leaks:
            probes |= _attribute_read(run, evaluator, {"sent": sent, "frozen": plain})
            leaks["membership"] = _membership_read(run, evaluator.data, developer, {"sent": sent, "frozen": plain})
    share = scores.double().softmax(-1)[:, 1]
    return {
        "scores": {"test": pack((share * (LEVELS - 1)).round().long().tolist(), classes=LEVELS)},
        "probes": {name: pack(predicted.tolist(), classes=groups) for name, predicted in probes.items()},
    } | leaks


# ---------------------------------------------------------------------------------------------------------- what leaks
def _attribute_read(run: Run, evaluator: Evaluator, features: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What someone with ``features`` tells of the attribute of test images: "<whose>, <images with a known one>"."""
    found = {}
    for whose, by_split in features.items():
        found[f"{whose}, 0"] = evaluator.clusters(by_split, seed=run.seed)
        for known in leakage.KNOWN:
            found[f"{whose}, {known}"] = evaluator.probe(by_split, examples=known, seed=run.seed)
    return found


def _membership_read(
    run: Run, data: datasets.GroupedData, developer: Developer, features: Mapping[str, Mapping[str, Tensor]]
) -> Record:
    """How the auditor's training images (members, first) and the developer's score in each of leakage.ATTACKS.

    The halves are random and have no image in common: whatever tells them apart came with the adapter. The attacker
    knows the attribute of as many validation images as the last of leakage.KNOWN says.
    """
    halves = _candidates(data)
    rows, part = torch.cat(halves), data.part("validation")
    draw = torch.Generator().manual_seed(run.seed)
    known = torch.randperm(len(part), generator=draw)[: leakage.KNOWN[-1]]
    scores = leakage.membership_scores(
        developer.encoder.forward_all(developer.sensitive, rows).cpu(),
        _frozen_candidates(untrained(run)),
        data.group[rows],
        public_adapted=features["sent"]["validation"][known].cpu(),
        public_frozen=features["frozen"]["validation"][known],
        public_attribute=data.group[part][known],
    )
    packed = {
        attack: pack(leakage.byte_levels(values).tolist(), classes=leakage.LEVELS) for attack, values in scores.items()
    }
    return {"members": len(halves[0]), "scores": packed}


def _candidates(data: datasets.GroupedData) -> list[Tensor]:
    """Training images of the auditor's half and as many of the developer's, the same for all seeds."""
    halves = [view(data, images="disjoint").rows["training"] for view in (auditor_view, developer_view)]
    each = min(CANDIDATES, *map(len, halves))
    draw = torch.randperm(min(map(len, halves)), generator=torch.Generator().manual_seed(0))[:each]
    return [rows[draw] for rows in halves]


@lru_cache(maxsize=2)
def _frozen_candidates(run: Run) -> Tensor:
    frozen = encoder(run)
    return frozen.forward_all(frozen.adapter(0), torch.cat(_candidates(load(run)))).cpu()
