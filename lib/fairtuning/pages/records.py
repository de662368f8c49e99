"""The book's pages of records: to which every number of ours leads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairtuning import papers, report, studies
from fairtuning.runs import Record, Store

LISTED = 300  # records behind no label (searches, unfinished labels) that a page still lists one by one


def write(folder: Path, *, profile: str | None = None) -> list[Path]:
    """``records/<study>.md`` into ``folder``: every number of the book leads to a section there."""
    paths = []
    for study in studies.STUDIES:
        path = folder / "records" / f"{study}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_record_page(study, [profile] if profile else report.profiles(study)), encoding="utf-8")
        paths.append(path)
    return paths


def _record_page(study: str, profiles: Sequence[str]) -> str:
    lines = [
        f"# Records of arXiv {papers.load_published(study)['paper']['arxiv']}",
        "",
        "A record's key is a hash of its configuration, of the data and of the version of its method.",
        "",
    ]
    for profile in profiles:
        lines += _records_of(study, profile)
    return "\n".join(lines) + "\n"


def _records_of(study: str, profile: str) -> list[str]:
    module, store = studies.study(study), Store.of(study, profile)
    if not store.records:
        return [f"No records yet: `fairtuning run {study} --profile {profile}`."]
    runs = report.every(study, profile)
    behind = {record["key"] for records in runs.values() for record in records}
    lines = [
        f"## Profile {profile}",
        "",
        f"{len(store.records)} records in `results/{store.path.name}`; {len(behind)} stand behind numbers of "
        "this book, in the sections below; the others are searches that chose settings on the validation data, and "
        "runs whose other seeds are not there.",
        "",
        *_environments(store),
    ]
    by_first: dict[str, list[str]] = {}
    for label, records in runs.items():  # two labels can name the same runs: two rules that select the same lambda
        by_first.setdefault(records[0]["key"], []).append(label)
    for labels in by_first.values():
        lines += _record_section(study, module, profile, labels, max((runs[label] for label in labels), key=len))
    others = [record for key, record in store.records.items() if key not in behind]
    if 0 < len(others) <= LISTED:
        lines += _other_records(others)
    return lines


def _other_records(records: Sequence[Record]) -> list[str]:
    """Searches and unfinished labels, one line each; what all of them share is not repeated."""
    names = dict.fromkeys(name for record in records for name in record["configuration"])
    differ = [
        name
        for name in names
        if name != "order_seed" and len({str(record["configuration"].get(name)) for record in records}) > 1
    ]
    worst = all("worst" in record for record in records)
    head = ["key", *differ, "validation accuracy, %", *(["worst group, %"] if worst else []), "seconds"]
    lines = [
        "### Searches and unfinished labels",
        "",
        "Settings are selected by validation accuracy (and that of the worst group, label by attribute). A dash: the "
        "record was made before there was such a setting.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in head) + " |",
        "|" + "---|" * len(head),
    ]
    for record in records:
        settings = [str(record["configuration"].get(name, "-")) for name in differ]
        scores = [f"{100 * record['accuracy']['validation']:.2f}"]
        scores += [f"{100 * record['worst']['validation']:.2f}"] if worst else []
        lines.append("| " + " | ".join([f"`{record['key']}`", *settings, *scores, f"{record['seconds']:.0f}"]) + " |")
    return [*lines, ""]


def _environments(store: Store) -> list[str]:
    lines = [
        "### Where they were made",
        "",
        "| environment | processor | Python | packages | commit |",
        "|---|---|---|---|---|",
    ]
    for key, entry in store.environments.items():
        packages = ", ".join(f"{name} {version}" for name, version in entry["packages"].items())
        made = ", ".join(entry[name] for name in ("accelerator", "processor") if name in entry)
        lines.append(f"| `{key}` | {made} | {entry['python']} | {packages} | `{entry['commit'][:12]}` |")
    return [*lines, ""]


def _record_section(
    study: str, module: Any, profile: str, labels: Sequence[str], records: Sequence[Record]
) -> list[str]:
    first = records[0]
    item = next(slug for slug, found in module.LABELS.items() if labels[0] in found)
    fields = {name: value for name, value in first["configuration"].items() if name not in ("seed", "order_seed")}
    command = f"fairtuning verify {study} --profile {profile} --key {first['key']}"
    return [
        f"(run-{first['key']})=",
        f"### {', '.join(f'`{label}`' for label in labels)}",
        "",
        f"- needed by: {item}; computed by `fairtuning run {study} --profile {profile} --only {item}`",
        f"- seeds: {', '.join(str(record['configuration']['seed']) for record in records)}; "
        f"environment: {', '.join(f'`{key}`' for key in sorted({record['environment'] for record in records}))}; "
        f"{sum(record['seconds'] for record in records):.1f} seconds in all",
        f"- data: {first['data']['name']}, edition {first['data']['edition']}, digest `{first['data']['digest'][:16]}`",
        f"- make one again and compare: `{command}`",
        "",
        "```{dropdown} Configuration and keys",
        f"`{json.dumps(fields)}`",
        "",
        ", ".join(f"`{record['key']}`" for record in records),
        "```",
        "",
    ]
