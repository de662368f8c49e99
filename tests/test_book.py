"""The book's sources: guards on notebooks and prose, and the checker of the built site on planted faults."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
from book._ext.plain_docstrings import plain
from book.build import Refused, book_parameters, run_notebook, toc_files
from book.check_site import check

from fairtuning.studies import STUDIES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("notebooks/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAGES = sorted(ROOT.glob("book/**/*.md"))
names = [str(p.relative_to(ROOT)) for p in NOTEBOOKS]
notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
page = pytest.mark.parametrize("path", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


def cells(path, kind):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def tags(cell):
    return cell["metadata"].get("tags", [])


def prose(path):
    """The text a reader sees of a page or of a notebook's text cells, without code fences."""
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in cells(path, "markdown"))
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"^```(?:sh|python|text|yaml)\n.*?^```", "", text, flags=re.M | re.S)


def tracked():
    """Every file that is committed or could be: neither ignored nor made by a tool."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# ----------------------------------------------------------------------------------------------------------- notebooks
@notebook
def test_every_code_cell_was_run_and_carries_no_times(path):
    # nbval compares nothing where execution_count is null: a notebook without outputs would pass unseen.
    for cell in cells(path, "code"):
        assert "nbval-skip" in tags(cell) or cell["execution_count"] is not None, "".join(cell["source"])[:60]
        assert not {"papermill", "execution"} & cell["metadata"].keys()
    assert "papermill" not in json.loads(path.read_text())["metadata"]


@notebook
def test_exactly_one_cell_of_parameters(path):
    assert sum("parameters" in tags(cell) for cell in cells(path, "code")) == 1


@notebook
def test_no_machine_paths_and_no_error_in_stored_outputs(path):
    for cell in cells(path, "code"):
        stored = json.dumps(cell["outputs"])
        assert not re.search(r"/(?:home|root|Users|work|tmp)/", stored)
        assert '"output_type": "error"' not in stored


@notebook
def test_pictures_of_a_notebook_have_alternative_text(path):
    for cell in cells(path, "code"):
        drawn = any("image/png" in out.get("data", {}) for out in cell["outputs"])
        assert not drawn or cell["metadata"].get("mystnb", {}).get("image", {}).get("alt"), "".join(cell["source"])[:60]


def test_notebooks_and_table_of_contents_agree():
    listed = [f"{name}.ipynb" for name in toc_files(ROOT / "book/_toc.yml") if name.startswith("notebooks/")]
    assert sorted(listed) == names


def test_pages_and_table_of_contents_agree():
    listed = [f"{name}.md" for name in toc_files(ROOT / "book/_toc.yml") if name.startswith("book/")]
    generated = {f"book/records/{study}.md" for study in STUDIES} | {"book/scoreboard.md"}
    assert set(listed) - generated == {str(p.relative_to(ROOT)) for p in PAGES} - generated


def test_code_shown_in_prose_is_where_the_page_says():
    """A class once moved to another module, and its page showed so only when the whole book was rendered."""
    sources = [path.read_text(encoding="utf-8") for path in PAGES]
    sources += ["".join(cell["source"]) for path in NOTEBOOKS for cell in cells(path, "markdown")]
    shown = [one for text in sources for one in re.findall(r"\{literalinclude\} /(\S+)\n:pyobject: (\S+)", text)]
    assert shown
    for file, name in shown:
        found = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            found = next((node for node in found.body if getattr(node, "name", None) == part), None)
            assert found is not None, f"{file} has no {name}"


def test_every_module_is_on_the_page_of_the_library():
    files = (path.relative_to(ROOT / "lib").with_suffix("") for path in ROOT.glob("lib/fairtuning/**/*.py"))
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files}
    # A study is shown by its package, which names what its modules offer; rerun.md has the commands, deployment.md what
    # needs Flower.
    elsewhere = {name for name in modules if re.fullmatch(r"fairtuning\.studies\.\w+\.\w+", name)}
    elsewhere |= {"fairtuning.cli", "fairtuning.collaboration.flower"}
    shown = re.findall(r"^\.\. automodule:: (\S+)$", (ROOT / "book/api.md").read_text(), re.M)
    assert sorted(shown) == sorted(modules - elsewhere)


# ------------------------------------------------------------------------------------------------------- book/build.py
@pytest.mark.filterwarnings("ignore")
def test_unknown_parameters_and_notebooks_are_refused(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("papermill")
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    cell = nbformat.v4.new_code_cell("seeds = 3", metadata={"tags": ["parameters"]})
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "notebooks/one.ipynb")
    monkeypatch.setattr("book.build.ROOT", tmp_path)
    given = tmp_path / "params.yml"
    assert book_parameters(given, ["notebooks/one"]) == {}
    given.write_text("one: {seeds: 4}")
    assert book_parameters(given, ["notebooks/one"]) == {"notebooks/one": {"seeds": 4}}
    given.write_text("one: {sedes: 4}")
    with pytest.raises(Refused, match="one has no parameter 'sedes'; it has: seeds"):
        book_parameters(given, ["notebooks/one"])
    for text, said in {"one: [4}": "is not YAML", "one: 4": "must map", "- one": "must map"}.items():
        given.write_text(text)
        with pytest.raises(Refused, match=said):
            book_parameters(given, ["notebooks/one"])
    given.write_text("two: {seeds: 4}")
    with pytest.raises(Refused, match="no notebook 'two' in the book; there are: one"):
        book_parameters(given, ["notebooks/one"])


@pytest.mark.filterwarnings("ignore")
def test_a_notebook_is_run_with_parameters_and_a_failure_says_what_failed(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("papermill")
    pytest.importorskip("ipykernel")
    code = nbformat.v4.new_code_cell
    source, target = tmp_path / "n.ipynb", tmp_path / "out/n.ipynb"
    sheet = [code("a = 1", metadata={"tags": ["parameters"]}), code("print(10 // a)")]
    nbformat.write(nbformat.v4.new_notebook(cells=sheet), source)
    assert run_notebook(str(source), str(target), {"a": 5}, 60)[1] is None
    done = nbformat.read(target, 4)
    assert done.cells[2].outputs[0].text == "2\n"
    assert done.cells[1].metadata.tags == ["injected-parameters", "hide-input"]
    assert "papermill" not in done.metadata and "papermill" not in done.cells[2].metadata
    _, failure = run_notebook(str(source), str(target), {"a": 0}, 60)
    assert failure.startswith("cell [3]: ZeroDivisionError")


def test_docstrings_keep_their_formulas():
    assert plain("|a - b| and x * y, or ``a|b``") == r"\|a - b\| and x \* y, or ``a|b``"
    assert plain("    >>> a | b") == "    >>> a | b"


# --------------------------------------------------------------------------------------------------------------- prose
@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, ROOT / "README.md"], ids=lambda p: p.name)
def test_words(path):
    # A gap that moved is reported as that: no model is said to be cured of bias, no fairness to be achieved.
    found = re.findall(
        r"\bde-?bias\w*|\bsolv\w*\s+(?:the\s+)?(?:un)?fairness\b|\bfairness\s+is\s+solved\b",
        prose(path),
        re.I,
    )
    assert not found


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda p: p.name)
def test_every_citation_is_in_the_bibliography(path):
    known = set(re.findall(r"^@\w+\{([^,\s]+),", (ROOT / "book/references.bib").read_text(), re.M))
    used = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(path))
    assert {key.strip() for keys in used for key in keys.split(",")} <= known


@page
def test_figures_have_alternative_text(path):
    text = path.read_text()
    assert not re.findall(r"!\[\s*\]\(", text)
    for block in re.findall(r"^(?:```|:::)\{(?:figure|image)\}.*?^(?:```|:::)\s*$", text, re.M | re.S):
        assert re.search(r"^:alt: \S", block, re.M), block
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img\b[^>]*>", text))


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda p: p.name)
def test_nothing_is_loaded_from_elsewhere(path):
    text = prose(path)
    assert not re.findall(r"!\[[^\]]*\]\((?:https?:)?//", text)
    assert not re.findall(r"\{(?:figure|image|video|iframe)\}\s*(?:https?:)?//", text)
    stored = json.dumps([c["outputs"] for c in cells(path, "code")]) if path.suffix == ".ipynb" else ""
    assert not re.findall(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\\?["'](?:https?:)?//""", text + stored)


