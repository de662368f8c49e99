"""Claims of the papers as data (``claims/<study>.yaml``) and the tests that give each a verdict.

A claim holds on a data set when all its parts hold. Each part is an effect, one of four tests and a margin
``m`` that was fixed before the runs. A verdict is *supported*, *contradicted* or *unresolved*; a claim
without runs is *not yet*, and one that this study cannot test is *not testable here*.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fairtuning import statistics
from fairtuning.papers import read_yaml
from fairtuning.statistics import Effect, Estimate

TESTS = ("greater", "not_worse", "equivalent", "exact")
STATES = ("not yet", "not testable here")
LEVEL = 0.025  # one-sided, for support and for contradiction apart
CONFIDENCE = 1 - 2 * LEVEL  # of the intervals shown, not adjusted for the number of claims
FEWEST_SEEDS = 5

Quantities = Mapping[str, Callable[..., Effect]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One effect and its test; ``test`` None marks a quantity that is only shown beside the claim."""

    quantity: str
    arguments: Mapping[str, Any]
    says: str
    test: str | None = None
    m: float | None = None
    sign: int = 1
    was: float | None = None  # m in the first edition, where the second has another
    relative: str = ""  # "half": m, or half of what the metric is without any method (Erm), where that is smaller


@dataclass(frozen=True, kw_only=True)
class OnData:
    """A claim on one data set: its parts, or the state (and reason) that stands in for them."""

    parts: tuple[Part, ...] = ()
    beside: tuple[Part, ...] = ()
    state: str | None = None
    reason: str = ""
    over: tuple[str, ...] = ()  # a sentence with a quantifier: its parts hold on at_least, at_most so many of these
    at_least: int = 0
    at_most: int | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One testable sentence of a paper, or one of ours about it."""

    id: str
    place: str
    statement: str
    origin: str
    data: Mapping[str, OnData]
    note: str = ""
    change: str = ""  # what differs from the first edition, and why


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the runs of one profile say about one claim on one data set.

    effect and interval (95 %, not adjusted for the number of claims) are those of the weakest part, in the
    claimed direction; parts holds one object per part, beside one per quantity that is shown but not tested.
    n is the number of seeds, 0 for an exact number.
    """

    id: str
    data: str
    profile: str
    verdict: str
    reason: str
    effect: float | None = None
    interval: tuple[float | None, float | None] = (None, None)
    n: int = 0
    parts: list[dict] = field(default_factory=list)
    beside: list[dict] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain types only: id, data, profile, verdict, effect, interval, n, reason, parts, beside."""
        return asdict(self) | {"interval": list(self.interval)}


def load(study: str, *, edition: int = 1) -> list[Claim]:
    """The claims of one paper, in its order. ValueError on an unknown study or an ill-formed claim.

    ``edition`` 2: the claims and margins of ``claims/second``, which came before the runs that they judge.

    >>> load("zhang2024")[3].id
    'P1-C4'
    """
    entries = read_yaml("claims" if edition == 1 else "claims/second", study)
    for entry in entries if edition == 2 else ():
        entry["data"] = {data: _written_out(on, entry["data"]) for data, on in entry["data"].items()}
    return [Claim(**e | {"data": {d: _on_data(e["id"], v) for d, v in e["data"].items()}}) for e in entries]


def _written_out(entry: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    """The short form of ``claims/second`` in the long one: one-line parts, ``same``, ``suffix``, ``each``."""
    entry = dict(entry)
    suffix = entry.pop("suffix", "")
    if "same" in entry:
        entry = dict(beside[entry.pop("same")])
    for key in {"parts", "beside"} & set(entry):
        entry[key] = [part for line in entry[key] for part in _parts(line, suffix)]
    return entry


def _parts(line: dict[str, Any], suffix: str) -> list[dict[str, Any]]:
    line = dict(line)
    test = next(name for name in (*TESTS, "show") if name in line)
    what, each = line.pop(test), line.pop("each", [""])
    named = {name: str(line.pop(name)) for name in ("of", "minus") if name in line}
    quantity, arguments = ("difference", {"metric": what}) if isinstance(what, str) else next(iter(what.items()))
    parts = []
    for filled in each:
        labels = {key: value.replace("{}", str(filled)) for key, value in named.items()}
        full = {key: f"{value}{suffix}" if key in LABELLED else value for key, value in (arguments | labels).items()}
        says = line["says"].replace("{}", str(filled)) if "says" in line else _says(test, what, **labels)
        parts.append(line | {"quantity": quantity, "arguments": full, "says": says})
        if test != "show":
            parts[-1]["test"] = test
    return parts


LABELLED = ("of", "minus", "and_", "over")  # arguments that name runs
#: Metrics that are not of counts (``metrics.METRICS``).
TITLES = {"auroc": "area under the ROC curve", "probe_accuracy": "accuracy of a probe for the attribute"}


def _says(test: str, metric: str, *, of: str, minus: str) -> str:
    """A part in words: that metric(of) - metric(minus) is as its test wants it."""
    from fairtuning.metrics import METRICS

    title = TITLES[metric] if metric in TITLES else METRICS[metric].title
    title = title if title.startswith("F1") else title[0].lower() + title[1:]
    if test == "equivalent":
        return f"{title} of {of} and of {minus} agree"
    if test == "not_worse":  # the difference is a harm: of a metric that should be high, that of the second
        first, second = (of, minus) if metric in METRICS and METRICS[metric].better == "lower" else (minus, of)
        return f"{title} of {first} is no worse than that of {second}"
    return f"{title} of {of} is higher than that of {minus}"


def _on_data(claim: str, entry: dict[str, Any]) -> OnData:
    parts, beside = (tuple(Part(**part) for part in entry.get(key, [])) for key in ("parts", "beside"))
    for part in parts:
        if part.test not in TESTS:
            raise ValueError(f"claim {claim}: test is {part.test!r}; permitted: {', '.join(TESTS)}")
        if not isinstance(part.m, int | float) or part.m < 0 or (part.m == 0 and part.test == "equivalent"):
            raise ValueError(f"claim {claim}: m is {part.m!r}; permitted: above 0, or 0 where not equivalent")
    for part in (*parts, *beside):
        if part.sign not in (1, -1):
            raise ValueError(f"claim {claim}: sign is {part.sign!r}; permitted: 1, -1")
    state, over = entry.get("state"), tuple(entry.get("over", ()))
    if not parts and state not in STATES:
        raise ValueError(f"claim {claim}: no parts and state {state!r}; permitted states: {', '.join(STATES)}")
    least, most = entry.get("at_least", 0), entry.get("at_most")
    if over and not 0 < least <= (len(over) if most is None else most) <= len(over):
        raise ValueError(f"claim {claim}: at_least {least}, at_most {most} of {len(over)}; permitted: 1 to {len(over)}")
    return OnData(
        parts=parts, beside=beside, state=state, reason=entry.get("reason", ""), over=over, at_least=least, at_most=most
    )


def evaluate(
    claims: Iterable[Claim], quantities: Quantities | Mapping[str, Quantities], *, profile: str
) -> list[Verdict]:
    """One verdict per claim and data set, in the order of the claims.

    quantities: name -> function(**arguments) -> Effect; where claims are tested on more than one data set,
    data set -> name -> function. A quantity that raises KeyError has missing runs: the claim is *not yet*.

    One-sided tests at level 0.025, support and contradiction apart, each adjusted by Holm's method over all
    claims tested here, so pass all claims of a paper at once. For the effect in the claimed direction:

    - greater: support shows effect > 0 while the interval's upper end reaches m; contradiction: effect < m;
    - not_worse (the effect is a harm): support shows effect < m; contradiction shows effect > m;
    - equivalent: support shows -m < effect < m by two one-sided tests; contradiction shows effect < -m or
      effect > m (Bonferroni);
    - exact (no sampling error): supported where effect >= m, else contradicted.

    Several parts: support takes the largest p of the parts, contradiction the smallest times their number.
    Fewer than 5 seeds, or a part that is not defined in some run (an empty group): *unresolved*.
    """
    claims = list(claims)
    entries = [(claim, data, entry) for claim in claims for data, entry in claim.data.items()]
    nested = any(isinstance(value, Mapping) for value in quantities.values())
    tested = {data for _, data, entry in entries if not entry.state}
    if len(tested) > 1 and not nested:
        raise ValueError(f"quantities of one data set, claims on {len(tested)}: {', '.join(sorted(tested))}")
    drafts = []
    for claim, data, entry in entries:
        functions = quantities.get(data, {}) if nested else quantities
        drafts.append(_draft(claim.id, data, entry, functions, profile))

    family = [index for index, draft in enumerate(drafts) if draft["verdict"] is None]
    support = statistics.holm([drafts[index]["support"] for index in family]) if family else []
    contradiction = statistics.holm([drafts[index]["contradiction"] for index in family]) if family else []
    for index, p, q in zip(family, support, contradiction, strict=True):
        _judge(drafts[index], float(p), float(q))
    names = Verdict.__dataclass_fields__
    return [Verdict(**{key: value for key, value in draft.items() if key in names}) for draft in drafts]


def _draft(claim: str, data: str, entry: OnData, functions: Quantities, profile: str) -> dict[str, Any]:
    """All of a verdict but Holm's adjustment; verdict None where the claim takes part in that."""
    draft: dict[str, Any] = {"id": claim, "data": data, "profile": profile, "verdict": None, "reason": ""}
    if entry.state:
        return draft | {"verdict": entry.state, "reason": entry.reason}
    if not functions:
        return draft | {"verdict": "not yet", "reason": f"no runs in profile {profile}"}
    try:
        results = [_measure(part, functions) for part in entry.parts]
    except KeyError as error:
        return draft | {"verdict": "not yet", "reason": str(error.args[0] if error.args else error)}
    draft |= {"parts": [result for result, _ in results], "beside": _beside(entry.beside, functions)}
    draft["estimates"] = [estimate for _, estimate in results]
    parts = draft["parts"]
    draft["support"] = max(part["p_support"] for part in parts)
    draft["contradiction"] = min(1.0, len(parts) * min(part["p_contradiction"] for part in parts))
    _show(draft, max(range(len(parts)), key=lambda index: parts[index]["p_support"]))

    sampled = [part for part in parts if part["test"] != "exact"]
    if not sampled:  # nothing to adjust: an exact number takes no part in Holm's family
        holds = draft["support"] == 0
        relation = "reaches" if holds else "is below"
        draft |= {"verdict": "supported" if holds else "contradicted"}
        draft["reason"] = f"an exact number; it {relation} m = {draft['weakest']['m']:g}"
    elif (fewest := min(part["n"] for part in sampled)) < FEWEST_SEEDS:
        draft |= {"verdict": "unresolved", "reason": f"fewer than {FEWEST_SEEDS} seeds ({fewest})"}
    elif undefined := [part["says"] for part in sampled if part["interval"][0] is None]:
        draft |= {"verdict": "unresolved", "reason": f"not defined in some run: {undefined[0]}"}
    return draft


