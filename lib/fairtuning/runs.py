"""From configurations to records: keys, the store, executors, resuming.

A study is a module that says which runs its tables need and what one run does. This module knows none of that: it
computes what is missing and appends it. A store is one JSON-lines file per study and profile with three kinds of
line: a ``record`` (what a run left), ``examples`` (label and group of the examples that predictions belong to) and an
``environment`` (hardware, package versions, commit; referred to by its key).
"""

import base64
import hashlib
import json
import os
import platform
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fairtuning import FairtuningError
from fairtuning.paths import ROOT, results_folder
from fairtuning.plan import Record, Study
from fairtuning.studies import Runnable

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "fairtuning")


class RunError(FairtuningError):
    """A run that cannot start or go on."""


# ---------------------------------------------------------------------------------------------------- keys and lines
def canonical(value: Any) -> str:
    """One text for one value: JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(configuration: Any, *, digest: str, version: int) -> str:
    """16 hexadecimal digits that stand for a run: configuration, data and the version of its method.

    Fields that are not compared are left out, and those at their default, so that a field added later, whose default
    is what was done before, keeps the keys of the records that are there.
    """
    text = canonical([_stated(configuration), digest, version])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stated(configuration: Any) -> Record:
    """The fields of a dataclass that differ from their defaults, nested dataclasses likewise."""
    found = {}
    for field in fields(configuration):
        value = getattr(configuration, field.name)
        if field.compare and value != field.default:
            found[field.name] = _stated(value) if is_dataclass(value) else value
    return found


def pack(values: Sequence[int] | np.ndarray, *, classes: int) -> Record:
    """Small integers as text: bits (two classes) or bytes, zlib, base64; about a kilobyte for 10,000 predictions."""
    array = np.asarray(values)
    if not 2 <= classes <= 256 or (array.size and not (array.min() >= 0 and array.max() < classes)):
        found = f"{array.min()} to {array.max()}" if array.size else "none"
        raise ValueError(f"values are {found} of {classes} classes; allowed: 2 to 256 classes, values 0 to classes - 1")
    array = array.astype(np.uint8)
    raw = np.packbits(array) if classes == 2 else array
    return {
        "n": len(array),
        "classes": classes,
        "packed": base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode(),
    }


def unpack(packed: Record) -> np.ndarray:
    """The integers that ``pack`` packed, ``[n]`` uint8."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(packed["packed"])), dtype=np.uint8)
    return np.unpackbits(raw, count=packed["n"]) if packed["classes"] == 2 else raw


