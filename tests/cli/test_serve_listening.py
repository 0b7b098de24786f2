"""The port is bound before the model is loaded, and open before its address is printed."""

import asyncio
import socket

import pytest

from switchlm.cli.serve import _address, _listen, _open
from switchlm.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_connections_do_not_wait_for_more_to_send(host):
    """Nagle's algorithm against delayed acknowledgements costs 40 ms per response."""
    try:
        listener = _listen(host, 0)
    except ConfigError:
        assert host == "::1", "every machine has IPv4's loopback"
        pytest.skip("there is no IPv6 here")

    async def accepted():
        found = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(
            lambda _, writer: found.set_result(writer.get_extra_info("socket")), sock=listener
        )
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            delay = (await found).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            return delay

    with listener:
        _open(listener)
        assert _address(listener).endswith(f":{listener.getsockname()[1]}")
        assert asyncio.run(accepted())


def test_clients_may_connect_once_it_is_open():
    with _listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address).close()
        _open(listener)
        socket.create_connection(address).close()


def test_of_two_servers_on_one_port_the_second_is_an_error():
    first = _listen("127.0.0.1", 0)
    second = _listen("127.0.0.1", first.getsockname()[1])
    with first, second:
        _open(first)
        with pytest.raises(ConfigError, match="Choose another --port"):
            _open(second)
