"""The study of arXiv 2410.17358: labels, selection, what a run does, claims; its profile `paper` end to end, tiny."""

import copy
import csv
import hashlib
import io
import itertools
import json
import tarfile
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fairtuning import FairtuningError, claims, losses, papers, report, runs, verification
from fairtuning.analysis import MissingRuns, Results
from fairtuning.datasets import waterbirds
from fairtuning.metrics import METRICS
from fairtuning.plan import best, seeded
from fairtuning.runs import key_of, pack, unpack
from fairtuning.studies import sukumaran2024
from fairtuning.studies.sukumaran2024 import tables
from fairtuning.studies.sukumaran2024.configuration import (
    FOUR,
    LABELS,
    PROFILES,
    RANKS,
    STUDY,
    Run,
    offered,
    resolve,
    selected,
)
from fairtuning.vision import adapters, backbones
from fairtuning.vision import small as classroom

# the package's own "work" and "configuration" are functions
work, configuration = (import_module(f"fairtuning.studies.sukumaran2024.{name}") for name in ("work", "configuration"))
ALL = list(dict.fromkeys(label for found in LABELS.values() for label in found))


# -------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    "label, expected",
    [
        ("LoRA", dict(method="lora", penalty=0.0, groups="class")),
        ("FairLoRA", dict(method="lora", penalty=None)),
        ("FFT", dict(method="full", penalty=0.0)),
        ("FairFFT", dict(method="full", penalty=None)),
        ("FairLoRA/lambda=10", dict(penalty=10.0)),
        ("FairLoRA/groups=cell", dict(penalty=None, groups="class x attribute")),
        ("FairLoRA/groups=cell/smoothed", dict(objective="smoothed", groups="class x attribute")),
        ("FairFFT/groups=background", dict(method="full", groups="attribute")),
        ("LoRA/fisher", dict(method="lora-fisher", penalty=0.0)),
        ("FairLoRA/pissa", dict(method="lora-pissa", penalty=None)),
    ],
)
def test_a_label_names_a_run(label, expected):
    asked = resolve(label)
    assert {name: asked.get(name, getattr(Run, name)) for name in expected} == expected


def test_what_a_label_leaves_to_the_profile():
    asked = resolve("FairLoRA/dino/r=8/R1/waterbirds")
    assert [asked[name] for name in ("backbone", "rank", "rule", "place")] == ["dino", 8, "R1", "waterbirds"]
    assert resolve("LoRA") == {"method": "lora"}
    assert offered("LoRA", "compact") and offered("LoRA/clip", "paper") and not offered("LoRA/clip", "compact")
    assert offered("LoRA/r=128", "compact") and not offered("LoRA/r=128", "classroom")
    assert (STUDY.seeds("LoRA", "compact", 5), STUDY.seeds("LoRA/r=8", "compact", 5)) == (5, 3)


@pytest.mark.parametrize(
    "label, words",
    [
        ("lora", "unknown run label 'lora'; allowed: LoRA, FairLoRA, FFT, FairFFT"),
        ("LoRA/r=0", "unknown modifier 'r=0'"),
        ("LoRA/r=many", "unknown modifier 'r=many'"),
        ("LoRA/lambda=1", "unknown modifier 'lambda=1'"),
        ("FairLoRA/lambda=-1", "unknown modifier 'lambda=-1'"),
        ("FairLoRA/groups=race", "'FairLoRA/groups=race'; allowed: smoothed, R1, R2"),
        ("LoRA/groups=cell", "unknown modifier"),
        ("LoRA/R1", "unknown modifier"),
        ("FairLoRA/R3", "unknown modifier"),
        ("FFT/r=8", "only LoRA and FairLoRA have one"),
        ("LoRA/resnet", "unknown modifier 'resnet'"),
        ("FFT/pissa", "unknown modifier 'pissa'"),
        ("LoRA/pissa/fisher", "unknown modifier 'fisher'"),
    ],
)
def test_an_unknown_label_is_one_line(label, words):
    with pytest.raises(FairtuningError) as error:
        resolve(label)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_label_resolves_and_some_profile_has_it():
    assert all(any(offered(label, profile) for profile in PROFILES) for label in ALL)
    with pytest.raises(FairtuningError, match="'LoRA/clip' is not offered in profile compact"):
        selected("LoRA/clip", "compact", lambda run: None)
    for profile, seeds, words in (("huge", 1, "profile is 'huge'"), ("compact", 0, "seeds is 0")):
        with pytest.raises(FairtuningError, match=words):
            next(STUDY.phases(profile, ["LoRA"], seeds, lambda run: None))


# ----------------------------------------------------------------------------------------------------------- selection
def validated(accuracy, worst):
    """A record of two epochs, the second with these values."""
    return {"key": "", "history": [0.99, accuracy], "curve": {"worst": [0.01, worst]}}


