"""What may cross between developer and auditor (arXiv 2503.05684): LoRA adapters, and nothing else.

A message is a safetensors file in memory whose metadata hold sender, receiver, round and the version of this protocol.
The paper does not say what crosses the wire, nor how; names, shapes and bytes are our reading. The encoding is
canonical: one message has one byte string, so that a hash stands for it and nothing hides in padding, in the order of
keys or in metadata. Whoever receives a message states what it expects, and anything else is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fairtuning import FairtuningError
from fairtuning.runs import canonical

PROTOCOL = "1"
Shapes = dict[str, tuple[tuple[int, ...], str]]  # tensor name -> (shape, dtype such as "float32")

#: dtype -> (its name in safetensors, bytes per number)
DTYPES = {"float64": ("F64", 8), "float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
#: peft's names, of a state dict or of parameters: ``blocks.0.attn.qkv.lora_A.weight``, ``….lora_B.default.weight``
ADAPTER = re.compile(r"[A-Za-z0-9_.]{0,200}\blora_[AB](\.[A-Za-z0-9_]{1,40})?\.weight")
#: What timm and transformers call a classifier; a name with one of these parts never crosses, adapted or not.
HEADS = {"head", "heads", "head_dist", "fc", "classifier", "score", "logits", "modules_to_save"}
LONGEST_HEADER = 1 << 20  # bytes; an adapter of every linear layer of ViT-Large takes a tenth


class Refused(FairtuningError):
    """A message that is not what was agreed; nothing of it has been used."""


@dataclass(frozen=True)
class Message:
    """``tensors`` (an adapter) from ``sender`` to ``receiver`` in ``round`` (0 or more)."""

    sender: str
    receiver: str
    round: int
    tensors: dict[str, Tensor]


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Name -> (shape, dtype) of adapter tensors: what the other side is told to expect.

    Raises Refused for a tensor that is no adapter's (a head, a bias) and for a shape or dtype that no message can hold.
    """
    shapes = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in tensors.items()}
    _check(shapes)
    return shapes


