# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Keeps pages of other sites out, for the server and the web page.

A site may give its own name the address of this machine once its page is loaded (DNS rebinding). The visitor's browser then
lets the page read what this machine answers. But it names the site in the header `Host`.
"""

import re
import socket
from collections.abc import Collection, Iterable
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from visualchat.errors import InputError
from visualchat.serving.errors import RequestError


# A host as it stands in `Host`, and in `Origin` behind the scheme
HOST = r"(?P<host>\[[0-9a-f:.]+\]|[\w.-]+)"
HOST_HEADER = re.compile(HOST + r"(?::(?P<port>\d*))?", re.IGNORECASE)
ORIGIN_HEADER = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://" + HOST + r"(?::(?P<port>\d+))?", re.IGNORECASE)
ALLOWED_HOST = re.compile(r"\*|(?:\*\.)?" + HOST + r"|[0-9a-f:.]+", re.IGNORECASE)
DEFAULT_PORTS = {"http": "80", "https": "443"}


def find_allowed_hosts(address: str, named: Iterable[str] = ()) -> frozenset[str]:
    """
    The hosts under which a server is known: `localhost`, the name of this machine, the address that it listens on, and those
    that `--allowed-host` names.

    Args:
        address (`str`): What the server listens on, a name or an address.
        named (`Iterable[str]`): Each is a host without scheme and port, `*.` and a domain for all hosts of the domain, or
            `*` for all hosts.

    Raises:
        InputError: If one of `named` is not such a host.
    """
    for host in named:
        if not ALLOWED_HOST.fullmatch(host):
            raise InputError(
                f"--allowed-host {host!r:.200}: give a host without scheme and port: example.com, *.example.com, or *"
            )
    return frozenset(normalize_host(host) for host in ("localhost", socket.gethostname(), address, *named))


def normalize_host(host: str) -> str:
    """One spelling of a host: in lower case, without a dot at the end; addresses without brackets, IPv6 ones shortened."""
    host = host.lower().removesuffix(".")
    address = read_address(host)
    return str(address) if address else host


def read_address(host: str):
    """The IP address that a host is, or `None` for a name."""
    try:
        return ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


class HostMiddleware:
    """
    Refuses requests that name another host than this server's (status 421), or that pages of other sites send (status 403).

    As `Host`, every IP address is allowed: DNS rebinding needs a name. As `Origin`, the server's own is allowed (the same
    host and port as in `Host`), and those whose host is one of `hosts`, on any port.

    Args:
        app (`ASGIApp`): The application behind it.
        hosts (`Collection[str]`): Of [`find_allowed_hosts`]. With `*` in it, nothing is refused.
        open_paths (`Collection[str]`): Paths that are answered in any case, since load balancers ask for them under names of
            their own.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], open_paths: Collection[str] = ()):
        self.app, self.hosts, self.open_paths = app, hosts, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_checked = scope["type"] in ("http", "websocket") and scope["path"] not in self.open_paths
        error = self._find_error(Headers(scope=scope)) if is_checked and "*" not in self.hosts else None
        await (error.to_response() if error else self.app)(scope, receive, send)

    def _find_error(self, headers: Headers) -> RequestError | None:
        hosts = headers.getlist("host")
        parsed = HOST_HEADER.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if not (parsed and (read_address(parsed["host"]) or self._is_known(parsed["host"]))):
            return RequestError(
                f"The header Host is {', '.join(hosts) or 'missing'!r:.200}, which is not a name of this server"
                " (the operator of the server can allow names with --allowed-host)",
                code="host_not_allowed",
                status=421,
            )
        for origin in headers.getlist("origin"):
            page = ORIGIN_HEADER.fullmatch(origin)
            if not (page and (self._is_known(page["host"]) or is_same_origin(page, parsed))):
                return RequestError(
                    f"The header Origin is {origin!r:.200}: this server answers no pages of other sites"
                    " (the operator of the server can allow their hosts with --allowed-host)",
                    code="origin_not_allowed",
                    status=403,
                )
        return None

    def _is_known(self, host: str) -> bool:
        host = normalize_host(host)
        address = read_address(host)
        if address:
            return address.is_loopback or host in self.hosts
        domains = (host[k:] for k, character in enumerate(host) if character == ".")
        return host in self.hosts or host.endswith(".localhost") or any(f"*{domain}" in self.hosts for domain in domains)


def is_same_origin(page: re.Match, server: re.Match) -> bool:
    """Whether the headers `Origin` and `Host` name the same host and port."""
    default = DEFAULT_PORTS.get(page["scheme"].lower())
    ports = {page["port"] or default, server["port"] or default}
    return normalize_host(page["host"]) == normalize_host(server["host"]) and len(ports) == 1