def test_rules_r1_and_r2():
    """R1: accuracy. R2: worst group, among those within a point of the highest accuracy; the first of equals."""
    found = {0.1: (0.950, 0.20), 1.0: (0.945, 0.40), 10.0: (0.940, 0.40), 100.0: (0.9399, 0.90)}
    runs_ = [Run(penalty=penalty) for penalty in found]
    lookup = lambda run: validated(*found[run.penalty])  # noqa: E731
    last = lambda record: configuration.judged(record, "last")  # noqa: E731
    assert best(runs_, lookup, last, rule="R1").penalty == 0.1
    assert best(runs_, lookup, last, rule="R2").penalty == 1.0
    assert best(runs_[:3], lambda run: validated(0.9, 0.5), last, rule="R2") is runs_[0]
    assert best(runs_[:3], lambda run: validated(0.9, 0.5), last, rule="R1") is runs_[0]
    assert best(runs_, lambda run: None, last) is None
    # over two seeds the means decide
    luck = lambda run: validated(0.9 + (0.05 if run.penalty == 0.1 and run.seed == 0 else 0.03), 0.5)  # noqa: E731
    assert best(runs_[:2], luck, last, rule="R1", seeds=1).penalty == 0.1
    worse = lambda run: validated(0.9 - (0.2 * run.seed if run.penalty == 0.1 else 0), 0.5)  # noqa: E731
    assert best(runs_[:2], worse, last, rule="R1", seeds=2).penalty == 1.0


def test_selection_is_of_the_rate_then_of_lambda():
    def lookup(run):
        assert run.evaluate == "validation" and run.rank == PROFILES["compact"]["rank"] and run.seed == 0
        if run.penalty == 0:
            return validated({0.0003: 0.90, 0.001: 0.93, 0.003: 0.91, 0.01: 0.7}[run.learning_rate], 0.9)
        assert run.learning_rate == 0.001
        return validated({0.1: 0.935, 1.0: 0.93, 10.0: 0.90}[run.penalty], {0.1: 0.2, 1.0: 0.5, 10.0: 0.8}[run.penalty])

    for label, penalty in (("LoRA", 0), ("FairLoRA", 1.0), ("FairLoRA/R1", 0.1), ("FairLoRA/lambda=7", 7.0)):
        run, searches = selected(label, "compact", lookup)
        assert (run.learning_rate, run.penalty, run.evaluate, run.rank) == (0.001, penalty, "test", 16)
        assert len(searches) == (2 if label in ("FairLoRA", "FairLoRA/R1") else 1)
    run, _ = selected("FairLoRA/r=64/groups=cell", "compact", lookup)
    assert (run.rank, run.groups, run.penalty) == (64, "class x attribute", 1.0)


def test_every_start_selects_its_own_rate_from_the_grid_of_lora():
    def lookup(run):
        return validated(0.9 - abs(run.learning_rate - (0.01 if run.method == "lora-fisher" else 0.001)), 0.5)

    starts = ["LoRA", *(f"LoRA/{start}" for start in configuration.STARTS)]
    for label in starts:
        run, (search,) = selected(f"{label}/celeba", "compact", lookup)
        assert run.learning_rate == (0.01 if label == "LoRA/fisher" else 0.001) and run.rank == 16
        assert [one.learning_rate for one in search] == list(PROFILES["compact"]["rates"]["lora"])
        assert {one.method for one in search} == {run.method}
    assert {f"{label}/celeba" for label in starts} < {*LABELS["initialisation"], *LABELS["initialisation-controls"]}


def test_a_rule_judges_the_epoch_that_is_kept():
    one, other = Run(learning_rate=0.1), Run(learning_rate=0.2)
    curves = {
        0.1: {"history": [0.9, 0.5], "curve": {"worst": [0.1, 0.5]}},
        0.2: {"history": [0.8, 0.7], "curve": {"worst": [0.2, 0.4]}},
    }
    for keep, chosen in (("best", one), ("last", other)):
        lookup = lambda run: curves[run.learning_rate]  # noqa: E731
        assert best([one, other], lookup, lambda record, keep=keep: configuration.judged(record, keep)) == chosen


def test_phases_and_their_runs():
    store = {}
    phases = []
    for phase in STUDY.phases("compact", ["LoRA", "FairLoRA", "LoRA/r=8", "LoRA/clip"], 5, store.get):
        phases.append(phase)
        store |= {run: validated(0.9, 0.5) for run in phase}
    assert [len(phase) for phase in phases] == [4, 3, 13]  # rates; lambdas; 5 + 5 seeds, 3 of the rank
    assert {run.evaluate for run in phases[0] + phases[1]} == {"validation"}
    assert {run.evaluate for run in phases[2]} == {"test"}


# ----------------------------------------------------------------------------------------------------- what a run does
def small(label, **changes):
    """A classroom run, cut short."""
    run, _ = selected(label, "classroom", lambda run: None)
    return seeded(replace(run, **{"epochs": 2} | changes), changes.get("seed", 0))


def record_of(run):
    found = {line["kind"]: line for line in sukumaran2024.work([run])}
    assert set(found) == {"environment", "examples", "record"}
    return found["record"]


def results_part(record):
    """What is a result of the training: not its key, configuration, environment or time, nor what groups would pay."""
    apart = ("key", "configuration", "environment", "seconds", "penalty")
    return {name: record[name] for name in record if name not in apart}


@pytest.mark.parametrize("fair, plain", [("FairLoRA", "LoRA"), ("FairFFT", "FFT")])
def test_without_strength_the_penalty_changes_nothing(fair, plain):
    """lambda = 0 of any groups is the plain method bit for bit under one seed."""
    expected = results_part(record_of(small(plain)))
    none = small(f"{fair}/lambda=0")
    assert none == small(plain)  # the very same run, and key
    assert results_part(record_of(replace(none, groups="class x attribute"))) == expected
    assert results_part(record_of(replace(none, penalty=1.0))) != expected


GOLDEN = {  # two epochs: accuracy, loss and worst cell on the 826 test images, trained numbers
    "LoRA": (0.854722, 0.40774262, 0.790476, 3170),
    "FairLoRA/lambda=1": (0.846247, 0.4031119, 0.802956, 3170),
    "FairLoRA/lambda=1/groups=cell": (0.734867, 0.48053899, 0.610837, 3170),
    "FFT": (0.90678, 0.28093836, 0.788177, 77522),
}


