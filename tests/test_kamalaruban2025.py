"""The study of arXiv 2503.05684: labels, selection, what a run leaves, claims; its profile `paper` end to end, tiny."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

from fairtuning import FairtuningError, claims, metrics, report, runs, studies, verification
from fairtuning.analysis import MissingRuns
from fairtuning.collaboration import exchange, leakage, parties
from fairtuning.collaboration.parties import METHODS as PARTY_METHODS
from fairtuning.collaboration.parties import RAISED, SENSITIVE, turns
from fairtuning.collaboration.transcript import Transcript, compare, verify
from fairtuning.datasets import celeba, files
from fairtuning.plan import best, seeded
from fairtuning.runs import Store, key_of, pack, unpack
from fairtuning.studies import kamalaruban2025
from fairtuning.studies.kamalaruban2025 import measures, tables
from fairtuning.studies.kamalaruban2025.configuration import (
    CLIP,
    IN_ROUNDS,
    LABELS,
    MAIN,
    PROFILES,
    STUDY,
    VARIANTS,
    VERSIONS,
    Run,
    offered,
    resolve,
    selected,
)

work = import_module("fairtuning.studies.kamalaruban2025.work")  # the package's own "work" is a function
ALL = list(dict.fromkeys(label for found in LABELS.values() for label in found))


# -------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    "label, expected",
    [
        ("Erm", dict(method="erm", strength=0.0)),
        ("Unl", dict(method="unl", strength=None)),
        ("Unl/gamma=0.5", dict(method="unl", strength=0.5)),
        ("Unl/ascent", dict(method="unl-ascent")),
        ("Orth/strength=3", dict(method="orth", strength=3.0)),
        ("Orth/cosine", dict(method="orth-cosine")),
        ("Orth/weight/shuffled", dict(method="orth-weight", sensitive="shuffled")),
        ("Orth/random", dict(sensitive="random")),
        ("Adv/central", dict(method="adv-central")),
        ("Ent/uniform", dict(method="ent-uniform")),
        ("Erm/disjoint", dict(images="disjoint", strength=0.0)),
        ("Orth/leaks", dict(method="orth", images="disjoint", leaks=True, clip=0.0, noise=0.0)),
        ("Orth/noise=4", dict(images="same", leaks=False, clip=CLIP, noise=4.0)),
    ],
)
def test_a_label_names_a_run(label, expected):
    asked = resolve(label)
    assert {name: asked.get(name, getattr(Run, name)) for name in expected} == expected


def test_what_a_label_leaves_to_the_profile():
    asked = resolve("Orth/O/utkface")
    assert (asked["rule"], asked["place"], asked["strength"]) == ("O", "utkface", None)
    assert not {"rule", "place"} & set(resolve("Orth"))
    assert STUDY.place_of("Orth", "compact") == "celeba" and STUDY.place_of("Orth", "classroom") == "parity"
    assert offered("Orth/Bald", "compact") and not offered("Orth/Bald", "classroom")
    assert set(VERSIONS) == set(PARTY_METHODS) and set(IN_ROUNDS) == set(RAISED)
    assert {resolve(label).get("sensitive", Run.sensitive) for label in ALL} == set(SENSITIVE)


@pytest.mark.parametrize(
    "label, words",
    [
        ("erm", "unknown run label 'erm'; allowed: Erm, Unl, Adv, Orth, Ent"),
        ("Erm/strength=1", "unknown modifier 'strength=1'"),
        ("Orth/strength=-1", "unknown modifier 'strength=-1'"),
        ("Orth/strength=much", "unknown modifier 'strength=much'"),
        ("Orth/gamma=1", "unknown modifier 'gamma=1'"),
        ("Orth/", "unknown modifier ''"),
        ("Orth/ascent", "unknown modifier 'ascent'"),
        ("Adv/shuffled", "unknown modifier 'shuffled'"),
        ("Erm/O", "unknown modifier 'O'"),
        ("Erm/leaks", "unknown modifier 'leaks'"),
        ("Adv/noise=1", "unknown modifier 'noise=1'"),
        ("Orth/noise=inf", "unknown modifier 'noise=inf'"),
        ("Erm/Attractive", "unknown modifier 'Attractive'"),
        ("Adv/central/disjoint", "has label and attribute of the same images"),
    ],
)
def test_an_unknown_label_is_one_line(label, words):
    with pytest.raises(FairtuningError) as error:
        resolve(label)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_label_is_offered_by_some_profile():
    assert all(offered(label, "compact") and offered(label, "paper") for label in ALL)
    assert [label for label in ALL if offered(label, "classroom")] == [
        label for label in ALL if "place" not in resolve(label)
    ]
    with pytest.raises(FairtuningError, match="'Orth/Bald' is not offered in profile classroom"):
        selected("Orth/Bald", "classroom", lambda run: None)
    for profile, seeds, words in (("huge", 1, "profile is 'huge'"), ("compact", 0, "seeds is 0")):
        with pytest.raises(FairtuningError, match=words):
            next(STUDY.phases(profile, ["Erm"], seeds, lambda run: None))
    strengths = {method for variants in VARIANTS.values() for method in variants.values()} - {"erm"}
    assert all(set(profile["strengths"]) == strengths for profile in PROFILES.values())
    assert all(list(s) == sorted(s) for profile in PROFILES.values() for s in profile["strengths"].values())


# ----------------------------------------------------------------------------------------------------------- selection
def validated(accuracy, gap=0.3):
    return {"accuracy": {"validation": accuracy}, "oracle": {"dp": gap, "fpr": gap}}


def test_rule_d_is_the_strongest_within_a_point_and_rule_o_the_smallest_gap_of_those():
    plain = Run(learning_rate=0.1)
    found = {0.0: (0.90, 0.3), 1.0: (0.91, 0.2), 10.0: (0.890, 0.25), 100.0: (0.8899, 0.01)}
    candidates = [Run(method="orth", strength=strength) for strength in (1.0, 10.0, 100.0)]
    lookup = lambda run: validated(*found[run.strength])  # noqa: E731

    def strongest(candidates, lookup, rule="D"):
        return best([plain, *candidates], lookup, lambda record: STUDY.judge(record, {}), rule=rule)

    assert strongest(candidates, lookup).strength == 10.0
    assert strongest(candidates, lookup, rule="O").strength == 1.0
    assert strongest(candidates[2:], lookup) is candidates[2]  # none within a point: the weakest
    assert strongest(candidates[1:], lambda run: validated(0.9 - 0.1 * bool(run.strength))) is candidates[1]
    assert strongest(candidates, lambda run: None) is None


def test_selection_is_of_the_rate_on_erm_then_of_the_strength():
    def lookup(run):
        assert run.evaluate == "validation" and run.seed == 0 and run.images == "same" and run.sensitive == "trained"
        assert not (run.clip or run.noise or run.leaks)
        if run.method == "erm":
            assert run.strength == 0.0 and run.rounds == 1
            return validated({0.0003: 0.90, 0.001: 0.93, 0.003: 0.91}[run.learning_rate])
        assert run.learning_rate == 0.001
        return validated(0.93 if run.strength in (0.25, 0.1, 1.0, 10.0) else 0.9)

    for label, strength, rounds in (("Erm", 0.0, 1), ("Orth", 10.0, 1), ("Unl", 1.0, 1), ("Adv", 1.0, 20)):
        run, searches = selected(label, "compact", lookup)
        assert (run.learning_rate, run.strength, run.evaluate, run.rounds) == (0.001, strength, "test", rounds)
        assert [len(search) for search in searches] == ([3] if label == "Erm" else [3, 4])
    run, searches = selected("Unl/gamma=0.5", "compact", lookup)
    assert run.strength == 0.5 and len(searches) == 1
    # controls and other labels of the same images have the settings of what they belong to
    for label, expected in (
        ("Orth/shuffled", dict(sensitive="shuffled", strength=10.0)),
        ("Orth/disjoint", dict(images="disjoint", strength=10.0)),
        ("Orth/leaks/noise=1", dict(images="disjoint", leaks=True, noise=1.0, strength=10.0)),
        ("Orth/Bald", dict(label="Bald", strength=10.0)),
    ):
        run, searches = selected(label, "compact", lookup)
        assert {name: getattr(run, name) for name in expected} == expected
        assert {one.label for search in searches for one in search} == {"Wavy_Hair"}


def test_phases_and_their_runs():
    store, phases = {}, []
    for phase in STUDY.phases("compact", [*MAIN, "Orth/random"], 5, store.get):
        phases.append(phase)
        store |= {run: validated(0.9) for run in phase}
    assert [len(phase) for phase in phases] == [3, 1 + 5 * 3, 7 * 5]  # rates; Erm's with 5 methods' strengths; seeds
    assert {run.evaluate for run in phases[0] + phases[1]} == {"validation"}
    assert {run.evaluate for run in phases[2]} == {"test"}
    units = kamalaruban2025.units(phases[2])
    assert [unit[0].seed for unit in units] == sorted(unit[0].seed for unit in units) and len(units) == 35


# ----------------------------------------------------------------------------------------------------- what a run does
def small(label, **changes):
    """A classroom run, cut short."""
    run, _ = selected(label, "classroom", lambda run: None)
    return seeded(replace(run, **{"epochs": 2} | changes), changes.get("seed", 0))


def record_of(run):
    found = {line["kind"]: line for line in kamalaruban2025.work([run])}
    assert set(found) == {"environment", "examples", "record"}
    return found["record"]


def results_part(record):
    """What is a result of the run: not its key, configuration, environment or time."""
    return {
        name: record[name]
        for name in record
        if name not in ("key", "configuration", "environment", "seconds", "auditor")
    }


GOLDEN = {  # two epochs: accuracy and loss on the 826 test images, demographic parity difference on validation
    "Erm": (0.943099, 0.23325264, 0.070707),
    "Unl/gamma=0.5": (0.889831, 0.32419375, 0.070707),
    "Orth/strength=10": (0.865617, 0.405855, 0.035354),
    "Orth/weight/strength=10": (0.914044, 0.34356064, 0.005051),
    "Orth/cosine/strength=1": (0.900726, 0.29480591, 0.070707),
    "Adv/strength=1": (0.927361, 0.26447698, 0.015152),
    "Ent/strength=1": (0.916465, 0.33195806, 0.010101),
    "Adv/central/strength=0.3": (0.941889, 0.24487044, 0.085859),
}


def test_golden_numbers():
    """If these move, so has the meaning of committed records: raise the method's version."""
    for label, golden in GOLDEN.items():
        record = record_of(small(label))
        found = record["accuracy"]["test"], record["loss"]["test"], record["oracle"]["demographic_parity_difference"]
        assert found == pytest.approx(golden, abs=2e-4), label


