"""Every field of every message survives the wire."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from lorafleet.proto import messages, shard_pb2
from lorafleet.proto.codec import decode, deserializer, encode, serialize

MESSAGES = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == messages.__name__
]


def example(hint: Any, number: int) -> Any:
    """A value of a field's type that differs from its default and from its neighbours'."""
    if get_origin(hint) is list:
        return [example(get_args(hint)[0], number + offset) for offset in range(3)]
    if type(None) in get_args(hint):
        return example(get_args(hint)[0], number)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(
            **{f.name: example(hints[f.name], number + i) for i, f in enumerate(fields(hint))}
        )  # type: ignore[operator]
    if hint is messages.Tier:
        return messages.Tier.HOST
    if hint is bool:
        return True
    if hint is bytes:
        return b"bytes %d" % number
    if hint is float:
        return number + 0.5  # exact in the wire's 32 bits
    return hint(number)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_field_survives(kind: type) -> None:
    message = example(kind, 1)
    assert deserializer(kind)(serialize(message)) == message
    assert decode(encode(message)) == message


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_dataclass_and_proto_have_the_same_fields_in_the_same_order(kind: type) -> None:
    descriptor = getattr(shard_pb2, kind.__name__).DESCRIPTOR
    assert [f.name for f in fields(kind)] == [f.name for f in descriptor.fields]


def test_no_message_of_the_contract_is_left_out() -> None:
    empty = {"DescribeRequest", "DropAdapterReply", "ListAdaptersRequest"}
    lists = {"ListAdaptersReply"}
    names = set(shard_pb2.DESCRIPTOR.message_types_by_name) - empty - lists
    assert names == {kind.__name__ for kind in MESSAGES}


def test_an_absent_message_is_none() -> None:
    assert decode(encode(messages.FetchProgress("reading", 1, 2))).info is None


def test_a_token_is_not_shown() -> None:
    key = messages.AdapterKey("hub", "someone/private")
    request = messages.FetchAdapterRequest(key, messages.Tier.DISK, api_token="hf_secret")
    assert "hf_secret" not in repr(request)
