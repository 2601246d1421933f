"""
Merges a PEFT adapter that `train.py --mode lora` saved into its base, as a plain VisualChat folder:

    python examples/merge_adapter.py --adapter outputs/lora/model --output outputs/merged
"""

import argparse

from peft import PeftConfig, PeftModel
from transformers import AutoModel, AutoProcessor, PreTrainedModel


def load_merged(adapter: str, base: str | None = None, **kwargs) -> PreTrainedModel:
    """
    Args:
        adapter (`str`): Folder or Hub id.
        base (`str`, *optional*): Folder or Hub id. By default the adapter names it.
        kwargs: As for `from_pretrained` of the base.
    """
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model = AutoModel.from_pretrained(base, trust_remote_code=True, **kwargs)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--base", help="folder or Hub id of the base; by default the adapter names it")
    args = parser.parse_args(argv)
    load_merged(args.adapter, args.base).save_pretrained(args.output)
    AutoProcessor.from_pretrained(args.adapter, trust_remote_code=True).save_pretrained(args.output)


if __name__ == "__main__":
    main()
