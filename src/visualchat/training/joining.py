"""The processor of a recipe, and the model of one that joins a tower and a decoder."""

from importlib import import_module
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.chat_streaming_visualchat import find_end_tokens
from modeling_visualchat.joining_visualchat import check_parts
from visualchat.loading import check_model_type, check_part, find_image_size, load_image_processor, load_processor
from visualchat.training.arguments import ModelArguments


MMCA = ("mmca", "mmca_merged")
LEARNED_NUMBERS = 64  # as many as [`VisualChatProcessor.image_number_token_ids`] spells


def prepare_processor(model_args: ModelArguments) -> VisualChatProcessor:
    """
    The processor of the model, or a new one made of the image processor and tokenizer of the parts.

    Raises:
        OSError: If it cannot be read.
        ValueError: If neither is given, the model is no VisualChat, or the decoder cannot be used, or has no chat template
            that can be used for `chat_format: decoder`.
        TypeError: If the parts are of families that cannot be joined.
        ImportError: If the decoder is a GGUF file and the extra `gguf` is not installed.
    """
    if model_args.model_name_or_path:
        try:
            check_model_type(model_args.model_name_or_path, model_args.trust_remote_code)
            return load_processor(model_args.model_name_or_path, model_args.trust_remote_code)
        except ValueError as error:
            join = "To join a tower and a decoder, give --vision_name_or_path and --text_name_or_path"
            raise ValueError(f"--model_name_or_path: {error} {join}") from error
    if not (model_args.vision_name_or_path and model_args.text_name_or_path):
        raise ValueError("Give --model_name_or_path, or both --vision_name_or_path and --text_name_or_path")
    if model_args.text_gguf_file:
        import_module("gguf")  # of the extra `gguf`: what is missing is named before anything is read
    check_part(model_args.vision_name_or_path)
    check_part(model_args.text_name_or_path)
    check_parts(model_args.vision_name_or_path, model_args.text_name_or_path, model_args.text_gguf_file)
    gguf = {"gguf_file": model_args.text_gguf_file} if model_args.text_gguf_file else {}
    return VisualChatProcessor(
        load_image_processor(model_args.vision_name_or_path),
        AutoTokenizer.from_pretrained(model_args.text_name_or_path, **gguf),
        chat_format=model_args.chat_format,
        image_position=model_args.image_position,
    )


def join_parts(model_args: ModelArguments, processor: VisualChatProcessor, folder: Path) -> None:
    """
    Joins tower and decoder once and saves them, so that every process can load its share of the result.

    Raises:
        ValueError: If a field of the recipe has a wrong value, or one that does not suit the tower.
    """
    try:
        model = VisualChatForCausalLM.from_vision_text_pretrained(
            model_args.vision_name_or_path,
            model_args.text_name_or_path,
            gguf_file=model_args.text_gguf_file,
            dtype=model_args.dtype,
            image_token_id=processor.image_token_id,
            multimodal_attention=model_args.multimodal_attention,
            cross_attention_every=model_args.cross_attention_every,
            projector=model_args.projector,
            pixel_shuffle_factor=model_args.pixel_shuffle_factor,
            pool_factor=model_args.pool_factor,
            class_token_outputs=model_args.class_token_outputs,
            image_size=find_image_size(processor.image_processor),
            image_number_keys=model_args.image_number_keys,
            image_number_token_ids=processor.image_number_token_ids() if model_args.image_number_keys else None,
            learned_image_numbers=count_learned_numbers(model_args),
            image_prefix_ids=find_image_prefix(model_args, processor),
        )
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if processor.chat_format == "decoder":  # a turn may end with another token than a text does
        end_tokens = find_end_tokens(processor, model.generation_config.eos_token_id)
        model.generation_config.eos_token_id = sorted(end_tokens)
    processor.image_seq_length = model.config.image_seq_length
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def count_learned_numbers(model_args: ModelArguments) -> int:
    """How many learned numbers of images a recipe asks for: if it is silent, `LEARNED_NUMBERS` for MMCA alone."""
    if model_args.learned_image_numbers is not None:
        return model_args.learned_image_numbers
    return LEARNED_NUMBERS if model_args.multimodal_attention in MMCA and not model_args.image_number_keys else 0


def find_image_prefix(model_args: ModelArguments, processor: VisualChatProcessor) -> list[int] | None:
    """The token ids of the image prefix that a recipe asks for: for `auto` none, if the attention has no use for one."""
    if model_args.image_prefix in ("none", None):  # `null` in a recipe, and what a command line can say
        return None
    if model_args.image_prefix != "auto":
        return processor.tokenizer(model_args.image_prefix, add_special_tokens=False)["input_ids"]
    return processor.image_prefix_ids() if model_args.multimodal_attention in MMCA else None
