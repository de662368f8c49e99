"""Parties in one process and by Flower: the same bytes, whatever is killed in between.

The Flower part runs the documented deployment on this machine: SuperLink, two SuperNodes and their apps, each a process
of its own, with TLS and registered keys. It is skipped where Flower is not installed.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from fairtuning import paths
from fairtuning.collaboration import ExchangeError, Seat, exchange, locked
from fairtuning.collaboration.messages import Message, Refused, decode, encode, shapes_of
from fairtuning.collaboration.transcript import Transcript, TranscriptError, compare

PARTIES = ("auditor", "developer")
TURNS = ["auditor", "developer", "auditor", "developer"]


class Toy:
    """Two small tensors that drift in each turn, towards the other party's."""

    def __init__(self, name, transcript, *, turns=len(TURNS), hurt=lambda party: None):
        self.name, self.transcript, self.turns, self.hurt = name, transcript, turns, hurt
        self.other = PARTIES[1 - PARTIES.index(name)]
        generator = torch.Generator().manual_seed(PARTIES.index(name))
        self.adapter = {
            "qkv.lora_A.weight": torch.randn(2, 4, generator=generator),
            "qkv.lora_B.weight": torch.randn(6, 2, generator=generator),
        }
        self.taken = 0

    def turn(self, incoming):
        if incoming is not None:
            round = self.taken if self.name == "developer" else self.taken - 1
            allowed = shapes_of(self.adapter)
            received = decode(incoming, allowed=allowed, sender=self.other, receiver=self.name, round=round)
            self.transcript.append("received", incoming)
            self.adapter = {name: (value + received.tensors[name]) / 3 for name, value in self.adapter.items()}
        self.hurt(self)
        self.taken += 1
        if self.name == "developer" and self.taken == self.turns // 2:
            return None
        data = encode(Message(self.name, self.other, self.taken - 1, self.adapter))
        self.transcript.append("sent", data)
        return data

    def save(self, folder):
        torch.save(self.adapter | {"taken": self.taken}, folder / "toy.pt")

    def load(self, folder):
        self.adapter = torch.load(folder / "toy.pt")
        self.taken = self.adapter.pop("taken")


def toys(folder=None, **hurt):
    return {
        name: Toy(
            name,
            Transcript(folder / name / "transcript.jsonl" if folder else None, party=name),
            hurt=hurt.get(name, lambda party: None),
        )
        for name in PARTIES
    }


def final(folder):
    """What is left of an exchange: adapters' bytes, heads."""
    found = {}
    for name in PARTIES:
        done = json.loads((folder / name / "completed.json").read_text())
        party = Toy(name, Transcript(folder / name / "transcript.jsonl", party=name))
        party.load(folder / name / f"turn-{done['turn']}")
        found[name] = (encode(Message("a", "b", 0, party.adapter)), done["head"], party.transcript.head)
    assert compare(folder / "auditor/transcript.jsonl", folder / "developer/transcript.jsonl") == 3
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert exchange(toys(folder), TURNS, folder=folder)["turns"] == 4
    return final(folder)


def wrong(kind, act, *words):
    with pytest.raises(kind) as error:
        act()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# -------------------------------------------------------------------------------------------------------- one process
def test_in_memory(undisturbed):
    parties = toys()
    done = exchange(parties, TURNS)
    assert (done["turns"], done["resumed"]) == (4, 0)
    for name, party in parties.items():
        adapter, head, _ = undisturbed[name]
        assert encode(Message("a", "b", 0, party.adapter)) == adapter and done["heads"][name] == head
    assert compare(*(parties[name].transcript for name in PARTIES)) == 3


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("where", ["turn", "save", "kept"])
def test_stopped_anywhere_and_gone_on(tmp_path, undisturbed, monkeypatch, turn, where):
    """Within a turn, between training and saving, and just before the turn counts."""

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    name, own = TURNS[turn], turn // 2
    parties = toys(tmp_path, **({name: lambda party: party.taken == own and stop()} if where == "turn" else {}))
    if where == "save":
        save = parties[name].save
        parties[name].save = lambda folder: stop() if parties[name].taken == own + 1 else save(folder)
    if where == "kept":
        import fairtuning.collaboration as module

        write = module._write
        monkeypatch.setattr(
            module,
            "_write",
            lambda path, data: stop() if f'"turn": {turn}'.encode() in data else write(path, data),
        )
    with pytest.raises(Stop):
        exchange(parties, TURNS, folder=tmp_path)
    monkeypatch.undo()
    again = exchange(toys(tmp_path), TURNS, folder=tmp_path)
    assert again["resumed"] == turn and final(tmp_path) == undisturbed
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert exchange(toys(tmp_path), TURNS, folder=tmp_path)["resumed"] == 4  # nothing left to do
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_seat_takes_its_next_turn_or_answers_the_last_again(tmp_path):
    parties = toys()
    auditor, developer = (Seat(parties[name], TURNS, folder=tmp_path / name) for name in PARTIES)
    first = auditor.take(0, None)
    assert auditor.take(0, None) == first and parties["auditor"].taken == 1  # an answer lost on its way
    wrong(ExchangeError, lambda: auditor.take(0, first), "asked for turn 0 and has completed 0; allowed: turn 2")
    wrong(ExchangeError, lambda: developer.take(3, first), "asked for turn 3 and has completed -1; allowed: turn 1")
    wrong(ExchangeError, lambda: developer.take(0, None), "allowed: turn 1")
    second = developer.take(1, first)
    third = auditor.take(2, second)
    wrong(ExchangeError, lambda: auditor.take(0, None), "it has no turn left")  # a late one
    assert developer.take(3, third) is None and developer.last() == (3, None)
    again = Seat(toys()["developer"], TURNS)
    wrong(Refused, lambda: again.take(1, second), "sender is 'developer'")  # one's own message
    wrong(Refused, lambda: again.take(1, first[:-1]), "bytes")
    wrong(Refused, lambda: again.take(1, third), "round is 1, expected 0")
    assert again.last() == (-1, None) and again.party.transcript.lines == [] and again.party.taken == 0
    assert again.take(1, first) == second


