"""OpenTask: the broadcast that runs now: which results have arrived, in what order they are used, what is fetched.

A result *arrives* as a message; its arrays are then fetched (*staged*), which takes room and time; only then it is
*here*. Nothing here looks at all results for one of them: there may be thousands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flarebus.cell import Payload
from flarebus.codec import decode
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, SourceLost
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.slab import SlabPool
from flarebus.tasks.tally import Tally
from flarebus.workflow.controller import Task
from flarebus.workflow.held import HeldModel

__all__ = ["Arrived", "OpenTask", "Parcel", "named", "results_in"]


class Arrived:
    """A result whose message is here; its arrays may not be yet.

    Args:
        site: whose it is.
        delivery: its message.
        body: the encoded model.
        buffers: which of the message's buffers are this result's; None: all of them.
        tell: tells the site that its result was refused, and why, if the message is not answered with that.
    """

    __slots__ = ("_buffers", "_tell", "at", "body", "delivery", "pulled", "site")

    def __init__(
        self,
        site: str,
        delivery: Delivery,
        body: bytes,
        buffers: slice | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.site = site
        self.delivery = delivery
        self.body = body
        self.pulled: Pending[Sequence[Any]] | None = None
        self.at = 0.0
        """When it came, in seconds of the desk's clock."""
        self._buffers = buffers
        self._tell = tell

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        if self._buffers is None:
            return self.delivery.nbytes
        bundle = self.delivery.message.bundle
        return 0 if bundle is None else sum(bundle.lengths[self._buffers])

    def pull(self, pool: SlabPool) -> None:
        """Have its arrays brought here."""
        pulled = self.delivery.pull(pool)
        if self._buffers is not None:
            pulled, whole = Pending(), pulled.result()  # they came in the message: nothing is waited for
            pulled.set(whole[self._buffers])
        self.pulled = pulled

    @property
    def is_here(self) -> bool:
        """Whether nothing more has to be fetched."""
        return self.pulled is not None and self.pulled.is_done

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here, and nobody's death can take it away."""
        return self.delivery.is_here

    @property
    def lost_its_holder(self) -> bool:
        """Whether its arrays could not be fetched because who held them is gone."""
        return self.pulled is not None and isinstance(self.pulled.error(), SourceLost)

    def model(self) -> FLModel:
        """The model, from what was pulled.

        Raises:
            FlarebusError: it could not be fetched, or is none.
        """
        assert self.pulled is not None
        model = decode(self.body, self.pulled.result())
        if type(model) is not FLModel:
            raise DecodeError("it is not an FLModel")
        return model

    def hold(self) -> HeldModel:
        """The model where it is; its maker is answered when it is released.

        Raises:
            DecodeError: it is none, or cannot be read without its arrays.
        """
        message = self.delivery.message
        return HeldModel(self.body, Payload(self.body, message.bundle, message.manifest), self.answer)

    def answer(self, refused: str | None) -> None:
        """Tell the site what became of it: if its message is its alone, its `send` may wait for that."""
        if self._tell is None:
            self.delivery.reply({"accepted": refused is None, "reason": refused or ""})
        elif refused is not None:
            self._tell(refused)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A task, encoded once, and the sites that get it."""

    task: Task
    payload: Payload
    sites: list[str]


class OpenTask:
    """The broadcast that runs now.

    Args:
        number: it is the so-manyth of its owner.
        parcels: what goes out; all of one name and one round.
        tally: who has answered.
        targets: the sites of all parcels, sorted.
        in_order: use results in the order of `targets`.
        fetch: whether results are fetched; otherwise they stay with their makers.
        most_staged: results of more than 1 MiB fetched at once; None leaves it to their bytes.
        staging_timeout_s: seconds that a result may wait for that; None for no limit.
        resumes: sites give what they answered to somebody else before.
        on_failed: told site and reason of each that fails.
    """

    def __init__(
        self,
        number: int,
        parcels: Sequence[Parcel],
        tally: Tally,
        targets: list[str],
        in_order: bool,
        fetch: bool = True,
        most_staged: int | None = None,
        staging_timeout_s: float | None = None,
        resumes: bool = False,
        on_failed: Callable[[str, str], None] | None = None,
    ) -> None:
        self.number = number
        self.name = parcels[0].task.name if parcels else ""
        self.round = parcels[0].task.round if parcels else 0
        self.parcels = parcels
        self.tally = tally
        self.targets = targets
        self.in_order = in_order
        self.fetch = fetch
        self.resumes = resumes
        self.is_closing = False
        self.was_cancelled = False
        self.nbytes = max((_nbytes(each) for each in parcels), default=0)
        self.most_staged = most_staged
        self._staging_timeout_s = staging_timeout_s
        self._on_failed = on_failed
        self.arrived: dict[str, Arrived] = {}
        """What has arrived and is not used yet; changed by the methods here only."""
        self.metrics: dict[str, dict[str, Any]] = {}
        self._staged: dict[str, Arrived] = {}
        # What is to be staged, in the order of use; some of it may be gone.
        self._line: deque[Arrived] = deque()
        # In order: the targets before this one are in line, staged, used, or not waited for.
        self._lined = 0
        # In order: the targets before this one are used or not waited for.
        self._done = 0

    def fail(self, site: str, reason: str) -> None:
        """Nothing usable will come from `site`."""
        self.tally.fail(site, reason)
        if self._on_failed is not None:
            self._on_failed(site, reason)

    def add(self, arrived: Arrived, now: float) -> None:
        """A result has arrived."""
        arrived.at = now
        self.arrived[arrived.site] = arrived
        if not self.in_order:
            self._line.append(arrived)

    def remove(self, site: str) -> None:
        """The result of `site` is used, or never will be."""
        del self.arrived[site]
        self._staged.pop(site, None)

    def forget(self, site: str) -> None:
        """The result of `site` cannot be fetched any more; another one may arrive."""
        self.remove(site)
        self.line_up_again()

    def line_up_again(self) -> None:
        """A site whose result was removed may answer once more, and has its place in the order."""
        if self.in_order:
            self._line.clear()
            self._lined = 0

    def next_unstaged(self) -> Arrived | None:
        """The next result to stage, in the order of use."""
        self._line_up()
        while self._line:
            arrived = self._line[0]
            if arrived.pulled is None and self.arrived.get(arrived.site) is arrived:
                return arrived
            self._line.popleft()
        return None

    def staging_deadline(self) -> float | None:
        """Until when the next result to stage waits for its place; None: without end, or there is none."""
        arrived = None if self._staging_timeout_s is None else self.next_unstaged()
        return None if arrived is None else arrived.at + (self._staging_timeout_s or 0.0)

    def stage(self, arrived: Arrived, pool: SlabPool) -> None:
        """Fetch the next result."""
        arrived.pull(pool)
        self._staged[arrived.site] = arrived

    @property
    def may_stage(self) -> bool:
        """Whether one more may be fetched, as far as their number goes."""
        return self.most_staged is None or len(self._staged) < self.most_staged

    @property
    def is_staging(self) -> bool:
        """Whether a result is being fetched, or is here and not yet taken."""
        return bool(self._staged)

    def next_ready(self) -> Arrived | None:
        """A result that is here and whose turn it is."""
        if not self.in_order:
            candidates = self._staged if self.fetch else self.arrived
            return next((arrived for arrived in candidates.values() if self._is_ready(arrived)), None)
        arrived = self._next_in_order()
        return arrived if arrived is not None and self._is_ready(arrived) else None

    def _is_ready(self, arrived: Arrived) -> bool:
        return arrived.is_here or not self.fetch

    def is_awaited(self, arrived: Arrived) -> bool:
        """Whether no other result can be used before this one."""
        return self.in_order and self._next_in_order() is arrived

    def _next_in_order(self) -> Arrived | None:
        targets, open_sites = self.targets, self.tally.open
        while self._done < len(targets) and targets[self._done] not in open_sites:
            self._done += 1
        for index in range(self._done, len(targets)):
            arrived = self.arrived.get(targets[index])
            if arrived is not None or (targets[index] in open_sites and not self.is_closing):
                return arrived
        return None

    def add_target(self, site: str) -> None:
        """One more site gets what all get."""
        self.targets.append(site)
        self.parcels[0].sites.append(site)
        self.tally.open.add(site)

    def waits_for(self, site: str) -> bool:
        """Whether an answer of `site` would count, and none has arrived."""
        return site in self.tally.open and site not in self.arrived and not self.is_closing

    def _line_up(self) -> None:
        """In order: put into line what has arrived, as far as its turn has come."""
        if not self.in_order:
            return
        while self._lined < len(self.targets):
            site = self.targets[self._lined]
            arrived = self.arrived.get(site)
            if arrived is not None:
                if arrived.pulled is None:
                    self._line.append(arrived)
            elif site in self.tally.open and not self.is_closing:
                return
            self._lined += 1


def _nbytes(parcel: Parcel) -> int:
    return max(parcel.payload.nbytes + len(parcel.payload.body), parcel.task.asks_nbytes)


def results_in(delivery: Delivery, tell: Callable[[str, str, int, str], None]) -> list[tuple[int, Arrived]]:
    """The results in a message that carries several, each with the number of its task.

    Args:
        tell: called with host, site, number and reason when one is refused.

    Raises:
        DecodeError: it is no such message.
    """
    try:
        if delivery.message.manifest is not None:
            raise TypeError("their arrays are not in the message")
        return list(_results_in(delivery, tell))
    except (DecodeError, KeyError, TypeError) as problem:
        raise DecodeError(f"results cannot be read: {problem}") from problem


def _results_in(delivery: Delivery, tell: Callable[[str, str, int, str], None]) -> Iterator[tuple[int, Arrived]]:
    bundle, end = delivery.message.bundle, 0
    for entry in delivery.plain()["results"]:
        site, number, body, count = named(entry["site"]), entry["number"], entry["model"], entry["buffers"]
        if type(body) is not bytes or type(number) is not int or type(count) is not int or count < 0:
            raise TypeError("a model that is not encoded, or a number that is none")
        begin, end = end, end + count
        yield number, Arrived(site, delivery, body, slice(begin, end), partial(tell, delivery.source, site, number))
    if end != (0 if bundle is None else len(bundle.lengths)):
        raise TypeError("more or fewer buffers than belong to them")


def named(site: Any) -> str:
    """A site's name as it came.

    Raises:
        TypeError: it is none.
    """
    if type(site) is not str:
        raise TypeError(f"a site of type {type(site).__name__}")
    return site
