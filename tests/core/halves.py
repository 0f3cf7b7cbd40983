"""Two halves of a protocol, wired back to back: the network between them loses, repeats and reorders.

Nothing here runs by itself. Hypothesis takes the steps, the clock is a number, and whatever fails is printed as the
list of steps that leads there.
"""

from __future__ import annotations

from random import Random
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

__all__ = ["RARELY", "WHICH", "LossyMachine", "explore", "thorough"]

WHICH = st.integers(0, 1 << 16)
# Steps are picked evenly; what ends everything must be rare, or little else would ever be seen.
RARELY = st.integers(0, 9).map(lambda drawn: drawn == 9)


def thorough(examples: int, **more: Any) -> hypothesis.settings:
    """Settings of a property: how often it is tried, and that a failure says how to see it again."""
    return hypothesis.settings(max_examples=examples, print_blob=True, deadline=None, **more)


def explore(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Let Hypothesis take `steps` steps of `machine`, `examples` times."""
    run_state_machine_as_test(machine, settings=thorough(examples, stateful_step_count=steps))


class LossyMachine(RuleBasedStateMachine):
    """A network as a list of packets in flight, whose fate Hypothesis decides; `arrive` says what a packet does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.flight: list[Any] = []

    def arrive(self, packet: Any) -> None:
        """A packet is where it was sent."""
        raise NotImplementedError

    @precondition(lambda self: self.flight)
    @rule(which=WHICH)
    def deliver(self, which: int) -> None:
        """Any one packet arrives, in whatever order they were sent."""
        self.arrive(self.flight.pop(which % len(self.flight)))

    @precondition(lambda self: self.flight)
    @rule(which=WHICH)
    def repeat(self, which: int) -> None:
        """One packet is under way twice."""
        self.flight.append(self.flight[which % len(self.flight)])

    @precondition(lambda self: self.flight)
    @rule(which=WHICH)
    def lose(self, which: int) -> None:
        """One packet is lost."""
        self.flight.pop(which % len(self.flight))

    @precondition(lambda self: self.flight)
    @rule(count=st.integers(1, 40), order=st.randoms(use_true_random=False))
    def flow(self, count: int, order: Random) -> None:
        """Many packets arrive, and what they cause, in a mixed order."""
        for _ in range(count):
            if self.flight:
                self.arrive(self.flight.pop(order.randrange(len(self.flight))))

    def drain(self, limit: int = 10_000) -> None:
        """Everything arrives, in order, and whatever that causes: a network without faults."""
        while self.flight:
            limit -= 1
            assert limit, "the two halves keep talking for ever"
            self.arrive(self.flight.pop(0))
