"""Starts a VisualChat model from a LLaVA 1.5 checkpoint: `visualchat convert llava`."""

import argparse

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.decoders_visualchat import DECODERS, find_decoder_family
from modeling_visualchat.joining_visualchat import load_all_weights
from modeling_visualchat.projector_visualchat import VisualChatLinearProjector, VisualChatMlpProjector
from visualchat.errors import input_errors
from visualchat.loading import check_name, check_part


# LLaVA 1.5's prompt (arXiv 2310.03744), as the template of its folders on the Hub writes a question and what asks for an
# answer. That template leaves out the end of an answer, which LLaVA was trained to write
CHAT_TEMPLATE = """\
{%- macro content_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '' if loop.first else '\\n' -}}
            {{- IMAGE_TOKEN if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- OPENING -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- content_of(message) + ' ' -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'USER: ' + content_of(message) + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + content_of(message) + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def read_config(name: str) -> LlavaConfig:
    """
    Args:
        name (`str`): A folder or a Hub id.

    Raises:
        OSError: If the config cannot be read.
        ValueError: If the model is of another type. The error names it.
    """
    check_name(name)
    config, _ = PreTrainedConfig.get_config_dict(name)
    if config.get("model_type") != LlavaConfig.model_type:
        raise ValueError(f"the model is of the type {config.get('model_type')!r}, not {LlavaConfig.model_type!r}")
    return LlavaConfig.from_pretrained(name)


def check_config(config: LlavaConfig) -> None:
    """Raises a `ValueError` if VisualChat cannot use the vision tower, the decoder or the features of this LLaVA."""
    for name, allowed in (("vision_config", ["clip_vision_model"]), ("text_config", DECODERS)):
        model_type = getattr(config, name).model_type
        if model_type not in allowed:
            supported = " or ".join(map(repr, allowed))
            raise ValueError(f"`{name}` has the model_type {model_type!r}: VisualChat supports {supported} only")
    if not isinstance(config.vision_feature_layer, int):
        layers = config.vision_feature_layer
        raise ValueError(
            f"`vision_feature_layer` concatenates {len(layers)} layers ({layers}), but VisualChat uses a single layer"
        )


def convert(llava: LlavaForConditionalGeneration, **config) -> tuple[VisualChatForCausalLM, list[str]]:
    """
    Args:
        llava (`LlavaForConditionalGeneration`): The model to convert. Its weights are shared, not copied.
        config: Fields of [`VisualChatConfig`], such as `multimodal_attention` and `projector`.

    Returns:
        The model, and a line of text for each of its parts, which says where the weights come from.
    """
    check_config(llava.config)
    if config.get("projector") == "mlp" and llava.config.projector_hidden_act != "gelu":
        raise ValueError(f"`projector_hidden_act` is {llava.config.projector_hidden_act!r}: the projector mlp has 'gelu'")
    with torch.device("meta"):
        text = find_decoder_family(llava.config.text_config).causal_lm_class(llava.config.text_config)
    text.model, text.lm_head = llava.model.language_model, llava.lm_head
    text.generation_config = llava.generation_config
    model = VisualChatForCausalLM.from_vision_text_pretrained(
        llava.model.vision_tower,
        text,
        image_token_id=llava.config.image_token_id,
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        **config,
    )
    return model, ["vision tower and decoder: from LLaVA", *_init_projector(model, llava)]


@torch.no_grad()
def _init_projector(model: VisualChatForCausalLM, llava: LlavaForConditionalGeneration) -> list[str]:
    ours, theirs = model.model.multi_modal_projector, llava.model.multi_modal_projector
    if isinstance(ours, VisualChatMlpProjector):
        for name in ("linear_1", "linear_2"):
            _copy_linear(getattr(ours, name), getattr(theirs, name))
        return ["projector: from LLaVA"]
    if not isinstance(ours, VisualChatLinearProjector):
        return ["projector: random, since the weights of LLaVA's two-layer MLP do not fit its architecture"]
    _copy_linear(ours.linear, theirs.linear_1)
    shape = tuple(theirs.linear_2.weight.shape)
    lines = [
        "projector, linear: from the first layer of LLaVA's MLP",
        f"projector, layer_norm: newly initialized; the second layer {shape} of LLaVA's MLP does not fit and is dropped",
    ]
    return lines + (["projector, encoder_layer: random"] if model.config.projector == "vit" else [])


def _copy_linear(ours: nn.Linear, theirs: nn.Linear) -> None:
    ours.weight.copy_(theirs.weight)
    nn.init.zeros_(ours.bias)
    if theirs.bias is not None:
        ours.bias.copy_(theirs.bias)


def write_chat_template(tokenizer: PreTrainedTokenizerFast, image_token: str) -> str:
    """LLaVA's prompt. Its tokens are those in LLaVA's folders, where the tokenizer begins a text by itself."""
    begin = tokenizer.bos_token or ""
    expected = tokenizer("USER: ")["input_ids"]
    # Tokenizers such as LLaMA's put a blank before a text, but not before what stands behind their first token
    openings = (begin, f"{begin} ")
    fitting = [one for one in openings if tokenizer(f"{one}USER: ", add_special_tokens=False)["input_ids"] == expected]
    opening = fitting[0] if fitting else begin
    return CHAT_TEMPLATE.replace("OPENING", repr(opening)).replace("IMAGE_TOKEN", repr(image_token))


def make_processor(name: str, model: VisualChatForCausalLM) -> VisualChatProcessor:
    """
    A processor with LLaVA's tokenizer and image processor. With LLaVA's projector, the prompt is LLaVA's too; else it is the
    paper's.
    """
    tokenizer, prompt = AutoTokenizer.from_pretrained(name), {}
    if model.config.projector == "mlp":
        image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        prompt = {"chat_format": "decoder", "chat_template": write_chat_template(tokenizer, image_token)}
    processor = VisualChatProcessor(
        CLIPImageProcessorPil.from_pretrained(name),
        tokenizer,
        image_seq_length=model.config.image_seq_length,
        **prompt,
    )
    if processor.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"The tokenizer's id of {processor.image_token} is {processor.image_token_id}, but the model's image token is"
            f" {model.config.image_token_id}"
        )
    vocabulary = model.config.text_config.vocab_size
    if len(processor.tokenizer) > vocabulary:
        raise ValueError(f"The tokenizer has {len(processor.tokenizer)} tokens, but the embedding {vocabulary}")
    return processor


def run(args: argparse.Namespace) -> None:
    """Runs `visualchat convert llava` with these options."""
    with input_errors(f"cannot convert {args.model}: "):
        check_config(read_config(args.model))
        check_part(args.model)
        llava = load_all_weights(LlavaForConditionalGeneration, args.model, "auto")
        model, lines = convert(llava, multimodal_attention=args.attention, projector=args.projector)
        processor = make_processor(args.model, model)
    processor.save_pretrained(args.output)
    model.save_pretrained(args.output)
    print(f"{args.output}: {model.num_parameters():,} parameters, {model.dtype}", *lines, sep="\n  ")
    if args.projector != "mlp":
        print("Train the projector before use: LLaVA's weights were trained with another attention and another projector")
    elif args.attention != "causal":
        print("Fine-tune before use: LLaVA's weights were trained with another attention")
