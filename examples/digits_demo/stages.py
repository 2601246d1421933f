# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The training of the demo: a tokenizer, a vision tower and a decoder from scratch, and the alignment of the two."""

import re
import tempfile

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_visualchat import VisualChatDataCollator, VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.data_collator_visualchat import IGNORE_INDEX
from visualchat.data.digits import WORDS, Digits


# In pixels: 4 patches and the class token stand for a picture
IMAGE_SIZE, PATCH_SIZE = 16, 8
# LLaMA's 0.02 is for wide models. About 1 / √hidden_size keeps a tiny one's attention from starting out flat, and the token
# embedding then has to be larger, or what the layers add would drown it.
INITIALIZER_RANGE, EMBEDDING_RANGE = 0.08, 0.3
# LLaMA's 10,000 is for thousands of tokens. In a hundred, a small base tells neighbours apart sooner: the decoder learns
# which word stands under which number in fewer steps.
ROPE_THETA = 20.0


def make_processor(rows: list[dict], words: tuple[str, ...] = WORDS) -> VisualChatProcessor:
    """
    A CLIP image processor for small pictures and a byte-level BPE tokenizer that is trained on the conversations and on the
    words that stand for pictures.
    """
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    backend = Tokenizer(models.BPE())
    # Numbers stand alone; else a token may be a whole phrase of the conversations, which makes prompts several times shorter
    pieces = Regex(r" ?\p{N}|:?\n+(?:### ?\p{L}+(?::\n)?)?|[^\p{N}\n]+?(?= ?\p{N}|:?\n|$)")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    untrained = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    prompts = VisualChatProcessor(image_processor, untrained).apply_chat_template(
        [row["messages"] for row in rows[:1000]], tokenize=False
    )
    # Special tokens are no part of the text, and must not be merged with it
    texts = [piece for prompt in prompts for piece in re.split("<image>|</s>", prompt)]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=list(tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *words], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **tokens)
    return VisualChatProcessor(image_processor, tokenizer, image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2 + 1)


def make_tower() -> CLIPVisionModel:
    """A CLIP tower of 2 layers × 64, untrained."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )
    )


def make_decoder(processor: VisualChatProcessor) -> LlamaForCausalLM:
    """A LLaMA of 3 layers × 128, untrained."""
    tokenizer = processor.tokenizer
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=processor.image_token_id,  # the alignment adds the placeholder's row
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            initializer_range=INITIALIZER_RANGE,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_RANGE)
    return model


class TowerClassifier(torch.nn.Module):
    """
    Tells the label from every token of the tower, not from the class token alone: it is all of them that the decoder reads.
    """

    def __init__(self, tower: CLIPVisionModel, num_labels: int):
        super().__init__()
        self.tower = tower
        self.head = torch.nn.Linear(tower.config.hidden_size, num_labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Pictures.
            labels (`torch.LongTensor` of shape `(batch_size,)`): What they show.
        """
        logits = self.head(self.tower(pixel_values).last_hidden_state)
        targets = labels[:, None].expand(logits.shape[:2])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        return {"loss": loss, "logits": logits.mean(1)}


def train_tower(
    processor: VisualChatProcessor, digits: Digits, max_steps: int, seed: int, **settings
) -> tuple[CLIPVisionModel, list]:
    """A CLIP tower, trained on the labels. Returns it and the loss curve, without the classifier."""
    pixel_values = processor.image_processor(digits.images, return_tensors="pt")["pixel_values"]
    dataset = [{"pixel_values": pixels, "labels": int(label)} for pixels, label in zip(pixel_values, digits.labels)]
    model = TowerClassifier(make_tower(), int(digits.labels.max()) + 1)
    curve = train(
        model,
        dataset,
        max_steps,
        seed,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.05,
        **settings,
    )
    return model.tower, curve


def train_decoder(
    processor: VisualChatProcessor, examples: list[dict], max_steps: int, seed: int, **settings
) -> tuple[LlamaForCausalLM, list]:
    """A LLaMA, trained on conversations in words, see [`describe_in_words`]. Returns it and the loss curve."""
    model = make_decoder(processor)
    curve = train(
        model,
        examples,
        max_steps,
        seed,
        per_device_train_batch_size=32,
        learning_rate=1.5e-3,
        weight_decay=0.01,
        data_collator=DataCollatorForSeq2Seq(processor.tokenizer),
        **settings,
    )
    return model, curve


def describe_in_words(processor: VisualChatProcessor, rows: list[dict], words: tuple[str, ...] = WORDS) -> list[dict]:
    """
    The conversations with a word, such as "seven", where a picture stands: the one of its label.

    Returns:
        `list[dict]` of `input_ids` and `labels` (`list[int]` of the same length; -100 where nothing is learned).
    """
    words = [processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
    encoded = processor.tokenizer.apply_chat_template(
        [row["messages"] for row in rows],
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    examples = []
    for row, token_ids, learned in zip(rows, encoded["input_ids"], encoded["assistant_masks"]):
        shown = iter(row["labels"])
        input_ids, labels = [], []
        for token_id, is_learned in zip(token_ids, learned):
            new_ids = words[next(shown)] if token_id == processor.image_token_id else [token_id]
            input_ids += new_ids
            labels += new_ids if is_learned else [IGNORE_INDEX] * len(new_ids)
        examples.append({"input_ids": input_ids, "labels": labels})
    return examples


def align(model: VisualChatForCausalLM, processor: VisualChatProcessor, rows: list[dict], max_steps: int, seed: int) -> list:
    """Trains what the paper trains, the projector and the token embedding, in place. Returns the loss curve."""
    return train(
        model,
        rows,
        max_steps,
        seed,
        per_device_train_batch_size=32,
        learning_rate=3e-2,
        adam_beta2=0.95,
        remove_unused_columns=False,
        dataloader_num_workers=1,
        data_collator=VisualChatDataCollator(processor, supervised_logits_only=True),
    )


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, with the loss beside it rather than in lines of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


def train(
    model: torch.nn.Module,
    dataset: list[dict],
    max_steps: int,
    seed: int,
    data_collator=None,
    optimizer: torch.optim.Optimizer | None = None,
    callbacks: list[TrainerCallback] = (),
    **settings,
) -> list:
    """
    One run of the Trainer, with AdamW and a cosine schedule unless told otherwise. `settings` are fields of
    `TrainingArguments`.

    Returns:
        `list` of `(step, loss)`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        usual = {"lr_scheduler_type": "cosine", "warmup_steps": max_steps // 10, "adam_beta2": 0.98, "logging_steps": 10}
        training_args = TrainingArguments(
            output_dir=scratch,
            seed=seed,
            max_steps=max_steps,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            **{**usual, **settings},
        )
        trainer = Trainer(
            model,
            training_args,
            data_collator=data_collator,
            train_dataset=dataset,
            optimizers=(optimizer, None),
            callbacks=list(callbacks),
        )
        if training_args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        else:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(ProgressBar)
        trainer.train()
    model.eval()
    return [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
