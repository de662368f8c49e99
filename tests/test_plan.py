"""The plan that all studies share: labels, rules of selection, phases, and what a study's package must have."""

import inspect

import pytest

from fairtuning import FairtuningError, plan, studies
from fairtuning.plan import pick
from fairtuning.studies import OWN, STUDIES, Module


def measured(*rows):
    return [dict(zip(("accuracy", "worst", "gap"), row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    "rule, rows, expected",
    [
        ("R1", [(0.90, 0.1, 0), (0.91, 0.2, 0), (0.91, 0.9, 0)], 1),  # the first of equals
        ("R2", [(0.90, 0.5, 0), (0.905, 0.6, 0), (0.91, 0.2, 0), (0.899, 0.9, 0)], 1),  # within a point
        ("R2", [(0.90, 0.5, 0), (0.90, 0.5, 0)], 0),
        ("D", [(0.90, 0, 9), (0.91, 0, 9), (0.89, 0, 9), (0.88, 0, 0)], 2),  # the strongest within a point of the first
        ("D", [(0.90, 0, 9), (0.80, 0, 9), (0.81, 0, 9)], 1),  # none: the weakest
        ("O", [(0.90, 0, 9), (0.91, 0, 2), (0.89, 0, 1), (0.88, 0, 0)], 2),
        ("F", [(0.85, 0, 9), (0.84, 0, 0.02), (0.82, 0, 0.0), (0.80, 0, 0.0)], 1),  # fair, and the most accurate
        ("F", [(0.85, 0, 9), (0.84, 0, 0.3), (0.82, 0, 0.1), (0.80, 0, 0.0)], 2),  # none is fair: the fairest
    ],
)
def test_rules(rule, rows, expected):
    assert pick(rule, measured(*rows)) == expected


@pytest.mark.parametrize("name", [*STUDIES, *OWN])
def test_every_study_has_what_is_asked_of_one_and_its_labels_are_offered_somewhere(name):
    module = studies.study(name)
    asked = [one for one, _ in inspect.getmembers(Module, inspect.isfunction) if not one.startswith("_")]
    asked += [*Module.__annotations__, *studies.Runnable.__annotations__]
    if name in OWN:  # has no published numbers
        asked = [one for one in asked if one not in ("cell", "left_out", "COUNTED", "METRIC", "BACKBONES")]
    assert {"units", "work", "results", "quantities", "STUDY", "LABELS"} <= set(asked)
    assert all(hasattr(module, one) for one in asked), [one for one in asked if not hasattr(module, one)]
    labels = [label for found in module.LABELS.values() for label in found]
    assert all(any(module.STUDY.offered(label, profile) for profile in module.PROFILES) for label in labels)
    assert module.STUDY.profiles is module.PROFILES and module.STUDY.labels is module.LABELS


def test_an_unfinished_search_has_a_stand_in_and_a_finished_one_a_choice():
    made = []

    def select(run, asked, profile, choose):
        return choose([plan.replace(run, learning_rate=rate) for rate in (0.1, 0.2, 0.3)])

    study = plan.Study(
        name="toy", run=plan.Run, methods={"A": {"method": "a"}, "B": {"method": "b"}}, labels={}, select=select,
        profiles={"small": {"seeds": 2, "data": {"here": {}, "there": {"size": 8}}}},
    )  # fmt: skip

    def lookup(run):
        return {"accuracy": {"validation": run.learning_rate}} if made else None

    assert study.selected("A", "small", lookup)[0].learning_rate == 0.1
    made.append(True)
    run, (search,) = study.selected("A/there", "small", lookup)
    assert (run.learning_rate, run.data, run.size, len(search)) == (0.3, "there", 8, 3)
    search, final = study.phases("small", ["A", "B", "A"], None, lookup)
    assert len(search) == 2 * 3 and len(final) == 2 * 2 and {run.seed for run in search} == {0}
    for label, words in (("C", "unknown run label 'C'; allowed: A, B"), ("A/x", "unknown modifier 'x' in 'A/x'")):
        with pytest.raises(FairtuningError, match=words):
            study.resolve(label)
    with pytest.raises(FairtuningError, match="seeds is 0; allowed: 1 or more"):
        next(study.phases("small", ["A"], 0, lookup))