def test_a_record_tells_what_the_evaluator_saw():
    run = small("Orth/strength=10")
    data = work.load(run)
    record = record_of(run)
    index = data.part("test")
    label, group = data.label[index].numpy(), data.group[index].numpy()
    predicted, scores = unpack(record["predictions"]["test"]), unpack(record["scores"]["test"])
    assert record["accuracy"]["test"] == pytest.approx((predicted == label).mean(), abs=1e-6)
    assert ((scores >= 128) == predicted).mean() > 0.99 and len(set(scores.tolist())) > 20
    told = {name: (unpack(probe) == group).mean() for name, probe in record["probes"].items()}
    assert set(told) == {"trained", "frozen", "sent, few", "frozen, few"}
    assert told["sent, few"] > told["frozen, few"] + 0.05  # an adapter that was sent tells of the attribute
    assert 0.5 < told["frozen"] <= 1
    assert record["parameters"] == 2 * run.rank * (48 + 3 * 48) + 48 * 2 + 2
    assert record["messages"]["number"] == 1 and record["messages"]["bytes"] > 4 * 2 * run.rank * (48 + 3 * 48)
    assert set(record["messages"]["heads"]) == {"developer", "auditor"}
    assert len(record["history"]) == run.epochs == record["kept"]
    assert kamalaruban2025.configuration(record) == run
    assert record["key"] == key_of(run, digest=record["data"]["digest"], version=STUDY.version(run))


