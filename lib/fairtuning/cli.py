"""The command line: ``fairtuning data | run | table | claims | coverage | verify | transcript``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fairtuning import FairtuningError

app = typer.Typer(
    help="Reproduce three papers on fair fine-tuning: data, runs, tables, claims.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets: which there are, fetch them, verify them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
transcript_app = typer.Typer(help="What developer and auditor exchanged (arXiv 2503.05684).", no_args_is_help=True)
app.add_typer(transcript_app, name="transcript")

STOPPED = 130  # what typer makes of Ctrl-C

Study = Annotated[str, typer.Argument(help="A study, named after its paper: zhang2024.")]
Profile = Annotated[
    str | None,
    typer.Option(
        help="Scale of the runs: classroom, compact, gpu (arXiv 2410.17358 alone) or paper; "
        "default: the one that the book shows."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, a list of objects, instead of a table.")]


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _print_table(title: str, columns: list[str], rows: list[list[str]], *, caption: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


# --------------------------------------------------------------------------------------------------------------- data
@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """Every data set, what it needs and its licence."""
    from fairtuning.datasets import SOURCES

    rows = [{"name": n, "title": s.title, "needs": s.needs, "licence": s.licence} for n, s in SOURCES.items()]
    if as_json:
        _print_json(rows)
    else:
        _print_table("Data sets", list(rows[0]), [list(row.values()) for row in rows])


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="A data set of `fairtuning data list`.")]) -> None:
    """Bring the official files of a data set here, checked by SHA-256 (FAIRTUNING_MIRROR stands in for the network)."""
    from fairtuning import datasets

    paths = datasets.fetch(name)
    print(*(paths or [f"{name} needs no files: it is generated or comes with a package"]), sep="\n")


@data_app.command("pack")
def data_pack(
    name: Annotated[str, typer.Argument(help="A data set of images of `fairtuning data list`.")],
    size: Annotated[str | None, typer.Option(help="Side, or height x width: 112, 80x64; default: its own.")] = None,
    crop: Annotated[str, typer.Option(help="center, or stretch: the aspect ratio is lost.")] = "center",
    faulty: Annotated[
        str, typer.Option(help="Images that cannot be read or have no label: refuse, or skip (they are counted).")
    ] = "refuse",
    edition: Annotated[str, typer.Option(help="Which one, where several are packed here.")] = "",
) -> None:
    """Decode the images of a data set once, at one size, into data/NAME/packed, from which every run reads."""
    from fairtuning import datasets

    options = {"crop": crop, "faulty": faulty, "edition": edition} | ({"size": size} if size else {})
    data = datasets.pack(name, **options)
    print(f"{name}: {len(data.label)} images, edition {data.edition}, digest {data.digest[:12]}", *data.notes, sep="\n")


@data_app.command("verify")
def data_verify(name: Annotated[str, typer.Argument(help="A data set of `fairtuning data list`.")]) -> None:
    """Check the files that are here against the published SHA-256, and that they can be read."""
    from fairtuning import datasets

    print(*datasets.verify(name), sep="\n")


# ---------------------------------------------------------------------------------------------------------------- run
@app.command()
def run(
    study: Study,
    profile: Profile = None,
    only: Annotated[str | None, typer.Option(help="One table or figure, e.g. table3 or 'Fig. 5'.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds 0 to N-1; default: the profile's number.")] = None,
    executor: Annotated[
        str,
        typer.Option(help="inline, processes (one per core), or a dask scheduler's address such as tcp://host:8786."),
    ] = "processes",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute everything again in _build/fresh and compare with the store.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what is missing and what it would cost.")
    ] = False,
) -> None:
    """Compute the runs of a study that are missing, and say first what that will cost."""
    from fairtuning import paths, report, runs, studies, verification

    module, profile = studies.study(study), profile or report.shown(study)
    labels = report.labels(module, only)
    fresh_folder = paths.fresh_folder() if fresh else None
    studies.check_profile(module, profile)
    estimate = runs.cost(module.STUDY, labels, profile=profile, seeds=seeds, folder=fresh_folder)
    store = runs.Store.of(study, profile, folder=fresh_folder).path
    print(f"{store}: {estimate['present']} records, {estimate['missing']} runs missing", end="")
    print(f", about {estimate['seconds'] / 60:.1f} minutes on one core" if estimate["missing"] else "; nothing to do")
    if dry_run or not estimate["missing"]:
        return
    made = runs.ensure(module, labels, profile=profile, seeds=seeds, executor_name=executor, folder=fresh_folder)
    print(f"{made.path}: {len(made.records)} records")
    if fresh:
        _verdict(verification.compare_stores(module, made, runs.Store.of(study, profile)))


@app.command()
def bench(
    data: Annotated[
        Path, typer.Option(help="A YAML file: table (or images), label, group; see the book's Rerun page.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the page and its records; default: NAME-bench.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1.")] = 10,
    executor: Annotated[str, typer.Option(help="inline, processes, or a dask scheduler's address.")] = "inline",
) -> None:
    """Compare the methods on your own data: a page with intervals and warnings, and the records behind it."""
    from fairtuning.datasets.own import Problems
    from fairtuning.pages.comparison import own_page

    if seeds < 2:
        raise FairtuningError(f"--seeds is {seeds}; allowed: 2 or more, for an interval needs them")
    try:
        print(own_page(data, output or Path(f"{data.stem}-bench"), seeds=seeds, executor=executor))
    except Problems as problems:  # all of them, a line each
        print(*(f"error: {line}" for line in problems.lines), sep="\n", file=sys.stderr)
        raise typer.Exit(2) from None


# ------------------------------------------------------------------------------------------------------------ reading
@app.command()
def table(study: Study, name: str, profile: Profile = None, as_json: Json = False) -> None:
    """A table or figure of the paper: published and ours side by side."""
    from fairtuning import report

    rows = report.table(study, name, profile=profile or report.shown(study))
    if as_json:
        _print_json(rows)
        return
    shown = [
        [row["row"], row["column"], _of(row), report.plain(row["published"]), report.plain(row["ours"])] for row in rows
    ]
    backbones = sorted({row["ours"]["backbone"] for row in rows if row["ours"] and "backbone" in row["ours"]})
    _print_table(
        report.title(study, name),
        ["row", "column", "data", "published", "ours"],
        shown,
        caption="mean ± standard deviation over runs; '-': not given, or not run here"
        + (f"; ours: {', '.join(backbones)}" if backbones else ""),
    )


def _of(row: dict) -> str:
    """The data of a published cell, and of our number where that is of other data."""
    other = row["ours"]["data"] if row["ours"] else ""
    return f"{row['data']}; ours: {other}" if other not in ("", row["data"]) else row["data"]


@app.command()
def claims(
    study: Annotated[str | None, typer.Argument(help="A study; default: all.")] = None,
    profile: Profile = None,
    as_json: Json = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="Also write the scoreboard as two SVG files, -light and -dark, beside this name."),
    ] = None,
) -> None:
    """Every claim with its verdict, effect and interval."""
    from fairtuning import report, studies

    names = [study] if study else list(studies.STUDIES)
    verdicts = [verdict for name in names for verdict in report.verdicts(name, profile=profile or report.shown(name))]
    if picture is not None:
        from fairtuning.pages import scoreboard

        scoreboard.write(picture.parent, profile=profile)
    if as_json:
        _print_json([verdict.as_json() for verdict in verdicts])
        return
    for scale in dict.fromkeys(verdict.profile for verdict in verdicts):
        rows = [
            [v.id, v.data, v.verdict, report.number(v.effect), report.interval(v.interval), str(v.n), v.reason]
            for v in verdicts
            if v.profile == scale
        ]
        columns = ["claim", "data", "verdict", "effect", "95 % interval", "n", "reason"]
        _print_table(f"Claims, profile {scale}", columns, rows)


@app.command()
def coverage(profile: Profile = None, as_json: Json = False) -> None:
    """Every table and figure of every paper, and its state here."""
    from fairtuning import report

    rows = report.coverage(profile=profile)
    if as_json:
        _print_json(rows)
    else:
        columns = ["paper", "item", "data", "state", "profile", "note"]
        _print_table("Coverage", columns, [[str(row[name] or "") for name in columns] for row in rows])


@app.command()
def rerun(
    notebook: Annotated[Path, typer.Argument(help="A notebook, e.g. notebooks/zhang2024/alpha.ipynb.")],
    output: Annotated[Path, typer.Argument(help="Where the executed copy goes (a new file).")],
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE, the value as YAML; may be repeated.")
    ] = None,
) -> None:
    """Run a notebook with your parameters by papermill; names that it does not have are refused."""
    from fairtuning.rerun import rerun as run_notebook

    print(run_notebook(notebook, output, parameter or []))


@app.command()
def verify(
    study: Study,
    profile: Profile = None,
    sample: Annotated[int, typer.Option(help="How many records to make again, drawn at random.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Every record.")] = False,
    key: Annotated[str | None, typer.Option(help="One record, by its key (or the beginning of it).")] = None,
    executor: Annotated[str, typer.Option(help="inline, processes, or a dask scheduler's address.")] = "inline",
) -> None:
    """Make records again and compare them with the committed ones; exit status 1 where one differs."""
    from fairtuning import report, studies, verification

    if sample < 1:
        raise FairtuningError(f"--sample is {sample}; allowed: 1 or more")
    module = studies.study(study)
    number = None if everything else sample
    profile = profile or report.shown(study)
    _verdict(verification.verify(module, profile=profile, sample=number, key=key, executor_name=executor))


# --------------------------------------------------------------------------------------------------------- transcripts
@transcript_app.command("verify")
def transcript_verify(
    file: Annotated[Path, typer.Argument(help="A party's transcript, e.g. transcript.jsonl.")],
    head: Annotated[
        str | None, typer.Option(help="The published head: without it, lines cut from the end do not show.")
    ] = None,
) -> None:
    """Check a transcript's chain of hashes; an error names the first wrong line."""
    from fairtuning.collaboration.transcript import START, verify

    lines = verify(file, head=head)
    print(f"{file}: {len(lines)} messages, {sum(line['size'] for line in lines)} bytes, the chain is whole")
    print(f"head {lines[-1]['hash'] if lines else START}" + (" as published" if head else ""))


