"""The same turns across machines, by Flower: one SuperNode per party, and a ServerApp that carries what they say.

A SuperNode's own configuration says whose it is: ``party`` (developer or auditor), ``folder`` (state and transcript of
each exchange, never sent) and ``factory`` (``package.module:function``, which makes the Party from its name, the run's
configuration and a Transcript). The run's configuration has the name of the ``exchange``, whose turn is ``first``, how
many ``turns`` there are, how many seconds to ``wait`` for a party, and whatever else the factories ask for. A second
run of the same exchange goes on where the first one stopped.
The server sees bytes; what they may hold each party checks for itself, and writes down.

Flower is imported here alone: ``pip install 'fairtuning[collab]'``.
"""

import importlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from fairtuning import FairtuningError
from fairtuning.collaboration import ExchangeError, Seat, check_turns, kept, locked, route
from fairtuning.collaboration.transcript import Transcript, TranscriptError

PARTIES = ("developer", "auditor")
ATTEMPTS = 3  # at one turn, where a party's process dies in it
WAIT = 600.0  # seconds for a party to come, or to come back
#: Errors of Flower's that mean that a party's process or connection was lost; the turn can be asked for again.
LOST = {
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
}
_log = logging.getLogger("flwr")


def turns_of(settings: Mapping[str, Any]) -> list[str]:
    """The parties in alternation, from ``first``, ``turns`` in all."""
    first, number = settings.get("first"), settings.get("turns")
    if first not in PARTIES or type(number) is not int or not 1 <= number <= 10_000:
        raise ExchangeError(f"first is {first!r}, turns {number!r}; allowed: {', '.join(PARTIES)}; 1 to 10000")
    start = PARTIES.index(first)
    turns = [PARTIES[(start + n) % 2] for n in range(number)]
    check_turns(turns, PARTIES)
    return turns


# ------------------------------------------------------------------------------------------------------------- a party
client = ClientApp()


@client.query()
def last(message: Message, context: Context) -> Message:
    """Whose node this is, its last completed turn, and the answer it gave then."""

    def act(party: str, folder: Path) -> dict[str, Any]:
        done, answer = kept(folder, turns_of(context.run_config), settings=_agreed(context))
        return {"party": party, "turn": done["turn"], "head": done["head"], "answer": answer or b""}

    return _answered(message, context, act)


@client.train()
def take(message: Message, context: Context) -> Message:
    """One turn; its number and the other party's message are in ``message``, the answer goes back."""

    def act(party: str, folder: Path) -> dict[str, Any]:
        asked = message.content["turn"]
        module, _, function = str(context.node_config.get("factory", "")).partition(":")
        try:
            factory = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError):
            raise ExchangeError(
                f"{party}'s factory is {context.node_config.get('factory')!r}; it must be package.module:function"
            ) from None
        made = factory(party, context.run_config, Transcript(folder / "transcript.jsonl", party=party))
        seat = Seat(made, turns_of(context.run_config), folder=folder, settings=_agreed(context))
        answer = seat.take(asked["number"], asked["incoming"] or None)
        return {"party": party, "turn": asked["number"], "head": seat.head(), "answer": answer or b""}

    return _answered(message, context, act)


def _agreed(context: Context) -> dict[str, Any]:
    return {name: value for name, value in context.run_config.items() if name != "wait"}


def _answered(message: Message, context: Context, act: Callable[[str, Path], dict[str, Any]]) -> Message:
    """What ``act`` gives, or one line that says why not; a foreign exception's text could hold data and stays here."""
    party, folder = context.node_config.get("party"), context.node_config.get("folder")
    exchange = str(context.run_config.get("exchange"))
    try:
        if party not in PARTIES or not folder:
            raise ExchangeError(f"a node's party is {party!r}, its folder {folder!r}; allowed: {', '.join(PARTIES)}")
        if not re.fullmatch(r"[a-z0-9-]{1,40}", exchange):
            raise ExchangeError(f"exchange is {exchange[:80]!r}; allowed: small letters, digits and -")
        own = Path(str(folder)) / exchange
        with locked(own):
            record = act(str(party), own)
    except FairtuningError as error:
        _log.error("%s", error)
        record = {"party": str(party), "error": str(error) if _speaks_of_messages(error) else _failed(party, error)}
    except Exception as error:
        _log.exception("%s failed", party)
        record = {"party": str(party), "error": _failed(party, error)}
    return Message(RecordDict({"turn": ConfigRecord(record)}), reply_to=message)


