# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Who sends a request, and whose turn it is."""

import threading
from collections import OrderedDict, deque
from ipaddress import IPv6Address, ip_address
from typing import Generic, TypeVar

from fastapi import Request


T = TypeVar("T")


def find_client(request: Request) -> str:
    """The address of a request's client. One host has many IPv6 addresses, so that the first 64 bits of these are taken."""
    try:
        address = ip_address(request.client.host) if request.client else None
    except ValueError:  # what a proxy calls its client
        return request.client.host
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
    return str(address)


class FairQueue(Generic[T]):
    """A queue in which clients take turns. For each client, it is first in, first out. It may be used by several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        # The client whose turn it is comes first
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def put(self, client: str, item: T) -> None:
        with self._lock:
            self._waiting.setdefault(client, deque()).append(item)

    def take(self) -> T | None:
        """The next item, or `None` if there is none."""
        with self._lock:
            if not self._waiting:
                return None
            client, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if items:
                self._waiting[client] = items
            return item

    def remove(self, client: str, item: T) -> None:
        """Removes an item, if it still waits."""
        with self._lock:
            items = self._waiting.get(client, deque())
            if item in items:
                items.remove(item)
            if not items:
                self._waiting.pop(client, None)
