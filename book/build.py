"""Build the book: run the notebooks, stage the sources, render them strictly, check the site.

    .venv/bin/python book/build.py            (= make book)          the site is _build/html/index.html

Only _build is written to: notebooks run into _build/executed, the pages are put together in _build/stage
under their repository paths (so that launch buttons and links are right), the site replaces _build/html.
A notebook is run again only when something it could depend on has changed.
"""

import argparse
import hashlib
import html
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
EXECUTED, STAGE, SPHINX, SITE = (BUILD / name for name in ("executed", "stage", "sphinx", "html"))


class Refused(Exception):
    """A mistake that a user can mend: shown as one line, without a traceback."""


def toc_files(toc: Path) -> list[str]:
    """Every page of the table of contents, in order, without suffix."""
    import yaml

    def walk(entry):
        for key, value in entry.items():
            if key in ("root", "file"):
                yield value
            elif key in ("parts", "chapters", "sections"):
                for child in value:
                    yield from walk(child)

    return list(walk(yaml.safe_load(toc.read_text())))


def book_notebooks() -> list[str]:
    """The notebooks of the table of contents, as paths from the root without suffix."""
    return [name for name in toc_files(ROOT / "book/_toc.yml") if name.startswith("notebooks/")]


def book_parameters(path: Path, notebooks: list[str]) -> dict[str, dict]:
    """The parameters that the book gives its notebooks; an unknown notebook or name is refused."""
    import papermill
    import yaml

    try:
        given = (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}
    except yaml.YAMLError as error:
        raise Refused(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or not all(v is None or isinstance(v, dict) for v in given.values()):
        raise Refused(
            f"{path.name} must map notebooks to parameters, for example 'zhang2024/alpha: {{seeds: 20}}'"
        )
    for name, values in given.items():
        if f"notebooks/{name}" not in notebooks:
            known = ", ".join(n.removeprefix("notebooks/") for n in notebooks)
            raise Refused(f"{path.name}: no notebook {name!r} in the book; there are: {known}")
        known = papermill.inspect_notebook(str(ROOT / f"notebooks/{name}.ipynb"))
        for parameter in values or {}:
            if parameter not in known:
                has = ", ".join(known) or "none"
                raise Refused(f"{path.name}: {name} has no parameter {parameter!r}; it has: {has}")
    return {f"notebooks/{name}": values or {} for name, values in given.items()}


def digest(paths) -> str:
    """SHA-256 over names and contents of files, folders taken whole."""
    total = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" not in file.parts and not file.name.endswith(".jsonl.lock"):
                total.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode())
                total.update(file.read_bytes())
    return total.hexdigest()


def stamp(notebook: str, parameters: dict, code: str) -> str:
    """What the result of a notebook depends on: itself, its parameters, library, packages, records, data at hand."""
    folder = Path(os.environ.get("FAIRTUNING_DATA") or ROOT / "data")
    data = sorted(f"{path.name} {path.stat().st_size}" for path in folder.glob("*/*") if path.is_file())
    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("FAIRTUNING_"))
    return json.dumps([notebook, parameters, code, digest([ROOT / "results"]), data, settings], default=str)


