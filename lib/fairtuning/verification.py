"""Records made again and compared with those that are there."""

import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from fairtuning import FairtuningError
from fairtuning.runs import Record, Store, executor, run_all
from fairtuning.studies import check_profile

OUTCOMES = ("equal", "within the seed spread", "differs")


def verify(
    study: ModuleType, *, profile: str, sample: int | None, key: str | None = None, executor_name: str = "inline"
) -> dict[str, list[str]]:
    """Makes ``sample`` records of a store again (all for None, or the one whose key starts with ``key``).

    Returns outcome -> keys: "equal" (same predictions, history, accuracy and loss), "within the seed spread" (made on
    another processor or an accelerator, by another torch or another kernel, accuracy closer than the range over the
    seeds of its configuration) or "differs". The store itself is only read.
    """
    check_profile(study, profile)
    store = Store.of(study.NAME, profile)
    keys = _keys(store, study.NAME, profile, key)
    if key is None and sample is not None:
        keys = random.SystemRandom().sample(keys, min(sample, len(keys)))
    configurations = [study.STUDY.restore(store.records[found]) for found in keys]
    with TemporaryDirectory() as folder, executor(executor_name) as (pool, in_flight):
        again = Store.of(study.NAME, profile, folder=Path(folder))
        with again.writing():
            run_all(study.units(configurations), study.work, store=again, executor=pool, in_flight=in_flight)
        return compare_stores(study, again, store)


def _keys(store: Store, study: str, profile: str, key: str | None) -> list[str]:
    keys = sorted(store.records)
    if not keys:
        raise FairtuningError(f"{store.path} holds no records; `fairtuning run {study} --profile {profile}` makes them")
    if key is not None:
        keys = [found for found in keys if found.startswith(key)]
        if len(keys) != 1:
            raise FairtuningError(f"key {key!r} fits {len(keys)} records of {store.path.name}; it must fit one")
    return keys


def transcripts(*, profile: str, key: str, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Lets the parties of one of P3's records play again and keep their transcripts, ``folder/<party>.jsonl``.

    Returns their heads and those in the record: equal where the machine trains bit for bit as the record's did.
    """
    from fairtuning.studies import kamalaruban2025 as study
    from fairtuning.studies.kamalaruban2025.work import exchanged

    check_profile(study, profile)
    store = Store.of(study.NAME, profile)
    (found,) = _keys(store, study.NAME, profile, key)
    record = store.records[found]
    if not record["messages"]["number"]:
        raise FairtuningError(f"record {found} is of a run in which nothing crossed; choose one with an auditor")
    if folder.exists():
        raise FairtuningError(f"{folder} exists already; name a new folder, nothing is overwritten")
    with TemporaryDirectory() as kept:
        parties, heads = exchanged(study.STUDY.restore(record), folder=Path(kept))
        folder.mkdir(parents=True)
        for name in parties:
            shutil.copy(Path(kept, name, "transcript.jsonl"), folder / f"{name}.jsonl")
    return heads, record["messages"]["heads"]


def compare_stores(study: ModuleType, again: Store, there: Store) -> dict[str, list[str]]:
    """Every record of ``again`` against the one of the same key in ``there``: outcome -> keys."""
    outcomes: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    spread = _spreads(there)
    for key, record in again.records.items():
        if key in there.records:
            other = there.records[key]
            alike = _machine(again, record) == _machine(there, other) and not _accelerated(there, other)
            outcomes[compare(record, other, 0.0 if alike else spread[_setting(other)])].append(key)
    return outcomes


def _accelerated(store: Store, record: Record) -> bool:
    """Whether an accelerator made a record: its sums depend on the order in which threads arrive."""
    return "accelerator" in store.environments[record["environment"]]


def _machine(store: Store, record: Record) -> tuple:
    """What rounding depends on. Records without a word on attention were made with torch's fused kernel."""
    made = store.environments[record["environment"]]
    return made["processor"], made["packages"]["torch"], record.get("backbone", {}).get("attention", "fused")


def compare(record: Record, other: Record, spread: float) -> str:
    """One of OUTCOMES; with ``spread`` 0 (the same machine) only equality will do."""
    same = all(record[name] == other[name] for name in ("predictions", "accuracy", "loss", "history"))
    if same:
        return "equal"
    close = all(abs(value - other["accuracy"][split]) <= spread for split, value in record["accuracy"].items())
    return "within the seed spread" if spread and close else "differs"


def _setting(record: Record) -> str:
    """A configuration without its seeds."""
    return str({name: value for name, value in record["configuration"].items() if "seed" not in name})


def _spreads(store: Store) -> dict[str, float]:
    """Largest minus smallest validation accuracy over the seeds of each configuration."""
    values: dict[str, list[float]] = {}
    for record in store.records.values():
        values.setdefault(_setting(record), []).append(record["accuracy"]["validation"])
    return {setting: max(found) - min(found) for setting, found in values.items()}
