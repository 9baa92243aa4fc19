"""Hosts on one machine, joined by slow links: a bandwidth, and a delay that needs no kernel module.

Each host is a network namespace with a TUN device. All devices are read by one process, `Switch`, which hands packets on as links of
`mbit` in both directions and `delay` seconds one way would: what leaves a host is read no faster than its link takes it (so that the
kernel queues and TCP slows down), and what arrives at one waits behind what arrived before, up to `BUFFER` seconds; more is dropped.
Packets are of 9,000 bytes, so that Python is fast enough. Needs root and /dev/net/tun.
"""

import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MTU = 9000
BUFFER = 0.2
SLACK = 0.002
"""Seconds that a late reader may catch up."""

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def space(host: int) -> str:
    """The namespace of a host."""
    return f"pmsite{host}"


def address(host: int) -> str:
    """Of a host."""
    return f"10.77.0.{host + 1}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Switch(threading.Thread):
    """Hands packets on between TUN devices. `mbit` none: as fast as it can."""

    def __init__(self, devices: list[int], mbit: float | None, delay: float):
        super().__init__(daemon=True)
        self.devices, self.delay = devices, delay
        self.second = 8e-6 / mbit if mbit else 0.0  # seconds that a byte takes
        self.stopping, self.dropped = False, 0

    def run(self) -> None:
        count = len(self.devices)
        leaves, arrives = [0.0] * count, [0.0] * count  # when each link is free
        waiting: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self.stopping:
            now = time.perf_counter()
            while waiting and waiting[0][0] <= now:
                _, _, host, packet = heapq.heappop(waiting)
                os.write(self.devices[host], packet)
            free = [host for host in range(count) if leaves[host] <= now]
            soon = [at for at in leaves if at > now] + ([waiting[0][0]] if waiting else [])
            pause = max(0.0, min(soon) - now) if soon else 0.05
            for device in select.select([self.devices[host] for host in free], [], [], pause)[0]:
                source, packet = self.devices.index(device), os.read(device, 65536)
                if packet[0] >> 4 != 4 or packet[16:19] != b"\x0a\x4d\x00":
                    continue
                now, took = time.perf_counter(), len(packet) * self.second
                leaves[source] = max(leaves[source], now - SLACK) + took
                host = packet[19] - 1
                at = max(arrives[host], leaves[source] + self.delay)
                if at - leaves[source] - self.delay > BUFFER:
                    self.dropped += 1
                    continue
                arrives[host] = at + took
                number += 1
                heapq.heappush(waiting, (at, number, host, packet))


@contextmanager
def hosts(count: int, *, mbit: float | None, delay: float) -> Iterator[Switch]:
    """So many hosts on links of `mbit` each way and `delay` seconds from one to another; gone in the end."""
    _remove(count)
    devices = []
    for host in range(count):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", f"pmwire{host}".encode(), IFF_TUN | IFF_NO_PI))
        devices.append(device)
        _ip("netns", "add", space(host))
        _ip("link", "set", f"pmwire{host}", "netns", space(host), "name", "wire0")
        _ip("-n", space(host), "addr", "add", f"{address(host)}/24", "dev", "wire0")
        _ip("-n", space(host), "link", "set", "wire0", "mtu", str(MTU), "up")
        _ip("-n", space(host), "link", "set", "lo", "up")
    switch = Switch(devices, mbit, delay)
    switch.start()
    try:
        yield switch
    finally:
        switch.stopping = True
        switch.join()
        _remove(count)
        for device in devices:
            os.close(device)


def _remove(count: int) -> None:
    for host in range(count):
        subprocess.run(["ip", "netns", "del", space(host)], check=False, stderr=subprocess.DEVNULL)
