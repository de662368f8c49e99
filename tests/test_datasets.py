"""Data sets: the official Adult files, small ones of the same layout, everything that can be wrong with them."""

import gc
import hashlib
import os
import random
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from fairtuning import datasets, metrics, paths
from fairtuning.datasets import DataError, adult, embedded, files

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


# --------------------------------------------------------------------------------------- small files of UCI's layout
def line(rng, *, sex=None, label=None, workclass=None):
    row = [
        rng.randint(17, 90),
        workclass or rng.choice(["Private", "State-gov"]),
        rng.randint(20_000, 400_000),
        rng.choice(["Bachelors", "HS-grad", "11th"]),
        rng.randint(1, 16),
        rng.choice(["Divorced", "Never-married"]),
        rng.choice(["Sales", "Tech-support"]),
        rng.choice(["Husband", "Wife"]),
        rng.choice(["Black", "White"]),
        sex or rng.choice(adult.GROUPS),
        rng.choice([0, 0, 5178]),
        0,
        rng.randint(10, 60),
        rng.choice(["Cuba", "?"]),  # a missing country is a value of its own: only work decides
        label or rng.choice(adult.LABELS),
    ]
    return ", ".join(map(str, row))


def texts(*, sex=None):
    """adult.data with 40 complete rows and 5 to be dropped, adult.test with 25 and 2."""
    rng = random.Random(0)
    training = [line(rng, sex=sex) for _ in range(40)] + [line(rng, workclass="?") for _ in range(5)]
    test = [line(rng, sex=sex) + "." for _ in range(25)] + [line(rng, workclass="?", sex=sex) + "." for _ in range(2)]
    return {
        "adult.data": "\n".join(training) + "\n\n",
        "adult.test": "\n".join(["|1x3 Cross validator", *test]) + "\n\n",
    }


@pytest.fixture
def small(folders, monkeypatch):
    """Writes texts as official files (their SHA-256 taken as published) into a mirror folder; returns that folder."""

    def write(contents, *, publish=True):
        mirror = folders / "mirror" / "adult"
        mirror.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (mirror / name).write_text(text)
        if publish:
            published = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
            monkeypatch.setattr(adult, "FILES", published)
            monkeypatch.setattr(adult, "SIZES", {"pretraining": 24, "training": 16, "validation": 10, "test": 15})
        monkeypatch.setenv("FAIRTUNING_MIRROR", str(folders / "mirror"))
        return mirror

    return write