def test_a_malformed_message_applies_nothing(tmp_path, undisturbed):
    parties = toys(tmp_path)
    take = parties["auditor"].turn
    parties["auditor"].turn = lambda incoming: take(incoming) + b"\0"
    wrong(Refused, lambda: exchange(parties, TURNS, folder=tmp_path), "bytes")
    assert not list((tmp_path / "developer").glob("*"))  # neither a turn nor a line of its transcript


def test_turns_that_do_not_fit():
    wrong(ExchangeError, lambda: exchange(toys(), ["auditor", "auditor"]), "in alternation")
    wrong(ExchangeError, lambda: exchange(toys(), []), "one or more")
    wrong(ExchangeError, lambda: exchange(toys(), ["evaluator"]), "'evaluator'; allowed: auditor, developer")
    wrong(ExchangeError, lambda: exchange(toys(), TURNS[:3]), "auditor sent a message in the last turn")


def test_folders_that_do_not_fit(tmp_path, undisturbed):
    exchange(toys(tmp_path), TURNS, folder=tmp_path)
    longer = [*TURNS, *TURNS]
    wrong(ExchangeError, lambda: exchange(toys(tmp_path), longer, folder=tmp_path), "other turns or settings")
    parties = toys(tmp_path)
    wrong(
        ExchangeError,
        lambda: Seat(parties["auditor"], TURNS, folder=tmp_path / "auditor", settings={"seed": 1}),
        "other turns or settings",
    )
    with locked(tmp_path):
        wrong(ExchangeError, lambda: exchange(toys(tmp_path), TURNS, folder=tmp_path), "another process")
    answer = tmp_path / "auditor" / "turn-2" / "answer.safetensors"
    answer.write_bytes(answer.read_bytes()[:-1])
    wrong(ExchangeError, lambda: exchange(toys(tmp_path), TURNS, folder=tmp_path), "does not hold a whole turn")
    shutil.rmtree(answer.parent)
    wrong(ExchangeError, lambda: exchange(toys(tmp_path), TURNS, folder=tmp_path), "does not hold a whole turn")


def test_a_transcript_cut_or_changed_stops_it(tmp_path):
    stop = {"developer": lambda party: party.taken and 1 / 0}
    with pytest.raises(ZeroDivisionError):
        exchange(toys(tmp_path, **stop), TURNS, folder=tmp_path)
    path = tmp_path / "auditor" / "transcript.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    wrong(ExchangeError, lambda: exchange(toys(tmp_path), TURNS, folder=tmp_path), "does not reach turn 2")
    path.write_bytes(whole.replace(b"sent", b"sunt", 1))
    wrong(TranscriptError, lambda: toys(tmp_path), "line 1 ")


# ------------------------------------------------------------------------------------------------------------- Flower
def toy(party, settings, transcript):
    """What a node's configuration names as its factory. A file ``hurt`` beside the transcript says what befalls it."""
    marker = transcript.path.with_name("hurt")

    def hurt(toy):
        if marker.exists() and (how := marker.read_text()):
            marker.unlink()
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "hang":
                marker.with_name("hanging").touch()
                time.sleep(600)
            elif how == "fail":
                raise RuntimeError("the attribute of person 7 is 1")
            elif how == "spoil":
                toy.adapter = {name: value[:, :1] for name, value in toy.adapter.items()}

    return Toy(party, transcript, turns=settings["turns"], hurt=hurt)


