"""The web page in a real Chromium: `make test-browser`. Where there is none, a skip; under `CI=true`, a failure."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from helpers.commands import command
from helpers.tiny import digit_image, make_model, make_processor


pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
# Records how long the last answer is whenever the conversation changes
WATCH_ANSWER = """() => {
    window.lengths = [];
    const watch = () => {
        const answers = document.querySelectorAll("#chat [data-testid=bot]");
        if (answers.length) window.lengths.push(answers[answers.length - 1].innerText.trim().length);
    };
    const everything = {subtree: true, childList: true, characterData: true};
    new MutationObserver(watch).observe(document.querySelector("#chat"), everything);
}"""


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        decide = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        decide("there is no Chromium: apt-get install chromium, which `make test-browser` does as root")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page, served by a process of its own; of a model that is slow enough to be watched."""
    folder = tmp_path_factory.mktemp("model")
    model = make_model(image_number_keys=True, text={"num_hidden_layers": 8})
    model.generation_config.eos_token_id = None  # its answers are as long as they may be
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = ("--max-images", 5, "--max-image-mb", 0.1, "--max-message-mb", 0.15)
    words = command("web", folder, "--port", port, "--examples", "digits", *limits)
    with open(folder / "log", "w+") as log:
        server = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, server, folder / "log")
            yield address
        finally:
            server.terminate()
            server.wait(timeout=20)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{address} does not answer after a minute: {log.read_text()}")


@pytest.fixture
def visit(chromium, address):
    """Opens the page as another visitor. No request may leave the machine."""
    contexts, strangers = [], []

    def open_page():
        contexts.append(chromium.new_context(viewport={"width": 1000, "height": 900}))
        contexts[-1].set_default_timeout(60_000)
        page = contexts[-1].new_page()
        page.on("request", lambda request: None if is_local(request.url, address) else strangers.append(request.url))
        page.goto(address)
        page.wait_for_selector("#box textarea")
        page.evaluate(WATCH_ANSWER)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert strangers == []


def is_local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(3):
        digit_image(k).resize((64, 64)).save(folder / f"{k}.png")
    return [str(folder / f"{k}.png") for k in range(3)]


def send(page, text: str, files: list[str] = ()) -> None:
    if files:
        page.set_input_files("#box input[type=file]", files)
        page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item, #box img').length >= {len(files)}")
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def wait_for_answer(page, rounds: int) -> str:
    """The last answer, once it is whole: Undo is possible again."""
    page.wait_for_function(f"document.querySelectorAll('#chat [data-testid=bot]').length == {rounds}")
    page.wait_for_selector("#undo:not([disabled])")
    return page.locator("#chat [data-testid=bot]").last.inner_text()


def captions(page) -> list[str]:
    return page.locator("#chat figcaption").all_inner_texts()


def configure(page, **settings: str) -> None:
    """Fills in settings, by their labels; `_` is a space."""
    page.get_by_text("Settings", exact=True).click()
    fields = {page.locator(f"input[type=number][aria-label*='{k.replace('_', ' ')}']"): v for k, v in settings.items()}
    for _ in range(20):  # Gradio sets a field to its default a moment after it appears, over what was filled in meanwhile
        for field, value in fields.items():
            if field.input_value() != value:
                field.fill(value)
                page.keyboard.press("Tab")
        page.wait_for_timeout(500)
        if all(field.input_value() == value for field, value in fields.items()):
            break
    else:
        raise TimeoutError(f"The settings do not take {settings}")
    page.get_by_text("Settings", exact=True).click()


def test_a_conversation(visit, pictures):
    page = visit()
    configure(page, Temperature="2", Max_new_tokens="100")  # greedy, this model repeats itself

    send(page, "What is the difference?", pictures[:2])
    answer = wait_for_answer(page, rounds=1)
    lengths = sorted(set(page.evaluate("window.lengths")))
    assert len(lengths) > 3 and lengths[-1] >= len(answer.strip()) > 20  # it was seen to grow
    assert captions(page) == ["Image 1", "Image 2"]
    assert page.locator("#chat figure img").evaluate_all("all => all.map(one => one.naturalWidth)") == [16, 16]

    send(page, "And now?", pictures[2:])
    wait_for_answer(page, rounds=2)
    assert captions(page) == ["Image 1", "Image 2", "Image 3"]
    assert page.get_by_text("The next image will be Image 4").is_visible()
    (ROOT / "outputs").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / "outputs" / "web_demo.png")

    other = visit()
    assert captions(other) == [] and other.locator("#chat [data-testid=user]").count() == 0
    send(other, "What is this?", pictures[1:2])
    wait_for_answer(other, rounds=1)
    assert captions(other) == ["Image 1"]

    page.click("#undo")
    page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length == 1")
    assert captions(page) == ["Image 1", "Image 2"]
    assert page.input_value("#box textarea") == "And now?"
    page.click("#box [data-testid=submit-button]")  # with its picture
    wait_for_answer(page, rounds=2)
    assert captions(page) == ["Image 1", "Image 2", "Image 3"] and captions(other) == ["Image 1"]


