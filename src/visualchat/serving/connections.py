# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The connections of the server's clients: how many there may be, and how long each may keep the server waiting.

uvicorn limits neither. A client that sends no request, or a part of one, or that does not read its answer, could stay for
ever, and enough of them would take all open files that the process may have.
"""

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import resource
import socket
import time
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from visualchat.errors import InputError
from visualchat.serving.limits import ConnectionLimits


logger = logging.getLogger("uvicorn.error")

# Open files that are not connections: the listening sockets, images that are fetched, image memory in files, libraries
RESERVED_FILES = 96
# So much of an answer must be read in `send_seconds`
READ_BYTES = 16_384
# How long a connection without a request stays open after the server began to stop. A request that is on its way by then
# gets an answer (503) this way, instead of a broken connection
LAST_SECONDS = 1.0
# New connections that are turned away at a time
TURNED_AWAY = 50
# Between two lines in the log about the same
LOG_SECONDS = 60.0
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"


def possible_connections(wanted: int) -> int:
    """
    The number of connections that this process can have, `wanted` at most.

    Raises:
        InputError: If it may not open enough files for any.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return wanted
    if files <= RESERVED_FILES:
        raise InputError(f"this process may open {files} files, but the server needs more than {RESERVED_FILES}: ulimit -n")
    possible = min(wanted, files - RESERVED_FILES)
    if possible < wanted:
        logger.warning("Up to %d connections, not %d: this process may open %d files (ulimit -n)", possible, wanted, files)
    return possible


