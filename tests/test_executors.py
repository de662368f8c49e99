"""One study, three ways to run it: inline, in processes, on a dask cluster of which a worker is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fairtuning import runs
from fairtuning.runs import Inline, RunError, Store, executor, run_all

HERE = Path(__file__).parent
QUIET = ("seconds", "environment")


def toy_work(unit):
    return [{"kind": "record", "key": f"k{number}", "square": number**2} for number in unit]


def deadly_work(unit):
    """Number 3 kills the process that computes it, after a while in which others can return."""
    if 3 in unit:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return toy_work(unit)


def compute(work, tmp_path, *, pool, in_flight=3):
    store = Store(tmp_path / "toy.jsonl")
    with store.writing():
        run_all([[0], [1, 2], [3], [4]], work, store=store, executor=pool, in_flight=in_flight)
    return Store(store.path).records


SQUARES = {f"k{number}": {"kind": "record", "key": f"k{number}", "square": number**2} for number in range(5)}


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# --------------------------------------------------------------------------------------------------------- on one box
def test_any_executor_will_do(tmp_path):
    assert compute(toy_work, tmp_path / "inline", pool=Inline()) == SQUARES
    with ThreadPoolExecutor(2) as pool:
        assert compute(toy_work, tmp_path / "threads", pool=pool) == SQUARES
    for name in ("inline", "processes"):
        with executor(name) as (pool, in_flight):
            assert compute(toy_work, tmp_path / name, pool=pool, in_flight=in_flight) == SQUARES


def test_at_most_so_many_units_are_handed_out(tmp_path):
    class Counting(Inline):
        open, most = 0, 0

        def submit(self, work, unit):
            self.open += 1
            self.most = max(self.most, self.open)
            future = super().submit(work, unit)
            result = future.result
            future.result = lambda: (setattr(self, "open", self.open - 1), result())[1]
            return future

    for in_flight in (1, 2, 10):
        pool = Counting()
        compute(toy_work, tmp_path / str(in_flight), pool=pool, in_flight=in_flight)
        assert pool.most == min(in_flight, 4)


def test_progress_counts_records_only(tmp_path):
    seen = []
    store = Store(tmp_path / "toy.jsonl")
    work = lambda unit: [{"kind": "environment", "key": "here"}, *toy_work(unit)]  # noqa: E731
    with store.writing():
        run_all([[0], [1, 2]], work, store=store, executor=Inline(), finished=seen.append)
    assert seen == [1, 2] and set(store.environments) == {"here"}


def test_a_dead_worker_process_is_one_line_and_the_rest_is_recorded(tmp_path):
    with pytest.raises(RunError) as error, executor("processes") as (pool, _):
        compute(deadly_work, tmp_path, pool=pool, in_flight=4)
    one_line(error, "worker process died", "start again")
    left = Store(tmp_path / "toy.jsonl").records
    assert {"k0", "k1", "k2"} <= set(left) <= set(SQUARES) - {"k3"}
    assert compute(toy_work, tmp_path, pool=Inline()) == SQUARES


def slow_work(folder, unit):
    (Path(folder) / "begun").write_text(str(os.getpid()))
    time.sleep(3)
    (Path(folder) / "ended").touch()
    return toy_work(unit)


def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    """They went on once, a core and 1.6 GB each, beside the launcher that was started after it."""
    code = f"""
from functools import partial
from fairtuning.runs import Store, executor, run_all
from test_executors import slow_work
if __name__ == "__main__":
    store = Store({str(tmp_path / "toy.jsonl")!r})
    with store.writing(), executor("processes") as (pool, in_flight):
        run_all([[0]], partial(slow_work, {str(tmp_path)!r}), store=store, executor=pool, in_flight=in_flight)