def test_what_leaks_is_measured_of_the_bytes_that_crossed():
    plain = record_of(small("Orth/disjoint/strength=10"))
    record = record_of(small("Orth/leaks/strength=10"))
    noisy = record_of(small("Orth/leaks/noise=4/strength=10"))
    extra = {f"{whose}, {known}" for whose in ("sent", "frozen") for known in (0, *leakage.KNOWN)}
    assert set(record["probes"]) - set(plain["probes"]) == extra == set(noisy["probes"]) - set(plain["probes"])
    assert record["probes"]["sent, 100"] == record["probes"]["sent, few"]
    kept = {name: value for name, value in record["probes"].items() if name not in extra}
    assert results_part(record | {"probes": kept}) == results_part(plain) | {"membership": record["membership"]}

    data = work.load(small("Erm"))
    halves = [set(rows.tolist()) for rows in work._candidates(data)]
    auditors = parties.auditor_view(data, images="disjoint").rows["training"].tolist()
    assert not halves[0] & halves[1] and halves[0] <= set(auditors) and not halves[1] & set(auditors)
    scores = record["membership"]["scores"]
    assert record["membership"]["members"] == len(halves[0]) == len(halves[1]) == scores["loss"]["n"] // 2
    # noise changes what is sent and what comes of it, and nothing of the controls
    assert noisy["messages"]["bytes"] == record["messages"]["bytes"]
    assert noisy["predictions"] != record["predictions"] and noisy["probes"]["sent, 0"] != record["probes"]["sent, 0"]
    assert all(noisy["probes"][f"frozen, {known}"] == record["probes"][f"frozen, {known}"] for known in (0, 10))
    assert noisy["membership"]["scores"]["frozen"] == scores["frozen"] != noisy["membership"]["scores"]["loss"]
    assert noisy["auditor"]["accuracy"] == record["auditor"]["accuracy"]  # the adapter below the noise is the same one


