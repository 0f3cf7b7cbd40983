"""The program `flarebus-router`: a router on its own, so that servers and sites need only dial out."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from flarebus.cli.exits import run_command
from flarebus.errors import UsageError

__all__ = ["main"]

_EPILOG = """\b
Examples:
  flarebus-router --bind tcp://127.0.0.1:8002
  flarebus-router --bind 'tcp://127.0.0.1:*' --json
  flarebus-router --bind tcp://0.0.0.0:8002 --keys /etc/flarebus/router
  flarebus-router --bind ipc:///run/site-1/bus --keys keys --upstream tcp://hub:8002 --upstream-key hub.pub

The folder of keys holds router.key (for its owner only), router.pub, and in its folder 'admitted' the public key of
everybody who may connect. It ends with Ctrl-C or SIGTERM.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--bind", required=True, metavar="ENDPOINT", help="Where to listen: tcp://HOST:PORT or ipc://PATH.")
@click.option("--upstream", metavar="ENDPOINT", help="A router above this one, to be dialled.")
@click.option("--keys", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="CURVE keys.")
@click.option(
    "--upstream-key",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Public key of the router above; needed when it asks for keys.",
)
@click.option("--json", "as_json", is_flag=True, help="Say everything as JSON lines.")
def _router(bind: str, upstream: str | None, keys: Path | None, upstream_key: Path | None, as_json: bool) -> int:
    """Forward messages between cells by name.

    The first line of standard output is the address it listens at; a tcp port given as * is filled in. Beyond loopback
    it listens only with keys.
    """  # fmt: skip
    from flarebus.loop import Loop
    from flarebus.router import Router
    from flarebus.security.keys import DialKeys, KeyPair, ListenKeys, read_key

    listen = None if keys is None else ListenKeys.load(keys)
    dial = None
    if upstream_key is not None:
        if keys is None or upstream is None:
            raise UsageError("--upstream-key: needs --upstream, and --keys with this router's own pair")
        dial = DialKeys(KeyPair.load(keys, "router"), read_key(upstream_key))

    # Before anything is announced: whoever reads the line may send the signal at once.
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    loop = Loop("router")
    try:
        router = Router(loop)
        bound = router.bind(bind, listen)
        if upstream is not None:
            router.connect(upstream, dial)
        about = {"bound": bound, "upstream": upstream, "curve": listen is not None}
        click.echo(json.dumps(about) if as_json else bound)
        ended.wait()
        statistics = asdict(router.statistics())
        router.close()
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
