# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The life of the server's process: it listens, and when it is told to stop, answers may end before it exits."""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

import anyio
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visualchat.errors import InputError
from visualchat.serving.answers import AnswerService
from visualchat.serving.connections import ClientConnection, Connections, Listener
from visualchat.serving.errors import stopping_error
from visualchat.serving.limits import ConnectionLimits


logger = logging.getLogger("uvicorn.error")

# For errors to be sent, after `shutdown_seconds`
CLOSING_SECONDS = 1.0


class StoppingApp:
    """An ASGI application that answers like `app`, but while the server stops, refuses requests (503)."""

    def __init__(self, app: ASGIApp, connections: Connections):
        self.app, self.connections = app, connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_last(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if self.connections.is_stopping:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        if scope["type"] == "http" and self.connections.is_stopping:
            with anyio.move_on_after(CLOSING_SECONDS):  # many clients read the response only after they have sent the body
                while (await receive()).get("more_body"):
                    pass
            await stopping_error().to_response()(scope, receive, send_last)
            return
        try:
            await self.app(scope, receive, send_last)
        except asyncio.CancelledError:  # uvicorn cancels what is left at the end of the time
            if not self.connections.is_stopping:
                raise
            if not has_started:
                await stopping_error().to_response()(scope, receive, send_last)


class Server(uvicorn.Server):
    """
    uvicorn's server with limits of connections, whose answers may end when it stops. The first signal stops it, a second one
    ends the process at once.

    Args:
        app (`ASGIApp`): The application.
        service (`AnswerService`): It generates the answers of the application.
        limits (`ConnectionLimits`): The limits of connections.
        log_level (`str`, *optional*): uvicorn's.

    Attributes:
        signal (`int`, *optional*): The signal that stopped the server.
    """

    def __init__(self, app: ASGIApp, service: AnswerService, limits: ConnectionLimits, log_level: str | None = None):
        self.service, self.client_connections = service, Connections(limits)
        self.signal: int | None = None
        super().__init__(
            uvicorn.Config(
                StoppingApp(app, self.client_connections),
                http=functools.partial(ClientConnection, self.client_connections),
                ws="none",
                loop="asyncio",  # others do not call `Listener.accept`
                log_level=log_level,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=limits.shutdown_seconds + CLOSING_SECONDS,
            )
        )

    def listen(self, host: str, port: int) -> list[Listener]:
        """
        Listens on all addresses of a host, as `asyncio` does. An empty host means all addresses of this machine.

        Raises:
            InputError: If an address cannot be used. Those that the machine does not have (a container may know `localhost`
                as `::1` without having IPv6) are left out, if it has another one.
        """
        listeners, missing = [], None
        with contextlib.ExitStack() as stack:
            try:
                found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
                for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
                    try:
                        listener = stack.enter_context(Listener(self.client_connections, family))
                        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        if family == socket.AF_INET6:
                            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                        listener.bind(address)
                        listener.listen(self.config.backlog)  # clients that come before the event loop runs wait
                        listeners.append(listener)
                    except OSError as error:
                        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                            raise
                        missing = error
                if not listeners:
                    raise missing
            except OSError as error:
                raise InputError(f"cannot listen on {host} port {port}: {error.strerror}") from error
            stack.pop_all()
        return listeners

    def capture_signals(self) -> contextlib.AbstractContextManager:
        """uvicorn would raise the signal again after the server has stopped, so that SIGTERM never ended with status 0."""
        return contextlib.nullcontext()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of signals."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit, self.signal = True, sig

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        limit = self.client_connections.limits.shutdown_seconds
        logger.info("Stopping: answers may go on for %g seconds. A second signal ends them at once", limit)
        self.client_connections.is_stopping = self.service.is_stopping = True
        timer = asyncio.get_running_loop().call_later(limit, self.service.fail_all)
        await super().shutdown(sockets)
        timer.cancel()


def serve(app: ASGIApp, service: AnswerService, host: str, port: int, limits: ConnectionLimits) -> None:
    """
    Serves an application in this process, until SIGTERM or Ctrl-C.

    Raises:
        InputError: If the address cannot be used.
        KeyboardInterrupt: After Ctrl-C.
    """
    server = Server(app, service, limits)
    listeners = server.listen(host, port)
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, server.handle_exit)
    for listener in listeners:
        address, number = listener.getsockname()[:2]
        logger.info("Listening on http://%s:%d", f"[{address}]" if ":" in address else address, number)
    server.run(listeners)
    if not threads_ended(0.2):
        logger.warning("The process ends while the model still computes")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if server.signal == signal.SIGINT else 0)  # would wait for the threads otherwise
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


def threads_ended(seconds: float) -> bool:
    """Whether all threads for which Python would wait at its exit end within this time."""
    end = time.monotonic() + seconds
    others = [one for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon]
    for thread in others:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in others)
