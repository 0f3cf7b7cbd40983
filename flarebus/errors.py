"""Every exception of flarebus, sorted by whose fault it is.

    FlarebusError
    ├── UsageError                you: a wrong argument, a wrong order of calls
    │   ├── ConfigError           a parameter, with its value and what is allowed   (ValueError)
    │   ├── ClientApiError        a Client API call out of order                     (RuntimeError)
    │   ├── AddedAlready          something of which a recipe can have one           (RuntimeError)
    │   ├── FilterFailed          a filter of the job raised; its data stays put     (RuntimeError)
    │   └── EncodeError           a value that may not travel, with the path to it   (TypeError)
    ├── PeerError                 they: the other end did wrong or failed
    │   ├── DecodeError           bytes that do not hold what they claim
    │   ├── RemoteError           a handler at the other end raised
    │   └── UpdateRefused         a result that must not enter a mean
    ├── LinkError                 the path between
    │   ├── NoRoute               nobody of that name is there
    │   ├── SourceLost            the holder of a transfer is gone
    │   ├── DeadlineExceeded      no answer in time                                  (TimeoutError)
    │   └── Closed                this end was closed
    └── JobError                  the job as a whole
        ├── QuorumNotReached      too few usable results in a round
        ├── JobFailed             ended with a reason                                (RuntimeError)
        └── JobAborted            ended by somebody                                  (RuntimeError)

Fields come first; the message is built from them, so that a program can read what a person reads.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "AddedAlready",
    "ClientApiError",
    "Closed",
    "ConfigError",
    "DeadlineExceeded",
    "DecodeError",
    "EncodeError",
    "FilterFailed",
    "FlarebusError",
    "JobAborted",
    "JobError",
    "JobFailed",
    "LinkError",
    "NoRoute",
    "PeerError",
    "QuorumNotReached",
    "RemoteError",
    "SourceLost",
    "UpdateRefused",
    "UsageError",
]


class FlarebusError(Exception):
    """The root of all errors that flarebus raises on purpose."""


class UsageError(FlarebusError):
    """The caller did something that cannot work."""


class ConfigError(UsageError, ValueError):
    """A parameter is wrong.

    Args:
        parameter: its name, as the user wrote it.
        value: what was given; shortened in the message.
        allowed: what would have been right, in words.
    """

    def __init__(self, parameter: str, value: object, allowed: str) -> None:
        self.parameter = parameter
        self.value = value
        self.allowed = allowed
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{parameter}={shown}: {allowed}")


class ClientApiError(UsageError, RuntimeError):
    """A Client API call came too early, too late or on the wrong rank."""


class AddedAlready(UsageError, RuntimeError):
    """Something that a recipe can have once was added to it again."""


class FilterFailed(UsageError, RuntimeError):
    """A filter of the job did not do its work, so what it was given goes nowhere.

    Args:
        filter: the path of its class.
        reason: what it did instead, such as ``raised ValueError: ...``.
    """

    def __init__(self, filter: str, reason: str) -> None:
        self.filter = filter
        self.reason = reason
        super().__init__(f"filter {filter} {reason}")


class EncodeError(UsageError, TypeError):
    """A value may not travel.

    Args:
        path: where in the value it was found, such as ``params['layer'][3]``.
        found: the type found there, or what is wrong with it.
        hint: what to do instead.
    """

    def __init__(self, path: str, found: str, hint: str = "") -> None:
        self.path = path
        self.found = found
        self.hint = hint
        super().__init__(f"cannot encode {path}: {found}" + (f"; {hint}" if hint else ""))


class PeerError(FlarebusError):
    """The other end did something wrong, or failed."""


class DecodeError(PeerError):
    """Bytes do not hold what they claim. The message names the place, never the content."""


class RemoteError(PeerError):
    """The handler at the other end raised.

    Args:
        address: whose handler it was.
        kind: the class name of the exception there.
        text: its message.
        details: a traceback, if that end chose to send one.
    """

    def __init__(self, address: str, kind: str, text: str, details: str = "") -> None:
        self.address = address
        self.kind = kind
        self.text = text
        self.details = details
        super().__init__(f"{address}: {kind}: {text}" if text else f"{address}: {kind}")


class UpdateRefused(PeerError):
    """A result must not enter the mean.

    Args:
        reason: what is wrong with it, in words.
        key: the parameter concerned, or "" when the whole update is.
        site: who sent it, or "" while that is not known.
    """

    def __init__(self, reason: str, key: str = "", site: str = "") -> None:
        self.reason = reason
        self.key = key
        self.site = site
        where = ": ".join(part for part in (site, repr(key) if key else "") if part)
        super().__init__(f"{where}: {reason}" if where else reason)


class LinkError(FlarebusError):
    """The path between two cells failed."""


class NoRoute(LinkError):
    """Nobody of that name can be reached."""

    def __init__(self, target: str, reason: str = "no such cell") -> None:
        self.target = target
        self.reason = reason
        super().__init__(f"{target}: {reason}")


class SourceLost(LinkError):
    """The holder of a transfer is gone before all of it was pulled."""

    def __init__(self, holder: str, reason: str = "gone") -> None:
        self.holder = holder
        self.reason = reason
        super().__init__(f"source {holder} lost: {reason}")


class DeadlineExceeded(LinkError, TimeoutError):
    """No answer came in time."""


class Closed(LinkError):
    """This end was closed; nothing more goes out or comes in."""


class JobError(FlarebusError):
    """The job as a whole cannot go on."""


class QuorumNotReached(JobError):
    """A round ended with fewer usable results than it needs.

    Args:
        needed: how many were needed.
        got: how many were usable.
        reasons: site -> why it did not count.
    """

    def __init__(self, needed: int, got: int, reasons: Mapping[str, str]) -> None:
        self.needed = needed
        self.got = got
        self.reasons = dict(reasons)
        listed = "; ".join(f"{site}: {why}" for site, why in list(self.reasons.items())[:8])
        more = f"; and {len(self.reasons) - 8} more" if len(self.reasons) > 8 else ""
        super().__init__(
            f"{got} usable result{'s' * (got != 1)}, {needed} needed" + (f" ({listed}{more})" if listed else "")
        )


class JobFailed(JobError, RuntimeError):
    """The job ended with a reason; ``run_dir`` holds what it left."""

    def __init__(self, reason: str, run_dir: str = "") -> None:
        self.reason = reason
        self.run_dir = run_dir
        super().__init__(f"{reason} (run folder: {run_dir})" if run_dir else reason)


class JobAborted(JobError, RuntimeError):
    """Somebody ended the job."""

    def __init__(self, by: str) -> None:
        self.by = by
        super().__init__(f"aborted by {by}")
