"""Answers that are decoded together are those that each would get alone, whenever they join and leave."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from helpers.server import wait_until
from helpers.tiny import digit_image, make_model, make_processor
from visualchat.serving.model_thread import ModelThread


# Other frequencies beyond 80 tokens
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONGROPE["original_max_position_embeddings"] = 80


class Batches:
    """A model with its thread, and how many sequences each of its forward passes had."""

    def __init__(self, attention="mmca", implementation="sdpa", **config):
        self.model = make_model(multimodal_attention=attention, **config).eval()
        self.model.set_attn_implementation(implementation)
        self.model.generation_config.eos_token_id = None
        self.thread, self.sizes = ModelThread(self.model), []
        self.model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs, output):
        self.sizes.append(len(kwargs["input_ids"]))

    def together(self, inputs, **settings):
        cache = settings.pop("past_key_values", None) or DynamicCache(config=self.model.config)
        return self.alone(inputs, custom_generate=self.thread.decode, past_key_values=cache, **settings)

    def alone(self, inputs, **settings):
        return self.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 6, **settings})[0].tolist()


@pytest.fixture
def batches():
    one = Batches(image_number_keys=True)
    yield one
    one.thread.close()


def make_inputs(images, words="What is this?"):
    content = [{"type": "image", "image": digit_image(k)} for k in images] + [{"type": "text", "text": words}]
    return make_processor().apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def make_conversations(count, seed=0):
    """Inputs of text alone or of up to three images, and how many tokens to generate."""
    draw = random.Random(seed)
    conversations = []
    for _ in range(count):
        images = [draw.randrange(9) for _ in range(draw.choice([0, 0, 1, 2, 3]))]
        conversations.append((make_inputs(images, "What is this? " * draw.randint(1, 4)), draw.randint(1, 12)))
    return conversations


@pytest.mark.parametrize(
    "attention, implementation, numbered",
    [
        ("mmca", "sdpa", True),
        ("mmca", "flex_attention", False),
        ("mmca", "eager", True),
        ("mmca_merged", "sdpa", True),
        ("mmca_merged", "eager", False),
        ("causal", "sdpa", True),
        ("causal", "eager", False),
        ("mmca_released", "eager", False),
        ("cross", "sdpa", True),
    ],
)
def test_same_tokens(attention, implementation, numbered):
    batches = Batches(attention, implementation, image_number_keys=numbered)
    conversations = make_conversations(12)
    expected = [batches.alone(inputs, max_new_tokens=count) for inputs, count in conversations]
    batches.sizes.clear()
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda one: batches.together(one[0], max_new_tokens=one[1]), conversations))
    batches.thread.close()
    assert got == expected
    assert 3 <= max(batches.sizes) <= 6 and len(batches.sizes) < sum(count for _, count in conversations)


def test_same_tokens_where_not_every_layer_has_cross_attention():
    batches = Batches("cross", cross_attention_every=2)
    conversations = make_conversations(8)
    expected = [batches.alone(inputs, max_new_tokens=count) for inputs, count in conversations]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda one: batches.together(one[0], max_new_tokens=one[1]), conversations))
    batches.thread.close()
    assert got == expected and max(batches.sizes) > 1


def test_same_tokens_where_rotation_depends_on_the_longest():
    batches = Batches(text={"rope_parameters": LONGROPE})
    conversations = make_conversations(6)
    expected = [batches.alone(inputs, max_new_tokens=count) for inputs, count in conversations]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda one: batches.together(one[0], max_new_tokens=one[1]), conversations))
    batches.thread.close()
    assert got == expected and set(batches.sizes) == {1}
    assert min(map(len, expected)) < 80 < max(map(len, expected))


def test_the_rest_of_a_prompt(batches):
    """A cache that holds a part of the prompt, and is emptied or left as it was after the prompt."""
    cache, inputs = DynamicCache(config=batches.model.config), make_inputs([1, 2])
    expected = batches.together(inputs, past_key_values=cache)
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length
    cache.crop(-3)
    assert batches.together(inputs, past_key_values=cache) == expected == batches.alone(inputs)
    cache.crop(-1)
    assert batches.together(inputs, past_key_values=cache, empties_cache=True) == expected
    assert cache.get_seq_length() == 0


class Hold(StoppingCriteria):
    """Ends no answer, and holds its thread until an event is set."""

    def __init__(self, event):
        self.event, self.calls = event, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        assert self.event.wait(30)
        return torch.tensor([False])


class Fail(LogitsProcessor):
    def __init__(self, after):
        self.after = after

    def __call__(self, input_ids, scores):
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt("not even an Exception")
        return scores


class TestFailures:
    def ask_two(self, batches, failing, **settings):
        """Two answers in one batch; the result or error of each."""
        started, inputs = threading.Event(), make_inputs([1])
        with ThreadPoolExecutor(2) as pool:
            other = pool.submit(batches.together, inputs, max_new_tokens=20, stopping_criteria=[Hold(started)])
            wait_until(lambda: batches.sizes)
            broken = pool.submit(batches.together, inputs, max_new_tokens=20, **failing)
            wait_until(lambda: batches.thread._tasks.qsize() == 1)
            started.set()
            return other, broken

    @pytest.mark.parametrize("after", [0, 3])
    def test_of_one_answer(self, batches, after):
        other, broken = self.ask_two(batches, {"logits_processor": [Fail(after)]})
        with pytest.raises(KeyboardInterrupt, match="not even"):
            broken.result()
        assert other.result() == batches.alone(make_inputs([1]), max_new_tokens=20)

    def test_of_the_model(self, batches):
        def fail(model, args, output):
            if len(output.logits) > 1:
                raise RuntimeError("out of memory")

        hook = batches.model.register_forward_hook(fail)
        errors = [one.exception() for one in self.ask_two(batches, {})]
        hook.remove()
        assert [str(error) for error in errors] == ["A batch of answers failed: out of memory"] * 2
        assert errors[0] is not errors[1]
        inputs = make_inputs([])
        assert batches.together(inputs) == batches.alone(inputs)


def test_it_ends_after_its_answers():
    before = {*threading.enumerate()}
    batches = Batches()
    (thread,) = {*threading.enumerate()} - before
    started, inputs = threading.Event(), make_inputs([2])
    hold = Hold(started)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(batches.together, inputs, stopping_criteria=[hold])
        wait_until(lambda: hold.calls)
        batches.thread.close()
        started.set()
        assert answer.result() == batches.alone(inputs)
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="was closed"):
        batches.together(inputs)


class Record(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


def test_the_streamer_and_stop_strings(batches):
    streamer, inputs = Record(), make_inputs([3])
    tokenizer = make_processor().tokenizer
    expected = batches.alone(inputs, max_new_tokens=20)
    length = inputs["input_ids"].shape[1]
    stop = tokenizer.decode(expected[length + 4])
    settings = {"stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 20}
    got = batches.together(inputs, streamer=streamer, **settings)
    assert got == streamer.tokens == batches.alone(inputs, **settings)
    assert length < len(got) <= length + 5
