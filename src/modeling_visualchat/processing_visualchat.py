# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Processor of VisualChat: messages with text and images in, model inputs out. `CHAT_TEMPLATE` is the one place in the project
that assembles a prompt.
"""

import numpy as np
import torch
from transformers import AddedToken
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin

from .image_loading_visualchat import ImageSource, clip_pixel_values, clip_side, crop_for_clip, load_image


# The paper's prompt (DeepSpeed-VisualChat, arXiv 2309.14327, section 4.2): plain text, images numbered through the whole
# conversation and placed before the question of the turn that brings them. The generation block is what is learned.
CHAT_TEMPLATE = """\
{%- set numbered = namespace(images=0, rounds=0) -%}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
            {{- '' if loop.first else '\\n' -}}{{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token if write_bos_token else '' -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- 'You are a powerful vision-language assistant.\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- text_of(message) + '\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}
                {%- set numbered.images = numbered.images + 1 -%}
                {{- '\\n' if loop.first and numbered.rounds == 0 else '' -}}
                {{- '### Image ' + numbered.images | string + ':\\n<image>\\n' -}}
            {%- endfor -%}
        {%- endif -%}
        {%- set numbered.rounds = numbered.rounds + 1 -%}
        {{- '\\n### Question:\\n' + text_of(message) + '\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '\\n### Answer:\\n' -}}
        {%- generation -%}{{- text_of(message) + eos_token -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n### Answer:\\n' -}}
{%- endif -%}
"""

PART_KEYS = {"text": ("text",), "image": ("image", "url", "path", "base64"), "image_url": ("image_url",)}
IMAGE_OPTIONS = ImagesKwargs.__annotations__.keys() - {"return_tensors"}


class VisualChatProcessor(ProcessorMixin):
    r"""
    A CLIP image processor, a LLaMA tokenizer and the chat template in one.

    ```python
    >>> messages = [
    ...     {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "image", "path": "b.png"},
    ...                                  {"type": "text", "text": "What is the difference?"}]},
    ... ]
    >>> inputs = processor.apply_chat_template(
    ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    ```

    Args:
        image_processor (`CLIPImageProcessorPil` or another image processor): Makes `pixel_values`.
        tokenizer (`PreTrainedTokenizerFast`): The decoder's tokenizer. It is given the token `image_token` if it lacks it,
            and a padding token (its unknown token, else its end token) if it has none.
        image_seq_length (`int`, *optional*, defaults to 257): Tokens of one image: `model.config.image_seq_length`.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder, as the chat template writes it.
        chat_template (`str`, *optional*): Jinja template. Defaults to the paper's prompt.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 257,
        image_token: str = "<image>",
        chat_template: str | None = None,
    ):
        if image_token not in tokenizer.get_added_vocab():  # an ordinary token of this name becomes a special one
            tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        # `save_pretrained` would add it: with it, a processor that was saved equals the one that is loaded
        self.auto_map = {"AutoProcessor": "processing_visualchat.VisualChatProcessor"}

    def image_number_token_ids(self, count: int = 64) -> list[list[int]]:
        """
        How the prompt spells the numbers 1 to `count`, as token ids: the config field of the same name, which numbered image
        keys need.
        """
        numbers = []
        for number in range(1, count + 1):
            header = f"\n### Image {number}:\n"
            start, end = header.index(str(number)), header.index(":")
            encoded = self.tokenizer(header, add_special_tokens=False, return_offsets_mapping=True)
            spans = zip(encoded["input_ids"], encoded["offset_mapping"])
            numbers.append([token for token, (begin, stop) in spans if begin < end and stop > start])
        return numbers

    def apply_chat_template(self, conversation, *args, **kwargs):
        """
        As in transformers, with every message checked first.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): One conversation or a batch. A message has a `role` (`system`,
                first only; then `user` and `assistant` in turn) and a `content`, a string or a list of parts:
                `{"type": "text", "text": …}` and, for the user, `{"type": "image", "image" or "path" or "url": …}`. Text
                parts are joined by newlines; images stand before the question of their turn, numbered through the
                conversation.

        Raises:
            ValueError: Naming the conversation, message and part at fault.
        """
        conversation = getattr(conversation, "messages", conversation)
        is_batched = len(conversation) > 0 and not isinstance(conversation[0], dict)
        image_token = self.image_token
        if kwargs.get("sanitize_control_tokens"):
            image_token = None
            kwargs["write_bos_token"] = True  # the tokenizer adds no special token of its own to sanitized text
        if is_batched:
            conversation = [
                check_conversation(getattr(one, "messages", one), image_token=image_token, name=f"conversation {index}: ")
                for index, one in enumerate(conversation)
            ]
        else:
            conversation = check_conversation(conversation, image_token=image_token)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def prepare_inputs_layout(self, images: ImageSource | list | None = None, **kwargs):
        """
        Opens the images, however they are given and nested; see [`load_image`]. Unless options of the image processor are
        given, of each only the part that it keeps stays in memory; see [`crop_for_clip`].
        """
        given = {*kwargs, *kwargs.get("common_kwargs", {}), *kwargs.get("images_kwargs", {})}
        has_options = not given.isdisjoint(IMAGE_OPTIONS)
        counter = iter(range(1, 1_000_000_000))
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
            images = list(images)  # a batch

        def load(source):
            if isinstance(source, list | tuple):
                return [load(one) for one in source]
            image = load_image(source, name=f"image {next(counter)}")
            return image if has_options else crop_for_clip(image, self.image_processor)

        return super().prepare_inputs_layout(images=load(images) if images is not None else None, **kwargs)

    def _process_images(self, images, **kwargs):
        if kwargs != {"return_tensors": "pt"} or clip_side(self.image_processor) is None:
            return super()._process_images(images, **kwargs)
        images = make_flat_list_of_images(images)
        image_inputs = {"pixel_values": clip_pixel_values(images, self.image_processor)}
        return image_inputs, [self.replace_image_token(image_inputs, index) for index in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)


def check_conversation(conversation: list[dict], image_token: str | None = None, name: str = "") -> list[dict]:
    """
    Checks the messages of one conversation and returns a copy without entries that are `None`, which tables of messages
    are full of.

    Args:
        conversation (`list[dict]`): The messages.
        image_token (`str`, *optional*): Text that may not occur in a message, because it would be taken for an image.
        name (`str`): What errors begin with.
    """
    if not conversation:
        raise ValueError(f"{name}the conversation is empty: it needs at least one message from the user")
    checked = []
    expected = "user"
    for index, message in enumerate(conversation):
        where = f"{name}message {index}"
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where} has the role {role!r}: use 'system', 'user' or 'assistant'")
        if role == "system":
            if index > 0:
                raise ValueError(f"{where} has the role 'system', which only the first message may have")
        elif role != expected:
            raise ValueError(f"{where} has the role {role!r}, but user and assistant take turns: expected {expected!r}")
        else:
            expected = "assistant" if role == "user" else "user"

        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [_check_part(part, role, f"{where}, part {k}") for k, part in enumerate(content)]
        elif not isinstance(content, str):
            raise ValueError(f"{where} has a content of type {type(content).__name__}: use a string or a list of parts")
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        if image_token is not None and any(image_token in text for text in texts):
            raise ValueError(
                f"{where} holds the text {image_token!r}, which stands for a picture: give pictures as parts of the type"
                " 'image', or pass sanitize_control_tokens=True to take it as text"
            )
        checked.append({**{key: value for key, value in message.items() if value is not None}, "content": content})
    if checked[-1]["role"] == "system":
        raise ValueError(f"{name}the conversation holds only a system message: it needs at least one from the user")
    return checked


def _check_part(part: dict, role: str, where: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PART_KEYS:
        raise ValueError(f"{where} must be a dict whose 'type' is 'text' or 'image', got {part!r:.80}")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where} has the type 'text', but its 'text' is {part.get('text')!r:.80}")
    if kind != "text" and role != "user":
        raise ValueError(f"{where} is an image in a message of the role {role!r}: only the user brings images")
    if kind == "image_url":  # OpenAI's form
        url = part.get("image_url")
        return {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
    return {key: part[key] for key in ("type", *PART_KEYS[kind]) if part.get(key) is not None}


def list_images(conversation: list[dict]) -> list[ImageSource]:
    """The sources of the images of a conversation that was checked, in reading order."""
    parts = [part for message in conversation if not isinstance(message["content"], str) for part in message["content"]]
    return [part[next(key for key in PART_KEYS["image"] if key in part)] for part in parts if part["type"] == "image"]


__all__ = ["VisualChatProcessor"]