"""
    script = tmp_path / "launch.py"
    script.write_text(code)
    path = os.pathsep.join([str(HERE.parent / "lib"), str(HERE)])
    launcher = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": path})
    for _ in range(1200):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    time.sleep(4)
    assert (tmp_path / "begun").exists() and not (tmp_path / "ended").exists()


@pytest.mark.parametrize("name", ["threads", "", "Inline"])
def test_an_unknown_executor_is_one_line(name):
    with pytest.raises(RunError) as error, executor(name):
        pass
    one_line(error, f"executor is {name!r}", "inline, processes", "tcp://")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nowhere.invalid:8786", "udp://127.0.0.1:9", "tcp:"])
def test_no_scheduler_is_one_line(address, monkeypatch):
    import distributed

    monkeypatch.setattr(distributed, "Client", lambda name, timeout, make=distributed.Client: make(name, timeout=0.3))
    with pytest.raises(RunError) as error, executor(address):
        pass
    one_line(error, "no dask scheduler answers", repr(address))


def comparable(store):
    return {key: {k: v for k, v in record.items() if k not in QUIET} for key, record in store.records.items()}


def same(store, undisturbed):
    """Every record of figure 4 is there, and equal to the one that was made inline."""
    ours, theirs = comparable(Store(store.path)), comparable(undisturbed)
    assert len(ours) == 20 and ours == {key: theirs[key] for key in ours}
    assert set(store.examples) == set(undisturbed.examples)


def test_processes_give_what_inline_gives(tmp_path, classroom):
    from fairtuning.studies import zhang2024

    how = dict(profile="classroom", folder=tmp_path, progress=False)
    same(runs.ensure(zhang2024, zhang2024.LABELS["figure4"], executor_name="processes", **how), classroom)


# -------------------------------------------------------------------------------------------------------- a cluster
@contextmanager
def cluster(folder, *, workers, **environment):
    """A dask scheduler and worker processes of their own, as on two machines: address, and one process per worker."""
    folder.mkdir()
    where = folder / "scheduler.json"
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(HERE.parent / "lib"), str(HERE)])}

    def start(module, *arguments):
        log = stack.enter_context((folder / f"{len(started)}.log").open("w"))
        command = [sys.executable, "-m", f"distributed.cli.{module}", "--no-dashboard", "--scheduler-file", str(where)]
        started.append(subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log))
        return started[-1]

    started = []
    with ExitStack() as stack:
        try:
            start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
            found = [start("dask_worker", "--no-nanny", "--nthreads", "1") for _ in range(workers)]
            yield scheduler_address(where), found
        finally:
            for process in started:
                process.kill()
                process.wait()


def scheduler_address(where, seconds=60):
    import json

    for _ in range(seconds * 20):
        if where.exists() and where.read_text().endswith("}"):
            return json.loads(where.read_text())["address"]
        time.sleep(0.05)
    raise TimeoutError(f"no scheduler within {seconds} s")


def noted_work(folder, unit):
    """The study's own work; a file per worker process says when it starts and ends a unit."""
    from fairtuning.studies import zhang2024

    with open(Path(folder) / f"{os.getpid()}.events", "a", buffering=1) as events:
        events.write("start\n")
        lines = zhang2024.work(unit)
        events.write("end\n")
    return lines


def kill_mid_run(folder, killed):
    """Kills the first worker seen in the midst of its second unit, or a later one."""
    while not killed:
        for path in folder.glob("*.events"):
            events = path.read_text().split()
            if events[2:] and events[-1] == "start":
                os.kill(int(path.stem), signal.SIGKILL)
                killed.append(int(path.stem))
                break
        time.sleep(0.002)


@pytest.mark.slow
def test_a_cluster_of_which_a_worker_is_killed_gives_what_inline_gives(tmp_path, classroom):
    from fairtuning.studies import zhang2024

    study = SimpleNamespace(**vars(zhang2024))
    study.units = partial(zhang2024.units, size=2)
    study.work = partial(noted_work, str(tmp_path))
    killed = []
    with cluster(tmp_path / "dask", workers=2) as (address, workers):
        watcher = threading.Thread(target=kill_mid_run, args=(tmp_path, killed), daemon=True)
        watcher.start()
        store = runs.ensure(
            study,
            zhang2024.LABELS["figure4"],
            profile="classroom",
            folder=tmp_path,
            executor_name=address,
            progress=False,
        )
        watcher.join(1)
        assert [worker.pid for worker in workers if worker.poll() == -signal.SIGKILL] == killed and len(killed) == 1
    same(store, classroom)
    events = (tmp_path / f"{killed[0]}.events").read_text().split()
    assert events.count("start") == events.count("end") + 1  # it died at work, and another did that work


@pytest.mark.slow
def test_a_cluster_that_fails_is_one_line(tmp_path):
    """A unit that kills every worker it comes to."""
    once = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with cluster(tmp_path / "dask", workers=1, **once) as (address, _):
        with pytest.raises(RunError) as error, executor(address) as (pool, in_flight):
            compute(deadly_work, tmp_path, pool=pool, in_flight=in_flight)
        one_line(error, "worker", "start again")
