"""Merges a PEFT adapter into its base model: `visualchat merge`."""

import argparse

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from visualchat.loading import load_model, load_processor


def load_merged(adapter: str, base: str | None = None, trust_remote_code: bool = False, **kwargs) -> PreTrainedModel:
    """
    Args:
        adapter (`str`): Folder or Hub id.
        base (`str`, *optional*): Folder or Hub id. By default the adapter names it.
        trust_remote_code (`bool`): Run code that comes with the base, if it is of another type than this package's.
        kwargs: As for `from_pretrained` of the base.
    """
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model = load_model(base, trust_remote_code, **kwargs)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def run(args: argparse.Namespace) -> None:
    """Merges with the options of `visualchat merge`."""
    try:
        processor = load_processor(args.model, args.trust_remote_code)
        load_merged(args.model, args.base, args.trust_remote_code).save_pretrained(args.output)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot merge {args.model}: {error}") from error
    processor.save_pretrained(args.output)