def hush(log: Path) -> None:
    """What kernels print on the way out goes to a file; a failing cell is reported all the same."""
    sys.stdout.flush()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run_notebook(source: str, target: str, parameters: dict, limit: int) -> tuple[float, str | None]:
    """Run one notebook in a kernel of its own; (seconds, one line that says what failed or None)."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    start, target = time.perf_counter(), Path(target)
    part = target.with_suffix(".part.ipynb")
    part.parent.mkdir(parents=True, exist_ok=True)
    starts = 0
    while True:
        try:
            papermill.execute_notebook(
                source,
                str(part),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                cwd=str(Path(source).parent),
                progress_bar=False,
                execution_timeout=limit,
            )
            break
        except PapermillExecutionError as error:
            seconds = time.perf_counter() - start
            if "another launcher is writing" in str(error.evalue) and seconds < limit:
                time.sleep(10)  # the notebook beside this one is computing runs that it needs: wait for it
                continue
            return seconds, f"cell [{error.exec_count}]: {error.ename}: {error.evalue}".strip()
        except Exception as error:  # noqa: BLE001  a kernel that never started; said in one line by the caller
            starts += 1  # two kernels starting at once can, rarely, pick the same port: once more then
            if starts == 2:
                return time.perf_counter() - start, f"{type(error).__name__}: {error}"
    tidy(part, target)
    return time.perf_counter() - start, None


def tidy(part: Path, target: Path) -> None:
    """Fold the cell of injected parameters; drop times and paths, so that equal runs give equal files."""
    import nbformat

    notebook = nbformat.read(part, 4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "hide-input"]
    nbformat.write(notebook, part)
    part.replace(target)


def run_notebooks(
    notebooks: list[str], parameters: dict[str, dict], *, jobs: int, limit: int, fresh: bool
) -> None:
    """Run what has changed, ``jobs`` notebooks at a time, and stop with the failures by name."""
    code = digest(ROOT / name for name in ("lib", "benchmarks", "requirements.lock")) + sys.version
    waiting = []
    for name in notebooks:
        source, target = ROOT / f"{name}.ipynb", EXECUTED / f"{name}.ipynb"
        mark = digest([source]), parameters.get(name, {}), code
        kept = target.with_suffix(".stamp")
        if fresh or not target.exists() or not kept.exists() or kept.read_text() != stamp(*mark):
            kept.unlink(missing_ok=True)
            waiting.append((name, source, target, mark))
    waiting.sort(key=lambda one: "labs" not in one[0])  # labs train, and take longest
    unchanged = len(notebooks) - len(waiting)
    say(f"{len(waiting)} of {len(notebooks)} notebooks to run, {unchanged} unchanged")
    if not waiting:
        return
    # The backend of Jupyter must stay in force, and one thread a kernel: two kernels share a small machine.
    os.environ.pop("MPLBACKEND", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    failures, done = [], []
    BUILD.mkdir(exist_ok=True)
    with (
        progress() as bar,
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=hush, initargs=(BUILD / "notebooks.log",)
        ) as pool,
    ):
        task = bar.add_task("notebooks", total=len(waiting))
        futures = {
            pool.submit(run_notebook, str(source), str(target), mark[1], limit): (name, target, mark)
            for name, source, target, mark in waiting
        }
        for future in as_completed(futures):
            (name, target, mark), (seconds, failure) = futures[future], future.result()
            if failure:
                first = plain(failure).strip().splitlines()[0]
                failures.append(f"{name}.ipynb failed at {first}")
            else:
                done.append((target, mark))
            bar.console.print(f"  {seconds:6.1f} s  {name}{'  FAILED' if failure else ''}", highlight=False)
            bar.advance(task)
    for target, mark in done:  # only now: a notebook may have fetched data or computed records
        target.with_suffix(".stamp").write_text(stamp(*mark))
    if failures:
        raise Refused("\n".join(sorted(failures)))


def stage(notebooks: list[str]) -> None:
    """Put every page in _build/stage under its repository path."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT / "book", STAGE / "book", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copytree(
        ROOT / "lib", STAGE / "lib", ignore=shutil.ignore_patterns("__pycache__")
    )  # for literalinclude
    for name in notebooks:
        target = STAGE / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(EXECUTED / f"{name}.ipynb", target)
    write_generated_pages(STAGE / "book")


def write_generated_pages(book: Path) -> None:
    """The pages and pictures that are made of records: book/records/*.md, book/scoreboard*."""
    sys.path.insert(0, str(ROOT / "lib"))
    from fairtuning import FairtuningError
    from fairtuning.pages import records, scoreboard

    try:
        records.write(book)
        scoreboard.write(book)
    except FairtuningError as error:
        raise Refused(f"pages made of records: {error}") from None


def render() -> None:
    """Every page from scratch, every warning an error: a page that is not rebuilt would not warn again."""
    shutil.rmtree(SPHINX, ignore_errors=True)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", STAGE, "-W", "-n", "--keep-going"]
    command += ["--toc", STAGE / "book/_toc.yml", "--config", ROOT / "_config.yml", "--path-output", SPHINX]
    log = BUILD / "render.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "PYTHONWARNINGS": "ignore"}
    try:
        with log.open("w") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    except FileNotFoundError:
        raise Refused(f"jupyter-book is not installed beside {sys.executable}: run make env") from None
    if done.returncode:
        lines = plain(log.read_text()).replace(f"{STAGE}/", "").splitlines()
        bad = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|\b\w+Error:")
        pairs = zip(
            lines, ["", *lines], strict=False
        )  # autodoc says on the next line what it could not import
        said = [
            line for line, before in pairs if bad.search(line) or before.endswith("exception was raised:")
        ]
        raise Refused("the pages do not build:\n" + "\n".join(said or lines[-8:]) + f"\n(all of it: {log})")


