# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""`generate` with images: which of them a cached conversation still needs, and image memory in their place."""

import copy
import inspect

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import utils as generation_utils
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .image_memory_visualchat import ImageMemory
from .modality_cache_visualchat import get_modality_positions


SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAM_FLAGS = ("early_stopping", "length_penalty")

# What this version of transformers does: encodes images before the first forward pass; cuts them for a prefill in chunks
ENCODES_IMAGES = "_prepare_multimodal_encoder_kwargs_for_generation" in vars(GenerationMixin)
CUTS_IMAGES = "_slice_mm_encoder_output" in vars(generation_utils)


def drop_unused_flags(generation_config: GenerationConfig) -> GenerationConfig:
    """
    A copy without the values that have no effect because `do_sample` is not set, `num_beams` is 1, or the padding token is
    below 0. LLaMA's folders hold such; transformers saves them only as long as nothing else of the configuration changes.
    """
    generation_config = copy.deepcopy(generation_config)
    unused = () if generation_config.do_sample else SAMPLING_FLAGS
    if generation_config.num_beams in (None, 1):
        unused += BEAM_FLAGS
    if (generation_config.pad_token_id or 0) < 0:
        unused += ("pad_token_id",)
    for name in unused:
        setattr(generation_config, name, None)
    return generation_config