class Deployment:
    """What the book's deployment page says, on this machine: certificate, keys, SuperLink, two SuperNodes, runs.

    ``address`` is the SuperLink's; ``within`` has what each command begins with, by party, and for all else by "hub".
    """

    def __init__(self, folder, *, address="127.0.0.1", within=None):
        self.folder, self.running, self.address, self.within = folder, {}, address, within or {}
        self.bin = Path(sys.executable).parent
        self.ports = [free_port() for _ in range(3)]
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(paths.ROOT / "lib"), str(Path(__file__).parent)]),
            "PATH": os.pathsep.join([str(self.bin), os.environ["PATH"]]),
        }
        new = ("openssl", "req", "-newkey", "rsa:3072", "-nodes")
        names = f"subjectAltName=DNS:localhost,IP:{address}"
        self.do(*new, "-x509", "-days", "2", "-subj", "/CN=CA", "-keyout", "ca.key", "-out", "ca.crt")
        self.do(*new, "-subj", "/CN=localhost", "-addext", names, "-keyout", "server.key", "-out", "server.csr")
        self.do("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-copy_extensions", "copy", "-out", "server.pem")  # fmt: skip
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}:{self.ports[0]}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        self.start("superlink", "flower-superlink", "--host", address, "--port", str(self.ports[0]),
                   "--enable-supernode-auth", "--disable-runtime-dependency-installation",
                   "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem",
                   "--ssl-keyfile", "server.key")  # fmt: skip

    def open(self):
        wait_for(self.listens)
        for party in (*PARTIES, "stranger"):
            self.do("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"{party}.key")
        for party in PARTIES:
            self.do("flwr", "supernode", "register", f"{party}.key.pub", "here", "--name", party)
            self.start_node(party)

    def start_node(self, party, *, key=None):
        self.start(party, "flower-supernode", "--superlink", f"{self.address}:{self.ports[0]}",
                   "--root-certificates", "ca.crt", "--auth-supernode-private-key", f"{key or party}.key",
                   "--port", str(self.ports[1 + PARTIES.index(party)]), "--node-config",
                   f'party="{party}" folder="{self.folder / party}" factory="test_flower:toy"')  # fmt: skip

    def start_node_again(self, party):
        """A SuperLink takes a killed node back once it has missed two heartbeats; until then the node leaves again."""
        log = self.folder / f"{party}.log"
        before = log.read_text().count("SuperNode ID")
        until = time.monotonic() + 300
        while time.monotonic() < until:
            self.start_node(party)
            wait_for(lambda: self.running[party].poll() is not None or log.read_text().count("SuperNode ID") > before)
            if self.running[party].poll() is None:
                return
            time.sleep(5)
        raise AssertionError(f"the {party}'s node does not come back: {log.read_text()[-500:]}")

    def run(self, exchange, *, wait=120):
        """`flwr run` until it ends; what it printed."""
        return self.do(
            "flwr", "run", str(paths.ROOT / "lib/fairtuning/collaboration/app"), "here", "--stream", "--run-config",
            f'exchange="{exchange}" turns=4 wait={wait}',
        )  # fmt: skip

    def hurt(self, party, exchange, how):
        (self.folder / party / exchange).mkdir(parents=True)
        (self.folder / party / exchange / "hurt").write_text(how)

    def final(self, exchange):
        shown = self.folder / "shown" / exchange
        for party in PARTIES:
            shutil.copytree(self.folder / party / exchange, shown / party)
        return final(shown)

    def listens(self):
        """Whether the SuperLink does."""
        code = f"import socket; socket.create_connection(({self.address!r}, {self.ports[0]}), 5)"
        command = [*self.within.get("hub", []), sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def do(self, *command):
        done = subprocess.run(
            [*self.within.get("hub", []), *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert command[:2] == ("flwr", "run") or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name, *command):
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [*self.within.get(name, self.within.get("hub", [])), *command],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.running[name]

    def kill(self, name):
        """The node and its app, at once: as where a machine loses power."""
        process = self.running.pop(name)
        if process.poll() is None:
            for child in descendants(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()

    def close(self):
        for name in list(self.running):
            self.kill(name)


def wait_for(condition, *, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} seconds"
        time.sleep(0.2)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def descendants(pid):
    """Those of every thread's, the youngest first."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it may have ended by now
            for child in map(int, children.read_text().split()):
                found += [*descendants(child), child]
    return found


@pytest.fixture(scope="module")
def flower():
    if importlib.util.find_spec("flwr") is None:
        pytest.skip("Flower is not installed (pip install 'fairtuning[collab]')")


@contextmanager
def opened(folder, **place):
    found = Deployment(folder, **place)
    try:
        found.open()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def deployment(flower, tmp_path_factory):
    with opened(tmp_path_factory.mktemp("flower")) as found:
        yield found


HUB = "192.0.2.1"  # addresses of RFC 5737, which nobody has
LINKS = {"auditor": ("192.0.2.5", "192.0.2.6"), "developer": ("192.0.2.9", "192.0.2.10")}  # the hub's end, the party's


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces(flower):
    """A hub's network and each party's, whose only way out is a link to the hub; name -> what a command begins with."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces take iproute2 and root")
    names = {who: f"fairtuning-{os.getpid()}-{who}" for who in ("hub", *PARTIES)}
    try:
        for name in names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names["hub"], "addr", "add", f"{HUB}/32", "dev", "lo")
        for party, (here, there) in LINKS.items():
            peer = ("type", "veth", "peer", "name", "hub", "netns", names[party])
            ip("-n", names["hub"], "link", "add", party, *peer)
            for who, device, address in (("hub", party, here), (party, "hub", there)):
                ip("-n", names[who], "addr", "add", f"{address}/30", "dev", device)
                ip("-n", names[who], "link", "set", device, "up")
            ip("-n", names[party], "route", "add", HUB, "via", here)
        yield {who: ["ip", "netns", "exec", name] for who, name in names.items()}
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_by_flower_as_in_one_process(deployment, undisturbed):
    output = deployment.run("plain")
    assert deployment.final("plain") == undisturbed, output
    assert [f"turn {n}: {name}" in output for n, name in enumerate(TURNS)] == [True] * 4
    assert all(f"{name}: head {undisturbed[name][1]}" in output for name in PARTIES)


@pytest.mark.slow
def test_parties_on_networks_of_their_own(tmp_path, namespaces, undisturbed):
    """As on three machines: both parties reach the SuperLink, neither reaches the other."""
    with opened(tmp_path, address=HUB, within=namespaces) as apart:
        output = apart.run("apart")
        assert apart.final("apart") == undisturbed, output
    for party, other in (PARTIES, PARTIES[::-1]):
        for address, reached in ((HUB, True), (LINKS[other][1], False)):
            route = subprocess.run(
                [*namespaces[party], "ip", "route", "get", address], capture_output=True, check=False
            )
            assert (route.returncode == 0) == reached, (party, address)


@pytest.mark.slow
def test_an_app_killed_within_a_turn_is_asked_again(deployment, undisturbed):
    deployment.hurt("developer", "killed", "die")
    output = deployment.run("killed")
    assert "developer was lost in turn 1" in output and deployment.final("killed") == undisturbed, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, line",
    [
        ("spoil", "error: message refused: 'qkv.lora_A.weight' is float32 [2, 1], agreed: float32 [2, 4]"),
        ("fail", "error: auditor failed (RuntimeError); its own log says more"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_next_run_goes_on(deployment, undisturbed, how, line):
    deployment.hurt("auditor", how, how)
    output = deployment.run(how)
    assert line in output and "person" not in output, output
    assert not (deployment.folder / "developer" / how / "transcript.jsonl").exists()
    if how == "spoil":  # what the auditor sent cannot be unsaid: the exchange starts anew
        shutil.rmtree(deployment.folder / "auditor" / how)
    deployment.run(how)
    assert deployment.final(how) == undisturbed


@pytest.mark.slow
def test_a_node_lost_within_a_turn(deployment, undisturbed):
    """Killed with its app, as by a loss of power; started again, it goes on from its last completed turn."""
    deployment.hurt("developer", "lost", "hang")
    command = ["flwr", "run", str(paths.ROOT / "lib/fairtuning/collaboration/app"), "here", "--stream"]
    run = deployment.start("run", *command, "--run-config", 'exchange="lost" turns=4 wait=300')
    wait_for((deployment.folder / "developer" / "lost" / "hanging").exists)
    deployment.kill("developer")
    deployment.start_node_again("developer")
    assert run.wait(timeout=600) == 0
    assert "developer was lost in turn 1" in (deployment.folder / "run.log").read_text()
    assert deployment.final("lost") == undisturbed


@pytest.mark.slow
def test_a_stranger_s_node_is_not_let_in(deployment):
    """Another key than the registered ones; then the auditor does not come, which is one line."""
    deployment.kill("auditor")
    deployment.start_node("auditor", key="stranger")
    output = deployment.run("strange", wait=5)
    assert "error: no auditor within 5 seconds; start its SuperNode, then run again" in output, output
    assert not (deployment.folder / "auditor" / "strange").exists()
    deployment.kill("auditor")
    deployment.start_node_again("auditor")
