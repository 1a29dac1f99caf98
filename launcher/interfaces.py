"""Network interfaces of this machine, and the one that ranks talk through (asks the kernel, sets environment variables)."""

import os
import socket
import struct

LOOPBACK = "lo"


def choose_interface(name: str) -> None:
    """Have gloo and NCCL talk through one interface. Beyond the loopback what a site has set itself, such as its InfiniBand, it knows better."""
    chosen = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}  # without the sign NCCL takes every name that begins so
    os.environ.update(chosen if name == LOOPBACK else {variable: os.environ.get(variable, value) for variable, value in chosen.items()})


def interface_of(address: str) -> str | None:
    """Name of the network interface that carries an IPv4 address; None when none does."""
    import fcntl

    if address.startswith("127."):
        return LOOPBACK  # the whole network 127.0.0.0/8 is the loopback's, but the interface names only 127.0.0.1
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # SIOCGIFADDR: the IPv4 address of an interface.
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
