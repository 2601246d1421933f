# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The training stages of the demo: a tokenizer, a vision tower and a decoder from scratch, and their alignment."""

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


# In pixels: an image has 4 patches, so 5 tokens with the class token
IMAGE_SIZE, PATCH_SIZE = 16, 8
# LLaMA's default of 0.02 is for wide models. With about 1 / √hidden_size, the attention of a tiny model is not uniform at
# the start. The token embedding must be larger, so that the outputs of the layers do not dominate it.
INITIALIZER_RANGE, EMBEDDING_RANGE = 0.08, 0.3
# LLaMA's default of 10,000 is for thousands of tokens. Sequences have about a hundred here, where a small base separates
# neighbouring positions better: the decoder learns in fewer steps which word belongs to which image number.
ROPE_THETA = 20.0


def make_processor(examples: list[dict], words: tuple[str, ...] = WORDS) -> VisualChatProcessor:
    """
    A CLIP image processor for small images, and a byte-level BPE tokenizer that is trained on the conversations and on the
    words that stand for images.
    """
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    backend = Tokenizer(models.BPE())
    # A digit is always a separate token. Other tokens may be whole phrases, which makes prompts several times shorter
    pieces = Regex(r" ?\p{N}|:?\n+(?:### ?\p{L}+(?::\n)?)?|[^\p{N}\n]+?(?= ?\p{N}|:?\n|$)")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    untrained = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    prompts = VisualChatProcessor(image_processor, untrained).apply_chat_template(
        [example["messages"] for example in examples[:1000]], tokenize=False
    )
    # Special tokens are not part of the text, so the tokenizer is not trained on them
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
    """A CLIP vision tower with 2 layers and hidden size 64, untrained."""
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
    """A LLaMA decoder with 3 layers and hidden size 128, untrained."""
    tokenizer = processor.tokenizer
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=processor.image_token_id,  # the alignment adds the placeholder token
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
    A classifier on the vision tower. It predicts the label from each token of the image, not only from the class token,
    because the decoder will use all of them.
    """

    def __init__(self, tower: CLIPVisionModel, num_labels: int):
        super().__init__()
        self.tower = tower
        self.head = torch.nn.Linear(tower.config.hidden_size, num_labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The images.
            labels (`torch.LongTensor` of shape `(batch_size,)`): The labels of the images.
        """
        logits = self.head(self.tower(pixel_values).last_hidden_state)
        targets = labels[:, None].expand(logits.shape[:2])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        return {"loss": loss, "logits": logits.mean(1)}


def train_tower(
    processor: VisualChatProcessor, digits: Digits, max_steps: int, seed: int, **settings
) -> tuple[CLIPVisionModel, list]:
    """Trains a CLIP vision tower with a classifier. Returns the tower without the classifier, and the loss curve."""
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
    """Trains a LLaMA decoder on the examples of [`describe_in_words`]. Returns it and the loss curve."""
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


def describe_in_words(processor: VisualChatProcessor, examples: list[dict], words: tuple[str, ...] = WORDS) -> list[dict]:
    """
    Tokenizes the conversations with a word for each image: the word of its label, such as "seven".

    Returns:
        `list[dict]`: Examples with `input_ids` and `labels` (`list[int]` of the same length). Labels of tokens that are not
        part of an answer are -100, which the loss ignores.
    """
    words = [processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
    encoded = processor.tokenizer.apply_chat_template(
        [example["messages"] for example in examples],
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    described = []
    for example, token_ids, learned in zip(examples, encoded["input_ids"], encoded["assistant_masks"]):
        shown = iter(example["labels"])
        input_ids, labels = [], []
        for token_id, is_learned in zip(token_ids, learned):
            new_ids = words[next(shown)] if token_id == processor.image_token_id else [token_id]
            input_ids += new_ids
            labels += new_ids if is_learned else [IGNORE_INDEX] * len(new_ids)
        described.append({"input_ids": input_ids, "labels": labels})
    return described


def align(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, examples: list[dict], max_steps: int, seed: int
) -> list:
    """Trains the projector and the token embedding, as the paper does, in place. Returns the loss curve."""
    return train(
        model,
        examples,
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
    """The Trainer's progress bar, which shows the loss instead of printing it on separate lines."""

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
    Runs the Trainer, by default with AdamW and a cosine schedule. `settings` are fields of `TrainingArguments`.

    Returns:
        `list`: The loss curve, as `(step, loss)`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": max_steps // 10}
        defaults = {**schedule, "adam_beta2": 0.98, "logging_steps": 10, "use_cpu": True}
        training_args = TrainingArguments(
            output_dir=scratch,
            seed=seed,
            max_steps=max_steps,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            **{**defaults, **settings},
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
