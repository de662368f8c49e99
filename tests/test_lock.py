"""What the committed records say, held fast: every table, verdict and coverage row, and which records each label has.

A change of form leaves all of it as it is. A change of meaning renews ``lock.json`` (``python tests/test_lock.py``) in
a commit that lists each value that changed, with its reason.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest

from fairtuning import claims, papers, report, studies
from fairtuning.runs import Store, key_of

FILE = Path(__file__).with_name("lock.json")
STORES = [
    ("zhang2024", "paper"),
    ("zhang2024", "compact"),
    ("sukumaran2024", "compact"),
    ("sukumaran2024", "gpu"),
    ("kamalaruban2025", "compact"),
    ("bench", "compact"),
]
pytestmark = [pytest.mark.slow, pytest.mark.skipif("FAIRTUNING_RESULTS" in os.environ, reason="other records")]


def rounded(value):
    """Six digits: another machine's last bits are no change."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def digest(value) -> str:
    return hashlib.sha256(json.dumps(rounded(value), sort_keys=True).encode()).hexdigest()[:12]


def of_store(study: str, profile: str) -> dict[str, dict[str, str]]:
    """Name -> digest of all that one store says, by kind."""
    items = papers.load_published(study)["items"] if study in papers.STUDIES else []
    return {
        "claims": {f"{v.id} {v.data}": digest(v.as_json()) for v in report.verdicts(study, profile=profile)},
        "tables": {item["slug"]: digest(report.table(study, item["slug"], profile=profile)) for item in items},
        "records": {
            label: digest([record["key"] for record in records])
            for label, records in report.every(study, profile).items()
        },
    }


def locked() -> dict:
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("study, profile", STORES, ids="-".join)
def test_nothing_that_a_store_says_has_changed(study, profile):
    found, before = of_store(study, profile), locked()[f"{study}-{profile}"]
    for kind, values in before.items():
        changed = {name for name in values | found[kind] if values.get(name) != found[kind].get(name)}
        assert not changed, (kind, sorted(changed))


@pytest.mark.parametrize("profile", ["", "paper", "compact", "gpu"])
def test_coverage_has_not_changed(profile):
    assert digest(report.coverage(profile=profile or None)) == locked()["coverage"][profile]


@pytest.mark.parametrize("study, profile", STORES, ids="-".join)
def test_every_key_comes_out_of_its_own_record_again(study, profile):
    module = studies.study(study)
    for key, record in Store.of(study, profile).records.items():
        assert key_of(module.configuration(record), digest=record["data"]["digest"], version=record["version"]) == key


def test_the_lock_would_notice(monkeypatch):
    margin = claims.LEVEL
    before = of_store("zhang2024", "compact")
    monkeypatch.setattr(claims, "LEVEL", margin / 1e9)
    assert of_store("zhang2024", "compact")["claims"] != before["claims"]
    assert digest([1.00000001]) == digest([1.0]) != digest([1.00002])


def renew() -> None:
    """Writes the file, and prints the name of each value that is new or other than before."""
    held = {f"{study}-{profile}": of_store(study, profile) for study, profile in STORES}
    held["coverage"] = {name: digest(report.coverage(profile=name or None)) for name in ("", "paper", "compact", "gpu")}
    before = flat(locked()) if FILE.is_file() else {}
    print(*(name for name, value in flat(held).items() if before.get(name) != value), sep="\n")
    FILE.write_text(json.dumps(held, indent=0, sort_keys=True) + "\n")


def flat(values: dict, path: str = "") -> dict[str, str]:
    pairs = ((f"{path} {name}".strip(), value) for name, value in values.items())
    return {
        name: one
        for path, value in pairs
        for name, one in (flat(value, path) if isinstance(value, dict) else {path: value}).items()
    }


if __name__ == "__main__":
    renew()