def test_a_search_never_reads_the_test_images():
    record = record_of(small("Adv/strength=1", evaluate="validation"))
    assert set(record["accuracy"]) == {"validation"} == set(record["predictions"])
    assert not {"scores", "probes"} & set(record)
    assert record["messages"]["number"] == 2 * (PROFILES["classroom"]["rounds"] - 1)


def test_strength_0_is_erm_and_a_shared_sensitive_adapter_changes_nothing():
    plain = record_of(small("Erm"))
    for label in ("Orth/strength=0", "Adv/strength=0"):
        record = record_of(small(label))
        for name in ("predictions", "scores", "history", "loss", "oracle", "kept"):
            assert record[name] == plain[name], (label, name)
    first = record_of(small("Orth/strength=10"))  # its sensitive adapter may have been trained for a run before it
    work._sensitive.cache_clear()
    assert results_part(record_of(small("Orth/strength=10"))) == results_part(first)


def test_parties_made_apart_from_each_other_do_what_the_run_does():
    """As on two machines: each party from the names of profile and run, and from what a search would have selected."""
    settings = {"profile": "classroom", "run": "Orth", "strength": 10.0, "epochs": 2}
    found = {name: work.party(name, settings, Transcript(None, party=name)) for name in ("developer", "auditor")}
    run = small("Orth/strength=10")
    heads = exchange(found, turns(work.plan_of(run)))["heads"]
    assert heads == record_of(run)["messages"]["heads"]


