"""The memory of the server: what an answer needed is freed when it ends, not when the garbage collector runs."""

import gc
import weakref

import openai
import pytest

from helpers.server import body, picture, read_stream, send_and_leave, text, wait_until
from helpers.tiny import digit_image
from helpers.versions import needs_transformers


pytestmark = needs_transformers("5.23", "a rendered template holds the images until the garbage collector runs")


@pytest.fixture
def used(server, monkeypatch):
    """Weak references to what the answers of the server use: conversations, their images and key-value caches."""
    references = []
    submit = server.service.submit

    def record_and_submit(request, conversation, *others):
        images = [image for one in conversation.rounds for image in one.images]
        references.extend(map(weakref.ref, (conversation, conversation.session, *images)))
        return submit(request, conversation, *others)

    def record_cache(model, args, kwargs):
        references.append(weakref.ref(kwargs["past_key_values"]))

    monkeypatch.setattr(server.service, "submit", record_and_submit)
    hook = server.model.register_forward_pre_hook(record_cache, with_kwargs=True)
    gc.disable()
    yield references
    gc.enable()
    hook.remove()


def wait_until_freed(used):
    assert len(used) >= 4
    wait_until(lambda: not any(reference() is not None for reference in used))


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2, "logprobs": True, "temperature": 1}])
def test_of_an_answer(server, used, fields):
    answer = server.ask(picture(digit_image(3)), text(), **fields)
    if fields.get("stream"):
        read_stream(answer)
    wait_until_freed(used)


@pytest.mark.parametrize("stream", [False, True])
def test_of_clients_that_leave(server, used, stream):
    server.slow.set()
    request = body(picture(digit_image(3)), text(), max_tokens=500, stream=stream)
    with send_and_leave(server, request):
        wait_until(lambda: server.service.running == 1)
        with send_and_leave(server, request):
            wait_until(lambda: server.service.used_slots == 2)
        wait_until(lambda: server.service.used_slots == 1)
    server.slow.clear()
    wait_until_freed(used)


@pytest.mark.parametrize("stream", [False, True])
def test_of_an_answer_that_fails(server, used, stream):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = server.model.register_forward_hook(fail)
    with pytest.raises(openai.InternalServerError):
        server.ask(picture(digit_image(3)), text(), stream=stream)
    hook.remove()
    wait_until_freed(used)