def test_golden_numbers():
    """If these move, so has the meaning of committed records: raise the method's version. They are the same on every
    processor (tried with ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2), as the backbone is (`vision.small`)."""
    for label, golden in GOLDEN.items():
        record = record_of(small(label))
        found = record["accuracy"]["test"], record["loss"]["test"], record["worst"]["test"], record["parameters"]
        assert found == pytest.approx(golden, abs=2e-5), label


def test_a_record_tells_what_its_predictions_say():
    run = small("LoRA")
    data = work._load("parity", 8, "")
    record = record_of(run)
    index = data.part("test")
    label, group = data.label[index].numpy(), data.group[index].numpy()
    right = unpack(record["predictions"]["test"]) == label
    cells = [[right[(group == g) & (label == c)].mean() for c in range(2)] for g in range(2)]
    assert record["accuracy"]["test"] == pytest.approx(right.mean(), abs=1e-6)
    assert record["worst"]["test"] == pytest.approx(np.min(cells), abs=1e-6)
    share = np.array([[((group == g) & (label == c)).mean() for c in range(2)] for g in range(2)])
    assert (share * record["cell_loss"]["test"]).sum() == pytest.approx(record["loss"]["test"], rel=1e-5)
    assert len(record["history"]) == len(record["curve"]["worst"]) == len(record["curve"]["loss"]) == run.epochs
    assert record["parameters"] == 4 * run.rank * (48 + 3 * 48) + 48 * 2 + 2
    assert sukumaran2024.configuration(record) == run
    assert record["key"] == key_of(run, digest=record["data"]["digest"], version=STUDY.version(run))


def test_a_record_tells_how_much_of_the_penalty_is_noise(monkeypatch):
    """The losses of every batch of an epoch, in the order of the training, are what it is measured on."""
    seen = []
    whole = work.variance_penalised_loss

    def kept(logits, label, *, group, groups, lam):
        seen.append((losses.cross_entropy(logits.detach(), label)[0], group[0]))
        return whole(logits, label, group=group, groups=groups, lam=lam)

    monkeypatch.setattr(work, "variance_penalised_loss", kept)
    run = replace(small("FairLoRA/lambda=1"), epochs=1, batch_size=32)
    record = work.work([run])[-1]["penalty"]
    assert record["batch_sizes"] == [8, 32, 128, 512] and len(record["and_signal"]) == 1
    loss, group = (torch.cat(parts) for parts in zip(*seen, strict=True))
    for size, found in zip(record["batch_sizes"], record["and_signal"][0], strict=True):
        wanted = losses.penalty_and_signal(loss, group, groups=2, batch_size=size)
        assert found == ((None, None) if size > len(loss) else pytest.approx(wanted, rel=1e-4))


def test_noise_share_is_of_the_records_batches():
    pairs = [[(1.0, 0.25), (0.5, 0.25)], [(1.0, 0.5), (0.5, 0.5)]]  # two epochs, two sizes of batch
    penalty = {"batch_sizes": [8, 32], "and_signal": pairs}
    record = {"configuration": {"batch_size": 32}, "penalty": penalty}
    found = SimpleNamespace(records=lambda label: [record, record] if label == "LoRA" else [{}])
    assert tables.noise_share(found, "LoRA").tolist() == [[0.5, 0.0]] * 2
    assert tables.noise_share(found, "LoRA", multiple=0.25).tolist() == [[0.75, 0.5]] * 2
    assert tables.quantities(found)["noise_above_half"]("LoRA").by_seed.tolist() == [-0.25, -0.25]
    with pytest.raises(MissingRuns, match="before the penalty's noise was measured"):
        tables.noise_share(found, "FairLoRA")


