"""A wire with a delay, for kernels without ``netem``: a program between the port of a virtual switch and the switch.

    python wires.py PORT SECONDS

It runs in the network namespace of the switch, and ends with its standard input. What comes through PORT reaches the
bridge ``br0`` SECONDS later; the other direction has no delay. The order stays, and nothing is lost.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

MTU = 9000
"""With packets of 9,000 bytes, 1 Gbit/s are 14,000 packets per second, few enough for Python."""
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_PACKET_BYTES = 1 << 16
_PACKETS_AT_ONCE = 100


def ip(line: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *line.split()], check=True)


def tap(name: str, bridge: str) -> int:
    """Make an interface of a bridge, and return the descriptor through which its packets are read and written."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    ip(f"link set {name} mtu {MTU} txqueuelen 100000 master {bridge} up")
    return descriptor


def cut(port: str) -> tuple[int, int]:
    """Take a port out of the switch; return a descriptor on the side of the port, and one on the side of the switch."""
    bridge = f"{port}br"
    ip(f"link add {bridge} type bridge")
    ip(f"link set {port} mtu {MTU} master {bridge} up")
    ip(f"link set {bridge} mtu {MTU} up")
    return tap(f"{port}near", bridge), tap(f"{port}far", "br0")


def waiting(descriptor: int) -> Iterator[bytes]:
    """Yield some of the packets that are there."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_PACKETS_AT_ONCE):
            yield os.read(descriptor, _PACKET_BYTES)


def carry(near: int, far: int, delay: float) -> None:
    """Carry packets until standard input ends."""
    late: collections.deque[tuple[float, bytes]] = collections.deque()
    while True:
        left = max(0.0, late[0][0] - time.monotonic()) if late else None
        ready = select.select([near, far, sys.stdin], [], [], left)[0]
        if sys.stdin in ready:
            return
        if near in ready:
            until = time.monotonic() + delay
            late.extend((until, packet) for packet in waiting(near))
        if far in ready:
            for packet in waiting(far):
                os.write(near, packet)
        now = time.monotonic()
        while late and late[0][0] <= now:
            os.write(far, late.popleft()[1])


def main() -> None:
    """Cut the wire, say so, and carry."""
    near, far = cut(sys.argv[1])
    print("up", flush=True)
    carry(near, far, float(sys.argv[2]))


if __name__ == "__main__":
    main()
