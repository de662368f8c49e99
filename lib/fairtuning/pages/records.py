"""The book's pages of records: to which every number of ours leads."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from fairtuning import papers, report, studies
from fairtuning.pages.tables import markdown
from fairtuning.runs import Record, Store

LISTED = 300  # records behind no label (searches, unfinished labels) that a page still lists one by one


def write(folder: Path, *, profile: str | None = None) -> list[Path]:
    """``records/<study>.md`` into ``folder``: every number of the book leads to a section there."""
    paths = []
    for study in studies.STUDIES:
        lines = [
            f"# Records of arXiv {papers.load_published(study)['paper']['arxiv']}",
            "",
            "A record's key is a hash of its configuration, of the data and of the version of its method.",
            "",
        ]
        for one in [profile] if profile else report.profiles(study):
            lines += _of_profile(study, one)
        paths.append(folder / "records" / f"{study}.md")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def _of_profile(study: str, profile: str) -> Iterator[str]:
    store = Store.of(study, profile)
    if not store.records:
        yield f"No records yet: `fairtuning run {study} --profile {profile}`."
        return
    runs = report.every(study, profile)
    behind = {record["key"] for records in runs.values() for record in records}
    yield f"## Profile {profile}\n"
    yield (
        f"{len(store.records)} records in `results/{store.path.name}`; {len(behind)} stand behind numbers of this "
        "book, in the sections below; the others are searches that chose settings on the validation data, and runs "
        "whose other seeds are not there.\n"
    )
    yield "### Where they were made"
    yield from markdown(["environment", "processor", "Python", "packages", "commit"], _environments(store))
    by_first: dict[str, list[str]] = {}
    for label, records in runs.items():  # two labels can name the same runs: two rules that select the same lambda
        by_first.setdefault(records[0]["key"], []).append(label)
    for labels in by_first.values():
        yield _section(studies.study(study), profile, labels, max((runs[label] for label in labels), key=len))
    others = [record for key, record in store.records.items() if key not in behind]
    if 0 < len(others) <= LISTED:
        yield from _searches(others)


def _environments(store: Store) -> Iterator[list[str]]:
    for key, entry in store.environments.items():
        packages = ", ".join(f"{name} {version}" for name, version in entry["packages"].items())
        made = ", ".join(entry[name] for name in ("accelerator", "processor") if name in entry)
        yield [f"`{key}`", made, entry["python"], packages, f"`{entry['commit'][:12]}`"]


def _searches(records: Sequence[Record]) -> Iterator[str]:
    """Searches and unfinished labels, one line each; what all of them share is not repeated."""
    names = dict.fromkeys(name for record in records for name in record["configuration"])
    differ = [
        name
        for name in names
        if name != "order_seed" and len({str(record["configuration"].get(name)) for record in records}) > 1
    ]
    scores = {"validation accuracy, %": "accuracy"}
    if all("worst" in record for record in records):
        scores["worst group, %"] = "worst"
    rows = [
        [
            f"`{record['key']}`",
            *(str(record["configuration"].get(name, "-")) for name in differ),
            *(f"{100 * record[name]['validation']:.2f}" for name in scores.values()),
            f"{record['seconds']:.0f}",
        ]
        for record in records
    ]
    yield "### Searches and unfinished labels\n"
    yield (
        "Settings are selected by validation accuracy (and that of the worst group, label by attribute). A dash: the "
        "record was made before there was such a setting."
    )
    yield from markdown(["key", *(name.replace("_", " ") for name in differ), *scores, "seconds"], rows)


def _section(module: ModuleType, profile: str, labels: Sequence[str], records: Sequence[Record]) -> str:
    first = records[0]
    item = next(slug for slug, found in module.LABELS.items() if labels[0] in found)
    fields = {name: value for name, value in first["configuration"].items() if name not in ("seed", "order_seed")}
    environments = ", ".join(f"`{key}`" for key in sorted({record["environment"] for record in records}))
    return f"""(run-{first["key"]})=
### {", ".join(f"`{label}`" for label in labels)}

- needed by: {item}; computed by `fairtuning run {module.NAME} --profile {profile} --only {item}`
- seeds: {", ".join(str(record["configuration"]["seed"]) for record in records)}; environment: {environments}; \
{sum(record["seconds"] for record in records):.1f} seconds in all
- data: {first["data"]["name"]}, edition {first["data"]["edition"]}, digest `{first["data"]["digest"][:16]}`
- make one again and compare: `fairtuning verify {module.NAME} --profile {profile} --key {first["key"]}`

```{{dropdown}} Configuration and keys
`{json.dumps(fields)}`

{", ".join(f"`{record['key']}`" for record in records)}
```
"""
