import json
import math
from collections import Counter

import pytest
import torch

from fairtuning import claims
from fairtuning.claims import Claim, OnData, Part
from fairtuning.metrics import METRICS
from fairtuning.papers import load_published
from fairtuning.statistics import Effect, estimate, p_below

M = 1.0
SEED_NOISE, EXAMPLE_NOISE = 0.3, 0.1


def effect(truth, generator, *, n=10, noise=1.0):
    """Seeds vary about the truth; all share one test set, whose luck the resamples show."""

    def draw(*size):
        return noise * torch.randn(*size, generator=generator, dtype=torch.float64)

    by_seed = truth + SEED_NOISE * draw(n) + EXAMPLE_NOISE * draw(1)
    return Effect(by_seed, by_seed.mean() + EXAMPLE_NOISE * draw(200))


def claim(number, *parts):
    return Claim(id=f"P0-C{number}", place="Table 1", statement="", origin="ours", data={"adult": OnData(parts=parts)})


def part(test, name="q", m=M, **more):
    return Part(quantity=name, arguments={}, test=test, m=m, says=f"{name} holds", **more)


def verdict_of(test, effect, **more):
    [verdict] = claims.evaluate([claim(1, part(test, **more))], {"q": lambda: effect}, profile="paper")
    return verdict


def papers(tests, truth, *, replicates, noise=1.0, seed=0):
    """Verdicts of many papers, each with one claim per entry of tests and independent runs."""
    generator = torch.Generator().manual_seed(seed)
    tested = [claim(i, *(part(t, f"q{i}.{j}") for j, t in enumerate(parts))) for i, parts in enumerate(tests)]
    names = [p.quantity for c in tested for p in c.data["adult"].parts]
    for _ in range(replicates):
        drawn = {name: effect(truth, generator, noise=noise) for name in names}
        quantities = {name: lambda name=name, drawn=drawn: drawn[name] for name in names}
        yield [v.verdict for v in claims.evaluate(tested, quantities, profile="paper")]


def family_wise(verdicts, wrong):
    papers = list(verdicts)
    return sum(wrong in verdicts for verdicts in papers) / len(papers)


# The rate that is promised, and three standard errors of a rate over 500 papers.
PROMISED = claims.LEVEL + 3 * math.sqrt(claims.LEVEL / 500)


@pytest.mark.parametrize(
    "test, truth, wrong",
    [
        ("greater", 0.0, "supported"),  # null data
        ("greater", M, "contradicted"),
        ("not_worse", M, "supported"),
        ("not_worse", M, "contradicted"),
        ("equivalent", M, "supported"),
        ("equivalent", -M, "supported"),
        ("equivalent", M, "contradicted"),
    ],
)
def test_wrong_verdicts_come_at_most_at_the_promised_rate(test, truth, wrong):
    # Wide noise: with narrow noise a null effect would be told from m so surely that nothing is tested.
    assert family_wise(papers([[test]] * 4, truth, replicates=500, noise=2.0), wrong) <= PROMISED


def test_the_rate_is_used_and_not_merely_kept():
    # One claim, so nothing to adjust: a test that never rejects would pass the test above.
    rate = family_wise(papers([["greater"]], 0.0, replicates=500, noise=6.0), "supported")
    assert 0.005 < rate <= PROMISED


@pytest.mark.parametrize(
    "test, truth, right",
    [
        ("greater", 2 * M, "supported"),
        ("greater", 0.2 * M, "contradicted"),  # a real effect, too small to count
        ("greater", -M, "contradicted"),
        ("not_worse", 0.0, "supported"),
        ("not_worse", -2 * M, "supported"),
        ("not_worse", 2 * M, "contradicted"),
        ("equivalent", 0.0, "supported"),
        ("equivalent", 2 * M, "contradicted"),
        ("equivalent", -2 * M, "contradicted"),
    ],
)
def test_planted_effects_are_found(test, truth, right):
    found = Counter(v for verdicts in papers([[test]] * 4, truth, replicates=40) for v in verdicts)
    assert found[right] >= 0.95 * found.total()