def test_a_records_parties_play_again_and_keep_their_transcripts(tmp_path, monkeypatch):
    """The heads in a record are those of a chain that anyone with the data can have again."""
    store = Store.of("kamalaruban2025", "classroom", folder=tmp_path)
    runs = {"adv": small("Adv/strength=1"), "erm": small("Erm")}
    with store.writing():
        for line in (line for run in runs.values() for line in kamalaruban2025.work([run])):
            store.append(line)
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(tmp_path))
    made, unsent = (store.lookup(STUDY)(run)["key"] for run in runs.values())
    folder = tmp_path / "kept"
    heads, recorded = verification.transcripts(profile="classroom", key=made, folder=folder)
    assert heads == recorded and set(heads) == {"developer", "auditor"}
    lines = {name: verify(folder / f"{name}.jsonl", head=head) for name, head in recorded.items()}
    assert compare(*(folder / f"{name}.jsonl" for name in lines)) == store.records[made]["messages"]["number"] > 2
    with pytest.raises(FairtuningError, match="exists already"):
        verification.transcripts(profile="classroom", key=made, folder=folder)
    with pytest.raises(FairtuningError, match="nothing crossed"):
        verification.transcripts(profile="classroom", key=unsent, folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_out_of_memory_says_what_to_lower(monkeypatch):
    def full(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(work, "exchange", full)
    with pytest.raises(runs.RunError, match="out of memory at batch_size 32, size 8; lower one of them"):
        record_of(small("Erm"))


# ------------------------------------------------------------------------------------ profile `paper`, end to end, tiny
def face(seed, size):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def faces():
    """A tiny CelebA in the official layout: each (Wavy_Hair, Male) three times in each part."""
    cells = [(y, split, male) for split in range(3) for y in (-1, 1) for male in (-1, 1) for _ in range(3)]
    attributes = [str(len(cells)), "Bald Blond_Hair Male Smiling Wavy_Hair Young"]
    partition, members = [], {}
    for i, (y, split, male) in enumerate(cells):
        name = f"{i + 1:06d}.jpg"
        attributes.append(f"{name} {-y} {1 - 2 * (i % 2)} {male} {1 - 2 * (i % 2)} {y} {1 - 2 * (i % 2)}")
        partition.append(f"{name} {split}")
        members[f"img_align_celeba/{name}"] = face(i, (44, 36))
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    texts = {"list_attr_celeba.txt": attributes, "list_eval_partition.txt": partition}
    return {"img_align_celeba.zip": file.getvalue()} | {n: "\n".join([*t, ""]).encode() for n, t in texts.items()}


def people():
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        for i in range(80):
            content = face(1000 + i, (40, 40))
            entry = tarfile.TarInfo(f"UTKFace/{20 + i // 4}_{i % 2}_{i % 5}_201701161745{i:05d}.jpg.chip.jpg")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return {"UTKFace.tar.gz": file.getvalue()}


def forget():
    for cached in (work._load, work._encoder, work._sensitive):
        cached.cache_clear()
    work._frozen_features.cache_clear()
    work._frozen_candidates.cache_clear()


@pytest.fixture
def paper(folders, monkeypatch):
    """The profile `paper` on the processor, its backbone much reduced, its images those of ``faces`` and ``people``."""
    entries = []
    for name, contents in (("celeba", faces()), ("utkface", people())):
        (folders / "mirror" / name).mkdir(parents=True)
        for file, content in contents.items():
            (folders / "mirror" / name / file).write_bytes(content)
            entry = {"file": f"{name}/{file}", "sha256": hashlib.sha256(content).hexdigest(), "edition": "official"}
            entries.append(entry)
    (folders / "mirror" / "MANIFEST.json").write_text(json.dumps(entries))
    monkeypatch.setenv("FAIRTUNING_MIRROR", str(folders / "mirror"))
    settings = {"device": "cpu", "precision": "float32", "weights": "random", "batch_size": 8}
    small_tasks = {name: task | {"size": 32, "epochs": 1} for name, task in PROFILES["paper"]["data"].items()}
    tiny = {"seeds": 2, "data": small_tasks, "rounds": 2}
    tiny |= {"settings": PROFILES["paper"]["settings"] | settings}
    tiny["strengths"] = {method: found[:2] for method, found in PROFILES["paper"]["strengths"].items()}
    monkeypatch.setitem(PROFILES, "paper", PROFILES["paper"] | tiny)
    load = work.backbones.load

    def reduce(name, **options):
        assert name == "vit" and options["size"] == (32, 32) and options["weights"] == "random"
        backbone = load("vit_tiny_patch16_224", **options)
        backbone.model.blocks = backbone.model.blocks[:2]
        return backbone

    monkeypatch.setattr(work.backbones, "load", reduce)
    forget()
    yield PROFILES["paper"]
    forget()


def test_the_profile_paper_end_to_end(paper, folders, monkeypatch):
    labels = [*MAIN, "Orth/shuffled", "Adv/central", "Erm/disjoint", "Orth/disjoint", "Erm/Bald", "Erm/utkface"]
    expected = runs.cost(STUDY, labels, profile="paper")["missing"]
    assert expected == 2 + 6 * 2 + 2 + 2 * len(labels)  # Erm's rates; strengths of six; utkface's rates; seeds
    store = runs.ensure(kamalaruban2025, labels, profile="paper", progress=False)
    assert len(store.records) == expected
    again = next(record for record in store.records.values() if record["configuration"]["method"] == "orth")
    assert results_part(record_of(kamalaruban2025.configuration(again))) == results_part(again)

    # from here on only records are needed
    (folders / "data").rename(folders / "elsewhere")
    monkeypatch.delenv("FAIRTUNING_MIRROR")
    forget()
    found = kamalaruban2025.results(store, "paper")
    assert set(found.runs) == {label for label in labels if "place" not in resolve(label)}
    assert found.data_name == "celeba"
    assert set(kamalaruban2025.results(store, "paper", data="Bald").runs) == {"Erm/Bald"}
    assert len(found.effect("Orth", "auroc", minus="Erm").by_seed) == 2
    with pytest.raises(MissingRuns, match="no records of Smiling in profile paper"):
        kamalaruban2025.results(store, "paper", data="Smiling")
    verdicts = {(v.id, v.data): v for v in report.verdicts("kamalaruban2025", profile="paper")}
    assert verdicts["P3-C1", "celeba"].reason == "fewer than 5 seeds (2)"
    assert verdicts["P3-C1", "utkface"].reason == "missing runs: Orth/utkface"
    assert verdicts["P3-C1", "Smiling"].reason == "no runs in profile paper"
    assert verdicts["P3-C10", "celeba"].reason == "missing runs: Orth/random"


@pytest.mark.parametrize("profile", PROFILES)
def test_without_records_no_data_is_needed(folders, monkeypatch, profile):
    monkeypatch.setattr(files, "find", None)
    forget()
    assert {verdict.verdict for verdict in report.verdicts("kamalaruban2025", profile=profile)} == {"not yet"}
    rows = [row for row in report.coverage(profile=profile) if row["paper"] == "kamalaruban2025"]
    assert {row["state"] for row in rows} <= {"not testable here", "reproduced"}


def test_the_committed_profiles_fit_the_data():
    assert [*celeba.RECIPE.known["celeba.tar.gz"].values()][-1] == PROFILES["compact"]["data"]["celeba"]["edition"]


# ---------------------------------------------------------------------------------------- from records to our numbers
LABEL, GROUP = np.repeat([0, 0, 1, 1], 100), np.repeat([0, 1, 0, 1], 100)


def planted(rights, *, seeds=5, told=None, task="celeba", other=None):
    """Results made by hand. rights: label -> how many of 100 are right in each cell (label, group), and seed.

    told: label -> how many of 100 attributes in each cell a probe tells.
    """
    examples = {"key": "toy-test", "label": pack(LABEL, classes=2), "group": pack(GROUP, classes=2)}
    examples |= {"group_names": ["women", "men"]}

    def among(counts, truth):
        return np.where(np.concatenate([np.arange(100) < count for count in counts]), truth, 1 - truth)

    def record(label, seed):
        predicted = among([count + seed for count in rights[label]], LABEL)
        scores = (128 * predicted + np.arange(400) % 128).tolist()
        sent = {"sent, few": (95,) * 4, "frozen, few": (75,) * 4}
        shares = {"trained": (told or {}).get(label, (90,) * 4), "frozen": (80,) * 4} | sent
        read = 55 if "noise" in label else 90  # by clusters of the adapter that was sent; members score higher
        leaks = {f"sent, {known}": (read,) * 4 for known in (0, 100)} | {
            "frozen, 0": (50,) * 4,
            "frozen, 100": (75,) * 4,
        }
        chance = np.random.default_rng(seed)
        attacks = {a: chance.normal(np.repeat([0.0 if a == "frozen" else 1.0, 0.0], 200)) for a in leakage.ATTACKS}
        levels = {a: leakage.byte_levels(torch.from_numpy(values)).tolist() for a, values in attacks.items()}
        membership = {"members": 200, "scores": {a: pack(values, classes=256) for a, values in levels.items()}}
        shares |= leaks if "leaks" in label else {}
        return {
            "key": f"{label}-{seed}",
            "data": {"name": "celeba"},
            "predictions": {"test": pack(predicted, classes=2)},
            "scores": {"test": pack(scores, classes=256)},
            "probes": {name: pack(among(counts, GROUP), classes=2) for name, counts in shares.items()},
        } | ({"membership": membership} if "leaks" in label else {})

    found = {label: [record(label, seed) for seed in range(seeds)] for label in rights}
    return tables.TaskResults(found, examples, task=task, other=(other or {}).__getitem__, resamples=50)


def test_at_an_equal_share_of_positives_a_higher_threshold_changes_nothing():
    """Planted: Orth has Erm's scores and says yes to fewer, so its whole smaller gap is a threshold."""
    found = planted({"Erm": (90, 40, 60, 90), "Orth": (90, 40, 60, 90)})
    for record in found.runs["Orth"]:
        record["predictions"]["test"] = pack((unpack(record["scores"]["test"]) >= 192).astype(int), classes=2)
    assert float(found.effect("Orth", "demographic_parity_difference", minus="Erm").by_seed.abs().min()) > 0.05
    equal = measures.at_share_of(found, "Erm")
    for metric in ("accuracy", "demographic_parity_difference", "worst_cell_accuracy"):
        assert equal.effect("Orth", metric, minus="Erm").by_seed.abs().max() < 1e-12
        assert torch.equal(equal.values("Erm", metric), found.values("Erm", metric))
    assert equal.predictions("Orth").sum(-1).tolist() == found.predictions("Erm").sum(-1).tolist()


def test_effects_of_scores_and_probes():
    found = planted({"Erm": (90, 60, 60, 90), "Orth": (90, 85, 85, 90)}, told={"Orth": (70,) * 4})
    values = found.values("Erm", "auroc")
    scores = [unpack(record["scores"]["test"]) for record in found.records("Erm")]
    assert values.tolist() == pytest.approx([sklearn.metrics.roc_auc_score(LABEL, one) for one in scores])
    effect = found.effect("Orth", "auroc", minus="Erm")
    assert effect.resampled.shape == (50, 5) and (effect.by_seed > 0.05).all()
    assert float((effect.resampled.mean(0) - effect.by_seed).abs().max()) < 0.05
    quantities = kamalaruban2025.quantities(found)
    difference = quantities["difference"]
    assert difference("probe_accuracy", "Erm", "Orth").by_seed.tolist() == pytest.approx([0.2] * 5)
    assert difference("probe_accuracy", "frozen", "Orth").by_seed.tolist() == pytest.approx([0.1] * 5)
    assert difference("accuracy", "Orth", "Erm").by_seed.tolist() == pytest.approx([0.125] * 5)
    leak = quantities["leak"]("Orth")
    assert leak.by_seed.tolist() == pytest.approx([0.2] * 5) and leak.resampled.shape == (50, 5)
    with pytest.raises(MissingRuns, match="missing runs: Adv"):
        difference("auroc", "Adv", "Erm")
    with pytest.raises(MissingRuns, match="missing runs: table1"):
        kamalaruban2025.cell(found, "table1", "Orth", "Acc")


def test_effects_of_what_leaks():
    rights = {"Erm": (90, 60, 60, 90), "Orth/leaks": (88, 84, 84, 88), "Orth/leaks/noise=1": (88, 84, 84, 88)}
    found = planted(rights)
    quantities = kamalaruban2025.quantities(found)
    assert quantities["leak"]("Orth/leaks", known=0).by_seed.tolist() == pytest.approx([0.4] * 5)
    less = quantities["leak_difference"]("Orth/leaks", "Orth/leaks/noise=1", known=0)
    assert less.by_seed.tolist() == pytest.approx([0.35] * 5) and less.resampled.shape == (50, 5)
    assert set(found.membership.runs) == {f"{x}, {a}" for x in list(rights)[1:] for a in leakage.ATTACKS}
    effect = quantities["membership"]("Orth/leaks", "loss")
    record = found.records("Orth/leaks")[2]
    truth, scores = np.repeat([1, 0], 200), unpack(record["membership"]["scores"]["loss"])
    assert float(effect.by_seed[2]) == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores) - 0.5)
    assert (effect.by_seed > 0.2).all() and effect.resampled.shape == (50, 5)
    rate = found.membership.effect("Orth/leaks, loss", "true_positive_rate_at_1%").by_seed
    assert ((rate > 0.02) & (rate < 0.3)).all()
    with pytest.raises(MissingRuns, match="missing runs: what leaks"):
        kamalaruban2025.quantities(planted({"Erm": (9,) * 4}))["membership"]("Orth/leaks", "loss")
    with pytest.raises(MissingRuns, match="missing runs: Orth/leaks"):
        kamalaruban2025.quantities(planted({"Orth/leaks/noise=1": (9,) * 4}))["membership"]("Orth/leaks", "loss")


