"""Interfaces: gloo is told to use the one that leads to the other hosts, however their names are resolved."""

import os
from types import SimpleNamespace

import psutil
import pytest

from sutrain import network

TO = {"127.0.1.1": "127.0.0.1", "10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.1"}
"""From which address a host with the address 10.0.0.1 sends to these."""


@pytest.fixture(autouse=True)
def one_of_two_hosts(monkeypatch):
    monkeypatch.setattr(network, "own_address", TO.get)
    interfaces = {"lo": [SimpleNamespace(address="127.0.0.1")], "ib0": [SimpleNamespace(address="10.0.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what a test sets goes with it
        monkeypatch.delenv(name)


def note(host, address):
    return {"host": host, "address": address}


@pytest.mark.parametrize(
    ("master", "notes", "expected"),
    [
        ("10.0.0.1", [note("a", "10.0.0.1"), note("b", "10.0.0.2")], "ib0"),
        ("10.0.0.2", [note("b", "10.0.0.2"), note("a", "10.0.0.1")], "ib0"),
        (
            "127.0.1.1",
            [note("a", "127.0.0.1"), note("b", "10.0.0.2")],
            "ib0",
        ),  # its own name, as Debian has it
        ("127.0.1.1", [note("a", "127.0.0.1"), note("a", "127.0.0.1")], None),  # one host
        ("10.0.0.9", [note("a", None), note("b", None)], None),  # no way there: gloo says so
    ],
)
def test_the_interface_that_leads_to_another_host(master, notes, expected, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", master)
    network.choose_interface(notes)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    network.choose_interface([note("a", "10.0.0.1"), note("b", "10.0.0.2")])
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize("name", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
def test_an_interface_that_was_chosen_is_the_one_named(monkeypatch, name):
    assert network.interface_to("10.0.0.2") == "interface ib0, 10.0.0.1"
    monkeypatch.setenv(name, "eth7")
    assert network.interface_to("10.0.0.2") == f"interface eth7, by {name}"
