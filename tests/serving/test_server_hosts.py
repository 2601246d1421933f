"""Requests under foreign names, and from pages of other sites, as browsers send them."""

import http.client
import json
import socket

import pytest

from helpers.server import PATH, body, text
from visualchat.errors import InputError
from visualchat.serving.hosts import HostMiddleware, find_allowed_hosts


def send(server, headers, method="GET", path="/v1/models", content=None):
    """The status and the JSON of a request with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(content or b"")))
    connection.endheaders(content)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


OWN_HOSTS = ["127.0.0.1", "127.0.0.1:8000", "LOCALHOST:8000", "localhost.", "[::1]:8000", "[::1]", "a.localhost"]
OWN_HOSTS += ["10.1.2.3", "[fe80::1]:80", "a.example.com", "A.B.example.com:9", socket.gethostname()]
FOREIGN_HOSTS = ["evil.org", "evil.org:8000", "localhost.evil.org", "evil-example.com", "example.com", "127.0.0.1.evil.org"]
FOREIGN_HOSTS += ["localhost@evil.org", "evil.org/localhost", "[::1", "::1", "localhost:80:80", "0x7f.1", "", "*"]


class TestHost:
    @pytest.mark.parametrize("host", OWN_HOSTS)
    def test_own_names_and_addresses_are_answered(self, server, host):
        assert send(server, [("Host", host)])[0] == 200

    @pytest.mark.parametrize("host", FOREIGN_HOSTS)
    def test_others_are_refused(self, server, host):
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nothing"), ("POST", PATH)):
            status, answer = send(server, [("Host", host)], method, path)
            assert (status, answer["error"]["code"]) == (421, "host_not_allowed")
            assert f"The header Host is {host or 'missing'!r}" in answer["error"]["message"] or not host
        assert send(server, [("Host", host)], path="/health") == (200, {"status": "ok"})

    def test_long_names_are_cut(self, server):
        assert len(json.dumps(send(server, [("Host", "a" * 5000)])[1])) < 500


@pytest.mark.parametrize(
    "host, origin, expected",
    [
        ("localhost:8000", "http://localhost:8000", 200),
        ("127.0.0.1:8000", "http://localhost:3000", 200),
        ("10.1.2.3:8000", "http://10.1.2.3:8000", 200),
        ("10.1.2.3", "http://10.1.2.3:80", 200),
        ("[fe80::1]:8000", "http://[FE80:0::1]:8000", 200),
        ("a.example.com", "https://a.example.com", 200),
        ("localhost", "https://b.example.com:8443", 200),
        ("localhost:8000", "http://evil.org", 403),
        ("localhost:8000", "http://evil.org:8000", 403),
        ("10.1.2.3:8000", "http://10.1.2.3:9000", 403),
        ("10.1.2.3:8000", "http://10.1.2.4:8000", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "http://localhost@evil.org", 403),
        ("localhost:8000", "", 403),
    ],
)
def test_pages_of_other_sites_are_refused(server, host, origin, expected):
    headers = [("Host", host), ("Origin", origin), ("Content-Type", "application/json")]
    status, answer = send(server, headers, "POST", PATH, json.dumps(body(text())).encode())
    assert status == expected
    if expected == 403:
        assert answer["error"]["code"] == "origin_not_allowed" and repr(origin) in answer["error"]["message"]


def test_a_star_allows_all():
    async def app(*_):
        answered.append(True)

    answered = []
    middleware = HostMiddleware(app, find_allowed_hosts("127.0.0.1", ["*"]))
    headers = [(b"host", b"evil.org"), (b"origin", b"null")]
    with pytest.raises(StopIteration):
        middleware({"type": "http", "path": "/", "headers": headers}, None, None).__await__().__next__()
    assert answered


@pytest.mark.parametrize("host", ["http://a.org", "a.org:80", "a.org/", "*a.org", "a.*", "", "[::1]:80"])
def test_wrong_names_on_the_command_line(host):
    with pytest.raises(InputError, match="give a host without scheme and port"):
        find_allowed_hosts("127.0.0.1", [host])
    assert {"::1", "a.org", "*.b.org"} < find_allowed_hosts("0.0.0.0", ["[0:0::1]", "A.org.", "*.B.org"])