def _measure(part: Part, functions: Quantities) -> tuple[dict[str, Any], Estimate]:
    if part.quantity not in functions:
        raise KeyError(f"no quantity {part.quantity!r}")
    effect = functions[part.quantity](**part.arguments)
    if part.sign < 0:
        effect = effect.times(-1)
    result = {"says": part.says, "quantity": part.quantity, "arguments": dict(part.arguments)}
    result |= {"sign": part.sign}
    if part.test == "exact":
        value = float(effect.by_seed.double().mean())
        estimate = Estimate(value, value, value, 0.0, math.inf, 0)
    else:
        estimate = statistics.estimate(effect, confidence=CONFIDENCE)
    numbers = [float(value) for value in (estimate.effect, estimate.low, estimate.high)]
    value, low, high = (number if math.isfinite(number) else None for number in numbers)
    result |= {"effect": value, "interval": [low, high], "n": int(estimate.n)}
    if part.test:
        # NaN (an empty group) is no evidence either way.
        pair = [1.0 if math.isnan(p) else float(p) for p in _p_values(part, estimate)]
        result |= {"test": part.test, "m": part.m, "p_support": pair[0], "p_contradiction": pair[1]}
    return result, estimate


def _p_values(part: Part, estimate: Estimate) -> tuple[float, float]:
    """(p of support, p of contradiction) of one part, before any adjustment."""
    above, below, m = statistics.p_above, statistics.p_below, part.m
    if part.test == "exact":
        holds = estimate.effect >= m
        return float(not holds), float(holds)
    if part.test == "greater":
        # An interval that stays under m is no support, however surely the effect lies above 0.
        return above(estimate, 0) if estimate.high >= m else 1.0, below(estimate, m)
    if part.test == "not_worse":
        return below(estimate, m), above(estimate, m)
    return statistics.p_equivalent(estimate, m), min(1.0, 2 * min(above(estimate, m), below(estimate, -m)))