def prune(site: Path) -> None:
    """Drop what no page loads: 22 of the 24 MB of MathJax, templates of the theme."""
    mathjax = site / "_static/mathjax"
    for path in mathjax.iterdir() if mathjax.exists() else ():
        if path.name not in ("tex-chtml.js", "output"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for template in (site / "_static").glob("*macros.html"):
        template.unlink()


def check() -> None:
    import yaml
    from check_site import check as problems_of

    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    site = SPHINX / "_build/html"
    if problems := problems_of(site, repository=repository, tree=ROOT):
        raise Refused(f"the site is not in order ({site}):\n" + "\n".join(problems))


def refresh(notebooks: list[str], limit: int) -> None:
    """Write the stored outputs of the notebooks in the repository anew, with their default parameters."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.pop("MPLBACKEND", None)
    for name in notebooks:
        path, start = ROOT / f"{name}.ipynb", time.perf_counter()
        notebook = nbformat.read(path, 4)
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=limit,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            client.execute()
        except Exception as error:  # noqa: BLE001  nbclient's errors carry the whole cell: the last line says it
            raise Refused(f"{name}.ipynb failed: {plain(str(error)).strip().splitlines()[-1]}") from None
        for cell in notebook.cells:
            # Outputs that differ from run to run would only make noise in the history; nbval skips them.
            if cell.cell_type == "code" and "nbval-ignore-output" in cell.metadata.get("tags", []):
                cell.outputs = []
        notebook.metadata["kernelspec"] = {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        }
        notebook.metadata["language_info"] = {"name": "python"}  # the interpreter's version would differ
        nbformat.write(notebook, path)
        say(f"  {time.perf_counter() - start:6.1f} s  {name}")


def plain(text: str) -> str:
    """Text without terminal colours."""
    return html.unescape(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text))


def say(text: str) -> None:
    print(text, flush=True)


def progress():
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, transient=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="book/build.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="notebooks run at once (default 2)")
    parser.add_argument(
        "--params",
        type=Path,
        default=ROOT / "notebooks/params.yml",
        metavar="FILE",
        help="parameters per notebook (default notebooks/params.yml)",
    )
    parser.add_argument(
        "--limit", type=int, default=600, metavar="SECONDS", help="longest time for one cell (default 600)"
    )
    parser.add_argument("--fresh", action="store_true", help="run every notebook, changed or not")
    parser.add_argument(
        "--refresh",
        nargs="*",
        metavar="NOTEBOOK",
        help="no book: write the stored outputs of these notebooks (all if none is named) anew",
    )
    return parser.parse_args()


def main() -> int:
    options, start = arguments(), time.perf_counter()
    try:
        if options.jobs < 1:
            raise Refused(f"--jobs must be at least 1, received {options.jobs}")
        if options.params != ROOT / "notebooks/params.yml" and not options.params.exists():
            raise Refused(f"no such file: {options.params}")
        notebooks = book_notebooks()
        if missing := [name for name in notebooks if not (ROOT / f"{name}.ipynb").exists()]:
            raise Refused(f"book/_toc.yml names notebooks that do not exist: {', '.join(missing)}")
        if options.refresh is not None:
            wanted = [str(Path(name).with_suffix("")) for name in options.refresh] or notebooks
            if unknown := [name for name in wanted if name not in notebooks]:
                raise Refused(
                    f"not in book/_toc.yml: {', '.join(unknown)}; there are: {', '.join(notebooks)}"
                )
            refresh(wanted, options.limit)
            return 0
        parameters = book_parameters(options.params, notebooks)
        run_notebooks(notebooks, parameters, jobs=options.jobs, limit=options.limit, fresh=options.fresh)
        stage(notebooks)
        say("rendering")
        render()
        prune(SPHINX / "_build/html")
        check()
        shutil.rmtree(SITE, ignore_errors=True)
        (SPHINX / "_build/html").rename(SITE)
    except Refused as refusal:
        print(f"book: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("book: stopped", file=sys.stderr)
        return 130
    size = sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file()) / 1e6
    say(f"{SITE}/index.html  ({size:.0f} MB, {time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
