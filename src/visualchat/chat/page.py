# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A chat on a web page, made with Gradio: `visualchat web`."""

import argparse
import base64
import html
import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.chat.page_conversation import EXAMPLES, Conversation, Example, ShownRound
from visualchat.loading import load_model, load_processor


CSS = """
.pictures {display: flex; flex-wrap: wrap; gap: 12px}
.pictures figure {margin: 0; text-align: center}
.pictures img {height: 120px; border-radius: 6px; display: block}
.pictures figcaption {font-weight: 600; margin-top: 4px}
"""
FONTS = ["system-ui", "sans-serif"]  # those of the machine
FORGET_FILES_AFTER_S = 3600


class ChatPage:
    """
    The page, and what its controls do.

    Args:
        model (`VisualChatForCausalLM`), processor (`VisualChatProcessor`): They answer.
        examples (`list[Example]`, *optional*): Conversations to begin with.
        max_images (`int`): Of a conversation. A model with numbered image keys may allow fewer.
        max_pixels (`int`): Of a picture.
        max_cached (`int`): Of so many conversations, those that asked last, the cache is kept.
        store_bytes (`int`): For pictures that are remembered, of all visitors together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        examples: list[Example] = (),
        max_images: int = 16,
        max_pixels: int = 20_000_000,
        max_cached: int = 8,
        store_bytes: int = 4 * 2**30,
    ):
        self.model, self.processor, self.examples, self.max_cached = model, processor, examples, max_cached
        config = model.config
        self.max_images = min(max_images, len(config.image_number_token_ids)) if config.image_number_keys else max_images
        self.max_pixels = max_pixels
        self.store = ImageMemoryStore(model, store_bytes)
        self.cached: OrderedDict[str, Conversation] = OrderedDict()  # by Gradio's name of the session

    def build(self) -> gr.Blocks:
        """Lays out the page."""
        context = self.model.config.text_config.max_position_embeddings
        cards = [{"text": one.rounds[0][0], "display_text": one.title} for one in self.examples]
        with gr.Blocks(
            title="VisualChat", fill_height=True, analytics_enabled=False, delete_cache=(600, FORGET_FILES_AFTER_S)
        ) as page:
            gr.Markdown(f"# VisualChat\nDrop up to {self.max_images} pictures into a conversation, and call them by number.")
            # What an ended session holds is freed by Gradio, an hour after its tab is closed; the cache at once
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
                placeholder="Nothing has been asked yet.",
                examples=cards,
                elem_id="chat",
            )
            box = gr.MultimodalTextbox(
                label=self._invite(0),
                show_label=True,
                file_count="multiple",
                file_types=["image"],
                placeholder="Ask, and drop pictures here",
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
                seed = gr.Number(-1, precision=0, minimum=-1, label="Seed (-1: another answer each time)")

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
            at_once = {"outputs": shown, "concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
            box.submit(self.ask, [state, box, *settings], **answering)
            chatbot.example_select(self.ask_example, [state, *settings], **answering)
            chatbot.edit(self.edit, [state, *settings], **answering)
            retry.click(self.retry, [state, *settings], **answering)
            undo.click(self.undo, [state], **at_once)
            gr.on([clear.click, chatbot.clear], self.clear, [state], **at_once)
            stop.click(self.stop, [state], concurrency_limit=None, show_progress="hidden", api_visibility="private")
            page.unload(self.leave)
        return page

    def ask(self, request: gr.Request, conversation: Conversation | None, message: dict, *settings) -> Iterator[list]:
        """Sends the text and the files of the box. They stay there if that fails."""
        conversation = self._warm(conversation, request)
        growing = conversation.ask(message["text"], message["files"], **_generation(*settings))
        yield from self._answer(conversation, growing, message)

    def ask_example(
        self, request: gr.Request, event: gr.SelectData, conversation: Conversation | None, *settings
    ) -> Iterator[list]:
        """Asks the questions of an example, one after the other."""
        conversation = self._warm(conversation, request)
        growing = conversation.ask_all(self.examples[event.index].rounds, **_generation(*settings))
        yield from self._answer(conversation, growing)

    def edit(self, request: gr.Request, event: gr.EditData, conversation: Conversation | None, *settings) -> Iterator[list]:
        """Asks an earlier question anew: that of the round to which a message belongs."""
        conversation = self._warm(conversation, request)
        ends = accumulate(len(_messages([one])) for one in conversation.rounds)
        index = sum(end <= event.index for end in ends)
        growing = conversation.edit(index, html.unescape(event.value), **_generation(*settings))
        yield from self._answer(conversation, growing)

    def retry(self, request: gr.Request, conversation: Conversation | None, *settings) -> Iterator[list]:
        """Asks the last question again."""
        conversation = self._warm(conversation, request)
        yield from self._answer(conversation, conversation.retry(**_generation(*settings)))

    def undo(self, conversation: Conversation | None) -> list:
        """Puts the last question and its pictures back into the box."""
        conversation = conversation or self._begin()
        try:
            last = conversation.undo()
        except ValueError as error:
            return _refuse(error, conversation)
        files = [save_pil_to_cache(image, get_upload_folder(), format="png") for image in last.images]
        return self._show(conversation, {"text": last.text, "files": files})

    def clear(self, conversation: Conversation | None) -> list:
        """Begins anew."""
        conversation = conversation or self._begin()
        try:
            conversation.clear()
        except ValueError as error:
            return _refuse(error, conversation)
        return self._show(conversation)

    def stop(self, conversation: Conversation | None) -> None:
        """Ends the answer that is being written."""
        if conversation is not None:
            conversation.stop()

    def leave(self, request: gr.Request) -> None:
        """Frees the cache of a visitor whose tab was closed. Should the tab come back, the conversation goes on."""
        conversation = self.cached.pop(request.session_hash, None)
        if conversation is not None:
            conversation.release()

    def _begin(self) -> Conversation:
        return Conversation(self.model, self.processor, self.store, self.max_images, self.max_pixels)

    def _warm(self, conversation: Conversation | None, request: gr.Request) -> Conversation:
        """
        The visitor's conversation, now the one that was answered last. The cache of the one that was answered longest ago
        may go; it is not being answered, for answers are made one at a time.
        """
        conversation = conversation or self._begin()
        self.cached[request.session_hash] = conversation
        self.cached.move_to_end(request.session_hash)
        if len(self.cached) > self.max_cached:
            _, oldest = self.cached.popitem(last=False)
            oldest.release()
        return conversation

    def _answer(
        self, conversation: Conversation, growing: Iterator[list[ShownRound]], message: dict | None = None
    ) -> Iterator[list]:
        """Shows how the answer grows. `message` is put back into the box if there is none."""
        others = [gr.MultimodalTextbox(value=None, interactive=False), *_buttons(stop=True)]
        messages, num_rounds = [], 0
        try:
            for rounds in growing:
                if len(rounds) == num_rounds:  # the answer alone has grown: pictures need not be encoded again
                    messages = [*messages[:-1], _answer_message(rounds[-1])]
                else:
                    messages, num_rounds = _messages(rounds), len(rounds)
                yield [conversation, messages, *others]
                others = [gr.skip()] * len(others)
        except (ValueError, RuntimeError) as error:  # what was asked; memory or device
            _warn(error)
            yield self._show(conversation, message)
        else:
            yield self._show(conversation)

    def _show(self, conversation: Conversation, message: dict | None = None) -> list:
        """The page at rest."""
        rounds = conversation.rounds
        box = gr.MultimodalTextbox(value=message, interactive=True, label=self._invite(conversation.num_images))
        return [conversation, _messages(rounds), box, *_buttons(undo=bool(rounds))]

    def _invite(self, num_images: int) -> str:
        if num_images == self.max_images:
            return f"The conversation has all of its {num_images} pictures"
        return f"The next picture is Image {num_images + 1}, and so on in this order"


def _messages(rounds: list[ShownRound]) -> list[dict]:
    """
    Of every round the pictures, if any, the question, and the answer. What the model or a visitor writes is shown as it is,
    and can load nothing. Pictures are a message of their own: Gradio cannot edit one that holds anything but text.
    """
    messages, number = [], 0
    for one in rounds:
        figures = [_figure(image, number + k) for k, image in enumerate(one.images, 1)]
        number += len(figures)
        if figures:
            messages.append({"role": "user", "content": gr.HTML(f'<div class="pictures">{"".join(figures)}</div>')})
        messages.append({"role": "user", "content": html.escape(one.text, quote=False)})
        messages.append(_answer_message(one))
    return messages


def _answer_message(one: ShownRound) -> dict:
    return {"role": "assistant", "content": html.escape(one.answer, quote=False)}


def _figure(image: Image.Image, number: int) -> str:
    data = io.BytesIO()
    image.save(data, "webp", quality=90)
    encoded = base64.b64encode(data.getvalue()).decode()
    name = f"Image {number}"
    return f'<figure><img src="data:image/webp;base64,{encoded}" alt="{name}"><figcaption>{name}</figcaption></figure>'


def _buttons(stop: bool = False, undo: bool = False) -> list[gr.Button]:
    """Which of Stop, and of Undo, Retry and Clear, can be pressed."""
    return [
        gr.Button(interactive=stop, variant="stop" if stop else "secondary"),
        *(gr.Button(interactive=undo) for _ in range(3)),
    ]


def _generation(max_new_tokens: float, temperature: float, top_p: float, seed: int) -> dict:
    """What `model.generate` and the seed are; sliders do not tell 2 from 2.0, which `generate` does."""
    sampling = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p)}
    return {
        "max_new_tokens": int(max_new_tokens),
        "seed": None if seed == -1 else seed,
        **(sampling if temperature > 0 else {"do_sample": False}),
    }


def _refuse(error: ValueError, conversation: Conversation) -> list:
    _warn(error)
    return [conversation, _messages(conversation.rounds), *[gr.skip()] * 5]


def _warn(error: Exception) -> None:
    gr.Warning(html.escape(str(error)), duration=30)


def run(options: argparse.Namespace) -> None:
    """Serves the page with the options of `visualchat web`, until the process is stopped."""
    try:
        model = load_model(options.model, options.trust_remote_code, dtype="auto", device_map="auto")
        processor = load_processor(options.model, options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot load {options.model}: {error}") from error
    page = ChatPage(
        model,
        processor,
        EXAMPLES[options.examples](),
        options.max_images,
        options.max_pixels,
        options.max_cached,
        int(options.store_gb * 2**30),
    )
    page.build().queue(max_size=options.max_waiting, api_open=False).launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        max_file_size=options.max_upload,
        state_session_capacity=options.max_sessions,
        theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
