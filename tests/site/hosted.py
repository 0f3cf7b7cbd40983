"""A host of sites in this process, and the server that it works for: what tests of sites begin with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.client.log_config import LogConfig
from flarebus.job.kinds import FrameworkType
from flarebus.job.site_config import SiteConfig
from flarebus.site.host import HostedSite, SiteHost
from flarebus.site.job import JobFacts
from tests.server.played import LIMIT_S, SERVER, Bus

__all__ = ["SCRIPT", "Hosted", "until"]

SCRIPT = """
import flarebus.client as flare
import gate

flare.init()
name = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    gate.passed(name, model)
    model.params["w"] += 1
    flare.send(flare.FLModel(params=model.params, metrics={"loss": 0.5}))
    gate.answered(name)
print(name, "says goodbye")
"""


class Hosted:
    """A host under test, and the server it works for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bus = Bus()
        self.cell = Cell.attach("worker-1", self.bus.router, self.bus.loop)
        self.host: SiteHost | None = None
        self.over: Future[Any] = Future()
        self._thread: threading.Thread | None = None

    def start(self, *sites: str, text: str = SCRIPT, cell: Cell | None = None, **config: Any) -> SiteHost:
        """Run the sites, with a script unless its `text` is ""; returns when they have joined."""
        script = self.folder / "code" / "client.py"
        script.parent.mkdir(exist_ok=True)
        script.write_text(text)
        made = SiteConfig(str(script) if text else "", **{"framework": FrameworkType.NUMPY, **config})
        hosted = [HostedSite(site, self.folder / site, made) for site in sites]
        host = SiteHost(
            cell or self.cell,
            JobFacts("job", "job-1", SERVER, "best", "numpy", ""),
            hosted,
            LogConfig.parse("msg_only"),
        )
        heard = self.bus.start(lambda: self.bus.job.wait_for_sites(sites, LIMIT_S))
        self._thread = threading.Thread(target=self._run, args=(host,), name="flarebus host")
        self._thread.start()
        heard.result(LIMIT_S)
        self.host = host
        return host

    def _run(self, host: SiteHost) -> None:
        try:
            host.run()
            self.cell.close()
            self.over.set_result(None)
        except BaseException as error:
            self.over.set_exception(error)

    def log(self, site: str) -> str:
        return (self.folder / site / "log.txt").read_text()

    def end(self) -> None:
        """End the job as a server does, and wait for the host."""
        self.bus.start(lambda: self.bus.job.end("completed")).result(LIMIT_S)
        self.over.result(LIMIT_S)

    def close(self) -> None:
        if self.host is not None:
            self.host.end("test over")
        if self._thread is not None:
            self._thread.join(LIMIT_S)
            assert not self._thread.is_alive()
        self.cell.close()
        self.bus.close()


def until(is_true: Callable[[], bool]) -> None:
    """Return when something holds that is on its way."""
    deadline = time.monotonic() + LIMIT_S
    while not is_true():
        assert time.monotonic() < deadline
