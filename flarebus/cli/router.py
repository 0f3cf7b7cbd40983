"""The program `flarebus-router`: a router on its own, so that servers and sites need only dial out."""

from __future__ import annotations

import json
import queue
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from flarebus.cli.exits import run_command
from flarebus.errors import UsageError

__all__ = ["main"]

_ENDINGS = (signal.SIGINT, signal.SIGTERM)
_FOLDER = click.Path(file_okay=False, path_type=Path)

_EPILOG = """\b
Examples:
  flarebus-router --bind tcp://127.0.0.1:8002
  flarebus-router --bind 'tcp://127.0.0.1:*' --json
  flarebus-router --bind tcp://0.0.0.0:8002 --keys /etc/flarebus/router
  flarebus-router --bind ipc:///run/site-1/bus --upstream tcp://hub:8002 --upstream-keys site-1-keys

The folder of --keys holds router.key (for its owner only), router.pub, and in its folder 'admitted' the public key of
everybody who may connect; that of --upstream-keys holds cell.key and the other router's router.pub. 'flarebus keys'
makes both. The program ends with Ctrl-C or SIGTERM.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--bind",
    "binds",
    required=True,
    multiple=True,
    metavar="ENDPOINT",
    help="Where to listen: tcp://HOST:PORT or ipc://PATH. May be given several times.",
)
@click.option("--upstream", metavar="ENDPOINT", help="A router above this one, to be dialled.")
@click.option("--keys", type=_FOLDER, metavar="DIR", help="CURVE keys of this router.")
@click.option("--upstream-keys", type=_FOLDER, metavar="DIR", help="Keys to dial the router above with.")
@click.option("--json", "as_json", is_flag=True, help="Say everything as JSON lines.")
def _router(
    binds: tuple[str, ...], upstream: str | None, keys: Path | None, upstream_keys: Path | None, as_json: bool
) -> int:
    """Forward messages between cells by name.

    The first lines of standard output are the addresses it listens at; a tcp port given as * is filled in. Beyond
    loopback it listens only with keys.
    """
    from flarebus.loop import Loop
    from flarebus.router import Router
    from flarebus.security.keys import DialKeys, ListenKeys

    listen = None if keys is None else ListenKeys.load(keys)
    dial = None if upstream_keys is None else DialKeys.load(upstream_keys)
    if dial is not None and upstream is None:
        raise UsageError("--upstream-keys: needs --upstream")

    # Before anything is announced: whoever reads the line may send the signal at once. A queue and no event: a second
    # signal may interrupt the handler of the first, and the lock of an event would then wait for itself.
    endings: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in _ENDINGS:
        signal.signal(number, lambda number, _: endings.put(number))
    loop = Loop("router")
    try:
        router = Router(loop)
        bound = [router.bind(bind, listen) for bind in binds]
        if upstream is not None:
            router.connect(upstream, dial)
        about = {"bound": bound[0], "endpoints": bound, "upstream": upstream, "curve": listen is not None}
        click.echo(json.dumps(about) if as_json else "\n".join(bound))
        endings.get()
        # The end takes no time, and a second Ctrl-C must not leave half of it.
        for number in _ENDINGS:
            signal.signal(number, signal.SIG_IGN)
        statistics = asdict(router.statistics())
    finally:
        loop.stop()
    if as_json:
        click.echo(json.dumps(statistics))
    else:
        click.echo(f"forwarded {statistics['messages']} messages, {statistics['bytes']} bytes", err=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_command(_router, argv, "flarebus-router")


if __name__ == "__main__":
    raise SystemExit(main())
