"""What a handler remembers is bounded, and what it forgets is the oldest."""

from __future__ import annotations

from flarebus.pipes import Message
from flarebus.pipes.recall import MAX_ANSWER_BYTES, MAX_ANSWERS, MAX_IDS, Answers, SeenIds


def test_last_ids_are_known() -> None:
    """An id is new once, and again when so many came after it that it was forgotten."""
    seen = SeenIds()
    ids = [f"{number:032x}" for number in range(MAX_IDS + 1)]

    assert all(seen.add(each) for each in ids)

    assert not any(seen.add(each) for each in ids[1:])
    assert seen.add(ids[0])


def test_answers_are_bounded_in_number() -> None:
    """The oldest answers go first."""
    answers = Answers()
    requests = [Message("train") for _ in range(MAX_ANSWERS + 1)]
    for request in requests:
        answers.add(request.reply(b"yes"))

    assert answers.get(requests[0].msg_id) is None
    assert answers.get(requests[1].msg_id) is not None


def test_answers_are_bounded_in_bytes() -> None:
    """Long answers make room for one another; one that is too long for all room is not kept."""
    answers = Answers()
    first, second, third = Message("train"), Message("train"), Message("train")

    answers.add(first.reply(bytes(MAX_ANSWER_BYTES // 2 + 1)))
    answers.add(second.reply(bytes(MAX_ANSWER_BYTES // 2)))
    answers.add(third.reply(bytes(MAX_ANSWER_BYTES + 1)))

    assert [answers.get(each.msg_id) is not None for each in (first, second, third)] == [False, True, False]


def test_first_answer_stays() -> None:
    """A request has one answer, whatever is said later."""
    answers = Answers()
    request = Message("train")
    answers.add(request.reply(b"first"))
    answers.add(request.reply(b"second"))

    kept = answers.get(request.msg_id)
    assert kept is not None
    assert kept.body == b"first"
