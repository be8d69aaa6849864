"""Dataclass <-> protobuf, field for field; the only importer of `shard_pb2`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from lorafleet.proto import messages, shard_pb2

_Convert = Callable[[Any], Any]

_MESSAGES: tuple[type, ...] = (
    messages.ShardInfo,
    messages.SamplingParams,
    messages.SequenceStart,
    messages.AdapterKey,
    messages.AdapterMove,
    messages.StepPlan,
    messages.StepResult,
    messages.FetchAdapterRequest,
    messages.AdapterInfo,
    messages.AdapterTokenizer,
    messages.FetchProgress,
    messages.DropAdapterRequest,
)


def encode(message: Any) -> Any:
    """The protobuf twin of a dataclass of `lorafleet.proto.messages`."""
    return _ENCODERS[type(message)](message)


def decode(message: Any) -> Any:
    """The dataclass twin of a protobuf message."""
    return _DECODERS[type(message)](message)


def serialize(message: Any) -> bytes:
    """Wire bytes of a dataclass."""
    data: bytes = encode(message).SerializeToString()
    return data


def deserializer(kind: type) -> Callable[[bytes], Any]:
    """A function from wire bytes to a dataclass of `kind`, for gRPC stubs and handlers."""
    parse, convert = (
        getattr(shard_pb2, kind.__name__).FromString,
        _DECODERS[getattr(shard_pb2, kind.__name__)],
    )
    return lambda data: convert(parse(data))


def _encoder(kind: type) -> _Convert:
    names = [f.name for f in fields(kind)]
    nested = {name: how for name in names if (how := _nested(kind, name))}
    twin = getattr(shard_pb2, kind.__name__)

    def convert(message: Any) -> Any:
        values = {name: getattr(message, name) for name in names}
        for name, how in nested.items():
            if how == "list":
                values[name] = [encode(item) for item in values[name]]
            elif values[name] is not None:
                values[name] = encode(values[name])
        return twin(**values)

    return convert


def _decoder(kind: type) -> _Convert:
    hints = get_type_hints(kind)
    readers: dict[str, _Convert] = {}
    for field in fields(kind):
        name, hint, how = field.name, hints[field.name], _nested(kind, field.name)
        if how == "list":
            readers[name] = lambda column: [decode(item) for item in column]
        elif how == "one":
            readers[name] = decode
        elif get_origin(hint) is list:
            readers[name] = list
        elif hint is messages.Tier:
            readers[name] = messages.Tier
    optional = {name for name, hint in hints.items() if type(None) in get_args(hint)}
    plain = [f.name for f in fields(kind) if f.name not in readers]

    def convert(message: Any) -> Any:
        values = {name: getattr(message, name) for name in plain}
        for name, read in readers.items():
            absent = name in optional and not message.HasField(name)
            values[name] = None if absent else read(getattr(message, name))
        return kind(**values)

    return convert


def _nested(kind: type, name: str) -> str:
    """How a field holds other messages: "list", "one", or "" for none."""
    hint = get_type_hints(kind)[name]
    if get_origin(hint) is list:
        return "list" if get_args(hint)[0] in _MESSAGES else ""
    return "one" if hint in _MESSAGES or any(arg in _MESSAGES for arg in get_args(hint)) else ""


_ENCODERS = {kind: _encoder(kind) for kind in _MESSAGES}
_DECODERS = {getattr(shard_pb2, kind.__name__): _decoder(kind) for kind in _MESSAGES}
