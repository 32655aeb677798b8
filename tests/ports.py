"""Ports for servers that a test starts in another process, which binds them later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at, chosen at random.

    They lie below the range from which the system gives ports to whoever asks for any, as the Ray of another test
    process does hundreds of times: one of those may be taken before the server binds it.
    """
    above = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(_LOWEST, max(above, 2 * _LOWEST))
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found
