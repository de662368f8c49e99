"""Keys, the store and its lock, resuming: nothing is lost, nothing is computed twice, nothing is overwritten."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtuning import runs
from fairtuning.plan import Study, seeded
from fairtuning.runs import Inline, RunError, Store, ensure, key_of, pack, run_all, unpack
from fairtuning.studies import zhang2024
from fairtuning.studies.zhang2024 import Run
from fairtuning.studies.zhang2024.configuration import Pretraining, published_digest

FAST = settings(deadline=None, max_examples=60)


# ------------------------------------------------------------------------------------------------------- a toy study
@dataclass(frozen=True)
class Toy:
    """A run whose record is a few arithmetic results of its configuration."""

    rate: float = 0.1
    hidden: tuple[int, ...] = (1, 2)
    evaluate: str = "test"
    seed: int = 0
    order_seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list in a record


def toy_key(run):
    return key_of(run, digest="toy", version=1)


def toy_record(run):
    return {
        "kind": "record",
        "key": toy_key(run),
        "configuration": vars(run) | {"hidden": list(run.hidden)},
        "version": 1,
        "accuracy": {"validation": 1 - abs(run.rate - 0.3) + run.seed / 100},
        "seconds": 0.5,
    }


def best_rate(run, asked, profile, choose):
    return replace(choose([replace(run, rate=rate) for rate in (0.1, 0.3, 0.5)]), evaluate="test")


class ToyStudy(SimpleNamespace):
    """Selects a rate by search, then runs it with every seed; counts what it was asked to compute."""

    STUDY = Study(
        name="toy",
        run=Toy,
        methods={"toy": {}},
        labels={},
        profiles={"small": {"seeds": 3, "data": {"toy": {}}}},
        select=best_rate,
        search_seeds=lambda seeds: 2,
    )

    def __init__(self):
        super().__init__(computed=[])

    def units(self, todo):
        return [todo[start : start + 2] for start in range(0, len(todo), 2)]

    def work(self, unit):
        self.computed += unit
        return [{"kind": "environment", "key": "here"}, *map(toy_record, unit)]


def toy_store(folder, **changes):
    return ensure(ToyStudy(), ["toy"], profile="small", folder=folder, progress=False, **changes)


def written(store):
    return store.path.read_bytes()


# -------------------------------------------------------------------------------------------------------------- keys
def other(value):
    """A value of the same type that is not this one."""
    if isinstance(value, str | tuple):
        return value + value[:1] if value else "x"
    return value + 1 if isinstance(value, int | float) else replace(value, hidden=(7,))


def test_keys_are_stable():
    """Committed records are found by these keys: a change here orphans every one of them."""
    assert key_of(Toy(rate=0.2, seed=3), digest="d", version=1) == "7f673ee1e10194c3"
    adult = published_digest("adult")
    ours = Run(method="factored head", weighting="neutralised")
    assert key_of(ours, digest=adult, version=1) == "5f2304c4446835ef"
    fair = Pretraining(penalty="demographic_parity", intensity=0.1)
    assert key_of(Run(optimiser="sgd", pretraining=fair), digest=adult, version=1) == "7221573c96f96a2f"


def test_a_field_that_is_added_later_keeps_old_keys():
    """As long as its default is what was done before."""

    @dataclass(frozen=True)
    class Grown(Toy):
        form: str = "convex"

    assert key_of(Grown(rate=0.2), digest="d", version=1) == key_of(Toy(rate=0.2), digest="d", version=1)
    assert key_of(Grown(form="other"), digest="d", version=1) != key_of(Toy(), digest="d", version=1)


def test_keys_tell_every_field_version_and_digest_apart():
    run = Run(method="factored head", weighting="neutralised", optimiser="sgd")
    inner = run.pretraining
    variants = [replace(run, **{field.name: other(getattr(run, field.name))}) for field in fields(run)]
    changed = [replace(inner, **{field.name: other(getattr(inner, field.name))}) for field in fields(inner)]
    variants += [run, *(replace(run, pretraining=one) for one in changed)]
    keys = [key_of(variant, digest="d", version=1) for variant in variants]
    keys += [key_of(run, digest="e", version=1), key_of(run, digest="d", version=2)]
    assert len(set(keys)) == len(keys) == len(fields(Run)) + len(fields(inner)) + 3


def test_a_record_gives_its_configuration_back(classroom):
    for key, record in classroom.records.items():
        run = zhang2024.configuration(record)
        assert key_of(run, digest=record["data"]["digest"], version=record["version"]) == key


# ----------------------------------------------------------------------------------------------------------- packing
@FAST
@given(st.integers(2, 256).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c - 1), max_size=50))))
def test_pack_and_unpack(case):
    classes, values = case
    packed = json.loads(json.dumps(pack(values, classes=classes)))
    assert unpack(packed).tolist() == values and packed["n"] == len(values)
    assert unpack(pack(np.array(values, dtype=np.int64), classes=classes)).tolist() == values


def test_pack_is_small_and_refuses_what_does_not_fit():
    values = np.random.default_rng(0).random(10_315) < 0.2
    assert len(pack(values, classes=2)["packed"]) < 1700  # at most bits in base64; a model's answers take less
    for values, classes in (([0, 2], 2), ([0, 300], 10), ([0, -1], 2), ([0], 257)):
        with pytest.raises(ValueError, match="classes|predictions"):
            pack(values, classes=classes)


# ------------------------------------------------------------------------------------------------------------- store
def test_append_only_and_only_while_writing(tmp_path):
    store = Store(tmp_path / "deep" / "toy.jsonl")
    with pytest.raises(RuntimeError, match="outside writing"):
        store.append(toy_record(Toy()))
    with store.writing():
        store.append(toy_record(Toy()))
        before = written(store)
        store.append(toy_record(Toy()) | {"seconds": 9.0, "environment": "elsewhere"})  # the same again: kept as it was
        assert written(store) == before
        store.append(toy_record(Toy(seed=1)))
        assert written(store).startswith(before) and len(written(store).splitlines()) == 2
    with pytest.raises(RuntimeError, match="outside writing"):
        store.append(toy_record(Toy(seed=2)))
    assert Store(store.path).records == store.records == {toy_key(run): toy_record(run) for run in (Toy(), Toy(seed=1))}


LINES = {
    "record": (toy_record(Toy()), {"accuracy": {"validation": 0.0}}),
    "examples": ({"kind": "examples", "key": "digest-test", "label": {"packed": "a"}}, {"label": {"packed": "b"}}),
    "environment": ({"kind": "environment", "key": "here", "processor": "one"}, {"processor": "another"}),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_second_line_of_one_key_and_other_content_is_refused(tmp_path, kind):
    """Predictions on one division of the people were once about to be scored by the labels of another."""
    line, changed = LINES[kind]
    store = Store(tmp_path / "toy.jsonl")
    with store.writing():
        store.append(line)
        before = written(store)
        store.append(dict(line))
        with pytest.raises(RunError, match=f"second {kind} line of key {line['key']} with other content"):
            store.append(line | changed)
    assert written(store) == before and Store(store.path).reload() is None
    store.path.write_bytes(before + json.dumps(line | changed).encode() + b"\n")
    with pytest.raises(RunError, match=f"toy.jsonl, line 2: a second {kind} line"):
        Store(store.path)
    store.path.write_bytes(2 * before)  # two machines' stores put together may hold the same line
    assert Store(store.path).path == store.path


def test_one_digest_for_one_data_set_size_edition_and_split(tmp_path):
    """Records are looked up by what they say: two versions of the files of one name would be taken for each other."""

    def line(key, digest, **configuration):
        of = {"data": "birds", "size": 112, "edition": "mine", "seed": key} | configuration
        return {"kind": "record", "key": str(key), "configuration": of, "data": {"digest": digest}}

    store = Store(tmp_path / "toy.jsonl")
    with store.writing():
        store.append(line(1, "a" * 64))
        store.append(line(2, "a" * 64))
        store.append(line(3, "b" * 64, size=224))
        store.append(line(4, "b" * 64, split_seed=3))
        store.append(line(5, "b" * 64, edition="b" * 64))  # as of your own data
        before = written(store)
        with pytest.raises(RunError, match="birds 112 mine has the digest bbbbbbbbbbbb, and aaaaaaaaaaaa in other"):
            store.append(line(6, "b" * 64))
    assert written(store) == before and list(store.records) == list("12345") == list(Store(store.path).records)
    with open(store.path, "ab") as file:
        file.write(json.dumps(line(6, "b" * 64)).encode() + b"\n")
    with pytest.raises(RunError, match="toy.jsonl, line 6: birds 112 mine has the digest"):
        Store(store.path)


@FAST
@given(st.data())
def test_a_torn_last_line_is_dropped_then_made_again(tmp_path_factory, data):
    """Power lost at any byte: what is whole is read, the rest is computed again, and the file ends the same."""
    folder = tmp_path_factory.mktemp("torn")
    undisturbed = written(toy_store(folder))
    path = Store.path_of("toy", "small", folder=folder)
    cut = data.draw(st.integers(0, len(undisturbed)))
    path.write_bytes(undisturbed[:cut])
    whole = undisturbed[:cut].count(b"\n")
    read = Store(path)
    assert len(read.records) + len(read.environments) == whole and written(read) == undisturbed[:cut]  # reading only
    again = toy_store(folder)
    assert sorted(written(again).splitlines()) == sorted(undisturbed.splitlines())
    assert again.records == Store(path).records


@pytest.mark.parametrize(
    "line", [b"{not json", b"", b"[1]", b"3", b'{"key": "a"}', b'{"kind": "record"}', b'{"kind": "else", "key": "a"}',
             b'{"kind": "record", "key": ["a"]}', b"\xff\xfe", b"<<<<<<< HEAD"],
)  # fmt: skip
def test_a_malformed_line_in_the_middle_is_one_line_of_error(tmp_path, line):
    lines = written(toy_store(tmp_path)).splitlines()
    path = Store.path_of("toy", "small", folder=tmp_path)
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:], b""]))
    before = path.read_bytes()
    for call in (lambda: Store(path), lambda: toy_store(tmp_path)):
        with pytest.raises(RunError) as caught:
            call()
        assert str(path) in str(caught.value) and "line 3" in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before


HOLD = """
import sys, filelock
with filelock.FileLock(sys.argv[1] + ".lock"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_launcher_is_refused(tmp_path):
    path = Store.path_of("toy", "small", folder=tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError) as caught:
            toy_store(tmp_path)
        assert "another launcher is writing toy-small.jsonl" in str(caught.value) and "\n" not in str(caught.value)
        assert not path.exists() and Store(path).records == {}  # reading needs no lock
        holder.communicate("\n")
    assert len(toy_store(tmp_path).records) == 9
    # In one process too, and a launcher that failed lets go of the lock.
    with Store(path).writing(), pytest.raises(RunError, match="another launcher"), Store(path).writing():
        pass
    with pytest.raises(ZeroDivisionError), Store(path).writing():
        raise ZeroDivisionError
    with Store(path).writing():
        pass


# ------------------------------------------------------------------------------------------------------------ ensure
def test_only_what_is_missing_is_computed(tmp_path):
    study = ToyStudy()
    expected = runs.cost(study.STUDY, ["toy"], profile="small", folder=tmp_path)
    assert expected == {"missing": 9, "present": 0, "seconds": 9.0} and not study.computed
    store = ensure(study, ["toy"], profile="small", folder=tmp_path, progress=False)
    assert len(study.computed) == 9 and {run.rate for run in study.computed if run.evaluate == "test"} == {0.3}
    before = written(store)
    again = ensure(study, ["toy"], profile="small", folder=tmp_path, progress=False)
    assert len(study.computed) == 9 and written(again) == before and again.records == store.records
    assert runs.cost(study.STUDY, ["toy"], profile="small", folder=tmp_path)["missing"] == 0
    assert runs.cost(study.STUDY, ["toy"], profile="small", seeds=5, folder=tmp_path) == {
        "missing": 2, "present": 9, "seconds": 1.0,
    }  # fmt: skip
    more = ensure(study, ["toy"], profile="small", seeds=5, folder=tmp_path, progress=False)
    assert study.computed[9:] == [seeded(Toy(rate=0.3), 3), seeded(Toy(rate=0.3), 4)]
    assert written(more).startswith(before)


def test_each_run_once_whatever_asks_for_it(tmp_path):
    store, twice = Store(tmp_path / "toy.jsonl"), ["toy", "toy"]
    wanted = runs.todo(ToyStudy.STUDY, store, twice, "small", None)
    assert len(wanted) == len(set(wanted)) == 9
    with store.writing():
        store.append(toy_record(wanted[0]))
    assert runs.todo(ToyStudy.STUDY, store, twice, "small", None) == wanted[1:]


def test_what_had_returned_is_recorded_when_another_unit_fails(tmp_path):
    def work(unit):
        if unit[0].seed == 2:
            raise ZeroDivisionError
        return [toy_record(run) for run in unit]

    store = Store(tmp_path / "toy.jsonl")
    for in_flight in (1, 4):
        with pytest.raises(ZeroDivisionError), store.writing():
            run_all([[Toy(seed=s)] for s in range(4)], work, store=store, executor=Inline(), in_flight=in_flight)
    seeds = {record["configuration"]["seed"] for record in Store(store.path).records.values()}
    assert seeds == {0, 1, 3}


def test_environment_says_where_a_record_was_made(classroom):
    [environment] = classroom.environments.values()
    assert {record["environment"] for record in classroom.records.values()} == {environment["key"]}
    assert environment["processor"] and environment["python"] == sys.version.split()[0]
    assert set(environment["packages"]) == set(runs.PACKAGES) and environment["commit"]
    assert "accelerator" not in environment


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(RunError, match=r"device is 'cuda:99', and torch .* finds none here; allowed here: cpu"):
        runs.environment("cuda:99")


# -------------------------------------------------------------------------------------------------- a launcher killed
COMMAND = ["fairtuning", "run", "zhang2024", "--profile", "classroom", "--only", "figure4", "--executor", "inline"]
QUIET = ("seconds", "environment")


def comparable(store):
    return {key: {k: v for k, v in record.items() if k not in QUIET} for key, record in store.records.items()}


def launch(folder):
    """A launcher of its own: what the shell would start, less the seconds that importing torch takes."""
    os.environ["FAIRTUNING_RESULTS"] = folder
    sys.argv = COMMAND
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    import torch

    from fairtuning import cli

    torch.set_num_threads(1)
    cli.main()


def test_killed_at_any_moment_and_started_again(tmp_path, classroom):
    """SIGKILL at random moments, half of them just after something was written; then one undisturbed start."""
    path = Store.path_of("zhang2024", "classroom", folder=tmp_path)
    size = lambda: path.stat().st_size if path.exists() else 0  # noqa: E731
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "fairtuning.studies.zhang2024", "fairtuning.cli"])
    generator = random.Random(0)
    seen = []
    for attempt in range(8):
        before = size()
        launcher = context.Process(target=launch, args=(str(tmp_path),))
        launcher.start()
        if attempt % 2 == 0:
            while size() == before and launcher.is_alive():
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.01))
        else:
            launcher.join(generator.uniform(0, 1))
        launcher.kill()
        launcher.join()
        seen.append(len(Store(path).records))
    assert seen == sorted(seen)  # nothing that was there is lost
    launcher = context.Process(target=launch, args=(str(tmp_path),))
    launcher.start()
    launcher.join()
    again = Store(path)
    assert launcher.exitcode == 0
    assert len(again.records) == 20 and any(0 < number < 20 for number in seen), seen
    undisturbed = comparable(classroom)
    assert comparable(again) == {key: undisturbed[key] for key in again.records}
    lines = path.read_bytes().splitlines()
    assert len({(entry["kind"], entry["key"]) for entry in map(json.loads, lines)}) == len(lines)  # nothing twice
    assert set(again.examples) == set(classroom.examples)


def test_path_of_a_store(folders):
    assert Store.of("toy", "small").path == Path(folders) / "results" / "toy-small.jsonl"
