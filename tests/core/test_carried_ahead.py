"""Two carriers, one of which has ordered: small transfers are there before they are asked for."""

from __future__ import annotations

import pytest

from flarebus.message import Manifest
from flarebus.transfer import CHUNK_BYTES, SEPARATE_SLICES
from flarebus.wire import CHUNK, ORDER, PLACE, PULL
from tests.core.test_carrier import Line, error_of

SMALL = bytes(range(256)) * 1000


@pytest.fixture
def line() -> Line:
    """A line whose puller has pulled once, and ordered."""
    line = Line()
    first = line.puller.pull(line.offer(SMALL), "puller", order=True)
    assert [frames[2] for frames in line.said] == [ORDER, PULL]
    line.carry()
    assert first.is_done
    line.said.clear()
    return line


def sent_ahead(line: Line, *buffers: bytes) -> Manifest:
    manifest = line.offer(*buffers)
    line.holder.send_ahead(manifest.transfer, "puller")
    return manifest


@pytest.mark.parametrize(
    "buffers",
    [[SMALL], [SMALL, b"", SMALL[:7]], [SMALL[:100]] * (SEPARATE_SLICES + 1), [bytes(CHUNK_BYTES)]],
    ids=["one", "some", "joined", "a whole chunk"],
)
def test_a_transfer_that_was_sent_ahead_is_pulled_without_a_word(line: Line, buffers: list[bytes]) -> None:
    """What was ordered is here before its message, and is the same."""
    manifest = sent_ahead(line, *buffers)
    assert line.carry() == 1
    pull = line.puller.pull(manifest, "puller", tell_done=False, order=True)

    assert [bytes(view) for view in pull.result(0)] == buffers
    assert line.said == []


def test_a_chunk_that_meets_its_pull_on_the_way_is_taken(line: Line) -> None:
    """If the message was quicker the pull has asked; whichever chunk comes first counts, the other is dropped."""
    manifest = sent_ahead(line, SMALL)
    pull = line.puller.pull(manifest, "puller", tell_done=False)
    line.carry()

    assert [bytes(view) for view in pull.result(0)] == [SMALL]
    again = line.puller.pull(manifest, "puller", tell_done=False)
    assert [frames[2] for frames in line.said] == [PULL], "the second copy was not kept"
    line.carry()
    assert again.is_done


def test_what_is_more_than_a_chunk_is_not_sent_ahead(line: Line) -> None:
    """Nor is what is not offered any more."""
    sent_ahead(line, bytes(CHUNK_BYTES + 1))
    manifest = line.offer(SMALL)
    line.holder.withdraw(manifest.transfer)
    line.holder.send_ahead(manifest.transfer, "puller")

    assert line.said == []


def test_a_lost_chunk_is_pulled(line: Line) -> None:
    """Sent ahead is no promise."""
    manifest = sent_ahead(line, SMALL)
    line.said.clear()
    pull = line.puller.pull(manifest, "puller")
    line.carry()

    assert [bytes(view) for view in pull.result(0)] == [SMALL]


def test_a_receiver_that_says_nothing_gets_no_second_one(line: Line) -> None:
    """Chunks must not pile up before one that stands still."""
    sent_ahead(line, SMALL)
    manifest = sent_ahead(line, SMALL)
    assert len(line.said) == 1
    line.carry()
    pull = line.puller.pull(manifest, "puller")
    line.carry()

    assert pull.is_done
    sent_ahead(line, SMALL)
    assert [frames[2] for frames in line.said] == [CHUNK]


def test_a_chunk_with_other_bytes_than_the_manifest_says_ends_the_pull(line: Line) -> None:
    """As it does when it was asked for."""
    manifest = line.offer(SMALL)
    line.chunk(manifest, b"short")

    assert "wrong length" in str(error_of(line.puller.pull(manifest, "puller")))


def test_what_cannot_have_been_ordered_is_dropped(line: Line) -> None:
    """The middle of a transfer, more than a chunk, nothing, an odd place."""
    manifest = line.offer(SMALL)
    line.chunk(manifest, SMALL, first=CHUNK_BYTES)
    line.chunk(manifest, bytes(CHUNK_BYTES + 1))
    line.chunk(manifest)
    line.puller.take([b"puller", b"holder", CHUNK, PLACE.pack(manifest.transfer, 0)[1:], SMALL])
    line.puller.pull(manifest, "puller")

    assert [frames[2] for frames in line.said] == [PULL]


def test_after_a_new_connection_it_is_ordered_again(line: Line) -> None:
    """The holder may be another one, who knows of no order."""
    line.puller.resume()
    line.puller.pull(line.offer(SMALL), "puller", order=True)

    assert [frames[2] for frames in line.said] == [ORDER, PULL]