def test_a_gain_beyond_that_on_another_task():
    smiling = planted({"Erm/Smiling": (90, 80, 80, 90), "Orth/Smiling": (90, 85, 85, 90)}, task="Smiling")
    found = planted({"Erm": (90, 60, 60, 90), "Orth": (90, 85, 85, 90)}, other={"Smiling": smiling})
    gaps = {
        label: metrics.demographic_parity_difference(one.counts(label))
        for one in (found, smiling)
        for label in one.runs
    }
    expected = (gaps["Erm"] - gaps["Orth"]) - (gaps["Erm/Smiling"] - gaps["Orth/Smiling"])
    quantity = kamalaruban2025.quantities(found)["gain_beyond"]
    effect = quantity("demographic_parity_difference", "Orth", "Erm", "Smiling")
    assert torch.allclose(effect.by_seed, expected) and effect.resampled.shape == (50, 5) and (expected > 0.1).all()
    # labels of another task are named in claims as those of the first are
    theirs = kamalaruban2025.quantities(smiling)["difference"]("accuracy", "Orth", "Erm")
    assert theirs.by_seed.tolist() == pytest.approx([0.025] * 5)


# -------------------------------------------------------------------------------------------------------------- claims
ARGUMENTS = {
    "difference": {"metric", "of", "minus"},
    "gain_beyond": {"metric", "of", "minus", "task"},
    "leak": {"of"},
    "leak_difference": {"of", "minus", "known"},
    "membership": {"of", "attack"},
}