def test_planted_compound_claims():
    two = [["greater", "not_worse"]]
    # truth 2 M: the first part holds, the second is broken; one broken part breaks the claim
    assert Counter(v for [v] in papers(two, 2 * M, replicates=40))["contradicted"] >= 38
    assert Counter(v for [v] in papers([["greater"] * 3], 2 * M, replicates=40))["supported"] >= 38
    assert family_wise(papers([["greater"] * 3], 0.0, replicates=300, noise=2.0), "supported") == 0


def test_a_claim_with_many_parts_is_not_contradicted_more_often():
    assert family_wise(papers([["greater"] * 4], M, replicates=500, noise=2.0), "contradicted") <= PROMISED


def test_contradiction_of_equivalence_counts_both_sides():
    effect = Effect(torch.tensor([-1.0, 1.0] * 5, dtype=torch.float64) - 1)
    [shown] = verdict_of("equivalent", effect, m=0.5).parts
    assert shown["p_contradiction"] == pytest.approx(2 * p_below(estimate(effect), -0.5))


def test_noise_leaves_it_unresolved():
    generator = torch.Generator().manual_seed(1)
    verdict = verdict_of("greater", effect(0.5 * M, generator, noise=10))
    assert verdict.verdict == "unresolved"
    assert "could have shown an effect of" in verdict.reason and "m = 1" in verdict.reason


def test_a_sure_effect_whose_interval_stays_below_m_is_no_support():
    # By hand: mean 0.5, spread 0.1, so 0.5 +- 0.07: above 0 and below m.
    by_seed = 0.5 + 0.1 * torch.tensor([-1.0, 1.0] * 5, dtype=torch.float64)
    verdict = verdict_of("greater", Effect(by_seed, None))
    assert verdict.verdict == "contradicted"
    assert verdict.interval == pytest.approx((0.4246, 0.5754), abs=1e-4)
    assert verdict_of("greater", Effect(by_seed, None), m=0.55).verdict == "supported"


def test_the_reported_part_is_the_weakest():
    wiggle = 0.1 * torch.tensor([-1.0, 1.0] * 5, dtype=torch.float64)
    values = {"strong": Effect(3 + wiggle), "weak": Effect(1 + 10 * wiggle)}
    quantities = {name: lambda name=name: values[name] for name in values}
    [verdict] = claims.evaluate(
        [claim(1, part("greater", "strong"), part("greater", "weak"))], quantities, profile="paper"
    )
    assert verdict.verdict == "supported" and verdict.effect == pytest.approx(1)
    assert [p["effect"] for p in verdict.parts] == pytest.approx([3, 1])
    assert verdict.parts[1]["p_support"] > verdict.parts[0]["p_support"]

    values["weak"] = Effect(0.2 + wiggle)
    [verdict] = claims.evaluate(
        [claim(1, part("greater", "strong"), part("greater", "weak"))], quantities, profile="paper"
    )
    assert verdict.verdict == "contradicted" and "does not hold that weak holds" in verdict.reason


def test_sign():
    verdict = verdict_of("greater", Effect(torch.full((10,), -2.0), torch.full((5,), -2.0)), sign=-1)
    assert verdict.verdict == "supported" and verdict.effect == 2


def test_no_spread_at_all():
    assert verdict_of("equivalent", Effect(torch.zeros(10), torch.zeros(5)), m=0.001).verdict == "supported"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_than_five_seeds_give_no_verdict(n):
    verdict = verdict_of("greater", Effect(torch.full((n,), 5.0) + torch.arange(n) / 100))
    assert verdict.verdict == "unresolved" and verdict.n == n
    assert verdict.reason == f"fewer than 5 seeds ({n})"
    assert json.loads(json.dumps(verdict.as_json(), allow_nan=False))["effect"] == pytest.approx(5, abs=0.1)


def test_exact():
    scalar = torch.tensor([696.0])
    verdict = verdict_of("exact", Effect(scalar), m=668)
    assert (verdict.verdict, verdict.effect, verdict.interval, verdict.n) == ("supported", 696, (696, 696), 0)
    assert verdict_of("exact", Effect(scalar), m=696).verdict == "supported"
    assert verdict_of("exact", Effect(scalar), m=697).verdict == "contradicted"