def test_controls(visit, pictures):
    page = visit()
    configure(page, Max_new_tokens="10")
    page.get_by_text("Two digits, then a third").click()
    wait_for_answer(page, rounds=3)
    assert captions(page) == ["Image 1", "Image 2", "Image 3"]

    page.locator("#chat button[aria-label=Edit]").nth(1).click()  # of the second question, which brought a picture
    page.locator("#chat textarea").fill("Is 1 < 2 & <b>bold</b>?")
    page.locator("#chat button[aria-label=Submit]").click()
    page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length == 2")
    wait_for_answer(page, rounds=2)
    assert captions(page) == ["Image 1", "Image 2", "Image 3"]
    assert page.locator("#chat [data-testid=user]").last.inner_text() == "Is 1 < 2 & <b>bold</b>?"

    first = wait_for_answer(page, rounds=2)
    page.click("#retry")
    page.wait_for_selector("#undo[disabled]")
    assert wait_for_answer(page, rounds=2) == first  # greedy

    page.click("#clear")
    page.wait_for_selector("#undo[disabled]")
    assert page.locator("#chat [data-testid=user]").count() == 0
    send(page, "What?", pictures[:1])
    wait_for_answer(page, rounds=1)
    assert captions(page) == ["Image 1"]
    page.locator("#chat button[aria-label=Clear]").click()  # Gradio's own
    page.wait_for_selector("#undo[disabled]")
    send(page, "What?", pictures[1:2])
    wait_for_answer(page, rounds=1)
    assert captions(page) == ["Image 1"]


def test_stop_and_a_closed_tab(visit):
    def begin():
        page = visit()
        configure(page, Temperature="2", Max_new_tokens="512")
        send(page, "What is this?")
        page.wait_for_function("window.lengths.some(length => length > 0)")
        return page

    page = begin()
    page.click("#stop")
    answer = wait_for_answer(page, rounds=1)
    assert 0 < len(answer) < 600  # of some 1,000
    begin().close()  # the next visitor need not wait for that answer
    other = visit()
    configure(other, Max_new_tokens="10")
    send(other, "What is this?")
    assert wait_for_answer(other, rounds=1)


def test_messages(visit, pictures, tmp_path):
    page = visit()
    configure(page, Max_new_tokens="10")
    send(page, "What is this?", pictures[:1])
    wait_for_answer(page, rounds=1)
    (tmp_path / "broken.png").write_bytes(Path(pictures[0]).read_bytes()[:60])
    send(page, "And this?", [str(tmp_path / "broken.png")])
    page.get_by_text("broken.png: ").wait_for()
    assert captions(page) == ["Image 1"] and page.input_value("#box textarea") == "And this?"

    (tmp_path / "large.png").write_bytes(os.urandom(200_000))
    page.set_input_files("#box input[type=file]", [str(tmp_path / "large.png")])
    page.get_by_text("exceed the maximum allowed size").wait_for()
    assert captions(page) == ["Image 1"]


def test_limits_of_a_message(visit, tmp_path):
    page = visit()
    configure(page, Max_new_tokens="10")
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(os.urandom(90_000))
    page.set_input_files("#box input[type=file]", [str(tmp_path / f"{k}.png") for k in range(3)])
    page.get_by_text("bytes, at most 150,000 are allowed").wait_for()

    for length, message in ((500_000, "has 500,000 characters"), (5_000_000, "bytes, at most 3,200,000 are allowed")):
        page.fill("#box textarea", "x" * length)
        page.press("#box textarea", "Enter")
        page.get_by_text(message).wait_for()
    configure(page, Seed=str(2**70))
    send(page, "What is this?")
    page.get_by_text("use 0 to 9007199254740991, or -1 for a different answer each time").wait_for()
    configure(page, Seed="3")
    send(page, "What is this?")
    assert wait_for_answer(page, rounds=1)