@pytest.mark.parametrize("label", ["LoRA", "FFT"])
def test_on_a_cpu_attention_is_written_out(label):
    network = work.network_of(small(label), work._load("parity", 8, ""))
    assert record_of(small(label, epochs=1))["backbone"]["attention"] == "written out"
    assert {m.fused_attn for m in network.module.modules() if hasattr(m, "fused_attn")} == {False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
@pytest.mark.parametrize("label", ["FairLoRA", "FairFFT"])
def test_a_run_on_a_gpu_is_the_run_on_a_cpu_up_to_rounding(label):
    run = replace(small(label), penalty=1.0)
    here, there = (sukumaran2024.work([replace(run, device=device)]) for device in ("cpu", "cuda"))
    accelerators = [lines[0].get("accelerator") for lines in (here, there)]
    assert accelerators == [None, torch.cuda.get_device_name()]
    ours, theirs = here[-1], there[-1]
    assert theirs["backbone"]["attention"] == "fused" and ours["key"] != theirs["key"]
    assert theirs["loss"]["test"] == pytest.approx(ours["loss"]["test"], rel=0.02)
    assert theirs["curve"]["loss"] == pytest.approx(ours["curve"]["loss"], rel=0.02)


@pytest.mark.parametrize(
    "attention, made, outcome",
    [
        ("fused", {}, "differs"),
        ("written out", {}, "within the seed spread"),
        ("fused", {"accelerator": "a GPU"}, "within the seed spread"),
    ],
)
def test_a_record_of_another_kernel_need_not_be_made_again_bit_for_bit(attention, made, outcome):
    """Records without a word on attention are of the fused one; an accelerator adds up in any order."""
    made = {"here": {"processor": "one", "packages": {"torch": "2"}} | made}

    def record(seed, accuracy, **more):
        values = {"accuracy": {"validation": accuracy}, "predictions": "", "loss": {}, "history": []}
        return {"configuration": {"seed": seed}, "environment": "here"} | values | more

    old = {"a": record(0, 0.50), "b": record(1, 0.60)}
    new = {"a": record(0, 0.55, backbone={"attention": attention})}
    stores = (SimpleNamespace(records=found, environments=made) for found in (new, old))
    found = verification.compare_stores(sukumaran2024, *stores)
    assert {name for name, keys in found.items() if keys} == {outcome}


# -------------------------------------------------------------------------------------------- where the factors start
STARTING = {"zero": "LoRA"} | {start: f"LoRA/{start}" for start in configuration.STARTS}


def test_every_start_begins_with_the_function_of_lora_and_trains_as_many_numbers():
    data = work._load("parity", 8, "")
    networks = {start: work.network_of(small(label), data) for start, label in STARTING.items()}
    scores = {start: work.scores(n, n.trained, data, "validation") for start, n in networks.items()}
    for start, network in networks.items():
        torch.testing.assert_close(scores[start], scores["zero"], rtol=0, atol=2e-5)
        assert {name: v.shape for name, v in network.trained.items()} == {
            name: v.shape for name, v in networks["zero"].trained.items()
        }
    factors = {
        start: torch.cat([v.detach().flatten() for name, v in n.trained.items() if "lora_A" in name])
        for start, n in networks.items()
    }
    for one, other in itertools.combinations(factors, 2):
        assert not torch.allclose(factors[one], factors[other], atol=1e-3), (one, other)


def test_the_seed_draws_the_random_importances_alone():
    data, backbone = work._load("parity", 8, ""), classroom.load(classes=2)

    def of(start, seed):
        return torch.stack(list(work.importance(backbone, small(f"LoRA/{start}", seed=seed), data).values()))

    assert torch.equal(of("fisher", 0), of("fisher", 1)) and not torch.equal(of("random", 0), of("random", 1))
    assert torch.equal(of("random", 1), of("random", 1)) and not torch.equal(of("fisher", 0), of("pooled", 0))


@pytest.mark.parametrize("start", ["fisher", "pooled"])
def test_importance_against_one_backward_pass_per_example(start, monkeypatch):
    """arXiv 2403.00625, eqs 1 and 2, on inner layers, word for word and in float64."""
    monkeypatch.setattr(work, "INFORMING", 12)
    data, backbone = work._load("parity", 8, ""), classroom.load(classes=2)
    index = data.part("training")
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:12]]
    inputs, label, group = backbone.prepare(data.inputs[index]).double(), data.label[index], data.group[index]
    model = copy.deepcopy(backbone.model).double()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
    head = work._fitted_head(features, label, classes=2)
    assert (features @ head["weight"].T + head["bias"]).argmax(-1).eq(label).double().mean() > 0.8
    weights = {name: module.weight for name, module in adapters.adapted(model).items()}
    squares = {name: [[] for _ in data.group_names] for name in weights}
    for x, y, s in zip(inputs, label, group, strict=True):
        features = model.forward_head(model.forward_features(x[None]), pre_logits=True)
        loss = torch.nn.functional.cross_entropy(features @ head["weight"].T + head["bias"], y[None])
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            squares[name][s].append(gradient.square().sum(0))  # over the outputs: torch's weight is [out, in]
    found = work.importance(backbone, small(f"LoRA/{start}"), data)
    assert found.keys() == weights.keys() and len(found) == 4 and min(group.bincount()) >= 3
    for name, by_group in squares.items():
        roots = [torch.stack(rows).mean(0).sqrt() for rows in by_group]
        pooled = torch.stack([row for rows in by_group for row in rows]).mean(0).sqrt()
        expected = pooled if start == "pooled" else torch.stack(roots).mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-5 * expected.max().item())