def test_exact_claims_take_no_part_in_the_adjustment():
    generator = torch.Generator().manual_seed(0)
    values = {"q": effect(0.3, generator, noise=2), "e": Effect(torch.ones(1))}
    quantities = {name: lambda name=name: values[name] for name in values}
    alone = claims.evaluate([claim(1, part("greater"))], quantities, profile="paper")
    beside = claims.evaluate([claim(1, part("greater")), claim(2, part("exact", "e"))], quantities, profile="paper")
    assert alone[0] == beside[0] and alone[0].reason != beside[1].reason


def test_holm_is_over_all_claims_of_the_paper():
    # mean 1, spread 1.05, n 10: t = 3.0, one-sided p = 0.0075: enough for one claim or three, not for four
    by_seed = 1 + torch.tensor([-1.0, 1.0] * 5, dtype=torch.float64)
    for count, expected in ((1, "supported"), (3, "supported"), (4, "unresolved")):
        tested = [claim(i, part("greater")) for i in range(count)]
        verdicts = claims.evaluate(tested, {"q": lambda: Effect(by_seed)}, profile="paper")
        assert {v.verdict for v in verdicts} == {expected}


def test_missing_runs_are_not_yet():
    def q():
        raise KeyError("missing runs: 3 of OURS/r=1")

    [verdict] = claims.evaluate([claim(1, part("greater"))], {"q": q}, profile="compact")
    assert verdict.as_json() == {
        "id": "P0-C1", "data": "adult", "profile": "compact", "verdict": "not yet",
        "reason": "missing runs: 3 of OURS/r=1", "effect": None, "interval": [None, None], "n": 0,
        "parts": [], "beside": [],
    }  # fmt: skip
    for quantities, reason in (({"p": q}, "no quantity 'q'"), ({}, "no runs in profile paper")):
        [verdict] = claims.evaluate([claim(1, part("greater"))], quantities, profile="paper")
        assert verdict.verdict == "not yet" and verdict.reason == reason


def test_missing_runs_beside_do_no_harm():
    shown = OnData(
        parts=(part("greater"),),
        beside=(Part(quantity="q", arguments={}, says="x"), Part(quantity="z", arguments={}, says="y")),
    )
    tested = Claim(id="P0-C1", place="Table 1", statement="", origin="ours", data={"adult": shown})
    [verdict] = claims.evaluate([tested], {"q": lambda: Effect(torch.full((10,), 2.0))}, profile="paper")
    assert verdict.verdict == "supported" and [entry["says"] for entry in verdict.beside] == ["x"]


def test_an_empty_group_is_unresolved():
    verdict = verdict_of("greater", Effect(torch.full((10,), math.nan)))
    assert verdict.verdict == "unresolved" and verdict.reason.startswith("not defined in some run")
    json.dumps(verdict.as_json(), allow_nan=False)


def test_several_data_sets():
    both = OnData(parts=(part("greater"),))
    tested = Claim(
        id="P0-C1", place="Table 1", statement="", origin="ours",
        data={"adult": both, "celeba": both, "lfw": OnData(state="not yet", reason="later")},
    )  # fmt: skip
    values = {
        "adult": {"q": lambda: Effect(torch.full((10,), 2.0))},
        "celeba": {"q": lambda: Effect(torch.zeros(10))},
    }
    verdicts = claims.evaluate([tested], values, profile="paper")
    assert [(v.data, v.verdict) for v in verdicts] == [
        ("adult", "supported"), ("celeba", "contradicted"), ("lfw", "not yet"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="quantities of one data set, claims on 2: adult, celeba"):
        claims.evaluate([tested], values["adult"], profile="paper")


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            {"parts": [{"test": "less", "m": 1}]},
            "test is 'less'; permitted: greater, not_worse, equivalent, exact",
        ),
        ({"parts": [{"test": "greater", "m": "1"}]}, "m is '1'; permitted"),
        ({"parts": [{"test": "equivalent", "m": 0}]}, "m is 0; permitted"),
        ({"parts": [{"test": "greater", "m": 1, "sign": 2}]}, "sign is 2; permitted: 1, -1"),
        ({"state": "later"}, "state 'later'; permitted states: not yet, not testable here"),
    ],
)
def test_an_ill_formed_claim_is_refused(entry, message):
    for p in entry.get("parts", []):
        p |= {"quantity": "q", "arguments": {}, "says": ""}
    with pytest.raises(ValueError, match=message):
        claims._on_data("P0-C1", entry)


