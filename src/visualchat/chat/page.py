# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A chat on a web page, made with Gradio: `visualchat web`."""

import argparse
import base64
import html
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from urllib.parse import urlsplit


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from transformers import PreTrainedModel, ProcessorMixin

from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from modeling_visualchat.messages_visualchat import MAX_TEXT_LENGTH
from visualchat.chat.image_marks import IMAGE_MARK
from visualchat.chat.page_conversation import EXAMPLES, Conversation, DisplayedRound, Example
from visualchat.chat.page_routes import PageRoutes
from visualchat.errors import input_errors
from visualchat.loading import load_model, load_processor
from visualchat.serving.hosts import HostMiddleware, find_allowed_hosts, normalize_host


logger = logging.getLogger(__name__)
CSS = """
.images {display: flex; flex-wrap: wrap; gap: 12px}
.images figure {margin: 0; text-align: center}
.images img {height: 120px; border-radius: 6px; display: block}
.images figcaption {font-weight: 600; margin-top: 4px}
"""
FONTS = ["system-ui", "sans-serif"]  # fonts of the visitor's machine, so that none is downloaded
DELETE_FILES_AFTER_S = 3600
MAX_SEED = 2**53 - 1  # a larger number does not leave a browser as it was typed


class ChatPage:
    """
    The web page, and the event handlers of its controls.

    Args:
        model (`VisualChatForCausalLM`), processor (`VisualChatProcessor`): They generate the answers.
        examples (`list[Example]`, *optional*): Conversations that the page offers to a visitor.
        max_images (`int`): The most images in a conversation. A model with numbered image keys may allow fewer.
        max_pixels (`int`): The most pixels of an image.
        max_bytes (`int`): The largest size of the image files of a message, together.
        max_cached (`int`): The number of conversations whose key-value cache is kept. Those that were used least recently
            lose theirs.
        store_bytes (`int`): The size of the image memory, in bytes. All visitors share it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        examples: list[Example] = (),
        max_images: int = 16,
        max_pixels: int = 20_000_000,
        max_bytes: int = 32_000_000,
        max_cached: int = 8,
        store_bytes: int = 4 * 2**30,
    ):
        self.model, self.processor, self.examples, self.max_cached = model, processor, examples, max_cached
        self.max_images = min(max_images, model.config.max_image_number or max_images)
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        self.store = ImageMemoryStore(model, store_bytes)
        self.cached: OrderedDict[str, Conversation] = OrderedDict()  # by Gradio's session hash, least recently used first

    def build(self) -> gr.Blocks:
        """Builds the layout of the page and connects its controls."""
        context = self.model.config.text_config.max_position_embeddings
        cards = [{"text": one.rounds[0][0], "display_text": one.title} for one in self.examples]
        with gr.Blocks(
            title="VisualChat", fill_height=True, analytics_enabled=False, delete_cache=(600, DELETE_FILES_AFTER_S)
        ) as page:
            gr.Markdown(
                f"# VisualChat\nDrop up to {self.max_images} images into a conversation, and refer to them by number."
            )
            # Gradio frees the state of a session an hour after its tab is closed. `leave` frees the cache at once
            state = gr.State()
            chatbot = gr.Chatbot(
                label="Conversation",
                height="60vh",
                editable="user",
                group_consecutive_messages=False,
                buttons=[],
                render_markdown=False,
                latex_delimiters=[],
                feedback_options=None,
                placeholder="No question has been asked yet.",
                examples=cards,
                elem_id="chat",
            )
            box = gr.MultimodalTextbox(
                label=self._box_label(0),
                show_label=True,
                file_count="multiple",
                file_types=["image"],
                placeholder=f"Type a question, and drop images here. {IMAGE_MARK} in the question: where an image stands",
                max_plain_text_length=MAX_TEXT_LENGTH,  # Gradio makes a file of a longer text that is pasted
                elem_id="box",
            )
            with gr.Row():
                stop = gr.Button("Stop", interactive=False, elem_id="stop")
                undo = gr.Button("Undo", interactive=False, elem_id="undo")
                retry = gr.Button("Retry", interactive=False, elem_id="retry")
                clear = gr.Button("Clear", interactive=False, elem_id="clear")
            with gr.Accordion("Settings", open=False):
                tokens = gr.Slider(1, context // 2, min(256, context // 4), step=1, label="Max new tokens")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                seed = gr.Number(-1, precision=0, label="Seed (-1: a different answer each time)")

            settings = [tokens, temperature, top_p, seed]
            shown = [state, chatbot, box, stop, undo, retry, clear]
            answering = {
                "outputs": shown,
                "concurrency_id": "answer",
                "concurrency_limit": 1,
                "show_progress": "minimal",
                "show_progress_on": chatbot,
                "api_visibility": "private",
            }
            immediate = {"outputs": shown, "concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
            box.submit(self.ask, [state, box, *settings], **answering)
            chatbot.example_select(self.ask_example, [state, *settings], **answering)
            chatbot.edit(self.edit, [state, *settings], **answering)
            retry.click(self.retry, [state, *settings], **answering)
            undo.click(self.undo, [state], **immediate)
            gr.on([clear.click, chatbot.clear], self.clear, [state], **immediate)
            stop.click(self.stop, [state], concurrency_limit=None, show_progress="hidden", api_visibility="private")
            page.unload(self.leave)
        return page

    def ask(self, request: gr.Request, conversation: Conversation | None, message: dict, *settings) -> Iterator[list]:
        """Sends the text and the files of the input box. If that fails, they are put back into the box."""
        conversation = self._mark_as_used(conversation, request)
        yield from self._answer(
            conversation,
            lambda: conversation.ask(message["text"], message["files"], **_generation(*settings)),
            message,
        )

    def ask_example(
        self, request: gr.Request, event: gr.SelectData, conversation: Conversation | None, *settings
    ) -> Iterator[list]:
        """Asks the questions of an example conversation, one after another."""
        conversation = self._mark_as_used(conversation, request)
        yield from self._answer(
            conversation, lambda: conversation.ask_all(self.examples[event.index].rounds, **_generation(*settings))
        )

    def edit(self, request: gr.Request, event: gr.EditData, conversation: Conversation | None, *settings) -> Iterator[list]:
        """Replaces the question of the round that the edited message belongs to, and answers it."""
        conversation = self._mark_as_used(conversation, request)

        def answer_edited() -> Iterator[list[DisplayedRound]]:
            ends = accumulate(len(_messages([one])) for one in conversation.rounds)
            index = sum(end <= event.index for end in ends)
            return conversation.edit(index, html.unescape(event.value), **_generation(*settings))

        yield from self._answer(conversation, answer_edited)

    def retry(self, request: gr.Request, conversation: Conversation | None, *settings) -> Iterator[list]:
        """Asks the last question again."""
        conversation = self._mark_as_used(conversation, request)
        yield from self._answer(conversation, lambda: conversation.retry(**_generation(*settings)))

    def undo(self, conversation: Conversation | None) -> list:
        """Removes the last round, and puts its question and images back into the input box."""
        conversation = conversation or self._start_conversation()
        try:
            last = conversation.undo()
        except ValueError as error:
            return _show_error(error, conversation)
        files = [save_pil_to_cache(image, get_upload_folder(), format="png") for image in last.images]
        return self._show(conversation, {"text": last.text, "files": files})

    def clear(self, conversation: Conversation | None) -> list:
        """Starts a new conversation."""
        conversation = conversation or self._start_conversation()
        try:
            conversation.clear()
        except ValueError as error:
            return _show_error(error, conversation)
        return self._show(conversation)

    def stop(self, conversation: Conversation | None) -> None:
        """Stops the answer that is being generated."""
        if conversation is not None:
            conversation.stop()

    def leave(self, request: gr.Request) -> None:
        """Frees the cache of a visitor who closed the tab. If the tab is restored, the conversation can continue."""
        conversation = self.cached.pop(request.session_hash, None)
        if conversation is not None:
            conversation.release()

    def _start_conversation(self) -> Conversation:
        return Conversation(self.model, self.processor, self.store, self.max_images, self.max_pixels, self.max_bytes)

    def _mark_as_used(self, conversation: Conversation | None, request: gr.Request) -> Conversation:
        """
        The visitor's conversation, marked as the most recently used. If too many conversations have a cache, the least
        recently used one loses it. That one has no answer under way, since answers are generated one at a time.
        """
        conversation = conversation or self._start_conversation()
        self.cached[request.session_hash] = conversation
        self.cached.move_to_end(request.session_hash)
        if len(self.cached) > self.max_cached:
            _, oldest = self.cached.popitem(last=False)
            oldest.release()
        return conversation

    def _answer(
        self, conversation: Conversation, ask: Callable[[], Iterator[list[DisplayedRound]]], message: dict | None = None
    ) -> Iterator[list]:
        """Streams the answer to the page. If it fails, whatever the reason, `message` is put back into the input box."""
        controls = [gr.MultimodalTextbox(value=None, interactive=False), *_buttons(stop=True)]
        messages, num_rounds = [], 0
        try:
            for rounds in ask():
                if len(rounds) == num_rounds:  # only the answer has grown, so the images need not be encoded again
                    messages = [*messages[:-1], _answer_message(rounds[-1])]
                else:
                    messages, num_rounds = _messages(rounds), len(rounds)
                yield [conversation, messages, *controls]
                controls = [gr.skip()] * len(controls)
        except (GeneratorExit, KeyboardInterrupt, SystemExit):  # the tab was closed, or the page is stopped
            raise
        except (ValueError, RuntimeError) as error:  # a wrong request; or out of memory, or another fault of the device
            _warn(str(error))
            yield self._show(conversation, message)
        except BaseException:  # a panic of the tokenizer is no Exception. Gradio would leave the visitor without controls
            logger.exception("An answer failed")
            _warn("The answer failed. The log of the page has the details")
            yield self._show(conversation, message)
        else:
            yield self._show(conversation)

    def _show(self, conversation: Conversation, message: dict | None = None) -> list:
        """The updates of all controls while no answer is being generated."""
        rounds = conversation.rounds
        box = gr.MultimodalTextbox(value=message, interactive=True, label=self._box_label(conversation.num_images))
        return [conversation, _messages(rounds), box, *_buttons(undo=bool(rounds))]

    def _box_label(self, num_images: int) -> str:
        if num_images == self.max_images:
            return f"The conversation has {num_images} images, which is the maximum"
        return f"The next image will be Image {num_images + 1}, and so on in this order"


def _messages(rounds: list[DisplayedRound]) -> list[dict]:
    """
    The chat messages of all rounds: the images if there are any, the question, and the answer. HTML in a text is escaped, so
    that a text is shown as it is and can load nothing. Images are a separate message, because Gradio can only edit messages
    that hold nothing but text.
    """
    messages, number = [], 0
    for one in rounds:
        figures = [_figure(image, number + k) for k, image in enumerate(one.images, 1)]
        number += len(figures)
        if figures:
            messages.append({"role": "user", "content": gr.HTML(f'<div class="images">{"".join(figures)}</div>')})
        messages.append({"role": "user", "content": html.escape(one.text, quote=False)})
        messages.append(_answer_message(one))
    return messages


def _answer_message(one: DisplayedRound) -> dict:
    return {"role": "assistant", "content": html.escape(one.answer, quote=False)}


def _figure(image: Image.Image, number: int) -> str:
    data = io.BytesIO()
    image.save(data, "webp", quality=90)
    encoded = base64.b64encode(data.getvalue()).decode()
    name = f"Image {number}"
    return f'<figure><img src="data:image/webp;base64,{encoded}" alt="{name}"><figcaption>{name}</figcaption></figure>'


def _buttons(stop: bool = False, undo: bool = False) -> list[gr.Button]:
    """Enables or disables Stop, and together Undo, Retry and Clear."""
    return [
        gr.Button(interactive=stop, variant="stop" if stop else "secondary"),
        *(gr.Button(interactive=undo) for _ in range(3)),
    ]


def _generation(max_new_tokens: float, temperature: float, top_p: float, seed: int | None) -> dict:
    """The settings as arguments of [`Conversation.ask`]. A slider may give 2 for 2.0, and `generate` needs a float."""
    if seed is not None and not -1 <= seed <= MAX_SEED:  # an empty field is None
        raise ValueError(f"The seed is {seed!r:.40}: use 0 to {MAX_SEED}, or -1 for a different answer each time")
    sampling = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p)}
    return {
        "max_new_tokens": int(max_new_tokens),
        "seed": None if seed == -1 else seed,
        **(sampling if temperature > 0 else {"do_sample": False}),
    }


def _show_error(error: ValueError, conversation: Conversation) -> list:
    _warn(str(error))
    return [conversation, _messages(conversation.rounds), *[gr.skip()] * 5]


def _warn(message: str) -> None:
    gr.Warning(html.escape(message), duration=30)


def run(options: argparse.Namespace) -> None:
    """Runs `visualchat web` with these options, until the process is stopped."""
    with input_errors(f"cannot load {options.model}: "):
        model = load_model(options.model, options.trust_remote_code, dtype="auto", device_map="auto")
        processor = load_processor(options.model, options.trust_remote_code)
    page = ChatPage(
        model,
        processor,
        EXAMPLES[options.examples](),
        options.max_images,
        int(options.max_image_megapixels * 1e6),
        int(options.max_message_mb * 1e6),
        options.max_cached,
        int(options.image_memory_gb * 2**30),
    )
    launch(page, options).block_thread()


def launch(page: ChatPage, options: argparse.Namespace) -> gr.Blocks:
    """Serves a page with the options of `visualchat web`, in a thread. Its method `close` ends that."""
    hosts = {*find_allowed_hosts(options.host, options.allowed_host)}
    blocks = page.build().queue(max_size=options.max_waiting, api_open=False)
    with input_errors():  # the port may be in use
        _, _, share_url = blocks.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            max_file_size=int(options.max_image_mb * 1e6),
            state_session_capacity=options.max_sessions,
            theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]),
            css=CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(HostMiddleware, hosts), Middleware(PageRoutes, page.max_bytes)]},
            prevent_thread_lock=True,
        )
    if share_url:
        hosts.add(normalize_host(urlsplit(share_url).hostname))
    return blocks
