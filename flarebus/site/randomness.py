"""The random generators that a whole process shares, so that each script of the process can have its own.

Scripts seed and draw from ``random``, ``numpy.random`` and ``torch`` as if they were alone; without this, what one
draws would depend on which other scripts ran in between. Only libraries that are loaded are touched. Generators of GPUs
are not exchanged (that would synchronise with the device), nor are generator objects, which are private anyway.
"""

from __future__ import annotations

import random
import sys
from typing import Any

__all__ = ["RandomStates"]


class RandomStates:
    """The process-wide generators of one script while another one has the process. Starts like a fresh process."""

    __slots__ = ("_numpy", "_python", "_torch")

    def __init__(self) -> None:
        # Any: the libraries' own state objects, opaque here; NumPy and PyTorch are not imported for them.
        self._python: Any = None
        self._numpy: Any = None
        self._torch: Any = None

    def save(self) -> None:
        """Keep the generators as they are in the process now."""
        self._python = random.getstate()
        numpy_random: Any = sys.modules.get("numpy.random")
        if hasattr(numpy_random, "get_bit_generator"):
            self._numpy = numpy_random.get_bit_generator()
        torch: Any = sys.modules.get("torch")
        if hasattr(torch, "get_rng_state"):
            self._torch = torch.get_rng_state()

    def install(self) -> None:
        """Make these the generators of the process; those of a library not yet seen begin as in a fresh process."""
        if self._python is None:
            random.seed()
        else:
            random.setstate(self._python)
        numpy_random: Any = sys.modules.get("numpy.random")
        if hasattr(numpy_random, "set_bit_generator"):
            # The generator itself is exchanged, not its state: a hundred times cheaper.
            numpy_random.set_bit_generator(numpy_random.MT19937() if self._numpy is None else self._numpy)
        torch: Any = sys.modules.get("torch")
        if hasattr(torch, "set_rng_state"):
            torch.set_rng_state(torch.Generator().get_state() if self._torch is None else self._torch)