def in_data_folder():
    folder = paths.data_folder()
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def refused(call, *words):
    """The DataError that ``call`` must raise: one line that holds each of ``words``."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_small_adult(small):
    small(texts())
    data = datasets.load("adult")
    assert data.inputs.shape == (65, 13) and data.inputs.dtype == torch.float64
    assert "sex" not in data.feature_names and len(data.feature_names) == 13
    assert torch.bincount(data.split).tolist() == [24, 16, 10, 15]
    # The first 40 are those of adult.data, in order: pre-training and training come from there and from there alone.
    assert (data.split[:40] < 2).all() and (data.split[40:] >= 2).all()
    rows = [text.split(", ") for text in texts()["adult.data"].splitlines()[:40]]
    assert data.label[:40].tolist() == [adult.LABELS.index(row[14]) for row in rows]
    assert data.group[:40].tolist() == [adult.GROUPS.index(row[9]) for row in rows]
    reference = data.inputs[data.part("pretraining")]
    assert torch.allclose(reference.mean(0), torch.zeros(13).double(), atol=1e-12)
    spread = reference.std(0, correction=0)
    assert torch.allclose(spread[spread > 0], torch.ones(12).double())  # capital-loss is constant here
    ages = torch.tensor([float(row[0]) for row in rows]).double()
    standardised = (ages - ages[data.split[:40] == 0].mean()) / ages[data.split[:40] == 0].std(correction=0)
    assert torch.allclose(data.inputs[:40, 0], standardised)
    # categories are numbered in the order of the alphabet
    country = data.inputs[:40, data.feature_names.index("native-country")]
    assert {row[13] for row, value in zip(rows, country, strict=True) if value == country.min()} == {"?"}


def test_small_adult_one_hot_and_other_splits(small):
    small(texts())
    data, one_hot = datasets.load("adult"), datasets.load("adult", encoding="one-hot")
    assert one_hot.inputs.shape[1] == 6 + 2 + 3 + 2 + 2 + 2 + 2 + 2 == len(one_hot.feature_names)
    assert "education=HS-grad" in one_hot.feature_names and torch.equal(one_hot.label, data.label)
    again, other = datasets.load("adult"), datasets.load("adult", split_seed=1)
    assert torch.equal(again.inputs, data.inputs) and torch.equal(again.split, data.split)
    assert not torch.equal(other.split, data.split)
    assert torch.bincount(other.split).tolist() == torch.bincount(data.split).tolist()
    refused(lambda: datasets.load("adult", encoding="binary"), "'binary'", "integer, one-hot")
    refused(lambda: data.part("train"), "'train'", "pretraining, training, validation, test")


# --------------------------------------------------------------------------------------------------- the real files
@pytest.fixture(scope="session")
def real():
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    here = paths.data_folder() / "adult"
    if not all((here / name).is_file() for name in adult.FILES) and not mirror:
        pytest.skip("Adult is neither in the data folder nor in a mirror (FAIRTUNING_MIRROR)")
    return datasets.load("adult")


def test_real_adult(real):
    assert dict(zip(real.split_names, torch.bincount(real.split).tolist(), strict=True)) == {
        "pretraining": 18431,
        "training": 12287,
        "validation": 5000,
        "test": 10315,
    }
    assert real.inputs.shape == (46033, 13)
    part = real.part("test")
    counts = metrics.group_counts(real.label[part], real.label[part], group=real.group[part], classes=2, groups=2)
    # Of the complete rows 11.4 % of the women and 31.3 % of the men earn over 50K; a random part is near that.
    assert float(metrics.base_rate_difference(counts)) == pytest.approx(0.192, abs=0.001)
    rate = [float(real.label[real.group == group].double().mean()) for group in range(2)]
    assert rate == pytest.approx([0.1135, 0.3127], abs=0.0001)
    assert real.digest == hashlib.sha256("".join(adult.FILES.values()).encode()).hexdigest()


def test_real_adult_one_hot(real):
    data = datasets.load("adult", encoding="one-hot")
    # numbers, workclass, education, marital status, occupation, relationship, race, country ("?" among them)
    assert data.inputs.shape == (46033, 6 + 7 + 16 + 7 + 14 + 6 + 5 + 42)
    assert torch.equal(data.split, real.split) and torch.equal(data.label, real.label)
    assert all("SHA-256 as published" in text for text in datasets.verify("adult"))


# ---------------------------------------------------------------------------------------------------------- bad rows
@pytest.mark.parametrize(
    "old, new, words",
    [
        (", <=50K", "", ["adult.data", "14 fields", "expected 15"]),
        (", <=50K", ", <=50K, 1", ["adult.data", "16 fields"]),
        (", <=50K", ", 50K", ["adult.data", "label '50K'", "<=50K, >50K"]),
        (", Female,", ", Other,", ["adult.data", "sex 'Other'", "Female, Male"]),
        (", Female,", ", female,", ["adult.data", "sex 'female'"]),
        ("\n", "\nabc\n", ["adult.data, line 2", "1 fields"]),
    ],
)
def test_a_bad_row_is_named(small, old, new, words):
    contents = texts()
    small(contents | {"adult.data": contents["adult.data"].replace(old, new, 1)})
    refused(lambda: datasets.load("adult"), "line", *words)


def test_a_number_that_is_none(small):
    contents = texts()
    first, rest = contents["adult.data"].split(", ", 1)
    small(contents | {"adult.data": "old, " + rest})
    refused(lambda: datasets.load("adult"), "adult.data", "line 1", "age", "'old'")


def test_an_empty_group_and_an_empty_file(small):
    small(texts(sex="Male"))
    refused(lambda: datasets.load("adult"), "adult", "no example with group 'Female'")
    small(texts() | {"adult.test": "|1x3 Cross validator\n"})
    refused(lambda: datasets.load("adult"), "adult.test", "no rows")


def test_rows_that_are_not_the_published_ones(small):
    contents = texts()
    contents["adult.data"] = contents["adult.data"].split("\n", 1)[1]
    small(contents)
    refused(lambda: datasets.load("adult"), "split sizes", "'training': 15", "'training': 16")


# --------------------------------------------------------------------------------------------------- files by mirror
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda text: text[: len(text) // 2], ["truncated or changed", "expected"]),
        (lambda text: text.replace("Sales", "Saies", 1), ["truncated or changed", "expected"]),
        (lambda text: PAGE.decode(), ["HTML page"]),
        (lambda text: "\n  <html>" + text, ["HTML page"]),
        (lambda text: "", ["truncated or changed", "0 bytes"]),
    ],
)
def test_a_wrong_file_in_a_mirror_folder(small, spoil, words):
    contents = texts()
    mirror = small(contents)
    small(contents | {"adult.test": spoil(contents["adult.test"])}, publish=False)
    refused(lambda: datasets.fetch("adult"), "adult.test", *words)
    assert in_data_folder() == ["adult.data"]  # the right one came and stays, of the wrong one there is nothing
    (mirror / "adult.test").unlink()
    refused(lambda: datasets.fetch("adult"), "adult.test", "is not there", "FAIRTUNING_MIRROR")
    assert in_data_folder() == ["adult.data"]
    small(contents)
    assert [path.name for path in datasets.fetch("adult")] == in_data_folder() == ["adult.data", "adult.test"]


def test_a_copy_that_breaks_off_leaves_nothing(small, monkeypatch):
    small(texts())

    def half(origin, path):
        Path(path).write_bytes(Path(origin).read_bytes()[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", half)
        refused(lambda: datasets.fetch("adult"), "adult.data", "No space left")
    assert in_data_folder() == []


def test_a_wrong_file_in_the_data_folder(small):
    small(texts())
    datasets.fetch("adult")
    assert all("SHA-256 as published" in text for text in datasets.verify("adult"))
    path = paths.data_folder() / "adult" / "adult.data"
    path.write_text(path.read_text()[:-50])
    refused(lambda: datasets.verify("adult"), str(path), "truncated or changed", "fetch again")
    datasets.load("adult")  # fetches it again
    assert files.sha256(path) == adult.FILES["adult.data"]
    path.unlink()
    refused(lambda: datasets.verify("adult"), str(path), "is not there")


# ---------------------------------------------------------------------------------------------------- files by HTTP
@pytest.fixture
def server(small, monkeypatch):
    """A mirror at a loopback address; ``answers[name]`` is what it will say, ``asked`` what it was asked for."""
    answers, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = answers.get(self.path.rsplit("/", 1)[1], (404, PAGE, None))
            status, body, promised = answer.pop(0) if isinstance(answer, list) else answer
            self.send_response(status)
            self.send_header("Content-Length", str(promised or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    contents = texts()
    small(contents)
    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("FAIRTUNING_MIRROR", f"http://127.0.0.1:{here.server_port}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pause between attempts
    yield {name: (200, text.encode(), None) for name, text in contents.items()}, answers, asked
    here.shutdown()
    thread.join()
    here.server_close()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda right: (404, PAGE, None), ["could not fetch", "HTTPError", "FAIRTUNING_MIRROR"]),
        (lambda right: (200, PAGE, None), ["HTML page", "try again"]),
        (lambda right: (200, right[1][:500], None), ["truncated or changed", "500 bytes"]),
        (lambda right: (200, right[1][:500], len(right[1])), ["could not fetch"]),  # the connection breaks off
    ],
    ids=["404", "page", "short", "broken off"],
)
def test_a_wrong_answer_then_the_right_one(server, spoil, words):
    right, answers, asked = server
    answers |= right | {"adult.test": spoil(right["adult.test"])}
    refused(lambda: datasets.fetch("adult"), "http://127.0.0.1", "/adult/adult.test", *words)
    gc.collect()  # an answer left open would be a warning, hence an error, of whatever test comes next
    assert in_data_folder() == ["adult.data"]
    answers |= right
    asked.clear()
    datasets.load("adult")
    assert in_data_folder() == ["adult.data", "adult.test"]
    assert asked == ["/adult/adult.test"]  # what is here and right is not fetched again
    asked.clear()
    datasets.fetch("adult")
    assert asked == []


def test_a_passing_fault_is_tried_again(server):
    right, answers, asked = server
    answers |= right | {"adult.data": [(503, b"busy", None), right["adult.data"]]}
    datasets.fetch("adult")
    assert asked == ["/adult/adult.data"] * 2 + ["/adult/adult.test"] and len(in_data_folder()) == 2


def test_nobody_answers(small, monkeypatch):
    small(texts())
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FAIRTUNING_MIRROR", "http://127.0.0.1:9/")  # the port is known to be unused
    refused(lambda: datasets.fetch("adult"), "could not fetch", "adult.data", "ConnectionError")
    assert in_data_folder() == []
    # what a lab does: Adult where it can be had, else the embedded data
    assert datasets.load_first("adult", "census").name == "census"


# --------------------------------------------------------------------------------------------------------- embedded
def gap(data):
    counts = metrics.group_counts(data.label, data.label, group=data.group, classes=2, groups=2)
    return float(metrics.base_rate_difference(counts))


def test_census_has_the_bias_it_is_given():
    gaps = [gap(datasets.load("census", n=40_000, bias=bias)) for bias in (0, 0.5, 1, 2, 4)]
    assert gaps[0] < 0.015  # three standard errors of a difference of two rates, 24,000 and 16,000 examples
    assert all(low + 0.03 < high for low, high in zip(gaps, gaps[1:], strict=False))
    against = datasets.load("census", n=40_000, bias=-2.0)
    rate = [float(against.label[against.group == group].double().mean()) for group in range(2)]
    assert rate[0] > rate[1] + 0.1
    # skill is equally distributed: what the two groups differ in is the proxies
    means = [against.inputs[against.group == group].mean(0) for group in range(2)]
    assert ((means[1] - means[0]).abs() < 0.05).tolist() == [True] * 4 + [False] * 2 + [True] * 2


def test_census_comes_again_from_its_seed():
    first, again, other = datasets.load("census"), datasets.load("census"), datasets.load("census", seed=1)
    assert torch.equal(first.inputs, again.inputs) and first.digest == again.digest
    assert not torch.equal(first.inputs, other.inputs) and first.digest != other.digest
    split = datasets.load("census", split_seed=1)
    assert torch.equal(first.inputs, split.inputs) and not torch.equal(first.split, split.split)
    assert torch.bincount(first.split).tolist() == [2400, 1560, 660, 1380]
    # Golden values: the digest stands for what is generated, so the one must not change without the other.
    assert first.inputs[0, :2].tolist() == pytest.approx([-0.6866639799062952, -1.580861247748226], abs=1e-12)
    assert first.digest == "fe21000303188dd4d9702ff96ddf545aaad6879fe2fc88adca16bd4a9168f6c2"
    refused(lambda: datasets.load("census", n=99), "99", "100")


def test_digits_on_two_backgrounds():
    data = datasets.load("digits")
    again = datasets.load("digits")
    assert torch.equal(data.inputs, again.inputs) and data.digest == again.digest
    assert data.digest != datasets.load("digits", alignment=0.8).digest
    assert data.inputs.min() >= 0 and data.inputs.max() <= 1 and data.inputs.shape[1] == 64
    test = data.part("test")
    half = len(test) // 2
    assert len(test) == 2 * half and len(data.label) == 1797 + half
    # every test image is there once on each background, and differs from its twin in the lower half alone
    first, second = test[:half], test[half:]
    assert torch.equal(data.label[first], data.label[second])
    assert torch.equal(data.group[first], 1 - data.group[second])
    assert torch.equal(data.inputs[first, :32], data.inputs[second, :32])
    plain = torch.where((data.group[first] == 0)[:, None], data.inputs[first], data.inputs[second])
    bright = torch.where((data.group[first] == 1)[:, None], data.inputs[first], data.inputs[second])
    assert torch.equal(bright[:, 32:], plain[:, 32:].clamp(min=0.5)) and not torch.equal(plain, bright)


@pytest.mark.parametrize("alignment", [0.5, 0.75, 0.9, 1.0])
def test_digits_shortcut(alignment):
    data = embedded.digits(alignment=alignment)
    before_test = data.split < 3
    follows = (data.label % 2 == data.group).double()
    assert float(follows[before_test].mean()) == pytest.approx(alignment, abs=0.04 if alignment < 1 else 0)
    assert float(follows[~before_test].mean()) == 0.5  # exactly: both backgrounds


def test_digits_refuses_an_alignment_that_is_none():
    for alignment in (0.4, 1.1):
        refused(lambda alignment=alignment: datasets.load("digits", alignment=alignment), str(alignment), "0.5")


@pytest.mark.parametrize("label", ["parity", "digit"])
def test_parity_on_two_grounds(label):
    data = datasets.load("parity", label=label)
    assert data.inputs.dtype == torch.uint8 and data.inputs.shape[1:] == (3, 8, 8)
    assert data.digest == datasets.load("parity", label=label).digest
    assert data.digest != datasets.load("parity", label=label, alignment=0.8).digest
    training = data.split == 1
    assert float((data.label % 2 == data.group)[training].double().mean()) == pytest.approx(0.95, abs=0.03)
    for split in (0, 2, 3):  # every image once on each ground, and its ink is the same
        index = torch.nonzero(data.split == split).squeeze(1)
        first, second = index.chunk(2)
        assert torch.equal(data.label[first], data.label[second])
        assert torch.equal(data.group[first], 1 - data.group[second])
        ink = [
            (data.inputs[part] - ground).float() / (255 - ground)
            for part in (first, second)
            for ground in [torch.tensor(embedded.GROUNDS)[data.group[part]][:, :, None, None]]
        ]
        assert torch.allclose(*ink, atol=0.05)
    digits = datasets.load("digits")
    assert torch.equal(data.split[:1797], digits.split[:1797])  # the same parts
    assert torch.equal(data.label[:1797] % 2, digits.label[:1797] % 2)


def test_parity_refuses_what_it_does_not_have():
    refused(lambda: datasets.load("parity", label="colour"), "'colour'", "parity, digit")
    refused(lambda: datasets.load("parity", alignment=0.4), "0.4", "0.5")


# ---------------------------------------------------------------------------------------------------------- contract
@pytest.mark.parametrize("name", ["census", "digits", "parity"])
def test_contract(name):
    data = datasets.load(name)
    assert datasets.fetch(name) == [] and data.digest[:12] in datasets.verify(name)[0]
    for values in (data.label, data.group, data.split):
        assert values.dtype == torch.int64 and len(values) == len(data.inputs)
    parts = torch.cat([data.part(split) for split in data.split_names])
    assert sorted(parts.tolist()) == list(range(len(data.inputs)))


def test_grouped_data_refuses_what_does_not_fit():
    values = dict(
        name="toy",
        edition="none",
        digest="",
        inputs=torch.zeros(4, 1),
        label=torch.tensor([0, 1, 0, 1]),
        group=torch.tensor([0, 0, 1, 1]),
        split=torch.tensor([0, 0, 0, 0]),
        label_names=("no", "yes"),
        group_names=("A", "B"),
        split_names=("all",),
    )
    datasets.GroupedData(**values)
    refused(lambda: datasets.GroupedData(**values | {"group": torch.tensor([0, 0, 0, 0])}), "toy", "group 'B'")
    refused(lambda: datasets.GroupedData(**values | {"label": torch.tensor([0, 1])}), "toy", "2 label", "4 inputs")
    refused(lambda: datasets.GroupedData(**values | {"label": torch.tensor([0, 1, 2, 1])}), "toy", "label", "2")


def test_unknown_name():
    refused(lambda: datasets.load("adults"), "'adults'", "adult, census, digits")


def test_the_official_address_is_the_default(small, monkeypatch):
    small(contents := texts())
    monkeypatch.delenv("FAIRTUNING_MIRROR")
    asked = []
    monkeypatch.setattr(files, "_download", lambda url, part: asked.append(url) or part.write_text(contents[part.stem]))
    adult.fetch()
    assert asked == [f"{adult.ADDRESS}/{name}" for name in adult.FILES]
