"""Two parties: a developer who holds labels, an auditor who holds the sensitive attribute (arXiv 2503.05684).

They take turns. In a turn a party checks the message that the other one sent, trains, and answers. Everything that
crosses is an adapter (``messages``) and is written down by both (``transcript``). Here the turns run in one process, by
``exchange``; across machines the same turns are routed by Flower (``flower``).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fairtuning import FairtuningError
from fairtuning.collaboration.transcript import START, Transcript


class ExchangeError(FairtuningError):
    """An exchange that cannot start or go on."""


class Party(Protocol):
    """Developer or auditor. The same turns on the same data must give the same bytes."""

    name: str
    transcript: Transcript

    def turn(self, incoming: bytes | None) -> bytes | None:
        """Checks the message, trains, and returns the message for the other party; None where there is none."""

    def save(self, folder: Path) -> None:
        """Everything needed to go on after this turn, into an empty folder."""

    def load(self, folder: Path) -> None:
        """What ``save`` wrote."""


class Seat:
    """A party and its ``folder``, which holds it as it was after its last completed turn (None: nothing is kept).

    ``folder`` is the party's own: ``turn-<n>/`` with what the party saved and its answer, and ``completed.json``, which
    says what is whole. A turn counts once that file has been replaced; whatever stops it before leaves the turn before.
    ``settings`` are whatever else was agreed: a folder of other turns or settings is refused.
    """

    def __init__(
        self,
        party: Party,
        turns: Sequence[str],
        *,
        folder: Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.party = party
        self.folder = Path(folder) if folder is not None else None
        self._agreed = {"turns": list(turns), "settings": dict(settings or {})}
        self._done, self._answer = kept(self.folder, turns, settings=settings)
        if self.folder is not None and self._done["turn"] >= 0:
            if self._done["head"] not in {START, *(line["hash"] for line in party.transcript.lines)}:
                raise ExchangeError(f"{party.name}'s transcript does not reach turn {self._done['turn']}; restore it")
            party.load(_part(self.folder, self._done["turn"]))

    def last(self) -> tuple[int, bytes | None]:
        """The last completed turn (-1: none) and the answer it gave."""
        return self._done["turn"], self._answer

    def head(self) -> str:
        """The hash that stands for the party's transcript."""
        return self.party.transcript.head

    def take(self, number: int, incoming: bytes | None) -> bytes | None:
        """The party's turn ``number`` (its place in ``turns``). The turn just completed is answered as it was.

        Raises ExchangeError for any turn but that one and the party's next; whatever ``turn`` raises leaves the last
        completed turn as it is.
        """
        done, got = self._done["turn"], _sha256(incoming)
        if number == done and got == self._done["incoming"]:
            return self._answer
        turns = self._agreed["turns"]
        following = next((n for n in range(done + 1, len(turns)) if turns[n] == self.party.name), None)
        if number == done or number != following:
            raise ExchangeError(
                f"{self.party.name} was asked for turn {number} and has completed {done}; "
                + (f"allowed: turn {following}" if following is not None else "it has no turn left")
            )
        answer = self.party.turn(incoming)
        self._answer = answer
        self._done = {"turn": number, "incoming": got, "answer": _sha256(answer), "head": self.head()}
        if self.folder is not None:
            self._keep(self.folder)
        return answer

    def _keep(self, folder: Path) -> None:
        part = _part(folder, self._done["turn"])
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self.party.save(part)
        for file in part.rglob("*"):
            if file.is_file():
                _sync(file)
        if self._answer is not None:
            _write(part / "answer.safetensors", self._answer)
        _write(folder / "completed.json", json.dumps(self._done | self._agreed).encode())
        for older in folder.glob("turn-*"):
            if older != part:
                shutil.rmtree(older)


def kept(
    folder: Path | None, turns: Sequence[str], *, settings: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], bytes | None]:
    """What a Seat's folder says of the last completed turn (its number, the head then), and the answer it gave.

    Raises ExchangeError where that is not whole, or of another exchange.
    """
    if folder is None or not (Path(folder) / "completed.json").exists():
        return {"turn": -1, "incoming": None, "answer": None, "head": START}, None
    try:
        done = json.loads((Path(folder) / "completed.json").read_bytes())
        part = _part(Path(folder), done["turn"])
        answer = (part / "answer.safetensors").read_bytes() if done["answer"] else None
        whole = _sha256(answer) == done["answer"] and part.is_dir() and isinstance(done["head"], str)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ExchangeError(f"{folder} does not hold a whole turn; restore it, or start anew in an empty folder")
    if (done["turns"], done["settings"]) != (list(turns), dict(settings or {})):
        raise ExchangeError(f"{folder} holds an exchange with other turns or settings; use another folder")
    return done, answer


def exchange(parties: Mapping[str, Party], turns: Sequence[str], *, folder: Path | None = None) -> dict[str, Any]:
    """Runs ``turns`` (names of ``parties``, in alternation) in this process; each message goes to the party after.

    With a ``folder``, each party is kept in ``folder/<name>`` after each of its turns, and a second call with new
    parties goes on after the last completed one. Returns the number of turns and the head of each transcript. Raises
    Refused for a message that is not what was agreed, ExchangeError for turns that do not fit.
    """
    check_turns(turns, list(parties))
    with locked(folder):
        seats = {
            name: Seat(party, turns, folder=None if folder is None else Path(folder) / name)
            for name, party in parties.items()
        }
        return route(seats, turns)


def check_turns(turns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ExchangeError unless ``turns`` are turns of ``names`` in alternation."""
    if unknown := [name for name in turns if name not in names]:
        raise ExchangeError(f"turns name {unknown[0]!r}; allowed: {', '.join(names)}")
    if not turns or any(first == second for first, second in zip(turns, turns[1:], strict=False)):
        raise ExchangeError(f"turns are {list(turns)}; allowed: one or more, the parties in alternation")


def route(
    seats: Mapping[str, Any], turns: Sequence[str], *, taken: Callable[[int], None] = lambda number: None
) -> dict[str, Any]:
    """Goes through the turns that are left: ``seats`` are Seats, or what reaches them over a network.

    It reads nothing of what it carries. ``taken`` is called with each completed turn.
    """
    done, message = max((seat.last() for seat in seats.values()), key=lambda last: last[0])
    for number in range(done + 1, len(turns)):
        message = seats[turns[number]].take(number, message)
        taken(number)
    if message is not None:
        raise ExchangeError(f"{turns[-1]} sent a message in the last turn, which nobody received; add a turn")
    return {"turns": len(turns), "resumed": done + 1, "heads": {name: seat.head() for name, seat in seats.items()}}


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keeps other processes out of ``folder`` by an operating-system lock."""
    import filelock

    if folder is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(Path(folder) / "lock", timeout=0):
            yield
    except filelock.Timeout:
        raise ExchangeError(f"another process takes turns in {folder}; wait for it, or stop it first") from None


def _part(folder: Path, turn: int) -> Path:
    return folder / f"turn-{turn}"


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _sync(path: Path) -> None:
    """Whatever was written to a file is on the disk afterwards."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    """The whole file or the one before, whatever happens."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