def _speaks_of_messages(error: FairtuningError) -> bool:
    from fairtuning.collaboration.messages import Refused  # torch, which neither the server nor a query needs

    return isinstance(error, (Refused, ExchangeError, TranscriptError))


def _failed(party: object, error: Exception) -> str:
    return f"{party} failed ({type(error).__name__}); its own log says more"


# ---------------------------------------------------------------------------------------------------------- the router
server = ServerApp()


class Lost(Exception):
    """A party's process or connection was lost before it answered."""


class Remote:
    """A Seat on another machine: its ``node`` and what that says of its ``last`` turn."""

    def __init__(self, grid: Grid, party: str, node: int, last: dict[str, Any], *, wait: float):
        self.grid, self.party, self.wait = grid, party, wait
        self._node, self._last = node, last

    def last(self) -> tuple[int, bytes | None]:
        return self._last["turn"], self._last["answer"] or None

    def head(self) -> str:
        return self._last["head"]

    def take(self, number: int, incoming: bytes | None) -> bytes | None:
        """As a Seat's; a party that was lost is waited for and asked again, ATTEMPTS times."""
        for _ in range(ATTEMPTS):
            try:
                self._last = _call(self.grid, self._node, "train", {"number": number, "incoming": incoming or b""})
                return self._last["answer"] or None
            except Lost as lost:
                _log.warning("%s was lost in turn %d (%s); it is asked again", self.party, number, lost)
                self._node, self._last = _find(self.grid, [self.party], wait=self.wait)[self.party]
        raise ExchangeError(
            f"{self.party} was lost {ATTEMPTS} times in turn {number}; see its log, then run again: the exchange goes "
            f"on after turn {number - 1}"
        )


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Carries the turns that are left; whatever stops it is one line, and the next run goes on from there."""
    settings = context.run_config
    try:
        turns = turns_of(settings)
        wait = float(settings.get("wait", WAIT))
        found = _find(grid, list(dict.fromkeys(turns)), wait=wait)
        seats = {party: Remote(grid, party, *at, wait=wait) for party, at in found.items()}
        done = route(seats, turns, taken=lambda number: _log.info("turn %d: %s", number, turns[number]))
    except FairtuningError as error:
        _log.error("error: %s", error)
        raise  # so that Flower counts the run as failed; it adds its own traceback
    for party, head in done["heads"].items():
        _log.info("%s: head %s", party, head)


def _find(grid: Grid, parties: Sequence[str], *, wait: float) -> dict[str, tuple[int, dict[str, Any]]]:
    """For each of ``parties`` its node and what that says of its last turn; waits for them to come."""
    until = time.monotonic() + wait
    while True:
        found: dict[str, tuple[int, dict[str, Any]]] = {}
        for node in grid.get_node_ids():
            try:
                record = _call(grid, node, "query", {}, timeout=max(1.0, until - time.monotonic()))
            except Lost:
                continue
            if record["party"] in found:
                raise ExchangeError(f"two nodes say that they are the {record['party']}; allowed: one")
            found[record["party"]] = (node, record)
        lacking = [party for party in parties if party not in found]
        if not lacking:
            return {party: found[party] for party in parties}
        if time.monotonic() > until:
            raise ExchangeError(f"no {lacking[0]} within {wait:g} seconds; start its SuperNode, then run again")
        time.sleep(1)


def _call(grid: Grid, node: int, kind: str, record: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
    """What the party on ``node`` answers. Raises Lost where it cannot, ExchangeError with its line where it refuses."""
    message = Message(RecordDict({"turn": ConfigRecord(record)}), dst_node_id=node, message_type=kind)
    for reply in grid.send_and_receive([message], timeout=timeout):
        if reply.has_error():
            if reply.error.code in LOST:
                raise Lost(reply.error.reason)
            raise ExchangeError(f"a party's node failed (Flower's error {reply.error.code}); its own log says more")
        answer = dict(reply.content["turn"])
        if "error" in answer:
            raise ExchangeError(" ".join(str(answer["error"]).split()))
        return answer
    raise Lost("no answer in time")