# ---- the claims of the first paper

ARGUMENTS = {
    "difference": {"metric", "of", "minus"},
    "alpha_slope": {"metric", "orientation"},
    "fisher_profile_distance": set(),
    "below_base_rate_gap": {"of"},
    "parameter_saving": {"of", "against"},
    "disagreement": {"of", "and_"},
}


def test_zhang2024_is_well_formed():
    loaded = claims.load("zhang2024")
    assert [c.id for c in loaded] == [f"P1-C{i}" for i in range(1, 16)]
    places = {item["item"] for item in load_published("zhang2024")["items"]}
    for c in loaded:
        assert c.place in places and c.origin in ("paper", "ours") and c.statement.endswith(".")
        assert "adult" in c.data and set(c.data) <= {"adult", "celeba", "lfw"}
        for entry in c.data.values():
            assert bool(entry.parts) != bool(entry.state) and (entry.parts or entry.reason)
            for p in (*entry.parts, *entry.beside):
                assert set(p.arguments) == ARGUMENTS[p.quantity], c.id
                assert p.arguments.get("metric", "error") in METRICS
                assert p.arguments.get("orientation", "female") in ("female", "male")


def test_zhang2024_with_planted_results():
    """A study in which each method has a known level gives each claim the verdict that follows."""
    generator = torch.Generator().manual_seed(0)
    level = {"OURS": (16.0, 0.17, 0.20), "TL": (16.5, 0.20, 0.24), "f+SVD": (16.6, 0.19, 0.23)}
    level |= {"pre-trained": (16.3, 0.19, 0.22), "random": level["OURS"], "pooled": (16.0, 0.19, 0.20)}
    names = ("error", "demographic_parity_difference", "equalized_odds_difference_sum")
    scale = torch.tensor([[0.05], [0.001], [0.001]])
    runs = {
        name: torch.tensor(values)[:, None] + scale * torch.randn(3, 10, generator=generator)
        for name, values in level.items()
    }

    def difference(metric, of, minus):
        missing = [name for name in (of, minus) if name not in runs]
        if missing:
            raise KeyError(f"missing runs: {missing[0]}")
        index = names.index(metric)
        return Effect(runs[of][index] - runs[minus][index])

    quantities = {
        "difference": difference,
        "parameter_saving": lambda of, against: Effect(torch.tensor([{"network": 696.0, "head": -4.0}[against]])),
        "below_base_rate_gap": lambda of: Effect(0.197 - runs[of][1]),
        "fisher_profile_distance": lambda: Effect(0.1 + 0.01 * torch.randn(10, generator=generator)),
    }
    verdicts = claims.evaluate(claims.load("zhang2024"), {"adult": quantities}, profile="classroom")
    found = {v.id: v for v in verdicts if v.data == "adult"}
    expected = {
        "C1": "supported", "C4": "supported", "C5": "supported", "C6": "supported", "C7": "supported",
        "C12": "supported", "C14": "contradicted", "C15": "supported",
    }  # fmt: skip
    assert {key: found[f"P1-{key}"].verdict for key in expected} == expected
    assert found["P1-C14"].reason.endswith("demographic parity difference of pooled and of OURS agree")
    assert found["P1-C12"].beside[0]["effect"] == -4
    assert found["P1-C2"].verdict == "not yet" and found["P1-C2"].reason == "missing runs: TL after EO 0.1"
    assert {v.verdict for v in verdicts if v.data != "adult"} == {"not yet"}
    json.dumps([v.as_json() for v in verdicts], allow_nan=False)


def test_unknown_study():
    with pytest.raises(ValueError, match="no claims of study 'zhang'; permitted: zhang2024"):
        claims.load("zhang")