@transcript_app.command("compare")
def transcript_compare(
    ours: Annotated[Path, typer.Argument(help="One party's transcript.")],
    theirs: Annotated[Path, typer.Argument(help="The other party's.")],
) -> None:
    """Check that each message one party sent is the one that the other received, in order; an error names the first."""
    from fairtuning.collaboration.transcript import compare

    print(f"{ours}, {theirs}: {compare(ours, theirs)} messages crossed, on which both agree")


@transcript_app.command("make")
def transcript_make(
    key: Annotated[str, typer.Argument(help="A record of kamalaruban2025, by its key (or the beginning of it).")],
    folder: Annotated[Path, typer.Argument(help="Where both transcripts go (a new folder).")],
    profile: Profile = None,
) -> None:
    """Let developer and auditor of a record play again, keep their transcripts and hold them against its heads."""
    from fairtuning import report, verification

    profile = profile or report.shown("kamalaruban2025")
    heads, recorded = verification.transcripts(profile=profile, key=key, folder=folder)
    for party, head in heads.items():
        print(f"{folder / party}.jsonl: head {head}, {'as recorded' if head == recorded[party] else 'not as recorded'}")
    if heads != recorded:
        print("another processor or torch may round otherwise, and so may another edition of the backbone's weights")
        raise typer.Exit(1)


def _verdict(compared: dict[str, list[str]]) -> None:
    for outcome, keys in compared.items():
        print(f"{outcome}: {len(keys)}" + (f" ({', '.join(keys[:5])}{' …' if len(keys) > 5 else ''})" if keys else ""))
    if compared["differs"]:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; a user's mistake is one line on standard error and exit status 2."""
    usage_error = typer.BadParameter.__base__  # click's own, or the copy of click that newer versions of typer carry
    try:
        status = app(standalone_mode=False, prog_name="fairtuning")
    except (FairtuningError, usage_error) as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            text = error.format_message() if isinstance(error, usage_error) else str(error)
            print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        status = STOPPED
    if status == STOPPED:
        print("stopped; what is recorded stays, start again to go on", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