class Connections:
    """
    All connections of the server.

    Args:
        limits (`ConnectionLimits`): Their limits.

    Attributes:
        count (`int`): The number of open connections.
        silent (`dict[ClientConnection, None]`): Those that have no request, or a part of its head; the oldest first.
        uploading (`dict[ClientConnection, None]`): Those with a request whose body has not arrived; the oldest first.
        is_stopping (`bool`): Whether the server stops. It takes no more requests then.
    """

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.count, self.is_stopping = 0, False
        self.silent: dict[ClientConnection, None] = {}
        self.uploading: dict[ClientConnection, None] = {}
        self._logged = -LOG_SECONDS

    def move(self, connection: "ClientConnection", to: "dict[ClientConnection, None] | None") -> None:
        """Puts a connection into `silent`, `uploading` or neither. It keeps its position if it is there already."""
        for group in (self.silent, self.uploading):
            if group is not to:
                group.pop(connection, None)
        if to is not None:
            to.setdefault(connection)

    def close_oldest(self) -> bool:
        """
        Closes the connections that have been silent for the longest time, else the oldest uploads. It closes several, since
        the event loop may turn more slowly than new connections come. Returns whether there were any.
        """
        oldest = list(itertools.islice(self.silent or self.uploading, 1 + self.limits.connections // 8))
        for connection in oldest:
            self.move(connection, None)
            connection.transport.abort()
        return bool(oldest)

    def log_shortage(self, problem: str) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.warning("%s: silent connections are closed, the oldest first, or new ones turned away", problem)


class Listener(socket.socket):
    """
    A listening socket whose `accept` keeps the limit of connections. The event loop of asyncio would accept them until the
    process has no more files, and then write two thousand errors a second into the log.
    """

    def __init__(self, connections: Connections, family: int = socket.AF_INET):
        super().__init__(family, socket.SOCK_STREAM)
        self.connections = connections
        # An open file to give up for a moment when there is no other
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._has_accepted = False

    def accept(self) -> tuple[socket.socket, tuple]:
        """
        Raises:
            BlockingIOError: If there is no connection to accept now. asyncio calls again while one is waiting.
        """
        # asyncio calls this method when a connection is waiting, and then again until it raises
        is_waiting, self._has_accepted = not self._has_accepted, False
        limit = self.connections.limits.connections
        if self.connections.count >= limit:
            if is_waiting:
                self._make_room(f"All {limit} connections are in use (--max-connections, ulimit -n)")
            raise BlockingIOError
        try:
            accepted = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._make_room(f"No more files can be opened ({error.strerror})")
            raise BlockingIOError from error
        self.connections.count += 1
        self._has_accepted = True
        return accepted

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        super().close()

    def _make_room(self, problem: str) -> None:
        """Closes old connections, which takes effect after this method, or turns away new ones."""
        self.connections.log_shortage(problem)
        if self.connections.close_oldest():
            return
        os.close(self._spare)
        try:
            with contextlib.suppress(OSError):
                for _ in range(TURNED_AWAY):
                    with super().accept()[0] as turned_away:
                        turned_away.send(REFUSAL)
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY)


class ResponseWriter(h11.Connection):
    """Writes responses, whose first bytes may have been sent before the response is known: all begin with `PREFIX`."""

    PREFIX: ClassVar[bytes] = b"HTTP/1.1 "
    # The number of bytes that have been sent
    sent_early = 0

    def send(self, event: h11.Event) -> bytes | None:
        data = super().send(event)
        if data and self.sent_early:
            data, self.sent_early = data[self.sent_early :], 0
        return data


class ClientConnection(H11Protocol):
    """
    uvicorn's HTTP/1.1 protocol with limits of time, which answers a client that has closed its direction of the connection
    after the request. Such a client cannot be told from one that has left, until something is sent: only then does the
    system of one that has left respond that the connection is gone. So the first bytes of the response, which are always
    the same, are sent early, one at a time.

    Args:
        connections (`Connections`): All connections of the server.
        **kwargs: What uvicorn passes.
    """

    def __init__(self, connections: Connections, **kwargs):
        super().__init__(**kwargs)
        self.conn = ResponseWriter(h11.SERVER)
        self.registry, self.limits = connections, connections.limits
        self._timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._unread = 0
        # Whether nothing was received since the last response
        self._is_idle = False
        self._is_half_closed = False

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait_for_request(self.limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self.registry.count -= 1
        self.registry.move(self, None)
        self._limit(None)
        self._stop_probing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            self._is_idle = False
            self._wait_for_request(self.limits.head_seconds)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.is_answering:
            self.registry.move(self, self.registry.uploading if self.cycle.more_body else None)
            if not self.flow.write_paused:
                self._limit(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # begins with the next request if that has arrived already
        self._stop_probing()
        if self.is_answering:
            if self._is_half_closed:
                self._probe(0.2)
            return
        if self._is_half_closed:
            self.transport.close()
        if self.transport.is_closing():  # after the client has read what was written
            self.registry.move(self, self.registry.silent)
            self._limit(self.limits.send_seconds)
        elif self.conn.their_state is h11.SEND_BODY:  # the answer did not wait for the end of the body
            self._wait_for_request(self.limits.head_seconds)
        else:
            self._is_idle = True
            self._wait_for_request(self.limits.idle_seconds)

    def eof_received(self) -> bool:
        """Returns whether the connection stays open: if a whole request waits for its answer."""
        if not self.is_answering or self.cycle.more_body:
            return False
        if not self._is_half_closed:
            self._is_half_closed = True
            self._probe(0.2)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit(self.limits.send_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.is_answering:
            self._limit(None)

    def shutdown(self) -> None:
        """uvicorn calls it when the server begins to stop."""
        if self.is_answering or self.transport.get_write_buffer_size():
            super().shutdown()
        elif not self.transport.is_closing():
            self._wait_for_request(LAST_SECONDS)

    def _wait_for_request(self, seconds: float) -> None:
        self.registry.move(self, self.registry.silent)
        self._limit(min(seconds, LAST_SECONDS) if self.registry.is_stopping else seconds)

    def _limit(self, seconds: float | None) -> None:
        """Gives the client so much time to go on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._unread = self.transport.get_write_buffer_size()
            self._timer = self.loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self._timer = None
        if 0 < self.transport.get_write_buffer_size() <= self._unread - READ_BYTES:  # slow, but it reads
            self._limit(seconds)
        else:
            self.transport.abort()

    def _probe(self, pause: float) -> None:
        """Sends the next early byte of the response. If the client has left, a later write fails and ends the connection."""
        if self.cycle.response_started or self.conn.sent_early == len(self.conn.PREFIX):
            return
        position = self.conn.sent_early
        self.conn.sent_early += 1
        self._probe_timer = self.loop.call_later(pause, self._probe, 2 * pause)
        self.transport.write(self.conn.PREFIX[position : position + 1])

    def _stop_probing(self) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None
