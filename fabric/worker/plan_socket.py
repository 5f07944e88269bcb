"""`SocketChannel`: a channel over TCP, for workers on other machines."""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from contextlib import suppress

from fabric.worker.channel import ChannelClosed, Unframer, framed

READ_BYTES = 256 << 10
PASSWORD_BYTES = 32
GREETING_TIMEOUT_S = 5.0


class SocketChannel:
    """One end; see `Channel`. `connection`: a connected TCP socket, from now on this channel's."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a cut cable is noticed within seconds
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
        connection.setblocking(True)
        # Timeouts belong to a socket object: one for each direction, so that both can wait.
        self._out, self._in = connection, connection.dup()
        self._unframer = Unframer()

    def send(self, data: bytes, timeout_s: float) -> None:
        """See `Channel`."""
        try:
            self._out.settimeout(timeout_s)
            self._out.sendall(framed(data))
        except TimeoutError:
            self.close()  # half a message is under way: nothing may follow it
            raise ChannelClosed(f"the other end has read nothing for {timeout_s:.0f} s") from None
        except OSError as error:
            raise ChannelClosed(f"the connection is lost: {error.strerror}") from None

    def receive(self, timeout_s: float | None) -> bytes:
        """See `Channel`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._unframer.take()) is None:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError(f"no message for {timeout_s:.0f} s")
            try:
                self._in.settimeout(left_s)
                data = self._in.recv(READ_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise ChannelClosed(f"the connection is lost: {error.strerror}") from None
            if not data:
                raise ChannelClosed("the channel is closed")
            self._unframer.add(data)
        return message

    def close(self) -> None:
        """See `Channel`."""
        with suppress(OSError):
            self._out.shutdown(socket.SHUT_RDWR)


class Doorman:
    """Listens for one worker; who comes must know the password, which only Ray's calls carry."""

    def __init__(self, host: str) -> None:
        self._password = secrets.token_hex(PASSWORD_BYTES // 2)
        self._listener = socket.create_server((host, 0))

    @property
    def address(self) -> str:
        """For `connect`: "host:port/password"."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}/{self._password}"

    def welcome(self, timeout_s: float) -> SocketChannel:
        """The worker's channel; strangers are sent away. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout_s
        with self._listener:
            while (left_s := deadline - time.monotonic()) > 0:
                self._listener.settimeout(left_s)
                connection, _ = self._listener.accept()
                if self._is_ours(connection):
                    return SocketChannel(connection)
                connection.close()
        raise TimeoutError(f"no worker has come for {timeout_s:.0f} s")

    def _is_ours(self, connection: socket.socket) -> bool:
        connection.settimeout(GREETING_TIMEOUT_S)
        said = b""
        with suppress(OSError):
            while len(said) < PASSWORD_BYTES and (more := connection.recv(PASSWORD_BYTES)):
                said += more
        return hmac.compare_digest(said, self._password.encode())


def connect(address: str, timeout_s: float) -> SocketChannel:
    """The worker's end. Raises `ChannelClosed` if nobody listens there."""
    place, _, password = address.partition("/")
    host, _, port = place.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout_s)
        connection.sendall(password.encode())
    except OSError as error:
        raise ChannelClosed(f"can't reach {place}: {error.strerror}") from None
    return SocketChannel(connection)