def _beside(parts: tuple[Part, ...], functions: Quantities) -> list[dict[str, Any]]:
    shown = []
    for part in parts:
        try:
            shown.append(_measure(part, functions)[0])
        except KeyError:  # what is only shown may be missing without harm to the claim
            continue
    return shown


def _show(draft: dict[str, Any], index: int) -> None:
    part = draft["parts"][index]
    draft |= {"effect": part["effect"], "interval": tuple(part["interval"]), "n": part["n"], "weakest": part}
    draft["estimate"] = draft["estimates"][index]


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def _judge(draft: dict[str, Any], support: float, contradiction: float) -> None:
    """Verdict and reason from the adjusted p values."""
    parts = draft["parts"]
    if support <= LEVEL:
        draft |= {"verdict": "supported", "reason": f"{_p(support)} after Holm's adjustment"}
    elif contradiction <= LEVEL:  # show the part that speaks against the claim most clearly
        _show(draft, min(range(len(parts)), key=lambda index: parts[index]["p_contradiction"]))
        weakest = draft["weakest"]
        says = f": it does not hold that {weakest['says']}" if len(parts) > 1 else ""
        reason = f"{_p(contradiction)} after Holm's adjustment (m = {weakest['m']:g}){says}"
        draft |= {"verdict": "contradicted", "reason": reason}
    else:
        weakest = draft["weakest"]
        smallest = statistics.smallest_detectable_effect(draft["estimate"], power=0.8, confidence=CONFIDENCE)
        says = f"; open: {weakest['says']}" if len(parts) > 1 else ""
        reason = f"these runs could have shown an effect of {smallest:.2g} with power 0.8 (m = {weakest['m']:g})"
        draft |= {"verdict": "unresolved", "reason": reason + says}