@cache
def environment(device: str = "cpu") -> Record:
    """Where a record is made: processor (and accelerator, where ``device``, of torch, is one), Python, packages,
    commit; with the key that records refer to it by."""
    described = {
        "processor": _processor(),
        "capability": _capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
    }
    if device != "cpu":
        described["accelerator"] = _accelerator(device)
    return {"kind": "environment", "key": hashlib.sha256(canonical(described).encode()).hexdigest()[:12], **described}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _capability() -> str:
    """The vector instructions that torch's kernels are chosen by: processors of one name differ in them."""
    import torch

    found = [torch.backends.cpu.get_cpu_capability()]
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
        found += [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    except (OSError, IndexError):
        pass
    return " ".join(found)


def _accelerator(device: str) -> str:
    import torch

    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError, NotImplementedError):
        raise RunError(
            f"device is {device!r}, and torch {torch.__version__} finds none here; allowed here: cpu"
        ) from None
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "lib", "requirements.lock")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------------- store
class Store:
    """The lines of one study and profile. Reading needs nothing; ``writing()`` takes the store's lock."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.records: dict[str, Record] = {}
        self.examples: dict[str, Record] = {}
        self.environments: dict[str, Record] = {}
        self._digests: dict[tuple, str] = {}  # of each data set, size, edition and split
        self._writable = False
        self.reload()

    @classmethod
    def of(cls, study: str, profile: str, *, folder: Path | None = None) -> "Store":
        return cls(cls.path_of(study, profile, folder=folder))

    @staticmethod
    def path_of(study: str, profile: str, *, folder: Path | None = None) -> Path:
        return (folder or results_folder()) / f"{study}-{profile}.jsonl"

    def lookup(self, study: Study) -> Callable[[Any], Record | None]:
        """Run -> its record; it sees what is appended later."""
        return _Lookup(self, study)

    def reload(self) -> None:
        if not self.path.is_file():
            return
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a torn last line (power lost while writing) is dropped
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._keep(entry, where=f"{self.path}, line {number}")
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{self.path}, line {number} is not a record ({error}); restore the file from git"
                ) from error

    @contextmanager
    def writing(self) -> Iterator["Store"]:
        """The only way to append. A second launcher on the same store is refused by an operating-system lock."""
        import filelock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path.with_name(self.path.name + ".lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(f"another launcher is writing {self.path.name}; wait for it, or stop it first") from None
        try:
            self._drop_torn_line()
            self.reload()
            self._writable = True
            yield self
        finally:
            self._writable = False
            lock.release()

    def _drop_torn_line(self) -> None:
        if self.path.is_file():
            text = self.path.read_bytes()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                os.truncate(self.path, whole)

    def append(self, entry: Record) -> None:
        """One line, then fsync. A line that says the same as one of its key is not written again; RunError where it
        says something else."""
        if not self._writable:
            raise RuntimeError("append() outside writing()")
        line = canonical(entry)
        if not self._keep(json.loads(line), where=str(self.path)):  # what a reader will find
            return
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _keep(self, entry: Record, *, where: str) -> bool:
        """Whether a line is new. Two lines of one key and other content would give the first one's labels, or numbers,
        to what belongs to the second."""
        table = {"record": self.records, "examples": self.examples, "environment": self.environments}[entry["kind"]]
        there = table.setdefault(entry["key"], entry)
        if there is not entry and _content(there) != _content(entry):
            raise RunError(
                f"{where}: a second {entry['kind']} line of key {entry['key']} with other content; "
                "a key stands for one content: restore the file from git, or write to another folder"
            )
        if there is entry and entry["kind"] == "record":
            self._one_digest(entry, where=where)
        return there is entry

    def _one_digest(self, record: Record, *, where: str) -> None:
        """RunError where a record is of other data than one of the same data set, size, edition and split: a record is
        looked up by what it says, which must mean one thing. (The edition of your own data is its digest.)"""
        of, digest = record.get("configuration", {}), record.get("data", {}).get("digest")
        if digest is None:
            return
        place = (*(of.get(name, "") for name in ("data", "size", "edition")), of.get("split_seed", 0))
        there = self._digests.setdefault(place, digest)
        if there != digest:
            del self.records[record["key"]]
            raise RunError(
                f"{where}: {' '.join(str(word) for word in place[:3] if word)} has the digest {digest[:12]}, and "
                f"{there[:12]} in other records of this store; keep records of changed files in another folder "
                "(FAIRTUNING_RESULTS)"
            )


def _content(entry: Record) -> Record:
    """A line without what differs from one making to the next: how long a run took, and where."""
    return {name: value for name, value in entry.items() if name not in ("seconds", "environment")}


# --------------------------------------------------------------------------------------------------------- executors
class Inline(Executor):
    """Runs a task where it is submitted."""

    def submit(self, function: Callable, /, *arguments: Any, **named: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def executor(name: str) -> Iterator[tuple[Executor, int]]:
    """``inline``, ``processes`` (one per core) or a dask scheduler's address; with how many tasks to keep in it."""
    if name == "inline":
        yield Inline(), 1
    elif name == "processes":
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_the_launcher) as pool:
            yield pool, workers + 1
    elif ":" in name:
        try:
            from distributed import Client, KilledWorker
        except ImportError:
            raise RunError(f"executor {name!r} needs dask: pip install 'fairtuning[cluster]'") from None
        try:
            client = Client(name, timeout=20)
        except (OSError, ValueError) as error:
            raise RunError(f"no dask scheduler answers at {name!r} ({error})") from None
        with client:
            try:
                yield client.get_executor(pure=False), 1000
            except (KilledWorker, CancelledError) as error:
                what = (
                    "every worker that tried a task died" if isinstance(error, KilledWorker) else "the scheduler left"
                )
                raise RunError(f"{what} ({name}); what returned is recorded: start again to go on") from None
    else:
        raise RunError(f"executor is {name!r}; allowed: inline, processes, or a dask scheduler's address (tcp://…)")


