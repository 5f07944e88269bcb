"""The door: every request gets an id, shows its key, is counted and logged; no error gets past."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fabric.core.errors import FabricError
from fabric.gateway.auth import KeyRing
from fabric.gateway.call import SCOPE_KEY, Call, new_call
from fabric.gateway.counters import GatewayCounters
from fabric.gateway.errors import ClientLeft, error_response
from fabric.gateway.logs import log_bug, log_call

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENT_LEFT = 499  # nginx's status for the log; nobody receives it
UNROUTED = "(none)"


class FrontDoor:
    """ASGI middleware around the routes."""

    def __init__(self, app: AsgiApp, *, keys: KeyRing, counters: GatewayCounters) -> None:
        self._app = app
        self._keys = keys
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (or pass on what is none)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        call = new_call(headers)
        scope[SCOPE_KEY] = call
        self._counters.open += 1
        try:
            await self._answer(scope, receive, _Tagged(send, call), headers)
        except asyncio.CancelledError:
            call.disconnected = True
            raise
        finally:
            self._counters.open -= 1
            self._account(scope, call)

    async def _answer(
        self, scope: Scope, receive: Receive, send: _Tagged, headers: dict[bytes, bytes]
    ) -> None:
        try:
            send.call.tenant = self._keys.check(scope["path"], headers.get(b"authorization"))
            await self._app(scope, receive, send)
        except ClientLeft:
            send.call.disconnected = True
        except Exception as error:  # noqa: BLE001 (the last line: nothing gets past)
            if not isinstance(error, FabricError):
                log_bug(send.call, error)
            if not send.started:
                await error_response(error)(scope, receive, send)

    def _account(self, scope: Scope, call: Call) -> None:
        route = getattr(scope.get("route"), "path", UNROUTED)
        if call.disconnected:
            call.status = CLIENT_LEFT
            self._counters.disconnected()
        self._counters.answered(route, call.status)
        log_call(call, method=scope["method"], route=route)


class _Tagged:
    """`send` that adds the request id to the headers and remembers the status."""

    __slots__ = ("_send", "call", "started")

    def __init__(self, send: Send, call: Call) -> None:
        self._send = send
        self.call = call
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.call.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.call.request_id.encode("latin-1")),
            ]
        await self._send(message)
