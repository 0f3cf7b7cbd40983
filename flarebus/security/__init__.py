"""Keys and admission: who may speak on a socket that leaves this machine."""

from flarebus.security.admission import Admission
from flarebus.security.keys import DialKeys, KeyPair, ListenKeys

__all__ = ["Admission", "DialKeys", "KeyPair", "ListenKeys"]
