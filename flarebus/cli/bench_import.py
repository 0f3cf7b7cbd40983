"""What importing the Client API costs: fresh interpreters with and without it, in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

__all__ = ["run"]

_MODULE = "flarebus.client"
_LIST = f"""
import sys, json
import {_MODULE}
known = sys.stdlib_module_names | {{"__main__", "flarebus"}}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}} - known)))
"""


def run(runs: int) -> dict[str, Any]:
    """Start `2 * runs` interpreters one after the other.

    Returns:
        `import_s` (median with the import less median without), `bare_s`, `whole_s` and the `modules` it brings in that
        belong neither to the standard library nor to flarebus.
    """
    modules = json.loads(subprocess.run([sys.executable, "-c", _LIST], check=True, capture_output=True).stdout)
    bare, whole = [], []
    for _ in range(runs):
        bare.append(_timed("pass"))
        whole.append(_timed(f"import {_MODULE}"))
    bare_s, whole_s = statistics.median(bare), statistics.median(whole)
    return {
        "bench": "import",
        "import_s": round(whole_s - bare_s, 4),
        "bare_s": round(bare_s, 4),
        "whole_s": round(whole_s, 4),
        # Installers put modules of their own into every interpreter (`__editable___...`, `_distutils_hack`).
        "modules": [name for name in modules if not name.startswith("_")],
    }


def _timed(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin
