# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes a VisualChat model with the stock `Trainer`, on any dataset with the columns `messages` and `images`. By default
it makes conversations over scanned digits. Run after `make demo`, on two CPU cores:

    python examples/finetune.py \
        --model_name_or_path outputs/demo/model \
        --output_dir outputs/finetuned \
        --max_steps 20 \
        --per_device_train_batch_size 8 \
        --learning_rate 1e-4 \
        --use_lora

With a dataset of your own, as a file or a Hub id: `--dataset_name examples.jsonl`. `visualchat train` does more: recipes,
mixtures, checks of the data, DeepSpeed, resuming.
"""

from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

from modeling_visualchat import VisualChatDataCollator
from visualchat.data.digits import make_conversations, split_digits


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(default="outputs/demo/model", metadata={"help": "Folder or Hub id."})
    dataset_name: str | None = field(default=None, metadata={"help": ".parquet, .json, .jsonl or a Hub id."})
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA in the decoder too, by PEFT."})


def load_examples(name: str | None) -> Dataset | list[dict]:
    if name is None:
        return make_conversations(split_digits()["train"], count=400)
    kind = {"parquet": "parquet", "json": "json", "jsonl": "json"}.get(name.rsplit(".", 1)[-1])
    return load_dataset(kind, data_files=name, split="train") if kind else load_dataset(name, split="train")


def main(script_args: ScriptArguments, training_args: TrainingArguments) -> None:
    # Model and processor
    model = AutoModel.from_pretrained(script_args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(script_args.model_name_or_path)

    # What trains: projector and token embedding, as in the paper; with LoRA, the decoder's attention too
    if script_args.use_lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj)",
            modules_to_save=["multi_modal_projector", "embed_tokens"],
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
        model.print_trainable_parameters()
    else:
        model.freeze_for_alignment()

    # Training. The collator writes the prompt, opens the images and learns the answers alone
    training_args.remove_unused_columns = False
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=load_examples(script_args.dataset_name),
        data_collator=VisualChatDataCollator(processor),
        processing_class=processor,
    )
    trainer.train()

    # Save: model or adapter, and the processor
    trainer.save_model(training_args.output_dir)
    processor.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses())
