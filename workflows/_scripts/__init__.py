"""What the sites of the demos run. In a folder of its own, because that comes first in the imports of a script: the
modules beside `workflows.fedavg` may be called like some of the standard library.
"""

from __future__ import annotations

__all__: list[str] = []
