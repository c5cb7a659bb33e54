"""The guard in tests/conftest.py really stops what would leave this machine."""

import socket
import urllib.error
import urllib.request

import pytest


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_a_connection_to_elsewhere_is_refused(host: str, method: str) -> None:
    with (
        socket.socket() as client,
        pytest.raises(PermissionError, match="must not use the network"),
    ):
        getattr(client, method)((host, 80))


def test_http_libraries_are_stopped_too() -> None:
    with pytest.raises((PermissionError, urllib.error.URLError), match="must not use the network"):
        urllib.request.urlopen("http://192.0.2.1/", timeout=5)


def test_this_machine_is_reachable() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()