def test_claims_are_well_formed():
    loaded = claims.load("kamalaruban2025")
    assert [c.id for c in loaded] == [f"P3-C{i}" for i in range(1, 16)]
    tasks = PROFILES["compact"]["data"]
    for c in loaded:
        assert (
            c.place in ("Abstract", "Follow-up", "Method") and c.statement.endswith(".") and set(c.data) <= set(tasks)
        )
        assert c.origin == ("ours" if c.place == "Method" else "paper")
        for data, entry in c.data.items():
            assert entry.parts and not entry.state
            for p in (*entry.parts, *entry.beside):
                assert set(p.arguments) - {"known"} == ARGUMENTS[p.quantity] - {"known"}, c.id
                assert p.arguments.get("attack", "loss") in leakage.ATTACKS
                assert p.arguments.get("metric", "auroc") in (*metrics.METRICS, "auroc", "probe_accuracy")
                for label in (p.arguments[name] for name in ("of", "minus") if name in p.arguments):
                    known = label if data == "celeba" else f"{label}/{data}"
                    assert label == "frozen" or known in ALL or p in entry.beside, (c.id, label)


def test_the_margins_are_those_of_the_head_of_the_file():
    wanted = {"accuracy": 0.005, "positive_class_f1": 0.005, "auroc": 0.01, "probe_accuracy": 0.02, "membership": 0.01}
    for c in claims.load("kamalaruban2025"):
        for entry in c.data.values():
            assert all(p.m == wanted.get(p.arguments.get("metric", p.quantity), 0.02) for p in entry.parts), c.id


