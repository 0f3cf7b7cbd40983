"""The wire: what leaves comes back the same, and whatever else comes in is refused in bounded time and memory."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarebus.errors import DecodeError, UsageError
from flarebus.message import Buffer, Bundle, Kind, Manifest, Message
from flarebus.transfer import CHUNK_BYTES
from flarebus.wire import (
    ALIGNMENT,
    CARRIES,
    CHUNK,
    DONE,
    MAX_BODY_BYTES,
    MAX_CARRIED_BYTES,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    MAX_INLINE_BYTES,
    NOT_OFFERED,
    PLACE,
    PULL,
    REQUEST,
    TRANSFER_ID_BYTES,
    VERSION,
    bundle,
    carry,
    decode_message,
    encode_message,
    is_carrying,
)
from tests.core.halves import thorough

names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,40}[a-z0-9])?", fullmatch=True)
words = st.text(max_size=64)
numbers = st.integers(0, (1 << 64) - 1)
seconds = st.floats(0, allow_nan=False) | st.integers(0, 1 << 40)
manifests = st.builds(
    Manifest,
    transfer=st.binary(min_size=16, max_size=16),
    holder=names,
    lengths=st.lists(st.integers(0, 1 << 33) | st.integers(0, 1 << 40), max_size=20).map(tuple),
)
buffers = st.lists(st.binary(max_size=200), max_size=6)
# A message has its buffers in a bundle, or a manifest of them; never both.
loads = st.one_of(st.tuples(manifests, st.none()), st.tuples(st.none(), buffers.map(lambda found: bundled(*found))))


def bundled(*found: bytes) -> Bundle:
    """A bundle of these buffers, which are small."""
    made = bundle([memoryview(buffer) for buffer in found])
    assert made is not None
    return made


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Any message that may travel."""
    manifest, carried = draw(loads)
    return Message(
        target=draw(names),
        source=draw(names),
        kind=draw(st.sampled_from(Kind)),
        id=draw(numbers),
        answers=draw(numbers),
        channel=draw(words),
        topic=draw(words),
        ttl_s=draw(seconds),
        manifest=manifest,
        body=draw(st.binary(max_size=100)),
        bundle=carried,
    )


PLAIN = Message(
    "site-1", "server", Kind.REQUEST, 7, 0, "task", "train", 1.5, None, b"body", bundled(b"one", b"", b"three")
)
OFFER = Message(
    "site-1", "server", Kind.REPLY, 8, 7, manifest=Manifest(bytes(16), "server.job", (1 << 20, 0, 5)), body=b"body"
)


def frames_of(message: Message) -> list[bytes]:
    """Its frames as they arrive."""
    return [bytes(frame) for frame in encode_message(message)]


def fields_of(message: Message) -> list[Any]:
    """What its header says."""
    return list(msgpack.unpackb(frames_of(message)[2], use_list=False))


def with_header(message: Message, header: bytes) -> list[bytes]:
    """Its frames with another header."""
    frames = frames_of(message)
    return [*frames[:2], header, *frames[3:]]


def with_field(message: Message, index: int, value: object) -> list[bytes]:
    """Its frames with one field of the header changed."""
    fields = fields_of(message)
    fields[index] = value
    return with_header(message, msgpack.packb(fields))


