"""The web page over HTTP: what it serves, to whom, and how much it takes."""

import json
import re
import socket
import time
from pathlib import Path

import httpx
import pytest
from gradio import blocks as gradio_blocks

from helpers.server import encode, wait_until
from helpers.tiny import digit_image, make_model, make_processor
from visualchat.chat.page import ChatPage, launch
from visualchat.chat.page_routes import PageRoutes
from visualchat.cli.web import parse_arguments
from visualchat.errors import InputError


API = "/gradio_api"
PICTURE = encode(digit_image(0).resize((64, 64)))
LIMIT = 50_000  # bytes of the files of a message


@pytest.fixture(scope="module")
def page():
    model = make_model(image_number_keys=True)
    model.generation_config.eos_token_id = None
    return ChatPage(model, make_processor(), max_bytes=LIMIT)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder of uploads."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


def start(page, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return launch(page, parse_arguments(["model", "--port", str(port), "--allowed-host", "*.example.com", *options]))


@pytest.fixture(scope="module")
def running(page, uploads):
    blocks = start(page)
    yield blocks
    blocks.close()


@pytest.fixture
def http(running):
    with httpx.Client(base_url=running.local_url, trust_env=False, timeout=60) as client:
        yield client


def upload(http, *files: bytes) -> httpx.Response:
    return http.post(f"{API}/upload", files=[("files", (f"{k}.png", data, "image/png")) for k, data in enumerate(files)])


def call(http, running, text: str, files=(), seed=-1) -> list[dict]:
    """Asks as the page does. All messages about the answer."""
    (index,) = (index for index, function in running.fns.items() if function.name == "ask")
    parts = [{"path": path, "meta": {"_type": "gradio.FileData"}, "mime_type": "image/png"} for path in files]
    data = [None, {"text": text, "files": parts}, 4, 0, 1, seed]
    session = {"session_hash": f"visitor{time.monotonic_ns()}"}
    http.post(f"{API}/queue/join", json={"data": data, "fn_index": index, **session}).raise_for_status()
    with http.stream("GET", f"{API}/queue/data", params=session) as response:
        return [json.loads(line.removeprefix("data:")) for line in response.iter_lines() if line.startswith("data:")]


def test_the_page_works(http, running):
    assert http.head("/").status_code == 200
    html = http.get("/").text
    assert "VisualChat" in html
    for name in ("/theme.css", re.search(r"[./]*(/assets/[\w.-]+\.js)", html)[1]):
        assert http.get(name).status_code == 200
    (path,) = upload(http, PICTURE).json()
    assert http.get(f"{API}/file={path}").content == PICTURE
    *_, done, _ = call(http, running, "What is it?", [path])
    assert done["msg"] == "process_completed" and done["success"]


def is_open(method: str, path: str) -> bool:
    return (method, path) in {
        *(("GET", path) for path in ("/", "/theme.css", "/favicon.ico", "/robots.txt", "/static/x", "/assets/x")),
        *(("GET", f"{API}/{name}") for name in ("startup-events", "app_id", "queue/data", "heartbeat/x")),
        ("HEAD", "/"),
        ("POST", f"{API}/upload"),
        ("POST", f"{API}/queue/join"),
    }


def test_of_all_routes_of_gradio_those_of_the_page_are_open(http, running):
    listed = running.app.openapi()["paths"].items()  # of FastAPI, whether or not the page has an address for it
    routes = {(method.upper(), re.sub(r"\{[^}]*\}", "x", path)) for path, methods in listed for method in methods}
    assert len(routes) > 70
    routes |= {("GET", path) for path in ("/docs", "/redoc", "/openapi.json")} | {("PUT", "/"), ("OPTIONS", "/")}
    for method, path in routes:
        if not is_open(method, path):
            response = http.request(method, path, json={})
            assert (response.status_code, response.text) == (404, "Not found" * (method != "HEAD")), (method, path)
    assert {route for route in routes if is_open(*route)} >= {("POST", f"{API}/upload"), ("GET", f"{API}/queue/data")}


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring/summary",
        f"{API}/info?all_endpoints=true",
        "/config",
        f"{API}/call/ask/anna",
        f"{API}/file=http://example.com/a.png",
        f"{API}/file=/etc/passwd",
        f"{API}/file=" + str(Path(__file__)),
        "/%67radio_api/info",
        "//monitoring/summary",
        "/assets/../monitoring/summary",
        "/assets/..%2f..%2f..%2findex.html",
        f"{API}/info/",
    ],
)
def test_what_is_closed_stays_closed_however_it_is_spelled(http, path):
    connection = socket.create_connection((http.base_url.host, http.base_url.port))  # a client would tidy the path
    with connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        connection.settimeout(30)
        assert connection.recv(1000).split()[1] in (b"403", b"404")