class VisualChatGenerationMixin(GenerationMixin):
    """What `generate` needs to know of images. The rest is transformers'."""

    def generate(self, inputs: torch.LongTensor | None = None, *args, **kwargs):
        """
        As in transformers. A conversation that goes on from `past_key_values` may bring all its images in `pixel_values` or
        `image_memory`, as the processor makes them, or the new ones alone: those whose placeholders are cached are left out.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        cache_implementation = kwargs.get("cache_implementation") or ""
        if cache_implementation.startswith("offloaded") and self.device.type == "cpu":
            raise ValueError(
                f"cache_implementation={cache_implementation!r} moves the cache from an accelerator to the CPU, where this"
                " model already is: use 'dynamic' or 'static', or 'quantized' to save memory"
            )
        self._check_assistance(**{**kwargs, "input_ids": input_ids})
        if input_ids is not None:
            self.model.language_model.check_length(input_ids.shape[1])
        for name in ("pixel_values", "image_memory"):
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
        self._check_guidance(**{**kwargs, "input_ids": input_ids})
        if self.config.multimodal_attention == "cross" and input_ids is not None:
            if (input_ids[:, -1] == self.config.image_token_id).any():
                raise ValueError(
                    "A prompt that ends with an image has no next token with multimodal_attention='cross', where images do"
                    " not pass through the decoder: let text follow the image"
                )
        if "image_memory" in kwargs:
            self._check_generation_with_memory(**{**kwargs, "input_ids": input_ids})
            memories = kwargs["image_memory"]
            # One entry for each image: what is left out or repeated is counted in images
            memories = [memories] if isinstance(memories, ImageMemory) else memories
            memories = [one for memory in memories for one in (memory if memory is not None else [None])]
            if "pixel_values" in kwargs:
                encoded = iter(self.encode_images(kwargs.pop("pixel_values")))
                memories = [next(encoded, None) if memory is None else memory for memory in memories]
            kwargs["image_memory"] = memories
        elif "pixel_values" in kwargs and isinstance(kwargs.get("assistant_model"), VisualChatGenerationMixin):
            raise ValueError(
                "transformers hands no images to an `assistant_model`: take a text model with this vocabulary, such as the"
                " decoder alone, or use `prompt_lookup_num_tokens`"
            )
        if not {"pixel_values", "image_memory", "mm_encoder_outputs"} & set(kwargs):
            if self.model.runs_in_step(kwargs.get("past_key_values")):
                # Images are encoded before the first forward pass, on the processes that have some
                self.get_image_features(self.model.dummy_pixel_values())
                if not ENCODES_IMAGES:
                    kwargs["mm_encoder_outputs"] = {}
        name = "image_memory" if "image_memory" in kwargs else "pixel_values"
        if name in kwargs and input_ids is not None and kwargs.get("past_key_values") is not None:
            kwargs[name] = self._select_new_images(
                input_ids, kwargs[name], kwargs["past_key_values"], kwargs.get("attention_mask")
            )
            if len(kwargs[name]) == 0:
                kwargs.pop(name)
        if "pixel_values" in kwargs:
            self._check_what_transformers_can_do(**kwargs)
            if not ENCODES_IMAGES:
                with torch.no_grad():
                    features = self.get_image_features(kwargs.pop("pixel_values"), return_dict=True)
                kwargs["mm_encoder_outputs"] = {"image": features}
        return super().generate(inputs, *args, **kwargs)

    def _check_what_transformers_can_do(self, generation_config=None, assistant_model=None, **kwargs):
        generation_config = generation_config or self.generation_config
        if not CUTS_IMAGES and kwargs.get("prefill_chunk_size", generation_config.prefill_chunk_size) is not None:
            raise ValueError("`prefill_chunk_size` with images needs transformers 5.23 or later: leave it out")
        if not ENCODES_IMAGES and assistant_model is not None:
            raise ValueError(
                "`assistant_model` with images needs transformers 5.18 or later, since earlier versions hand them to the"
                " assistant: use `prompt_lookup_num_tokens`"
            )

    def _check_guidance(self, input_ids=None, negative_prompt_ids=None, **kwargs):
        generation_config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("guidance_scale", generation_config.guidance_scale) in (None, 1):
            return
        if negative_prompt_ids is not None:
            name, negative = "`negative_prompt_ids`", negative_prompt_ids
        elif input_ids is not None:  # transformers takes the last token of the prompt
            name, negative = "the prompt's last token, its negative prompt by default,", input_ids[:, -1:]
        else:
            return
        if count := int((negative == self.config.image_token_id).sum()):
            raise ValueError(
                f"`guidance_scale`: transformers hands no images to the negative prompt, but {name} holds {count} image"
                " placeholder tokens. Give `negative_prompt_ids` of text alone, such as those of the prompt without its"
                " images"
            )

    def _check_assistance(
        self, past_key_values=None, generation_config=None, assistant_model=None, output_attentions=None, **kwargs
    ):
        defaults = generation_config or self.generation_config
        if kwargs.get("assistant_early_exit", defaults.assistant_early_exit) is not None:
            raise ValueError(
                "`assistant_early_exit` needs a config that is the decoder's own: use `prompt_lookup_num_tokens` or a text"
                " model as `assistant_model`"
            )
        lookup = kwargs.get("prompt_lookup_num_tokens", defaults.prompt_lookup_num_tokens)
        if (lookup is None and assistant_model is None) or past_key_values is None or past_key_values.get_seq_length() == 0:
            return
        mode = "prompt_lookup_num_tokens" if lookup is not None else "assistant_model"
        input_ids, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        passes_new_alone = (
            attention_mask is not None and input_ids is not None and len(attention_mask[0]) > len(input_ids[0])
        )
        if passes_new_alone and not ENCODES_IMAGES:
            raise ValueError(
                f"`{mode}` with `past_key_values` and the new tokens alone needs transformers 5.18 or later: pass all tokens"
            )
        settings = {"output_attentions": output_attentions, "output_hidden_states": kwargs.get("output_hidden_states")}
        for name, given in settings.items():
            if given if given is not None else getattr(defaults, name):
                raise ValueError(
                    f"`{name}` with `{mode}` and a filled `past_key_values`: transformers would take the outputs of the"
                    " new tokens for those of the whole prompt. Leave one of the three out"
                )

    def _check_generation_with_memory(self, input_ids, image_memory, pixel_values=None, **kwargs):
        if input_ids is None:
            raise ValueError("`image_memory` needs `input_ids`, whose placeholders say where the images stand")
        if (input_ids[:, -1] == self.config.image_token_id).any():
            raise ValueError("A prompt that ends with a remembered image has no next token: let text follow the image")
        generation_config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size", generation_config.prefill_chunk_size) is not None:
            raise ValueError("`prefill_chunk_size` and `image_memory`: remembered images need no prefill, leave it out")
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "transformers hands `image_memory` to an `assistant_model`, which cannot use it: use `pixel_values` or"
                " `prompt_lookup_num_tokens`"
            )
        expected = 0 if isinstance(image_memory, ImageMemory) else sum(memory is None for memory in image_memory)
        num_new = len(pixel_values) if pixel_values is not None else 0
        if num_new != expected:
            raise ValueError(f"`image_memory` has {expected} entries `None`, but {num_new} new images were given")

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """As in transformers. Image memory goes into the prefill alone, like images."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("image_memory", "mm_encoder_outputs", "mm_token_type_ids"):
                kwargs.pop(name, None)
        cache, of_all = kwargs.get("past_key_values"), kwargs.get("position_ids")
        of_all = kwargs.get("attention_mask") if of_all is None else of_all
        if is_first_iteration and next_sequence_length is None and cache is not None and of_all is not None:
            # Assisted decoding begins with the whole prompt, whatever is cached of it. Positions and mask are those of all
            # tokens seen: where they are more than what is given, the new tokens alone were passed
            given, cached = input_ids if inputs_embeds is None else inputs_embeds, int(cache.get_seq_length())
            if 0 < cached < given.shape[1] == of_all.shape[-1]:
                next_sequence_length = given.shape[1] - cached
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, past_key_values, is_first_iteration=False, **kwargs
    ) -> torch.Tensor | None:
        """
        As in transformers, which asks for masks of 4 dimensions where the cache is static. Sorted by modality, none is
        needed: the prefill takes padding from the 2-dimensional mask, and the cache notes it.
        """
        decoder = self.model.language_model
        if get_modality_positions(past_key_values) is not None:
            return attention_mask if is_first_iteration else None
        if is_first_iteration and decoder.takes_padding_mask(attention_mask):
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.LongTensor | None = None, **kwargs
    ) -> tuple[torch.LongTensor | None, dict]:
        cache, attention_mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        cached = int(cache.get_seq_length()) if cache is not None else 0
        # transformers counts the images of the cache with the new ones, which alone are given
        names = ("image_memory", "mm_encoder_outputs") if cached or not ENCODES_IMAGES else ("image_memory",)
        images = {name: kwargs.pop(name) for name in names if kwargs.get(name)}
        if images and expand_size > 1:  # the new images of a sequence are repeated together
            if attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]:
                cached = 0  # the new tokens alone were passed
            new = input_ids[:, cached:] == self.config.image_token_id
            counts = (new.sum(-1) // self.config.image_seq_length).tolist()
            starts = [sum(counts[:k]) for k in range(len(counts))]
            order = [s + k for s, count in zip(starts, counts) for _ in range(expand_size) for k in range(count)]
            if "image_memory" in images:
                images["image_memory"] = [images["image_memory"][k] for k in order]
            if "image" in images.get("mm_encoder_outputs", {}):
                features = images["mm_encoder_outputs"]["image"].pooler_output
                repeated = BaseModelOutputWithPooling(pooler_output=[features[k] for k in order])
                images["mm_encoder_outputs"] = {"image": repeated}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **images}

    def _select_new_images(
        self,
        input_ids: torch.LongTensor,
        images: torch.Tensor | list[ImageMemory],
        past_key_values: Cache,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor | list[ImageMemory]:
        if attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]:
            return images  # the new tokens alone were passed
        is_image = input_ids == self.config.image_token_id
        counts = (is_image.sum(-1) // self.config.image_seq_length).tolist()
        if sum(counts) != len(images):
            return images
        cached = is_image[:, : int(past_key_values.get_seq_length())]
        cached_counts = (cached.sum(-1) // self.config.image_seq_length).tolist()
        starts = [sum(counts[:k]) for k in range(len(counts))]
        new = [start + k for start, seen, count in zip(starts, cached_counts, counts) for k in range(seen, count)]
        return images[new] if isinstance(images, torch.Tensor) else [images[k] for k in new]

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer) -> dict:
        """As in transformers, but a `custom_generate` function gets the streamer and the tokenizer if it takes them."""
        given = {"streamer": streamer, "tokenizer": kwargs.get("tokenizer")}
        mode_kwargs = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        if callable(custom_generate):
            taken = inspect.signature(custom_generate).parameters
            mode_kwargs |= {name: value for name, value in given.items() if value is not None and name in taken}
        return mode_kwargs

    def start_chat(self, processor, **settings):
        """
        A conversation with this model, a [`ChatSession`], which says what `settings` there are.

        Raises:
            ValueError: If weights were missing when the model was loaded, or are not finite; see [`check_weights`].
        """
        from .chat_visualchat import ChatSession

        self.check_weights()
        return ChatSession(self, processor, **settings)