def is_sound(message: Message) -> bool:
    """Whether every field has the type and the bounds that whoever reads it may count on."""
    manifest = message.manifest
    return (
        type(message.target) is type(message.source) is type(message.channel) is type(message.topic) is str
        and type(message.kind) is Kind
        and type(message.id) is type(message.answers) is int
        and message.ttl_s >= 0
        and len(message.body) <= MAX_BODY_BYTES
        and (
            manifest is None
            or (
                type(manifest.transfer) is bytes
                and len(manifest.transfer) == TRANSFER_ID_BYTES
                and type(manifest.holder) is str
                and all(type(length) is int and length >= 0 for length in manifest.lengths)
                and message.bundle is None
            )
        )
        and (
            message.bundle is None
            or (
                all(type(length) is int and length >= 0 for length in message.bundle.lengths)
                and len(message.bundle.data) == sum(-(-length // ALIGNMENT) for length in message.bundle.lengths) * 64
            )
        )
    )


@given(messages())
@thorough(200)
def test_every_message_comes_back(message: Message) -> None:
    """Header, body and bundle survive the wire bit by bit."""
    back = decode_message(frames_of(message))

    assert back == message
    assert is_sound(back)


@given(messages(), st.lists(st.binary(max_size=50), max_size=4))
@thorough(100)
def test_what_is_brought_along_changes_nothing_else(message: Message, chunk: list[bytes]) -> None:
    """A message that brings the bytes of its manifest is recognised by its header, and is otherwise the same."""
    frames = frames_of(message)
    assert not is_carrying(frames[2])
    if message.manifest is None:
        return
    carrying = carry(frames, chunk)

    assert is_carrying(bytes(carrying[2]))
    assert carrying[4:] == chunk
    assert frames == frames_of(message)
    if message.manifest.nbytes > MAX_CARRIED_BYTES:
        with pytest.raises(DecodeError, match="brought along"):
            decode_message(carrying)
    else:
        assert decode_message(carrying) == decode_message(carrying[:4]) == message


@given(st.binary(max_size=12))
@thorough(200)
def test_any_header_may_be_asked_whether_it_carries(header: bytes) -> None:
    """The question is answered without decoding, whatever came; what cannot be decoded is then refused."""
    if is_carrying(header):
        with pytest.raises(DecodeError):
            decode_message([b"a", b"b", header, b"", b"x", b"y"])


def test_nothing_is_brought_along_without_a_manifest() -> None:
    """Bytes that no manifest names belong to nothing; neither does a kind beyond those that there are."""
    with pytest.raises(DecodeError, match="no manifest"):
        decode_message(carry(frames_of(PLAIN._replace(bundle=None)), [b"x"]))
    with pytest.raises(DecodeError):
        decode_message(carry(frames_of(PLAIN), []))
    for kind in (CARRIES, CARRIES + 5, 2 * CARRIES + 1, 3 * CARRIES + 1):
        with pytest.raises(DecodeError, match="kind"):
            decode_message(with_field(OFFER, 1, kind))


def test_what_may_be_brought_along_is_one_chunk() -> None:
    """Holder and receiver have the same idea of how much that is, and it is no more than a frame may have."""
    assert MAX_CARRIED_BYTES == CHUNK_BYTES < MAX_FRAME_BYTES


def test_a_bundle_is_not_copied() -> None:
    """Neither end of the wire touches its bytes: the frame is the bundle, and the bundle is the frame."""
    data = bytearray(64)
    frames = encode_message(PLAIN._replace(bundle=Bundle((9,), data)))
    assert frames[4] is data
    back = decode_message(frames)

    assert back.bundle is not None
    assert back.bundle.data is data


@given(buffers)
@thorough(100)
def test_buffers_lie_in_a_bundle_as_in_memory(found: list[bytes]) -> None:
    """In order, each on a multiple of 64 bytes, with nothing but zeros between them."""
    lengths, data = bundled(*found)
    place = 0
    for buffer in found:
        assert bytes(data[place : place + len(buffer)]) == buffer
        place += -(-len(buffer) // ALIGNMENT) * ALIGNMENT

    assert lengths == tuple(map(len, found))
    assert len(data) == place
    assert sum(data) == sum(map(sum, found))


def test_a_bundle_holds_what_is_small_together() -> None:
    """Up to the limit, counting the padding of very many; anything more becomes a transfer instead."""
    half, one = memoryview(bytes(MAX_INLINE_BYTES // 2)), memoryview(b"x")
    many = MAX_INLINE_BYTES // ALIGNMENT

    assert bundle([half, half]) is not None
    assert bundle([half, half, one]) is None
    assert bundle([one] * (many + 1)) is None
    most = bundle([memoryview(bytes(ALIGNMENT - 1))] * many)
    assert most is not None
    assert decode_message(encode_message(PLAIN._replace(bundle=most))).bundle == most


def test_transfer_headers_are_no_message_headers() -> None:
    """The three constant headers differ, and no message begins like one of them."""
    assert len({PULL, CHUNK, DONE}) == 3
    assert frames_of(PLAIN)[2][:1] not in (PULL, CHUNK, DONE)
    for header in (PULL, CHUNK, DONE):
        with pytest.raises(DecodeError):
            decode_message(with_header(PLAIN, header))


def test_transfer_bodies_have_one_layout() -> None:
    """Network byte order, no padding, and room for any place in a transfer."""
    assert REQUEST.pack(bytes(range(16)), 1 << 32, 1 << 23) == bytes(range(16)) + b"\0\0\0\1\0\0\0\0" + b"\0\x80\0\0"
    assert PLACE.unpack(PLACE.pack(bytes(16), NOT_OFFERED)) == (bytes(16), NOT_OFFERED)
    assert MAX_FRAME_BYTES > MAX_BODY_BYTES + MAX_HEADER_BYTES


@pytest.mark.parametrize("version", [0, VERSION + 1, -1, None, "1", b"\x01", (), 1 << 63])
def test_another_version_is_refused_by_name(version: object) -> None:
    """The error says which version came and which one this end speaks."""
    with pytest.raises(DecodeError, match=f"version .*: this end speaks {VERSION}"):
        decode_message(with_field(PLAIN, 0, version))


WRONG_FIELDS = [
    *((1, kind) for kind in (0, 5, -1, None, "REQUEST", (1,), {}, 1 << 60)),
    *((2, number) for number in (None, 1.0, True, "7", b"7", ())),
    *((3, answers) for answers in (None, 0.5, False, "", ())),
    *((index, word) for index in (4, 5) for word in (None, 1, b"task", ("task",), "x" * 65)),
    *((6, ttl_s) for ttl_s in (-1, -0.5, math.nan, -math.inf, None, "1", True, ())),
]


@pytest.mark.parametrize(("index", "value"), WRONG_FIELDS)
def test_a_field_of_a_wrong_type_is_refused(index: int, value: object) -> None:
    """Each field has one type and its bounds; nothing is converted."""
    with pytest.raises(DecodeError):
        decode_message(with_field(PLAIN, index, value))


def packed(*lengths: int, code: str = "Q") -> bytes:
    """Lengths as they stand in a header."""
    return code.encode() + struct.pack(f"!{len(lengths)}{code}", *lengths)


def test_lengths_take_four_bytes_or_eight() -> None:
    """Four as long as all of them fit; either way they come back as they were."""
    for lengths, code in (((), "I"), ((0, (1 << 32) - 1), "I"), ((7, 1 << 32), "Q")):
        message = OFFER._replace(manifest=Manifest(bytes(16), "server", lengths))
        assert fields_of(message)[7][2] == packed(*lengths, code=code)
        assert decode_message(frames_of(message)).manifest == message.manifest


WRONG_LENGTHS = [b"", b"i\0\0\0\1", b"\xff", b"I\0\0\0", b"Q" + bytes(12), "I", 64, {64: 64}, (64,), [], True, 1.0]
GOOD = bytes(16), "server", packed(1, 2)
WRONG_MANIFESTS = [
    *((transfer, *GOOD[1:]) for transfer in (b"", bytes(15), bytes(17), "x" * 16, None, 0)),
    *((GOOD[0], holder, GOOD[2]) for holder in ("", "x" * 256, b"server", None, 3)),
    *((*GOOD[:2], lengths) for lengths in [None, *WRONG_LENGTHS]),
    (*GOOD[:2], packed(1 << 48, 1)),
    (*GOOD[:2], packed(*[(1 << 64) - 1] * 9)),
    GOOD[:2],
    (*GOOD, None),
    (),
    0,
    "abc",
    b"abc",
    True,
]


@pytest.mark.parametrize("manifest", WRONG_MANIFESTS)
def test_a_manifest_that_claims_nonsense_is_refused(manifest: object) -> None:
    """A transfer has an id of 16 bytes, a holder, and byte counts that some machine could hold."""
    with pytest.raises(DecodeError):
        decode_message(with_field(OFFER, 7, manifest))


def test_buffers_come_inside_or_by_manifest() -> None:
    """A message with both is refused: nobody could tell which are meant."""
    with pytest.raises(DecodeError, match="not both"):
        decode_message([*with_field(OFFER, 8, packed(5)), bytes(64)])


WRONG_BUNDLES = [
    (packed(3, 0, 5), []),
    (packed(), []),
    (None, [b""]),
    (None, [bytes(128)]),
    (packed(3, 0, 5), [bytes(127)]),
    (packed(3, 0, 5), [bytes(192)]),
    (packed(3, 0, 5), [b""]),
    (packed(), [bytes(64)]),
    (packed((1 << 64) - 64, 128), [bytes(64)]),
    (packed(2 * MAX_INLINE_BYTES + 1), [bytes(2 * MAX_INLINE_BYTES + 64)]),
    *((lengths, [bytes(64)]) for lengths in WRONG_LENGTHS),
]


@pytest.mark.parametrize(("lengths", "frames"), WRONG_BUNDLES)
def test_a_bundle_that_is_not_what_it_says_is_refused(lengths: object, frames: list[bytes]) -> None:
    """Lengths and frame come together, agree to the byte, and are small."""
    with pytest.raises(DecodeError):
        decode_message([*with_field(PLAIN, 8, lengths)[:4], *frames])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6, 100_000])
def test_a_message_has_four_or_five_frames(count: int) -> None:
    """Fewer are no message, and more are none either, also when they are empty and cost their sender nothing."""
    with pytest.raises(DecodeError, match="frames"):
        decode_message([*frames_of(PLAIN), *[b""] * count][:count])


@pytest.mark.parametrize("count", range(9))
def test_a_header_has_nine_fields(count: int) -> None:
    """A header with fields missing, or with one more, is refused."""
    with pytest.raises(DecodeError):
        decode_message(with_header(PLAIN, msgpack.packb(fields_of(PLAIN)[:count])))
    with pytest.raises(DecodeError):
        decode_message(with_header(PLAIN, msgpack.packb([*fields_of(PLAIN), None])))


def of_size(part: str, more: int) -> list[bytes]:
    """Frames of which one part is as large as it may be, and that much more."""
    frames = frames_of(OFFER)
    match part:
        case "target":
            frames[0] = b"x" * (255 + more)
        case "source":
            frames[1] = b"x" * (255 + more)
        case "header":
            spare = MAX_HEADER_BYTES + more - len(with_field(OFFER, 7, (bytes(16), "h", packed(*range(8000))))[2])
            frames = with_field(OFFER, 7, (bytes(16), "h" * (1 + spare % 8), packed(*range(8000 + spare // 8))))
            assert len(frames[2]) == MAX_HEADER_BYTES + more
        case "body":
            frames[3] = bytes(MAX_BODY_BYTES + more)
        case "transfer":
            frames = with_field(OFFER, 7, (bytes(16), "h", packed(1 << 47, (1 << 47) - 1, 1 + more)))
    return frames


@pytest.mark.parametrize("part", ["target", "source", "header", "body", "transfer"])
def test_every_part_has_a_limit(part: str) -> None:
    """What is just within a limit is a message, and one byte more is none."""
    decode_message(of_size(part, 0))

    with pytest.raises(DecodeError):
        decode_message(of_size(part, 1))


@pytest.mark.parametrize("part", ["target", "source"])
def test_addresses_are_ascii(part: str) -> None:
    """Letters that only look alike are no address."""
    with pytest.raises(DecodeError):
        decode_message(frames_of(PLAIN._replace(**{part: "sitе-1"})))  # noqa: RUF001 - a Cyrillic letter, on purpose


HOSTILE_HEADERS = {
    "empty": b"",
    "never used byte": b"\xc1",
    "number": msgpack.packb(7),
    "map": msgpack.packb({"version": 1}),
    "map with keys of any type": b"\x81\x01\x02",
    "array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "text of 4 GiB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GiB": b"\xc6\xff\xff\xff\xff",
    "extension of 4 GiB": b"\xc9\xff\xff\xff\xff\x05",
    "long arrays in each other": b"\xdd\x00\x00\xff\xf0" * 13_000,
    "arrays in each other": b"\xdc\x03\xe8" * 20_000,
    "short arrays in each other": b"\x99" * 65_000,
    "deep": b"\x91" * 60_000,
    "deep map": b"\x81\xa1a" * 20_000,
    "far date": msgpack.packb([1, 1, 1, 0, "a", "b", msgpack.Timestamp(1 << 62, 0), None, None]),
    "extension type": msgpack.packb([1, 1, 1, 0, msgpack.ExtType(5, b"x"), "b", 0, None, None]),
    "text that is none": b"\x99\x01\x01\x01\x00\xa1\xff\xa1b\x00\xc0\xc0",
    "two headers": frames_of(PLAIN)[2] * 2,
    "cut off": frames_of(PLAIN)[2][:-1],
    "many empty arrays": msgpack.packb([1, 1, 1, 0, "a", "b", 0, [b"x" * 16, "h", [[]] * 60_000], None]),
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_hostile_headers_cost_next_to_nothing(header: bytes) -> None:
    """Claims of gigabytes, endless nesting and types beyond plain data are refused before they take memory."""
    frames = with_header(PLAIN, header)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode_message(frames)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 400_000


def decode_or_refuse(frames: Sequence[Buffer]) -> None:
    """Decode `frames`: a sound message comes out or a `DecodeError`, and nothing else."""
    try:
        message = decode_message(frames)
    except DecodeError:
        return
    assert is_sound(message)


def cut(data: bytes, at: int, put: bytes, instead_of: int) -> bytes:
    """`data` with `put` in place of some bytes of it."""
    at %= len(data) + 1
    return data[:at] + put + data[at + instead_of :]


@given(
    st.sampled_from([PLAIN, OFFER]) | messages(),
    st.lists(st.tuples(st.integers(0, 1000), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4),
)
@thorough(400)
def test_a_damaged_header_is_a_message_or_an_error(message: Message, damage: list[tuple[int, bytes, int]]) -> None:
    """However its bytes are changed, inserted or cut, decoding ends in one of the two."""
    header = frames_of(message)[2]
    for at, put, instead_of in damage:
        header = cut(header, at, put, instead_of)
    decode_or_refuse(with_header(message, header))


plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from([PLAIN, OFFER]), st.dictionaries(st.integers(0, 8), plain_data, max_size=3))
@thorough(200)
def test_a_header_of_anything_is_a_message_or_an_error(message: Message, changed: dict[int, Any]) -> None:
    """Whatever plain data stands where a field belongs, decoding ends in one of the two."""
    fields = fields_of(message)
    for index, value in changed.items():
        fields[index] = value
    decode_or_refuse(with_header(message, msgpack.packb(fields)))


@given(st.lists(st.binary(max_size=80), max_size=7))
@thorough(150)
def test_noise_is_a_message_or_an_error(frames: list[bytes]) -> None:
    """Frames of anything end in one of the two as well."""
    decode_or_refuse(frames)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (PLAIN._replace(body=bytes(MAX_BODY_BYTES + 1)), ["body of 1048577 bytes", "task/train", "1048576"]),
        (OFFER._replace(manifest=Manifest(bytes(16), "server", (1 << 20,) * 20_000)), ["header", "20000", "65536"]),
        (PLAIN._replace(channel="c" * 65), ["ccc", "at most 64"]),
        (PLAIN._replace(topic="t" * 65), ["ttt", "at most 64"]),
    ],
)
def test_the_sender_hears_of_a_limit_first(message: Message, words: list[str]) -> None:
    """What the other end would drop is never sent: the error says what is too large, and the limit."""
    with pytest.raises(UsageError) as caught:
        encode_message(message)

    assert all(word in str(caught.value) for word in words)
    assert len(str(caught.value)) < 400


@given(messages(), st.integers(60, 70), st.integers(60, 70))
@thorough(60)
def test_what_is_sent_can_be_received(message: Message, channel: int, topic: int) -> None:
    """Around the limits, whatever the sender lets through the receiver takes."""
    message = message._replace(channel="c" * channel, topic="t" * topic)
    try:
        frames = encode_message(message)
    except UsageError:
        assert max(channel, topic) > 64
        return
    assert decode_message(frames).channel == message.channel
