"""Over which of its network interfaces a host reaches the others."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import psutil


def choose_interface(notes: Sequence[Mapping[str, Any]]) -> None:
    """Have gloo use the interface that leads to the other hosts. By itself it takes the one that the name of its host
    stands for, which on Debian and Ubuntu is the loopback interface."""
    if "GLOO_SOCKET_IFNAME" in os.environ or len({(note["host"], note["address"]) for note in notes}) == 1:
        return
    # Rank 0 may know its own name, which MASTER_ADDR may be, as a loopback address.
    for target in [os.environ["MASTER_ADDR"], *(note["address"] for note in notes)]:
        own = own_address(target)
        if own is not None and not ipaddress.ip_address(own).is_loopback and (name := interface_of(own)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def interface_to(address: str) -> str:
    """Name and address of the network interface over which this host reaches `address`."""
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if chosen := os.environ.get(variable):
            return f"interface {chosen}, by {variable}"
    own = own_address(address)
    if own is None:
        return "no route"
    name = interface_of(own)
    return f"interface {name}, {own}" if name else own


def own_address(address: str) -> str | None:
    """This host's address on the way to `address`; None without a way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing; asks the routing table
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Name of this host's interface with that address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None