def test_claims_with_planted_results():
    """Orth closes the gaps, keeps accuracy, and its features tell less; Unl is Erm, a random adapter does nothing."""
    same, fair = (90, 60, 60, 90), (88, 84, 84, 88)
    rights = {"Erm": same, "Unl": same, "Adv": (85, 70, 70, 85), "Orth": fair, "Orth/weight": fair, "Ent": fair}
    rights |= {"Orth/random": same, "Orth/shuffled": same, "Erm/disjoint": same, "Orth/disjoint": same}
    rights |= {"Orth/leaks": fair, "Orth/leaks/noise=1": fair}
    found = planted(rights, told={"Orth": (70,) * 4})
    verdicts = {
        v.id: v.verdict
        for v in claims.evaluate(
            claims.load("kamalaruban2025"), {"celeba": kamalaruban2025.quantities(found)}, profile="compact"
        )
        if v.data == "celeba"
    }
    supported = {name for name, verdict in verdicts.items() if verdict == "supported"}
    assert {"P3-C1", "P3-C2", "P3-C4", "P3-C8", "P3-C10", "P3-C11", "P3-C13", "P3-C14", "P3-C15"} <= supported
    assert verdicts["P3-C7"] == verdicts["P3-C12"] == "contradicted"


def test_the_study_is_registered():
    assert studies.study("kamalaruban2025") is kamalaruban2025 and "kamalaruban2025" in studies.STUDIES