@page
def test_no_line_is_lost_as_a_comment(path):
    # MyST takes a line that begins with % for a comment: "95 %" broken before the sign once lost half a sentence.
    assert not re.findall(r"^\s*%.*$", prose(path), re.M)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, ROOT / "README.md"], ids=lambda p: p.name)
def test_no_number_is_left_to_fill_in(path):
    assert not re.findall(r"TODO|\bRESULT-[A-Z]+", path.read_text())


# ---------------------------------------------------------------------------------------------------------- repository
def test_only_text_is_committed():
    # Neither data nor images of people ever belong to the repository; pictures of ours are SVG.
    for path in tracked():
        assert b"\0" not in path.read_bytes(), path
        assert path.suffix.lower() not in {
            ".png",
            ".jpg",
            ".jpeg",
            ".gif",
            ".webp",
            ".npz",
            ".gz",
            ".zip",
            ".data",
        }, path


def test_the_lock_names_no_address():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert lock.count("--hash=sha256:") > 100


def test_continuous_integration_runs_the_command_of_the_readme():
    assert "exec make test" in (ROOT / ".ci/run").read_text()
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.M)


# ------------------------------------------------------------------------------------------------------- check_site.py
REPOSITORY = "https://github.com/owner/name"
WHOLE = '<html><body id="a"><a href="b.html#x">b</a><a href="https://else.org">e</a><img src="p.svg" alt="p"></body>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "a.html").write_text(WHOLE)
    (tmp_path / "b.html").write_text('<h1 id="x">x</h1><a href="#x">here</a><a href="#">top</a><a href="a.html">a</a>')
    (tmp_path / "p.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><a href="https://else.org"/></svg>')
    (tmp_path / "s.css").write_text("b { background: url(data:image/png;base64,aa) } i { background: url(p.svg) }")
    return tmp_path


def test_a_whole_site_has_no_problem(site):
    assert check(site, repository=REPOSITORY, tree=site) == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ('<a href="c.html">', "broken link: c.html"),
        ('<a href="../outside.html">', "broken link: ../outside.html"),
        ('<a href="b.html#y">', "no such anchor: b.html#y"),
        ('<a href="#y">', "no such anchor: #y"),
        ('<img src="q.svg" alt="q">', "<img> broken link: q.svg"),
        ('<img src="p.svg">', "image without alternative text: p.svg"),
        ('<img src="p.svg" alt="../_images/p.svg">', "image without alternative text: p.svg"),
        (
            '<img src="https://else.org/p.svg" alt="p">',
            "<img> loads from another host: https://else.org/p.svg",
        ),
        ('<script src="//else.org/s.js"></script>', "<script> loads from another host: //else.org/s.js"),
        ('<link rel="stylesheet" href="https://else.org/s.css">', "<link> loads from another host"),
        ('<p style="background: url(https://else.org/p)">', "<p> loads from another host"),
        ("<style>@import 'https://else.org/s.css';</style>", "<style> loads from another host"),
        (f'<a href="{REPOSITORY}/blob/main/gone.ipynb">', "no such file in the repository: gone.ipynb"),
        (
            '<a href="https://mybinder.org/v2/gh/owner/name/main?urlpath=lab/tree/gone.ipynb">',
            "no such file in the repository: gone.ipynb",
        ),
    ],
)
def test_each_fault_is_found(site, fault, said):
    (site / "a.html").write_text(WHOLE + fault)
    [problem] = check(site, repository=REPOSITORY, tree=site)
    assert problem.startswith("a.html: ") and said in problem


def test_faults_in_styles_and_pictures_are_found(site):
    (site / "s.css").write_text("@font-face { src: url('https://else.org/f.woff2') }")
    (site / "p.svg").write_text('<svg><image href="https://else.org/i.png"/></svg>')
    problems = check(site)
    assert [p.split(":")[0] for p in problems] == ["s.css", "p.svg"]


def test_an_empty_folder_is_no_site(tmp_path):
    assert "no page" in check(tmp_path)[0]


def test_the_committed_scoreboard_is_what_the_records_say(tmp_path):
    """The README shows these files; `fairtuning claims --picture book/scoreboard.svg` writes them again."""
    import matplotlib

    from fairtuning.pages import scoreboard

    if f"matplotlib=={matplotlib.__version__} " not in (ROOT / "requirements.lock").read_text():
        pytest.skip(f"matplotlib {matplotlib.__version__} is not the locked one: its pictures differ in their bytes")
    for path in scoreboard.write(tmp_path):
        if path.suffix == ".svg":
            assert path.read_bytes() == (ROOT / "book" / path.name).read_bytes(), path.name
