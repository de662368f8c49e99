"""Messages and transcripts as files in a folder: whole, one per round, waited for, or made by a stand-in."""

import threading

import pytest
import torch

from fairtuning.collaboration import ExchangeError
from fairtuning.collaboration.folder import put, put_transcript, wait_for, wait_for_transcript
from fairtuning.collaboration.messages import Message, Refused, encode
from fairtuning.collaboration.transcript import Transcript, compare

NAME = "blocks.0.attn.qkv.lora_A.weight"


def message(value=0.0, sender="auditor", round=0):
    receiver = {"auditor": "developer", "developer": "auditor"}[sender]
    return encode(Message(sender, receiver, round, {NAME: torch.full((2, 3), value)}))


def test_a_message_arrives_as_it_was_sent_and_only_one_of_a_round(tmp_path):
    path = put(tmp_path / "new", message())
    assert put(tmp_path / "new", message()) == path  # the same again is no other message
    assert wait_for(tmp_path / "new", "auditor", 0) == message()
    with pytest.raises(ExchangeError, match="other content; take another folder"):
        put(tmp_path / "new", message(1.0))
    put(tmp_path / "new", message(1.0, round=1))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["auditor-0.safetensors", "auditor-1.safetensors"]
    with pytest.raises(Refused):
        put(tmp_path, b"no message")


def test_who_waits_gets_what_comes_later(tmp_path):
    later = threading.Timer(0.1, put, (tmp_path, message()))
    later.start()
    assert wait_for(tmp_path, "auditor", 0, seconds=30) == message()
    later.join()


def test_a_stand_in_is_asked_only_by_who_does_not_wait(tmp_path):
    asked = []

    def stand_in():
        asked.append(True)
        return message()

    with pytest.raises(ExchangeError, match="did not come within 0.01 seconds"):
        wait_for(tmp_path, "auditor", 0, seconds=0.01, otherwise=stand_in)
    with pytest.raises(ExchangeError, match="did not come within 0 seconds"):
        wait_for(tmp_path, "auditor", 0)
    assert not asked
    assert wait_for(tmp_path, "auditor", 0, otherwise=stand_in) == message()
    assert wait_for(tmp_path, "auditor", 0, otherwise=stand_in) == message()  # it is there now
    assert len(asked) == 1


def test_transcripts_are_handed_over_and_compared(tmp_path):
    own = Transcript(tmp_path / "developer/transcript.jsonl", party="developer")
    other = Transcript(tmp_path / "auditor/transcript.jsonl", party="auditor")
    other.append("sent", message())
    own.append("received", message())
    with pytest.raises(ExchangeError, match="auditor-transcript.jsonl did not come"):
        wait_for_transcript(tmp_path / "shared", "auditor", seconds=0.01, otherwise=lambda: other)
    path = wait_for_transcript(tmp_path / "shared", "auditor", otherwise=lambda: other)
    assert compare(own, path) == 1
    other.append("sent", message(round=1))
    with pytest.raises(ExchangeError, match="other content"):
        put_transcript(tmp_path / "shared", other)
