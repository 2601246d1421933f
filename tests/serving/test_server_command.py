"""The server's metrics and its command, `visualchat serve`."""

import pytest
import torch

from benchmarks import serve_load
from helpers.server import Server, body, picture, text
from helpers.tiny import digit_image, make_model, make_processor
from visualchat.cli import main as visualchat
from visualchat.serving import server as program
from visualchat.serving.connections import possible_connections
from visualchat.serving.limits import ConnectionLimits, Limits


def test_metrics():
    with Server(Limits(images=2)) as server:
        server.ask(*[picture(digit_image(k)) for k in (1, 2)], text(), max_tokens=5)
        server.ask(picture(digit_image(1)), text(), max_tokens=5)
        server.post(b"{")
        server.post(body(text(), model="x"))
        server.store.max_bytes = server.store.nbytes
        server.ask(picture(digit_image(3)), text(), max_tokens=5)
        metrics = server.metrics()
        assert server.get("/metrics").startswith("# HELP visualchat_requests_total")
        expected = {
            'requests_total{status="200"}': 3,
            'requests_total{status="400"}': 1,
            'requests_total{status="404"}': 1,
            "generated_tokens_total": 15,
            "image_memory_hits_total": 1,
            "image_memory_misses_total": 3,
            "image_memory_evictions_total": 1,
            "image_memory_bytes": server.store.nbytes,
            "disconnects_total": 0,
            "queue_length": 0,
            "running": 0,
        }
        assert {name: metrics[f"visualchat_{name}"] for name in expected} == expected
        assert 0 < metrics["visualchat_tokens_per_second"] <= 1.5
        assert metrics["process_resident_memory_bytes"] > 1e7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(image_number_keys=True).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def test_the_script_under_load(folder):
    """The command line, in a process of its own: 60 requests by 8 clients. The benchmark sends 500."""
    results = serve_load.measure_load(folder, count=60, clients=8, invalid=0.15)
    assert [result["claim"][:2] for result in results] == ["51", "9 ", "th"]
    assert results[0]["image_memory"]["hits"] > 0


def test_arguments_reach_the_server(folder, tmp_path, monkeypatch):
    built, run = [], []
    monkeypatch.setattr(program, "build_app", lambda *arguments: built.extend(arguments))
    monkeypatch.setattr(program, "serve", lambda app, service, *settings: run.append(settings))
    visualchat(["serve", folder])
    service, name, limits, hosts = built
    assert (name, limits, service.num_slots, service.max_per_client) == (folder, Limits(images=12), 36, 18)
    assert {"localhost", "127.0.0.1"} < hosts and not {"::1", "c.org"} & hosts
    assert run[0][:2] == ("127.0.0.1", 8000)
    assert run[0][2] == ConnectionLimits(possible_connections(1000), shutdown_seconds=25)
    built.clear()
    arguments = "--model-name m --host ::1 --port 7 --dtype bfloat16 --concurrency 2 --queue 3 --image-memory-gb 0.5"
    arguments += f" --image-memory-folder {tmp_path}/memory --allow-host A.org --allow-host b.org:81 --max-body-mb 1"
    arguments += " --allowed-host C.org --max-text-mb 0.1 --max-json-values 50 --max-per-client 4"
    arguments += " --image-memory-folder-gb 1.5"
    arguments += " --max-images 3 --max-choices 4 --max-image-mb 0.5 --max-image-megapixels 2 --max-new-tokens 9"
    arguments += " --max-connections 5 --shutdown-seconds 0.5"
    visualchat(["serve", folder, *arguments.split()])
    service, name, limits, hosts = built
    assert (name, service.num_slots, service.max_per_client, service.model.dtype) == ("m", 5, 4, torch.bfloat16)
    assert (service.store.max_bytes, service.store.folder) == (2**29, f"{tmp_path}/memory")
    assert service.store.max_folder_bytes == 3 * 2**29
    urls = frozenset({"a.org", "b.org:81"})
    body, image = (1_000_000, 100_000, 50), {"images": 3, "image_bytes": 500_000, "image_pixels": 2_000_000}
    assert limits == Limits(*body, **image, choices=4, new_tokens=9, hosts=urls)
    assert {"localhost", "::1", "c.org"} < hosts
    assert run[1] == ("::1", 7, ConnectionLimits(5, shutdown_seconds=0.5))


def test_help_and_wrong_arguments(capsys, tmp_path):
    with pytest.raises(SystemExit):
        visualchat(["serve", "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--allow-host", "--image-memory-gb", "--queue", "--max-image-megapixels"))
    for arguments, message in (
        ([], "model"),
        (["x", "--concurrency", "0"], "expected 1"),
        (["x", "--queue", "-"], "expected 0"),
    ):
        with pytest.raises(SystemExit):
            visualchat(["serve", *arguments])
        assert message in capsys.readouterr().err
    make_model().model.language_model.config.save_pretrained(tmp_path)
    assert visualchat(["serve", str(tmp_path)]) == 2
    assert f"{tmp_path} holds a model of the type 'llama', not 'visualchat'" in capsys.readouterr().err
    assert visualchat(["serve", str(tmp_path), "--allowed-host", "http://a.org"]) == 2
    assert "--allowed-host 'http://a.org': give a host without scheme and port" in capsys.readouterr().err
    assert visualchat(["serve", str(tmp_path / "nothing")]) == 2
    assert f"there is no folder {tmp_path}/nothing" in capsys.readouterr().err
