"""The worker: a process that hosts sites. Started as `python -m flarebus.site.worker`, told what to do on standard
input.

The first line of standard input is its configuration, as JSON: nothing secret ever stands in an argument list. The rest
stays open for as long as the parent lives; when it ends, so does the worker, at once. Ctrl-C is the parent's business.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import mmap
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.client.log_config import LogConfig
from flarebus.errors import FlarebusError
from flarebus.job.site_config import SiteConfig
from flarebus.link import SILENCE_S
from flarebus.security.keys import DialKeys, KeyPair
from flarebus.site.host import HostedSite, SiteHost
from flarebus.site.job import JobFacts
from flarebus.tracking.group import TrackingPlan

__all__ = ["TURN_BYTES", "main", "read_turn"]

JOIN_S = 30.0
# The file in which a worker notes whose turn it is, for whoever looks after it was killed.
TURN_BYTES = 256
_NOBODY = b"-"  # no site is called that
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Host the sites of the configuration on standard input until the server ends the job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    config = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_watch_parent, name="flarebus parent", daemon=True).start()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # On one machine a closed connection says that a process is dead, and nothing else does: a script may keep this one
    # from answering for long, a person may stop the other one and let it go on.
    silence_s = math.inf if config["endpoint"].startswith("ipc://") else SILENCE_S
    keys, aliases = _keys(config["keys"]), config["aliases"]
    cell = Cell.dial(config["address"], config["endpoint"], keys, aliases, silence_s=silence_s)
    try:
        cell.wait_until_up(JOIN_S)
        _host(cell, config)
    except FlarebusError as error:
        print(f"worker {config['address']}: {error}", file=sys.stderr)
        return 1
    finally:
        cell.close()
    return 0


def _host(cell: Cell, config: dict[str, Any]) -> None:
    sites = [
        HostedSite(site["name"], Path(site["folder"]), SiteConfig.from_json(site["config"])) for site in config["sites"]
    ]
    with open(config["turn_file"], "r+b") as file, mmap.mmap(file.fileno(), TURN_BYTES) as page:
        host = SiteHost(
            cell,
            JobFacts(**config["job"]),
            sites,
            LogConfig.parse(config["log_config"]),
            on_turn=lambda site: _note_turn(page, site),
            endpoint=config["endpoint"],
            trainer_keys=config["trainer_keys"],
            tracking=TrackingPlan.from_json(config["tracking"]),
        )
        _note_turn(page, "")
        host.run()


def _note_turn(page: mmap.mmap, site: str) -> None:
    page[:TURN_BYTES] = (site.encode() or _NOBODY).ljust(TURN_BYTES, b"\0")


def read_turn(path: Path) -> str | None:
    """Whose turn it was in the worker that kept this file: "" nobody's, None when it never got ready to work."""
    try:
        noted = path.read_bytes().rstrip(b"\0")
    except OSError:
        return None
    return None if not noted else noted.removeprefix(_NOBODY).decode()


def _keys(config: dict[str, str] | None) -> DialKeys | None:
    if config is None:
        return None
    own = KeyPair(config["public"].encode(), config["secret"].encode())
    return DialKeys(own, config["server"].encode())


def _watch_parent() -> None:
    """Read standard input to its end, which is the parent's end."""
    while os.read(0, 4096):
        continue
    os._exit(1)  # whatever the scripts are doing: nobody wants it any more


def _die_with_parent() -> None:
    """On Linux the kernel ends us with the parent even if no Python code can run here any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
