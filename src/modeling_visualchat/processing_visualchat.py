# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Processor of VisualChat: messages with text and images in, model inputs out. The chat template assembles a prompt, and the
processor is the one place that decides what of it is a special token and what is text.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from transformers import AddedToken, BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_template_visualchat import read_turn, splice_chat_template, write_chat_template
from .image_loading_visualchat import ImageSource, clip_pixel_values, clip_side, crop_for_clip, load_image
from .messages_visualchat import check_conversation


# Stands within a special token that people typed: the tokenizer finds none there, and its normalizer, which is asked later,
# takes the mark out. A private character that no text holds; if one does, it is taken out as well.
MARK = "\U000f0001"

# Of `apply_chat_template`: what the template does not read
CALL_OPTIONS = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "processor_kwargs")
IMAGE_OPTIONS = ImagesKwargs.__annotations__.keys() - {"return_tensors"}


class VisualChatProcessor(ProcessorMixin):
    r"""
    A CLIP image processor, a LLaMA tokenizer and the chat template in one.

    The template writes every special token of a prompt: the one that the tokenizer begins a text with, `<image>` for
    images, and the end token behind answers. Special tokens in messages are text: a mark within them, which the tokenizer
    takes out again, stands in the prompt.

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
            and a padding token (its unknown token, else its end token) if it has none. It is given the chat template, and an
            end token that it puts behind every text (`add_eos_token`) is taken from it: an open prompt does not end.
        image_seq_length (`int`, *optional*, defaults to 257): Tokens of one image: `model.config.image_seq_length`.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder, as the chat template writes it.
        chat_template (`str`, *optional*): Jinja template. Defaults to the one that `chat_format` names.
        chat_format (`str`, *optional*, defaults to `"paper"`): `"paper"`, or `"decoder"`: the tokenizer's own chat template,
            with each image on a line "Image k: " of the user's turns. The token that ends an answer there becomes
            the tokenizer's end token.
        image_position (`str`, *optional*): `"front"`, the default of `"paper"`: images stand before the question of their
            turn; or `"in_place"`: they stand among its texts as in the message, which is so in `"decoder"`.

    Attributes:
        answer_lead (`str`): In `"decoder"`, what an answer begins with that is not its text, such as a blank.

    Raises:
        ValueError: If the tokenizer is not one of the `tokenizers` library, whose offsets tell answers from questions; or if
            its own chat template cannot be used for `"decoder"`, with the reason.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 257,
        image_token: str = "<image>",
        chat_template: str | None = None,
        chat_format: str = "paper",
        image_position: str | None = None,
    ):
        if chat_format not in ("paper", "decoder"):
            raise ValueError(f"chat_format is {chat_format!r}: use 'paper' or 'decoder'")
        positions = ("front", "in_place") if chat_format == "paper" else ("in_place",)
        image_position = image_position or positions[0]
        if image_position not in positions:
            allowed = " or ".join(map(repr, positions))
            raise ValueError(f"image_position is {image_position!r}: in the chat_format {chat_format!r}, use {allowed}")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is no tokenizer of the `tokenizers` library: convert it to one")
        if image_token not in tokenizer.get_added_vocab():  # an ordinary token of this name becomes a special one
            tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.chat_format, self.image_position, self.answer_lead = chat_format, image_position, ""
        _take_out_marks(tokenizer)
        self._begin = _begin_texts_only(tokenizer, image_token)
        if chat_format == "decoder":
            chat_template = chat_template or splice_chat_template(tokenizer, image_token)
            beginning, self.answer_lead, turn_end = read_turn(chat_template, tokenizer.special_tokens_map)
            # The tokens of the decoder's own template are those of its text: it may begin otherwise than texts do
            self._begin = self._begin if beginning.startswith(self._begin) else ""
            tokenizer.eos_token = tokenizer.tokenize(turn_end)[-1]
        else:
            # A saved template of the paper's prompt follows `image_position`; one of another origin stays as it is
            own = {position: write_chat_template(tokenizer, self._begin, position) for position in positions}
            chat_template = own[image_position] if chat_template in (None, *own.values()) else chat_template
        tokenizer.chat_template = chat_template
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        # `save_pretrained` would add it: with it, a processor that was saved equals the one that is loaded
        self.auto_map = {"AutoProcessor": "processing_visualchat.VisualChatProcessor"}

    def image_number_token_ids(self, count: int = 64) -> list[list[int]]:
        """
        How the prompt spells the numbers 1 to `count`, as token ids: the config field of the same name, which numbered image
        keys need.
        """
        numbers = []
        for number in range(1, count + 1):
            header = f"\n### Image {number}:\n" if self.chat_format == "paper" else f"\nImage {number}: "
            start, end = header.index(str(number)), header.index(":")
            encoded = self.tokenizer(header, add_special_tokens=False, return_offsets_mapping=True)
            spans = zip(encoded["input_ids"], encoded["offset_mapping"])
            numbers.append([token for token, (begin, stop) in spans if begin < end and stop > start])
        return numbers

    def image_prefix_ids(self) -> list[int]:
        """
        How the prompt of a conversation begins, up to an image that stands there, as token ids: what the config field of the
        same name is best made of.
        """
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        prompt = self.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        token_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return token_ids[: token_ids.index(self.image_token_id)]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        videos=None,
        audio=None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """As in transformers. A text that begins as the tokenizer begins a text is not given that beginning again."""
        given = {*kwargs, *kwargs.get("common_kwargs", {}), *kwargs.get("text_kwargs", {})}
        if text is not None and "add_special_tokens" not in given:
            kwargs["add_special_tokens"] = self._needs_beginning([text] if isinstance(text, str) else text)
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, **others):
        """As in transformers. Not all versions count the images."""
        super().validate_inputs(images=images, text=text, **others)
        if text is None:
            return
        count = sum(one.count(self.image_token) for one in ([text] if isinstance(text, str) else text))
        given = 0 if images is None else len(make_flat_list_of_images(images))
        if count and images is None:
            raise ValueError(f"Found {count} {self.image_token} tokens in the text but no images were passed")
        if images is not None and count != given:
            raise ValueError(f"Found {count} {self.image_token} tokens and {given} images")

    def encode_prompts(self, prompts: list[str]) -> dict[str, list[np.ndarray]]:
        """
        Tokenizes prompts of the chat template, as [`~VisualChatProcessor.apply_chat_template`] does. Nothing is padded.

        Returns:
            `input_ids`, for each prompt of shape `(tokens,)`, with `image_seq_length` placeholders for each image, and
            `offset_mapping` of shape `(tokens, 2)`, the characters of the prompt where each token begins and ends.
        """
        # The tokenizer takes its time for each placeholder, so it is given one for each image
        encoded = self.tokenizer(prompts, add_special_tokens=self._needs_beginning(prompts), return_offsets_mapping=True)
        expanded = {"input_ids": [], "offset_mapping": []}
        for ids, offsets in zip(map(np.array, encoded["input_ids"]), encoded["offset_mapping"]):
            repeats = np.where(ids == self.image_token_id, self.image_seq_length, 1)
            # Of a list of pairs, np.array takes twice as long
            offsets = np.fromiter(chain.from_iterable(offsets), int, 2 * len(ids)).reshape(-1, 2)
            expanded["input_ids"].append(ids.repeat(repeats))
            expanded["offset_mapping"].append(offsets.repeat(repeats, axis=0))
        return expanded

    def encode_answers(self, conversations: list[list[dict]], **template_options) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """
        Of each conversation that was prepared, the token ids, and which of them the template generates, both of shape
        `(tokens,)`. Nothing is padded.
        """
        options = {"chat_template": self.chat_template, **self.tokenizer.special_tokens_map, **template_options}
        prompts, answer_spans = render_jinja_template(conversations, return_assistant_tokens_mask=True, **options)
        encoded = self.encode_prompts(prompts)
        for ids, offsets, spans in zip(encoded["input_ids"], encoded["offset_mapping"], answer_spans):
            starts, ends = offsets.T
            is_answer = np.zeros(len(ids), dtype=bool)
            for start, end in spans:
                is_answer |= (starts < end) & (ends > start)
            yield ids, is_answer

    def _needs_beginning(self, texts: list[str]) -> bool:
        """Templates that were saved earlier leave it to the tokenizer."""
        begun = [text.startswith(self._begin) for text in texts]
        if len(set(begun)) > 1:
            raise ValueError(
                f"Text {begun.index(True)} begins with {self._begin!r} and text {begun.index(False)} does not: write it in"
                " all or in none"
            )
        return not all(begun)

    def prepare_conversation(self, conversation: list[dict], name: str = "", sanitize: bool = False) -> list[dict]:
        """
        The messages of one conversation for the chat template: checked, and with special tokens in their texts marked, so
        that the tokenizer takes them as text. Errors begin with `name`; `sanitize` is `sanitize_control_tokens` of
        [`~VisualChatProcessor.apply_chat_template`].
        """
        checked = check_conversation(conversation, None if sanitize else self.image_token, name)
        return [
            {**message, "content": self._mark_content(message["content"], f"{name}message {index}")}
            for index, message in enumerate(checked)
        ]

    def _mark_content(self, content: str | list[dict], where: str) -> str | list[dict]:
        if not isinstance(content, str):
            texts = [self._mark_content(part["text"], where) if part["type"] == "text" else None for part in content]
            return [part if text is None else {**part, "text": text} for part, text in zip(content, texts)]
        special = [token for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for token in special:
            if token.normalized and token.content in content:
                raise ValueError(
                    f"{where} holds the text {token.content!r}, which this tokenizer cannot take as text: make the token one"
                    " with normalized=False, or leave it out"
                )
        return _starts_of(tuple(token.content for token in special)).sub(lambda start: start[0] + MARK, content)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        As in transformers, with every message checked first. Special tokens in texts are text; in a prompt that is not
        tokenized, a mark within each sees to that.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): One conversation or a batch. A message has a `role` (`system`,
                first only; then `user` and `assistant` in turn) and a `content`, a string or a list of parts:
                `{"type": "text", "text": …}` and, for the user, `{"type": "image", "image" or "path" or "url": …}`. Text
                parts are joined by newlines; images are numbered through the conversation, and stand before the question of
                their turn or where they are in it, by `image_position`.
            sanitize_control_tokens (`bool`, *optional*, defaults to `False`): Takes the placeholder `<image>` in a text as
                text too, in place of an error.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`): Adds `assistant_masks`, which is 1 where
                a token is learned: those of the answers with their ends.

        Raises:
            ValueError: Naming the conversation, message and part at fault.
        """
        conversation = getattr(conversation, "messages", conversation)
        sanitize = kwargs.pop("sanitize_control_tokens", False)
        is_batch = len(conversation) > 0 and not isinstance(conversation[0], dict)
        if is_batch:
            conversation = [
                self.prepare_conversation(getattr(one, "messages", one), f"conversation {index}: ", sanitize)
                for index, one in enumerate(conversation)
            ]
        else:
            conversation = self.prepare_conversation(conversation, "", sanitize)
        inputs = super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)
        if isinstance(inputs, BatchFeature) and "assistant_masks" in inputs:
            # Not all versions of transformers know that an image is several tokens
            options = {name: value for name, value in kwargs.items() if name not in CALL_OPTIONS}
            options["chat_template"] = chat_template or self.chat_template
            conversations = conversation if is_batch else [conversation]
            inputs["assistant_masks"] = self._mask_answers(inputs, self.encode_answers(conversations, **options))
        return inputs

    def _mask_answers(
        self, inputs: BatchFeature, answers: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> list[list[int]] | np.ndarray | torch.Tensor:
        """The `assistant_masks` of tokens that may be padded or cut, on either side."""
        given, masks = inputs["assistant_masks"], []
        everything = [np.ones(len(ids)) for ids in inputs["input_ids"]]
        for is_token, (_, is_answer) in zip(inputs.get("attention_mask", everything), answers):
            is_token = np.asarray(is_token, dtype=bool)
            if (count := is_token.sum()) < len(is_answer):
                is_answer = is_answer[-count:] if self.tokenizer.truncation_side == "left" else is_answer[:count]
            mask = is_token.astype(int)
            mask[is_token] = is_answer
            masks.append(mask)
        if isinstance(given, torch.Tensor):
            return torch.from_numpy(np.stack(masks)).to(given.dtype)
        return np.stack(masks) if isinstance(given, np.ndarray) else [mask.tolist() for mask in masks]

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


def _begin_texts_only(tokenizer, known: str) -> str:
    """What a tokenizer puts before a text, such as a token that it knows. What it puts behind one, it does no longer."""
    from tokenizers import processors

    bare, whole = (tokenizer(known, add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
    begin = tokenizer.convert_ids_to_tokens(whole[:start])
    if whole[start + len(bare) :]:
        tokenizer.add_eos_token = False
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A"], pair=[*begin, "$A", *begin, "$B"], special_tokens=list(zip(begin, whole[:start]))
        )
    return "".join(begin)


def _take_out_marks(tokenizer) -> None:
    """Lets a tokenizer's normalizer take out marks."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None:
        # What is looked for in normalized text is looked for before, so that no mark is gone by then. Nothing else changes
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.normalized]
        options = [{"lstrip": one.lstrip, "rstrip": one.rstrip, "single_word": one.single_word} for one in special]
        earlier = [AddedToken(one.content, normalized=False, special=True, **each) for one, each in zip(special, options)]
        tokenizer.add_tokens(earlier, special_tokens=True)
        backend.normalizer = normalizers.Replace(MARK, "")
    elif MARK in backend.normalizer.normalize_str(MARK):
        backend.normalizer = normalizers.Sequence([normalizers.Replace(MARK, ""), backend.normalizer])


@lru_cache
def _starts_of(tokens: tuple[str, ...]) -> re.Pattern:
    """Matches the first character of each of these tokens, also where they overlap. One of one character has no inside."""
    found = "|".join(re.escape(token) for token in tokens if len(token) > 1)
    return re.compile(f"(?=(?:{found})).", flags=re.DOTALL)


__all__ = ["VisualChatProcessor"]