def _end_with_the_launcher() -> None:
    """In a worker process: ends it when its launcher is gone, however that died; by itself it would compute what it
    has been handed, for nobody, and then wait for ever."""
    import multiprocessing
    import threading

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(
    units: Sequence[Sequence[Any]],
    work: Callable[[Sequence[Any]], list[Record]],
    *,
    store: Store,
    executor: Executor,
    in_flight: int = 1,
    finished: Callable[[int], None] = lambda runs: None,
) -> None:
    """Computes ``units`` (lists of configurations that train together) and appends each record as its unit returns.

    Any ``concurrent.futures.Executor`` will do. Only this process writes; at most ``in_flight`` units are handed out
    at a time, so that a launcher killed at any moment loses no more than those.
    """
    waiting = list(units)
    running: set[Future] = set()
    try:
        while waiting or running:
            while waiting and len(running) < in_flight:
                running.add(executor.submit(work, waiting.pop(0)))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=_failed):  # failures last
                lines = future.result()
                for line in lines:
                    store.append(line)
                finished(sum(line["kind"] == "record" for line in lines))
    except BrokenProcessPool:
        raise RunError(
            "a worker process died (out of memory?); what it had not returned is not recorded, the rest is: "
            "start again to go on"
        ) from None
    finally:
        for future in running:
            future.cancel()


def _failed(future: Future) -> bool:
    return future.cancelled() or future.exception() is not None


class _Lookup:
    def __init__(self, store: Store, study: Study):
        self.store, self.study = store, study
        self.number, self.by_run = 0, {}

    def __call__(self, run: Any) -> Record | None:
        if self.number != len(self.store.records):
            self.number, self.by_run = len(self.store.records), self.study.by_run(self.store.records.values())
        return self.by_run.get(run)


# ------------------------------------------------------------------------------------------------------------ studies
def ensure(
    study: Runnable,
    labels: Sequence[str],
    *,
    profile: str = "paper",
    seeds: int | None = None,
    executor_name: str = "inline",
    folder: Path | None = None,
    progress: bool = True,
    split_seed: int | None = None,
) -> Store:
    """The store of ``study`` with every run that ``labels`` need: those present are read, the missing ones computed."""
    store = Store.of(study.STUDY.name, profile, folder=folder)
    if not todo(study.STUDY, store, labels, profile, seeds, split_seed):
        return store
    with store.writing(), executor(executor_name) as (pool, in_flight):
        lookup = store.lookup(study.STUDY)
        for phase in study.STUDY.phases(profile, labels, seeds, lookup, split_seed):
            missing = [run for run in phase if lookup(run) is None]
            if missing:
                with _bar(len(missing), progress) as bar:
                    run_all(
                        study.units(missing), study.work, store=store, executor=pool, in_flight=in_flight, finished=bar
                    )
    return store


def todo(
    study: Study, store: Store, labels: Sequence[str], profile: str, seeds: int | None, split_seed: int | None = None
) -> list[Any]:
    """Every run still missing; where a search is unfinished a candidate stands in for the selected one."""
    lookup = store.lookup(study)
    phases = study.phases(profile, labels, seeds, lookup, split_seed)
    return list(dict.fromkeys(run for phase in phases for run in phase if lookup(run) is None))


def cost(
    study: Study, labels: Sequence[str], *, profile: str, seeds: int | None = None, folder: Path | None = None
) -> Record:
    """What ``ensure`` would compute: how many runs are missing, and how many seconds such runs took before."""
    store = Store.of(study.name, profile, folder=folder)
    missing = todo(study, store, labels, profile, seeds)
    known = [record["seconds"] for record in store.records.values()]
    each = sum(known) / len(known) if known else study.profiles[profile].get("seconds", 1.0)
    return {"missing": len(missing), "present": len(store.records), "seconds": round(each * len(missing), 1)}


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda runs: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="run", desc="training", leave=False) as bar:
        yield bar.update
