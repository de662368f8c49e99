"""The image half of 2403.00625's study: heads on frozen features, with two outputs and with all attributes at once."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from fairtuning import FairtuningError, metrics, report
from fairtuning.datasets import DataError, GroupedData
from fairtuning.networks import head
from fairtuning.runs import Store, ensure, key_of
from fairtuning.studies import zhang2024
from fairtuning.studies.zhang2024 import attributes
from fairtuning.studies.zhang2024.configuration import LABELS, STUDY, offered, resolve, selected

work = import_module("fairtuning.studies.zhang2024.work")  # the package's own "work" and "configuration" are functions
configuration = import_module("fairtuning.studies.zhang2024.configuration")
IMAGES = [
    label for slug, found in LABELS.items() if slug.endswith(("-celeba", "-lfw", "attributes")) for label in found
]


@pytest.fixture
def features(monkeypatch):
    """Random features in the place of frozen ones, under the digest of the compact edition."""

    def read(run, options):
        generator = torch.Generator().manual_seed(1)
        n, d = 240, 6
        inputs = torch.randn(n, d, generator=generator) * torch.tensor([4.0, 1, 1, 0.3, 1, 1])
        noisy = inputs @ torch.randn(d, 5, generator=generator) + torch.randn(n, 5, generator=generator)
        every = (noisy > 0).long()
        label = every if run.label == "all" else every[:, 0]
        return GroupedData(
            run.data, "tiny", configuration.digest(run.data, run.size, run.edition), inputs, label, every[:, 1],
            torch.arange(n) % 3, ("no", "yes"), ("a", "b"), ("training", "validation", "test"),
            feature_names=tuple("vwxyz"),
        )  # fmt: skip

    monkeypatch.setattr(work, "_data", {})
    monkeypatch.setattr(work, "_pretrained", {})
    monkeypatch.setattr(work, "_read_images", read)


def chosen(label, seed=0, **changes):
    run, _ = selected(label, "compact", lambda run: None, 1)
    return replace(run, seed=seed, order_seed=seed, **changes)


def records(*runs):
    return [line for line in zhang2024.work(list(runs)) if line["kind"] == "record"]


# ------------------------------------------------------------------------------------------------------------- labels
def test_a_label_names_data_and_backbone():
    run = chosen("OURS/celeba/r=1/mobilenetv2")
    assert (run.data, run.label, run.attribute, run.rank) == ("celeba", "Wavy_Hair", "Male", 1)
    assert (run.size, run.edition, run.backbone) == ("80x64", "resized-64-20000", "mobilenetv2_100.onnxzoo_in1k")
    run = chosen("pre-trained/lfw")
    assert (run.data, run.label, run.attribute, run.pretraining.hidden) == ("lfw", "gender", "Heavy_Makeup", ())
    assert selected("TL/celeba", "paper", lambda run: None, 1)[0].backbone == "resnet18.tv_in1k"
    assert chosen("TL").data == "adult" and not chosen("TL").backbone
    assert resolve("f+SVD/40 attributes/r=16")["rank"] == 16


@pytest.mark.parametrize(
    "label, words",
    [
        ("OURS/celeba/MLP-3", "no hidden layers"),
        ("OURS/lfw/one-hot", "encoding"),
        ("OURS/resnet50", "only images (celeba, lfw, 40 attributes) have one"),
        ("OURS/celeba/r=3", "2 outputs allows 1 to 2"),
        ("OURS/40 attributes/r=41", "40 outputs allows 1 to 40"),
        ("OURS/r=x", "unknown modifier 'r=x' in 'OURS/r=x'; allowed: sgd"),
        ("Retrain+EO 0.5/40 attributes", "no penalty"),
    ],
)
def test_what_images_do_not_have(label, words):
    with pytest.raises(FairtuningError) as error:
        resolve(label)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_profiles_offer_what_they_have():
    assert all(offered(label, "compact") for label in LABELS["figure4-celeba"] + LABELS["attributes"])
    assert offered("TL/celeba/resnet50", "paper") and not offered("TL/celeba/resnet50", "compact")
    assert not any(offered(label, "classroom") for label in IMAGES)
    with pytest.raises(FairtuningError, match="'TL/celeba' is not offered in profile classroom"):
        selected("TL/celeba", "classroom", lambda run: None, 1)


def test_images_that_are_not_here_do_not_stop_the_others(folders):
    configuration._can_be_read.cache_clear()
    runs = [run for phase in STUDY.phases("paper", ["TL", "TL/celeba"], 1, lambda _: None) for run in phase]
    assert {run.data for run in runs} == {"adult"}
    store = Store.of("zhang2024", "paper")
    with pytest.raises(DataError, match="img_align_celeba.zip"):
        ensure(zhang2024, ["TL/celeba"], profile="paper", progress=False)
    assert not store.records
    configuration._can_be_read.cache_clear()


def test_methods_that_are_compared_have_the_same_grid():
    for labels in (LABELS["figure4-lfw"][1:], LABELS["attributes"][1:]):
        grids = [
            [
                (run.learning_rate, run.epochs, run.batch_size)
                for run in selected(label, "compact", lambda run: None, 5)[1][-1]
            ]
            for label in labels
        ]
        assert len(grids[0]) == 4 and all(grid == grids[0] for grid in grids)


# --------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("label", ["OURS/celeba", "TL/celeba", "OURS/40 attributes/r=2"])
def test_runs_train_together_as_alone(features, label):
    runs = [chosen(label, seed, learning_rate=0.01, epochs=2, batch_size=32) for seed in (0, 1)]
    for together, run in zip(records(*runs), runs, strict=True):
        (alone,) = records(run)
        assert together["key"] == alone["key"] and together["predictions"] == alone["predictions"]
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-9)
        assert together["history"] == alone["history"]


def test_a_record_says_which_features(features):
    (record,) = records(chosen("pre-trained/celeba"))
    assert record["backbone"]["name"].startswith("vit_tiny") and len(record["backbone"]["weights"]) == 64
    assert record["configuration"]["pretraining"]["hidden"] == () and record["parameters"] == 6 * 2 + 2
    key = key_of(zhang2024.configuration(record), digest=record["data"]["digest"], version=record["version"])
    assert key == record["key"]


def test_with_two_outputs_the_weights_are_without_effect_under_sgd(features):
    ours, plain, adam = (
        records(chosen(label, learning_rate=0.003, epochs=5, batch_size=32))[0]
        for label in ("OURS/celeba/sgd", "f+SVD/celeba/sgd", "OURS/celeba")
    )
    assert ours["predictions"] == plain["predictions"] and ours["loss"] == pytest.approx(plain["loss"], abs=1e-9)
    assert adam["loss"] != pytest.approx(plain["loss"], abs=1e-6)


def test_with_more_outputs_than_ranks_each_weighting_is_best_in_its_own_norm(features):
    """The truncated SVD minimises the error that its rows weigh; the others cannot do better there."""
    lost = {
        name: records(chosen(f"{name}/40 attributes/r=2", learning_rate=0.001))[0]["start"]["lost"]
        for name in ("f+SVD", "OURS", "pooled")
    }
    assert min(lost, key=lambda name: lost[name]["plain"]) == "f+SVD"
    assert min(lost, key=lambda name: lost[name]["neutralised"]) == "OURS"
    assert lost["OURS"]["plain"] > lost["f+SVD"]["plain"] + 1e-4


# -------------------------------------------------------------------------------------------------------- mathematics
def test_loss_and_fisher_against_slow_twins():
    generator = torch.Generator().manual_seed(0)
    z, label = torch.randn(9, 4, generator=generator).double(), torch.randint(2, (9, 3), generator=generator)
    group = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    W = torch.randn(4, 3, generator=generator).double().requires_grad_()
    squares = torch.zeros(2, 4, 3, dtype=torch.float64)
    for i in range(9):
        p = (z[i] @ W).sigmoid()
        one = -(label[i] * p.log() + (1 - label[i]) * (1 - p).log()).sum()
        (gradient,) = torch.autograd.grad(one, W)
        squares[group[i]] += gradient**2 / (group == group[i]).sum()
    logits = (z @ W).detach()
    torch.testing.assert_close(attributes.head_fisher(z, logits, label, group=group, groups=2), squares)
    p = logits.sigmoid()
    by_hand = -(label * p.log() + (1 - label) * (1 - p).log()).mean()
    torch.testing.assert_close(attributes.loss(logits, label), by_hand)
    torch.testing.assert_close(attributes.loss(logits[None].repeat(2, 1, 1), label), by_hand.repeat(2))
    truth = attributes.head_fisher(z, logits, label, group=group, groups=2, kind="true")
    draws = (torch.rand(20_000, 9, 3, generator=generator) < p).double()
    sampled = torch.stack(
        [torch.einsum("nd,snk->dk", z[group == s] ** 2, (p - draws)[:, group == s] ** 2) for s in (0, 1)]
    )
    sizes = torch.tensor([4, 5])[:, None, None]
    torch.testing.assert_close(truth, sampled / 20_000 / sizes, rtol=0.05, atol=0.01)


def test_nothing_is_lost_at_full_rank():
    W = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fisher = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = attributes.lost({"W": W}, {"A": W, "B": torch.eye(3, dtype=torch.float64)}, fisher)
    nothing = attributes.lost({"W": W}, {"A": 0 * W, "B": torch.eye(3, dtype=torch.float64)}, fisher)
    assert set(whole.values()) == {0.0} and set(nothing.values()) == {1.0}


# ----------------------------------------------------------------------------------------------------------- analysis
@pytest.fixture
def results(features, tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "FEWEST", 3)
    monkeypatch.setattr(configuration, "SEARCH_SEEDS", 1)
    labels = ["TL/40 attributes", "OURS/40 attributes/r=2"]
    store = ensure(zhang2024, labels, profile="compact", seeds=2, folder=tmp_path, progress=False)
    assert all(not r["predictions"] for r in store.records.values() if r["configuration"]["evaluate"] != "test")
    return zhang2024.results(store, "compact", labels=labels, seeds=2, data="40 attributes")


def test_measures_against_a_slow_twin(results):
    label = "OURS/40 attributes/r=2"
    assert results.names == tuple("vwxyz") and 1 not in results.with_gaps  # "w" is the group itself
    for seed, predicted in enumerate(results.predictions(label)):
        errors, gaps = [], []
        for k in range(5):
            counts = metrics.group_counts(
                predicted[:, k], results.label[:, k], group=results.group, classes=2, groups=2
            )
            errors.append(float(metrics.error(counts)))
            if k in results.with_gaps:
                gaps.append(float(metrics.demographic_parity_difference(counts)))
        found = {name: float(results.values(label, name)[seed]) for name in attributes.MEASURES}
        assert found["mean error"] == pytest.approx(sum(errors) / 5)
        assert found["mean demographic parity difference"] == pytest.approx(sum(gaps) / len(gaps))
        assert found["worst demographic parity difference"] == pytest.approx(max(gaps))


def test_effects_are_paired_and_resampled(results):
    effect = results.effect("OURS/40 attributes/r=2", "mean error", minus="TL/40 attributes")
    assert effect.by_seed.shape == (2,) and effect.resampled.shape == (1000, 2)
    spread = effect.resampled.std(0)
    assert (effect.resampled.mean(0) - effect.by_seed).abs().max() < 2 * spread.max() and spread.min() > 0
    assert torch.equal(
        results.effect("TL/40 attributes", "mean error").by_seed, results.values("TL/40 attributes", "mean error")
    )


def test_the_head_before_fine_tuning_is_recorded(results, features):
    label = "OURS/40 attributes/r=2"
    run = configuration.configuration(results.records(label)[0])
    data = work._load(run)
    source = work._pretrain([run], data)[work._source(run)][0]
    inputs, known, group = work._part(data, "training")
    start = work.factored([run], {k: v[None] for k, v in source.items()}, inputs, known, group)
    test, truth, member = work._part(data, "test")
    predicted = (head({k: v[0] for k, v in start.items()}, test) > 0).long()
    counts = attributes.attribute_counts(predicted, truth, group=member)
    assert results.before(label, "mean error")[0] == pytest.approx(float(metrics.error(counts).mean()))
    assert (results.lost(label) < 1).all() and (results.lost(label) > 0).all()


# ------------------------------------------------------------------------------------------------------------ reports
def test_results_and_claims_of_images(features, tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "SEARCH_SEEDS", 1)
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(tmp_path))
    ensure(zhang2024, LABELS["figure4-celeba"], profile="compact", seeds=10, progress=False)
    found = report.results("zhang2024", "compact", "celeba")
    assert set(found.runs) == set(LABELS["figure4-celeba"]) and found.sizes == {
        "training": 80,
        "validation": 80,
        "test": 80,
    }
    verdicts = {(v.id, v.data): v for v in report.verdicts("zhang2024", profile="compact")}
    assert verdicts["P1-C4", "celeba"].n == 10 and verdicts["P1-C4", "celeba"].profile == "compact"
    assert {verdicts["P1-C4", data].verdict for data in ("adult", "lfw")} == {"not yet"}
    assert zhang2024.cell(found, "figure4", "TL", "Err").records == tuple(r["key"] for r in found.records("TL/celeba"))


def test_unknown_data_is_a_missing_run(tmp_path):
    with pytest.raises(FairtuningError, match="missing runs: zhang2024 has no records"):
        zhang2024.results(Store.of("zhang2024", "compact", folder=tmp_path), "compact", data="lfw")