def test_out_of_memory_says_what_to_lower(monkeypatch):
    def full(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(work.Training, "train", full)
    with pytest.raises(runs.RunError, match="out of memory at batch_size 128, size 8; lower one of them"):
        record_of(small("LoRA"))


def test_a_rank_above_the_layer_is_one_line():
    with pytest.raises(adapters.AdapterError, match="rank is 100; .* allows 1 to 48"):
        record_of(replace(small("LoRA"), rank=100))


def test_in_the_classroom_groups_decide():
    """The lesson of the lab, at the profile's settings: the shortcut is taken, and seen by cells alone."""
    worst = {
        label: record_of(small(label, epochs=PROFILES["classroom"]["data"]["parity"]["epochs"]))["worst"]["test"]
        for label in ("LoRA", "FairLoRA/lambda=1", "FairLoRA/lambda=1/groups=cell")
    }
    plain, by_class, by_cell = worst.values()
    assert plain < 0.8 and abs(by_class - plain) < 0.05 and by_cell > plain + 0.05


def test_one_label_only_is_refused_and_an_empty_cell_is_left_out():
    data = work._load("parity", 8, "")
    training = data.split == data.split_names.index("training")
    network = SimpleNamespace(device=torch.device("cpu"), trained={})
    with pytest.raises(runs.RunError, match="parity: every training example has label 'even'; allowed: two labels"):
        work.Training(network, small("LoRA"), replace(data, label=data.label.where(~training, 0)))
    lacking = replace(data, group=data.group.where(data.label == 0, 0))  # no odd digit on blue
    label = data.label[data.part("test")]
    wrong = label.where(label == 1, 1 - torch.arange(len(label)) % 4 // 3)  # of the even ones one in four is right
    cells = work.Cells.of(torch.eye(2)[wrong], lacking, "test")
    assert cells.cell_loss[1][1] is None and all(cells.cell_loss[0]) and cells.worst == pytest.approx(0.25, abs=0.05)


def test_an_unknown_backbone_and_a_negative_lambda_are_one_line():
    with pytest.raises(backbones.BackboneError, match="timm has no model 'vit_huge'; allowed: clip, dino, vit"):
        record_of(replace(small("LoRA"), backbone="vit_huge"))
    with pytest.raises(ValueError, match="lam is -1.0; permitted: 0 or more"):
        record_of(replace(small("LoRA"), penalty=-1.0))


# ------------------------------------------------------------------------------------ profile `paper`, end to end, tiny
def birds():
    """A tiny Waterbirds in the official layout: each (label, background) three times in each part."""
    rng = np.random.default_rng(0)
    lines, members = ["img_id,img_filename,y,split,place,place_filename"], {}
    cells = [(y, split, place) for split in range(3) for y in range(2) for place in range(2) for _ in range(3)]
    for i, (y, split, place) in enumerate(cells):
        name = f"{i % 3 + 1:03d}.Bird/Bird_{i:04d}.jpg"
        lines.append(f"{i},{name},{y},{split},{place},/l/lake/{i}.jpg")
        pixels = (rng.integers(0, 100, (40, 50, 3)) + 150 * np.array([place, y, 1])).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
        members[name] = file.getvalue()
    assert next(csv.reader([lines[0]]))[1] == "img_filename"
    members["metadata.csv"] = "\n".join(lines).encode()
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"waterbirds_v1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def forget():
    work._load.cache_clear()


@pytest.fixture
def paper(folders, monkeypatch):
    """The profile `paper` on the processor, its three backbones much reduced, its images those of ``birds``."""
    folder = folders / "mirror" / "waterbirds"
    folder.mkdir(parents=True)
    content = birds()
    (folder / "waterbirds_v1.0.tar.gz").write_bytes(content)
    entry = {"file": "waterbirds/waterbirds_v1.0.tar.gz", "sha256": hashlib.sha256(content).hexdigest()}
    (folder.parent / "MANIFEST.json").write_text(json.dumps([entry | {"edition": "official"}]))
    monkeypatch.setenv("FAIRTUNING_MIRROR", str(folder.parent))
    monkeypatch.setattr(waterbirds, "COUNTS", dict.fromkeys(waterbirds.COUNTS, (3, 3, 3, 3)))
    settings = {"device": "cpu", "precision": "float32", "weights": "random", "batch_size": 8}
    tiny = {
        "seeds": 2,
        "data": PROFILES["paper"]["data"] | {"waterbirds": {"size": 32, "edition": "official", "epochs": 1}},
        "rates": {"lora": (0.001, 0.003), "full": (0.0001,)},
        "penalties": (0.1, 10.0),
        "rank": 4,
        "settings": settings,
    }
    monkeypatch.setitem(PROFILES, "paper", PROFILES["paper"] | tiny)
    load = work.backbones.load

    def reduce(name, **options):
        assert name in ("vit", "dino", "clip") and options["size"] == (32, 32) and options["weights"] == "random"
        backbone = load("vit_tiny_patch16_224", **options)
        backbone.model.blocks = backbone.model.blocks[:2]
        return backbone

    monkeypatch.setattr(work.backbones, "load", reduce)
    forget()
    yield PROFILES["paper"]
    forget()


def test_the_profile_paper_end_to_end(paper, folders, monkeypatch):
    labels = LABELS["table2"]
    how = dict(profile="paper", progress=False)
    assert len(labels) == 12 and all(offered(label, "paper") for label in labels)
    assert report.coverage(profile="paper")  # nothing is here yet: neither records nor images
    assert not (folders / "data").exists()

    expected = runs.cost(STUDY, labels, profile="paper")["missing"]
    assert expected == 3 * (2 + 2 + 2) + 3 * 4 * 2  # per backbone: LoRA's rates, lambda for each Fair one; seeds

    # stopped after 11 runs, and gone on with: nothing is lost, nothing is computed twice
    done, one = [], sukumaran2024.work

    def stopping(unit):
        if len(done) == 11:
            raise KeyboardInterrupt
        done.append(unit)
        return one(unit)

    module = SimpleNamespace(
        **{name: getattr(sukumaran2024, name) for name in sukumaran2024.__all__} | {"work": stopping}
    )
    with pytest.raises(KeyboardInterrupt):
        runs.ensure(module, labels, **how)
    store = runs.Store.of("sukumaran2024", "paper")
    assert len(store.records) == 11
    before = store.path.read_bytes()
    module.work = lambda unit: done.append(unit) or one(unit)
    store = runs.ensure(module, labels, **how)
    assert len(store.records) == len(done) == len({run for unit in done for run in unit}) == expected
    assert store.path.read_bytes().startswith(before)
    again = store.lookup(STUDY)(done[0][0])
    assert results_part(record_of(done[0][0])) == results_part(again)

    # from here on only records are needed
    (folders / "data").rename(folders / "elsewhere")
    monkeypatch.delenv("FAIRTUNING_MIRROR")
    forget()
    assert runs.cost(STUDY, labels, profile="paper")["missing"] == 0
    found = sukumaran2024.results(store, "paper")
    assert {"LoRA", "FairFFT/clip"} <= set(found.runs) and "LoRA/r=8" not in found.runs
    rows = report.table("sukumaran2024", "table2", profile="paper")
    assert len(rows) == 48 and all(row["ours"]["n"] == 2 and len(row["ours"]["records"]) == 2 for row in rows)
    assert {row["ours"]["backbone"] for row in rows if row["row"].startswith("CLIP")} == {"CLIP ViT-B/32 at 32 px"}
    assert {row["ours"]["backbone"] for row in rows if row["row"].startswith("ViT")} == {"ViT-B/16 at 32 px"}
    state = states("paper")
    assert state["Table 2"][0] == state["Table 3"][0] == state["Figure 12"][0] == "reproduced"
    assert state["Figures 5, 9 and 10"] == ("not yet", "no records of LoRA/r=8, FairLoRA/r=8, LoRA/r=16 …")
    verdicts = {v.id: v for v in report.verdicts("sukumaran2024", profile="paper") if v.data == "waterbirds"}
    assert verdicts["P2-C2"].verdict == "not yet" or "fewer than 5 seeds (2)" in verdicts["P2-C2"].reason
    assert verdicts["P2-C13"].reason == "missing runs: FairLoRA/groups=cell"


def test_a_dry_run_reads_no_image(paper, folders, monkeypatch):
    """Their digest is not published: the runs are counted all the same."""
    monkeypatch.setattr("fairtuning.datasets.images.read", None)
    missing = runs.cost(STUDY, LABELS["table2"], profile="paper")["missing"]
    assert missing == 3 * (2 + 2 + 2) + 3 * 4 * 2 and not (folders / "data").exists()


def states(profile):
    return {
        one["item"]: (one["state"], one["note"])
        for one in report.coverage(profile=profile)
        if one["paper"] == "sukumaran2024" and one["data"] == "waterbirds"
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_without_records_no_data_is_needed(folders, monkeypatch, profile):
    monkeypatch.setattr("fairtuning.datasets.files.find", None)
    forget()
    state = states(profile)
    assert state["Table 2"][1].startswith("no records of LoRA, FairLoRA, FFT")
    assert all(row["ours"] is None for row in report.table("sukumaran2024", "table2", profile=profile))
    found = report.verdicts("sukumaran2024", profile=profile)
    assert {verdict.verdict for verdict in found} == {"not yet", "not testable here"}


# ---------------------------------------------------------------------------------------- from records to our numbers
LABEL, GROUP = np.repeat([0, 0, 1, 1], 100), np.repeat([0, 1, 0, 1], 100)


def planted(rights, *, seeds=5, losses=None):
    """Results made by hand. rights: label -> how many of 100 are right in each cell (class, background), and seed."""
    examples = {"key": "toy-test", "label": pack(LABEL, classes=2), "group": pack(GROUP, classes=2)}
    examples |= {"group_names": ["land", "water"]}

    def record(label, seed):
        right = np.concatenate([np.arange(100) < count + seed for count in rights[label]])
        prediction = np.where(right, LABEL, 1 - LABEL)
        made_by = {"backbone": "vit-tiny", "size": 112}
        found = {"key": f"{label}-{seed}", "data": {"name": "waterbirds"}, "configuration": made_by}
        found["predictions"] = {"test": pack(prediction, classes=2)}
        found["cell_loss"] = {
            "test": [[value * (1 + seed / 10) for value in row] for row in (losses or {}).get(label, [])]
        }
        return found

    return Results({label: [record(label, seed) for seed in range(seeds)] for label in rights}, examples, resamples=50)


def test_cells():
    found = planted({"LoRA": (90, 70, 20, 80), "LoRA/r=8": (90, 90, 90, 90)}, seeds=1)
    cell = lambda slug, row, column: sukumaran2024.cell(found, slug, row, column)  # noqa: E731
    accuracy = cell("table2", "ViT LoRA", "Acc")
    assert accuracy.values.tolist() == [pytest.approx(65)] and accuracy.records == ("LoRA-0",)
    assert accuracy.backbone == "ViT-Tiny/16 at 112 px"
    assert cell("table2", "ViT LoRA", "Recall min").values.tolist() == [pytest.approx(50)]
    assert cell("table3", "ViT LoRA", "EOD max").values.tolist() == [pytest.approx(60)]
    # predicted class = background: 90 landbirds on land, 30 on water, 80 waterbirds on land, 80 on water
    assert cell("table3", "ViT LoRA", "Sensitive Acc").values.tolist() == [
        pytest.approx(100 * (90 + 30 + 80 + 80) / 400)
    ]
    parity = METRICS["demographic_parity_difference"].function(found.counts("LoRA"))
    assert tables.attribute_agreement(found.counts("LoRA")).tolist() == pytest.approx(((1 + parity) / 2).tolist())
    assert cell("figure12", "LoRA", "Acc").values.tolist() == [pytest.approx(0.65)]
    assert cell("ranks", "ViT LoRA r=8", "F1 min").values.tolist() == [pytest.approx(0.9)]
    for slug, row, column in (
        ("table2", "CLIP LoRA", "Acc"),
        ("table6", "ViT LoRA", "Acc"),
        ("ranks", "DINO LoRA r=8", "Acc"),
    ):
        with pytest.raises(MissingRuns, match="missing runs"):
            cell(slug, row, column)
    with pytest.raises(MissingRuns, match="as many attributes as classes"):
        tables.attribute_agreement(torch.ones(2, 10, 10))


def test_class_loss_variance():
    """Class means 0.2 and 0.6 of cells of equal size: variance 0.04; a quarter where losses are halved."""
    losses = {"LoRA": [[0.1, 0.8], [0.3, 0.4]], "FairLoRA": [[0.05, 0.4], [0.15, 0.2]]}
    found = planted({label: (90, 90, 50, 90) for label in losses}, losses=losses)
    assert float(tables.class_loss_variance(found, "LoRA")[0]) == pytest.approx(0.04)
    ratio = tables.log_loss_variance_ratio(found, "LoRA", "FairLoRA").by_seed
    assert ratio.tolist() == pytest.approx([np.log(4)] * 5)


def test_rank_range():
    rights = {f"LoRA/r={rank}": (80 + rank // 16,) * 4 for rank in RANKS}
    rights |= {f"FairLoRA/r={rank}": (80 + (rank == 32),) * 4 for rank in RANKS}
    effect = sukumaran2024.quantities(planted(rights, seeds=3))["rank_range"]("accuracy", "LoRA", "FairLoRA")
    assert effect.by_seed.tolist() == pytest.approx([0.07] * 3) and effect.resampled.shape == (50, 3)


def test_coverage_tells_a_part_from_the_whole(monkeypatch):
    """ViT-Tiny alone is not Tables 2 and 3, which have three backbones."""
    found = planted({label: (90, 70, 20, 80) for label in ALL if offered(label, "compact")})
    monkeypatch.setattr(report, "_available", lambda study, *rest: found if study == "sukumaran2024" else None)
    state = states("compact")
    for item in ("Table 2", "Table 3"):
        note = "only ViT-Tiny/16 at 112 px (profile compact); not run: CLIP ViT-B/32, DINO ViT-B/16"
        assert state[item] == ("not yet", note)
    assert state["Figure 12"][0] == state["Figures 5, 9 and 10"][0] == "reproduced"
    rows = report.table("sukumaran2024", "table2", profile="compact", found=found)
    assert {row["row"].split()[0] for row in rows if row["ours"]} == {"ViT"}
    assert {row["ours"]["backbone"] for row in rows if row["ours"]} == {"ViT-Tiny/16 at 112 px"}
    assert "r=64, r=128" in tables.left_out("ranks", "classroom")
    assert all(tables.left_out(slug, "paper") == "" for slug in LABELS)


# -------------------------------------------------------------------------------------------------------------- claims
ARGUMENTS = {
    "difference": {"metric", "of", "minus"},
    "log_loss_variance_ratio": {"of", "over"},
    "rank_range": {"metric", "of", "minus"},
    "noise_above_half": {"of"},
}


def test_claims_are_well_formed():
    loaded = claims.load("sukumaran2024")
    assert [c.id for c in loaded] == [f"P2-C{i}" for i in range(1, 15)]
    places = {item["item"] for item in papers.load_published("sukumaran2024")["items"]} | {"Method"}
    for c in loaded:
        assert c.place in places and c.origin in ("paper", "ours") and c.statement.endswith(".")
        assert "waterbirds" in c.data and set(c.data) <= {"waterbirds", "kinds", "geode", "aircraft"}
        for data, entry in c.data.items():
            assert bool(entry.parts) != bool(entry.state) and (entry.parts or entry.reason)
            assert not entry.parts or data in ("waterbirds", "kinds")
            for p in (*entry.parts, *entry.beside):
                assert set(p.arguments) == ARGUMENTS[p.quantity], c.id
                assert p.arguments.get("metric", "accuracy") in METRICS
                for label in (p.arguments[name] for name in ("of", "minus", "over") if name in p.arguments):
                    assert label in ALL or p.quantity == "rank_range", (c.id, label)


def test_claims_with_planted_results():
    """The penalty helps the worst group only where groups are class x background: P2-C13; P2-C10 does not hold."""
    rights = {label: (90, 70, 20, 80) for label in ALL if offered(label, "compact")}
    rights["FairLoRA/groups=cell"] = (85, 80, 70, 80)
    losses = {label: [[0.1, 0.8], [0.3, 0.4]] for label in FOUR}
    losses["FairLoRA"] = losses["FairFFT"] = [[0.2, 0.4], [0.2, 0.4]]
    found = planted(rights, losses=losses)
    for label in ("FairLoRA/kinds", "LoRA/kinds"):
        for seed, record in enumerate(found.records(label)):
            record["configuration"]["batch_size"] = 32
            record["penalty"] = {"batch_sizes": [32], "and_signal": [[(1.0, 0.1 + seed / 100)]]}
    quantities = dict.fromkeys(("waterbirds", "kinds"), sukumaran2024.quantities(found))
    evaluated = claims.evaluate(claims.load("sukumaran2024"), quantities, profile="compact")
    verdicts = {v.id: v for v in evaluated if v.data == "waterbirds"}
    assert {v.id: v.verdict for v in evaluated if v.data == "kinds"} == {"P2-C14": "supported"}
    assert verdicts["P2-C13"].verdict == "supported" and verdicts["P2-C4"].verdict == "supported"
    assert verdicts["P2-C10"].verdict == "contradicted" and verdicts["P2-C1"].verdict == "supported"
    assert verdicts["P2-C11"].verdict == "supported" and verdicts["P2-C2"].verdict == "contradicted"
    assert verdicts["P2-C12"].verdict == verdicts["P2-C14"].verdict == "not testable here"
    assert verdicts["P2-C7"].verdict == verdicts["P2-C8"].verdict == "not yet"


def test_keep_best_evaluates_the_epoch_of_the_highest_validation_accuracy():
    last = record_of(small("LoRA", epochs=6))
    best = record_of(small("LoRA", epochs=6, keep="best"))
    assert best["history"] == last["history"]
    assert best["curve"]["kept"] == 1 + best["history"].index(max(best["history"]))
    assert best["accuracy"]["validation"] == pytest.approx(max(best["history"]), abs=1e-4)
    assert last["curve"]["kept"] == 6 and last["accuracy"]["validation"] == pytest.approx(last["history"][-1], abs=1e-4)


work_module = import_module("fairtuning.studies.sukumaran2024.work")


def trained(label, **changes):
    run = small(label, **changes)
    data = work_module._load(run.data, run.size, run.edition)
    network = work_module.network_of(run, data)
    return work_module.Training(network, run, data), data


@pytest.mark.parametrize("label", ["GroupDRO", "Balanced"])
def test_balanced_batches_hold_every_cell_alike_and_repeat_by_seed(label):
    training, data = trained(label)
    draws = [trained(label)[0].batch(torch.arange(2000)[None])[2] for _ in range(2)]
    assert torch.equal(*draws)
    shares = draws[0].flatten().bincount(minlength=training.groups) / draws[0].numel()
    assert torch.allclose(shares, torch.full_like(shares, 1 / training.groups), atol=0.05)
    plain = trained("LoRA")[0].group.bincount(minlength=2)
    assert plain.sum() == len(data.part("training"))


def test_group_dro_moves_its_weight_to_the_group_of_the_higher_loss():
    training, _ = trained("GroupDRO")
    group = torch.arange(training.groups)[None]
    logits = torch.zeros(1, training.groups, 2)
    logits[0, 0, 0] = -9.0  # the first group is wrong
    for _ in range(3):
        training.objective(logits, torch.zeros(1, training.groups, dtype=torch.int64), group)
    assert training.dro_weights.argmax() == 0 and float(training.dro_weights.sum()) == pytest.approx(1)


def test_smoothed_penalty_remembers_group_losses_from_one_batch_to_the_next():
    training, _ = trained("FairLoRA/lambda=1", objective="smoothed")
    logits, label = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 0, 0, 1, 1, 1]])
    first = training.objective(logits, label, label)
    eq1 = trained("FairLoRA/lambda=1")[0].objective(logits, label, label)
    assert float(first) == pytest.approx(float(eq1))  # nothing remembered yet
    assert float(training.objective(2 * logits, label, label)) != pytest.approx(
        float(trained("FairLoRA/lambda=1")[0].objective(2 * logits, label, label))
    )


def test_a_retrained_last_layer_is_fitted_to_validation_and_changes_the_head_alone():
    plain, retrained = record_of(small("LoRA")), record_of(small("DFR"))
    assert retrained["history"] == plain["history"]
    assert retrained["predictions"]["test"] != plain["predictions"]["test"]
    assert retrained["worst"]["validation"] >= plain["worst"]["validation"]


def test_a_hundred_classes_that_are_their_own_groups_do_not_fill_the_memory():
    """Aircraft: counts by class, true and predicted class, resampled for 36 runs, would take 144 GB."""
    names, label = [f"variant {number}" for number in range(100)], np.arange(300) % 100
    wrong = np.where(np.arange(300) < 100, (label + 1) % 100, label)  # a third of every class
    wrong[100] = 1  # of class 0 two thirds
    examples = {"key": "0-test", "label": pack(label, classes=100), "group": pack(label, classes=100)}
    examples |= {"label_names": names, "group_names": names}
    cells = [[0.5 + y / 100 if y == g else None for y in range(100)] for g in range(100)]
    record = {"data": {"name": "aircraft"}, "predictions": {"test": pack(wrong, classes=100)}}
    found = Results({"LoRA": [record | {"cell_loss": {"test": cells}}] * 5}, examples, resamples=20)
    assert found._resampled_counts.shape == (20, 5, 1, 100, 100)
    assert found.values("LoRA", "accuracy").tolist() == pytest.approx([199 / 300] * 5)
    for metric in ("min_class_recall", "worst_cell_accuracy"):
        assert found.values("LoRA", metric).tolist() == pytest.approx([1 / 3] * 5)
    assert found.values("LoRA", "equalized_odds_one_vs_rest_max").isnan().all()
    spread = np.var(0.5 + np.arange(100) / 100)
    assert tables.class_loss_variance(found, "LoRA").tolist() == pytest.approx([spread] * 5)


@pytest.mark.parametrize("slug, data", [("table1", "geode"), ("table6", "aircraft")])
def test_cells_of_the_other_data_sets_are_read_from_their_own_runs(slug, data):
    label = f"FairLoRA/clip/{data}"
    assert label in sukumaran2024.LABELS[slug]
    truth = {"label": pack([0, 1, 2, 2], classes=3), "group": pack([0, 1, 0, 1], classes=2), "group_names": ["a", "b"]}
    record = {
        "key": "k", "configuration": {"backbone": "clip", "size": 224}, "data": {"name": data},
        "predictions": {"test": pack([0, 1, 2, 0], classes=3)},
    }  # fmt: skip
    found = Results({label: [record]}, truth | {"key": "0-test"})
    assert sukumaran2024.cell(found, slug, "CLIP FairLoRA", "Acc").values.tolist() == [75.0]
    with pytest.raises(MissingRuns):
        sukumaran2024.cell(found, slug, "ViT LoRA", "Acc")