def test_a_file_beside_the_uploads_is_not_read(http, uploads):
    beside = Path(f"{uploads}-beside.png")
    beside.write_bytes(PICTURE)
    for path in (beside, f"{uploads}/../{beside.name}"):
        assert http.get(f"{API}/file={path}").status_code in (403, 404)


def test_uploads_have_a_limit_together(http, uploads):
    before = {*uploads.rglob("*")}
    response = upload(http, *[bytes(LIMIT // 2)] * 12)
    assert response.status_code == 413
    assert re.fullmatch(r"The files have 30\d,\d{3} bytes, at most 50,000 are allowed", response.text)
    response = http.post(f"{API}/upload", content=iter([b"a"]), headers={"Content-Type": "multipart/form-data"})
    assert response.status_code == 411
    assert {*uploads.rglob("*")} == before


def test_an_upload_that_breaks_off_leaves_no_file(http, uploads):
    before = {*uploads.iterdir()}
    head = f"POST {API}/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40000\r\n"
    part = 'Content-Disposition: form-data; name="files"; filename="a.png"'
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        content_type = "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        connection.sendall(f"{head}{content_type}--x\r\n{part}\r\n\r\n".encode() + bytes(30_000))
        wait_until(lambda: {*uploads.iterdir()} > before, seconds=60)
    wait_until(lambda: {*uploads.iterdir()} == before, seconds=60)


def test_images_of_several_uploads_have_the_same_limit(http, running):
    paths = [upload(http, PICTURE + bytes(30_000)).json()[0], upload(http, PICTURE + bytes(30_001)).json()[0]]
    messages = call(http, running, "What are these?", paths)
    assert any("bytes together: at most 50,000 are allowed" in one.get("log", "") for one in messages)


def test_long_texts_and_large_seeds_are_refused_and_the_visitor_goes_on(http, running):
    for text, seed, warning in (
        ("x" * 2_000_000, -1, "The question has 2,000,000 characters: at most 400,000 are allowed"),
        ("What?", 2**64, f"The seed is {2**64}: use 0 to {2**53 - 1}, or -1 for a different answer each time"),
    ):
        messages = call(http, running, text, seed=seed)
        assert [one["log"] for one in messages if one["msg"] == "log"] == [warning]
        done = messages[-2]
        assert done["msg"] == "process_completed" and done["success"]
        assert done["output"]["data"][2]["interactive"]
    response = http.post(f"{API}/queue/join", json={"data": ["x" * 4_000_000]})
    assert (response.status_code, response.json()["detail"].startswith("The message has 4,000,0")) == (413, True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost"}, 200),
        ({"Host": "chat.example.com", "Origin": "https://chat.example.com"}, 200),
    ],
)
def test_foreign_hosts_are_refused(http, headers, status):
    assert http.get("/", headers=headers).status_code == status


def test_a_host_that_is_none_is_named(page):
    with pytest.raises(InputError, match="--allowed-host 'http://a'"):
        start(page, "--allowed-host", "http://a")


def test_the_name_of_a_public_link_is_allowed(page, uploads, monkeypatch):
    monkeypatch.setattr(gradio_blocks.networking, "setup_tunnel", lambda **_: "https://1234.gradio.live")
    blocks = start(page, "--share")
    try:
        for host, status in (("1234.gradio.live", 200), ("5678.gradio.live", 421)):
            response = httpx.get(blocks.local_url, headers={"Host": host, "Origin": f"https://{host}"}, trust_env=False)
            assert response.status_code == status
    finally:
        blocks.close()


def test_other_protocols_pass():
    """Those of the application's start and end."""
    import asyncio

    passed = []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    asyncio.run(PageRoutes(app, 1)({"type": "lifespan"}, None, None))
    assert passed == ["lifespan"]