def encode(message: Message) -> bytes:
    """The bytes of ``message``, always the same for the same message. Raises Refused for what may not leave."""
    data = [_header(shapes_of(message.tensors), message.sender, message.receiver, message.round)]
    for name in sorted(message.tensors):
        value = message.tensors[name].detach().cpu().contiguous()
        _check_finite(name, value)
        data.append(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(data)


def decode(data: bytes, *, allowed: Shapes, sender: str, receiver: str, round: int) -> Message:
    """The message in ``data``, if it is from ``sender`` to ``receiver``, of ``round``, and holds just ``allowed``.

    Names, shapes, dtypes and sizes are checked before a tensor is made. Raises Refused, in one line, for anything else:
    a tensor more or less, another shape or dtype, a head, a value that is not finite, other metadata, bytes cut or
    added.
    """
    _check(allowed)
    found_sender, found_receiver, found_round, shapes = read_header(data)
    for what, found, expected in (
        ("sender", found_sender, sender),
        ("receiver", found_receiver, receiver),
        ("round", found_round, round),
    ):
        if found != expected:
            raise Refused(f"message refused: its {what} is {found!r}, expected {expected!r}")
    if surplus := sorted(shapes.keys() - allowed.keys()):
        raise Refused(f"message refused: tensor {surplus[0]!r} is not one of the {len(allowed)} agreed")
    if lacking := sorted(allowed.keys() - shapes.keys()):
        raise Refused(f"message refused: tensor {lacking[0]!r} is missing ({len(allowed)} agreed, {len(shapes)} sent)")
    for name in sorted(allowed):
        if shapes[name] != allowed[name]:
            raise Refused(f"message refused: {name!r} is {_form(shapes[name])}, agreed: {_form(allowed[name])}")
    tensors, end = {}, len(data) - _size(shapes)
    for name in sorted(shapes):
        shape, dtype = shapes[name]
        start, end = end, end + _size({name: shapes[name]})
        value = torch.frombuffer(bytearray(data[start:end]), dtype=getattr(torch, dtype)).reshape(shape)
        _check_finite(name, value)
        tensors[name] = value
    return Message(sender, receiver, round, tensors)


def read_header(data: bytes) -> tuple[str, str, int, Shapes]:
    """Sender, receiver, round and shapes of a message, without its values. Raises Refused where it is not canonical."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(LONGEST_HEADER, len(data) - 8):
        raise Refused(f"message refused: {len(data)} bytes that are no safetensors file, or one cut short")
    try:
        header = json.loads(data[8 : 8 + length].decode("ascii"))
        metadata = header.pop("__metadata__")
        names = {"protocol", "sender", "receiver", "round"}
        if metadata.keys() != names:
            raise Refused(f"message refused: its metadata are {_cut(sorted(metadata))}, allowed: {sorted(names)}")
        if metadata["protocol"] != PROTOCOL:
            raise Refused(f"message refused: protocol {_cut(metadata['protocol'])}, here it is {PROTOCOL!r}")
        known = {short: dtype for dtype, (short, _) in DTYPES.items()}
        sender, receiver, round = metadata["sender"], metadata["receiver"], int(metadata["round"])
        shapes = {
            name: (tuple(entry["shape"]), known.get(entry["dtype"], entry["dtype"])) for name, entry in header.items()
        }
        expected = _header(shapes, sender, receiver, round)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"message refused: its header is not a message's ({type(error).__name__})") from None
    size = len(expected) + _size(shapes)
    if len(data) != size:
        raise Refused(f"message refused: {len(data)} bytes, its header announces {size}")
    if not data.startswith(expected):
        raise Refused("message refused: its header is not written as encode() writes it")
    return sender, receiver, round, shapes


def _header(shapes: Shapes, sender: str, receiver: str, round: int) -> bytes:
    """The first part of a safetensors file: length (8 bytes), JSON padded to a multiple of 8; tensors by name."""
    for name in (sender, receiver):
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,40}", name):
            raise Refused(f"message refused: a party is called {_cut(name)}; allowed: small letters, digits, _ and -")
    if sender == receiver:
        raise Refused(f"message refused: sender and receiver are both {sender!r}")
    if type(round) is not int or round < 0:
        raise Refused(f"message refused: round is {_cut(round)}; allowed: 0 or more")
    _check(shapes)
    metadata = {"protocol": PROTOCOL, "sender": sender, "receiver": receiver, "round": str(round)}
    entries, end = {"__metadata__": metadata}, 0
    for name in sorted(shapes):
        shape, dtype = shapes[name]
        start, end = end, end + _size({name: shapes[name]})
        entries[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [start, end]}
    text = canonical(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check(shapes: Shapes) -> None:
    if not shapes:
        raise Refused("message refused: it holds no tensor")
    for name, (shape, dtype) in shapes.items():
        if not isinstance(name, str) or not ADAPTER.fullmatch(name) or HEADS & set(name.split(".")):
            raise Refused(f"message refused: {_cut(name)} is no adapter's tensor; allowed: ….lora_A.weight and lora_B")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise Refused(f"message refused: {name!r} is {_cut(dtype)}; allowed: {', '.join(DTYPES)}")
        if len(shape) > 4 or any(type(size) is not int or size < 1 for size in shape):
            raise Refused(f"message refused: {name!r} has shape {_cut(list(shape))}; allowed: sizes of 1 or more")


def _check_finite(name: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise Refused(f"message refused: {name!r} has a value that is not finite")


def _size(shapes: Shapes) -> int:
    return sum(prod(shape) * DTYPES[dtype][1] for shape, dtype in shapes.values())


def _form(entry: tuple[tuple[int, ...], str]) -> str:
    return f"{entry[1]} {list(entry[0])}"


def _cut(value: object) -> str:
    """What a stranger sent, fit for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
