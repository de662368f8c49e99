"""The second edition of the claims: it says what it changes, and its margins follow their rule."""

import math
from importlib import import_module

import pytest

from fairtuning import claims

EDITIONS = {name: (claims.load(name), claims.load(name, edition=2)) for name in ("zhang2024", "sukumaran2024")}
EDITIONS |= {name: (claims.load(name), claims.load(name, edition=2)) for name in ("kamalaruban2025", "bench")}
#: Asked for by the second edition, not built yet: runs and quantities of the bench and of arXiv 2410.17358.
TO_COME = {"rank_dependence", "step_cost", "weighted_noise_above_half", "ERM/long/R1", "DP/strongest", "EO/strongest"}
#: The tests are as before, what is shown beside (C7) or how strengths are selected (C6) is not.
SELECTED_ANEW = {"P2-C7", "P3-C6"}
ROWS = [
    pytest.param(name, claim, part, id=f"{claim.id}-{data}-{index}")
    for name in ("zhang2024", "sukumaran2024")
    for claim in EDITIONS[name][1]
    for data, entry in claim.data.items()
    for index, part in enumerate(entry.parts)
]


def what_decides(claim):
    """All that decides a verdict."""
    return [
        (data, entry.over, entry.at_least, entry.at_most, part.quantity, dict(part.arguments), part.test, part.m,
         part.sign, part.relative)
        for data, entry in claim.data.items()
        for part in entry.parts
    ]  # fmt: skip


def as_a_set(claim):
    return {str(one) for one in what_decides(claim)}


@pytest.mark.parametrize("name", EDITIONS)
def test_every_change_is_said(name):
    first = {claim.id: claim for claim in EDITIONS[name][0]}
    for claim in EDITIONS[name][1]:
        old = first.pop(claim.id, None)
        same = old is not None and as_a_set(old) == as_a_set(claim)
        assert claim.change or same, claim.id
        assert not (claim.change and same and old.statement == claim.statement) or claim.id in SELECTED_ANEW
        for part in (part for entry in claim.data.values() for part in entry.parts):
            assert part.was is None or (claim.change and part.was != part.m)
    assert not first  # no claim went


@pytest.mark.parametrize("name", EDITIONS)
def test_labels_and_quantities_are_those_of_the_study(name):
    known = {"difference", "alpha_slope", "fisher_profile_distance", "below_base_rate_gap", "parameter_saving"}
    known |= {"disagreement", "log_loss_variance_ratio", "rank_range", "noise_above_half", "gain_beyond", "leak"}
    known |= {"leak_difference", "membership", "rank_agreement"} | TO_COME
    resolve = import_module(f"fairtuning.studies.{name}.configuration").resolve
    for claim in EDITIONS[name][1]:
        for entry in claim.data.values():
            for part in (*entry.parts, *entry.beside):
                assert part.quantity in known
                if part.quantity == "parameter_saving":
                    continue
                for label in (part.arguments[key] for key in claims.LABELLED if key in part.arguments):
                    if label not in TO_COME | {"frozen"}:
                        resolve(f"adult/{label}" if name == "bench" else label)


def printed(name, claim, part):
    """The paper's own effect of a part, by its printed means; None where it prints none."""
    tables = import_module(f"fairtuning.studies.{name}.tables")
    place = {"place": claim.place} if name == "zhang2024" else {}
    arguments = part.arguments
    if part.quantity == "log_loss_variance_ratio":
        one, other = (tables.printed("loss variance", arguments[key]) for key in ("of", "over"))
        return math.log(one / other)
    if part.quantity != "difference":
        return None
    pair = [tables.printed(arguments["metric"], arguments[key], **place) for key in ("of", "minus")]
    return None if None in pair else round(part.sign * (pair[0] - pair[1]), 9)


def passes(part, effect, m):
    if part.test == "greater":
        return effect >= m
    return effect < m if part.test == "not_worse" else abs(effect) < m


@pytest.mark.parametrize("name, claim, part", ROWS)
def test_a_margin_changes_where_the_printed_means_fail_it_and_only_there(name, claim, part):
    """Half the printed difference for greater, twice it for the others; never where the sign disagrees. What the paper
    calls comparable or close has no sign."""
    effect = printed(name, claim, part)
    if effect is None or claim.origin != "paper":
        assert part.was is None
        return
    close = claim.id == "P2-C2"  # new in this edition, with margins of "comparable" (twice those of a gain)
    before = part.m if part.was is None else part.was
    agrees = effect > 0 if part.test == "greater" else part.test == "equivalent" or effect <= 0 or close
    if part.was is not None and not close:
        assert agrees and not passes(part, effect, before)
        assert part.m == pytest.approx(effect / 2 if part.test == "greater" else 2 * abs(effect), rel=0.02)
    assert passes(part, effect, part.m) == agrees, (effect, part.m)


def test_the_printed_numbers_are_found():
    tables = {name: import_module(f"fairtuning.studies.{name}.tables") for name in ("zhang2024", "sukumaran2024")}
    ours = tables["zhang2024"].printed
    assert ours("error", "OURS") == 16.066 and ours("error", "OURS", place="Table 3") == 15.829
    assert ours("equalized_odds_difference_sum", "TL after EO 0.9/additive") == 0.186
    assert ours("demographic_parity_difference", "TL after EO 0.9") is None  # Table 2 has the penalised gap alone
    assert ours("error", "TL/celeba") == 19.323 and ours("error", "OURS/MLP-4") == 16.237
    assert ours("error", "OURS/sgd") is None and ours("error", "pre-trained EO fair") is None
    theirs = tables["sukumaran2024"].printed
    assert theirs("accuracy", "LoRA") == pytest.approx(0.9183) and theirs("accuracy", "LoRA/r=8") == 0.919
    assert theirs("demographic_parity_difference", "FFT") == pytest.approx(0.1916)
    assert theirs("worst_cell_accuracy", "LoRA") is None and theirs("accuracy", "FairLoRA/R1") is None


def test_sentences_with_a_quantifier_say_how_many():
    found = {c.id: c.data["tasks"] for c in EDITIONS["kamalaruban2025"][1] if "tasks" in c.data}
    assert {name: (len(one.over), one.at_least, one.at_most) for name, one in found.items()} == {
        "P3-C2": (4, 2, None),
        "P3-C3": (4, 1, 3),
        "P3-C9": (4, 1, None),
    }
    with pytest.raises(ValueError, match="at_least 0, at_most None of 2; permitted: 1 to 2"):
        claims._on_data("X", {"over": ["a", "b"], "state": "not yet"})


def test_the_short_form():
    beside = {"adult": {"parts": [{"greater": "error", "of": "A {}", "minus": "B", "m": 1, "each": [0.1, 0.5]}]}}
    entry = claims._written_out({"same": "adult", "suffix": "/lfw"}, beside)
    assert [part["arguments"] for part in entry["parts"]] == [
        {"metric": "error", "of": f"A {strength}/lfw", "minus": "B/lfw"} for strength in (0.1, 0.5)
    ]
    assert entry["parts"][0]["says"] == "error (100 - weighted F1) of A 0.1 is higher than that of B"
    assert "each" in beside["adult"]["parts"][0]  # what is written out leaves the source as it is
    one, other = {"of": "A", "minus": "B"}, claims._says
    assert other("not_worse", "accuracy", **one) == "accuracy of B is no worse than that of A"
    assert other("not_worse", "error", **one) == "error (100 - weighted F1) of A is no worse than that of B"
