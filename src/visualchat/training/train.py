"""Trains a VisualChat model: seed → logging → folder → data → model → Trainer → train → save → evaluate → card → push."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, set_seed

from modeling_visualchat import VisualChatConfig
from modeling_visualchat.decoders_visualchat import find_head_dim
from modeling_visualchat.generation_visualchat import drop_unused_flags
from modeling_visualchat.modality_kernels_visualchat import BLOCK_SIZE, make_block_mask, softmax
from visualchat.data.checks import ModelRequirements
from visualchat.hub.push import check_access, push
from visualchat.loading import load_model, load_processor
from visualchat.training.arguments import DataArguments, ModelArguments
from visualchat.training.card import write_card
from visualchat.training.checkpoints import world_size_changed
from visualchat.training.collator import TrainingCollator
from visualchat.training.dataset import prepare_dataset, report_statistics
from visualchat.training.interruption import Interrupted
from visualchat.training.joining import join_parts, prepare_processor
from visualchat.training.output_folder import is_finished, on_main_process, open_folder, take_lock, write_record
from visualchat.training.recipe import check_arguments, parse_arguments
from visualchat.training.run_record import check_same_run, record_arguments, record_config, record_data
from visualchat.training.trainer import (
    RestoreParamGroupsCallback,
    SetEpochCallback,
    VisualChatTrainer,
    VisualChatTrainingArguments,
    load_universal_checkpoint,
    plot_curves,
)


logger = logging.getLogger("train")

LORA_TARGETS = {
    "decoder": r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "tower": r".*vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|o_proj|fc1|fc2|gate_proj|up_proj|down_proj)",
}


def fit_context(max_length: int, text_config: PreTrainedConfig) -> int:
    """`max_length`, or the decoder's context if that is shorter: the model would refuse a longer conversation."""
    context = text_config.max_position_embeddings
    if max_length <= context or text_config.rope_parameters["rope_type"] == "dynamic":
        return max_length
    logger.warning("max_length is %d, but the decoder's context holds %d tokens: cutting there", max_length, context)
    return context


def prepare_model(model_args: ModelArguments, training_args: VisualChatTrainingArguments) -> torch.nn.Module:
    """Loads the model and sets which parameters train, by the mode."""
    quantization = None
    if model_args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=[  # whole names
                *("model.vision_tower", "model.multi_modal_projector", "lm_head"),
                r"model\.language_model\.layers\.\d+\.cross_attn",
            ],
        )
    model = load_model(
        model_args.model_name_or_path,
        model_args.trust_remote_code,
        dtype=model_args.dtype,
        attn_implementation="sdpa",
        quantization_config=quantization,
    )
    attention = model_args.attn_implementation or fastest_attention(model.config, training_args.device)
    logger.info(f"The decoder's attention: {attention}")
    model.set_attn_implementation({"text_config": attention})
    model.config.use_cache = not training_args.gradient_checkpointing
    model.generation_config = drop_unused_flags(model.generation_config)
    model.generation_config.validate(strict=True)  # what cannot be saved is refused before training
    return set_mode(model, model_args)


def fastest_attention(config: VisualChatConfig, device: torch.device) -> str:
    """
    On a GPU flex attention, if it can compute this model and compiles here: small batches then go to SDPA, and large ones to
    a compiled kernel (docs/performance.md, "Flex attention"). SDPA otherwise.
    """
    can_compute = config.multimodal_attention in ("mmca", "mmca_merged") and config.text_config.attention_dropout == 0
    if not can_compute or device.type != "cuda":
        return "sdpa"
    try:
        try_flex_attention(config.text_config, device)
    except Exception as error:  # of Triton, a C compiler, an old GPU: better now than at the first large batch
        logger.warning(f"Trains by SDPA: flex attention does not compile here ({type(error).__name__})", exc_info=True)
        return "sdpa"
    return "flex_attention"


def try_flex_attention(config: PreTrainedConfig, device: torch.device) -> None:
    """Compiles flex attention for heads like the decoder's, forward and backward, in seconds."""
    positions_BK = torch.arange(2 * BLOCK_SIZE, device=device)[None]
    mask = make_block_mask(positions_BK, torch.zeros_like(positions_BK), positions_BK)
    query, key = (
        torch.zeros(1, heads, 2 * BLOCK_SIZE, find_head_dim(config), dtype=torch.bfloat16, device=device, requires_grad=True)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    softmax(query, key, key, mask).sum().backward()


def set_mode(model: torch.nn.Module, model_args: ModelArguments) -> torch.nn.Module:
    """Sets which parameters train, by the mode. With `lora` it returns PEFT's wrapper of the model."""
    if model_args.mode == "alignment":
        model.freeze_for_alignment(train_embedding=model_args.train_embedding)
    elif model_args.mode == "lora":
        from peft import LoraConfig, get_peft_model  # of the extra `train`

        targets = LORA_TARGETS.values() if model_args.lora_target == "both" else [LORA_TARGETS[model_args.lora_target]]
        whole = ["multi_modal_projector"]
        whole += ["embed_tokens"] if model_args.train_embedding else []
        whole += ["image_numbers"] if model.config.learned_image_numbers else []
        whole += ["cross_attn"] if model.config.multimodal_attention == "cross" else []
        lora = LoraConfig(
            r=model_args.lora_rank,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules="|".join(targets),
            modules_to_save=whole,
            task_type="CAUSAL_LM",  # for AutoPeftModelForCausalLM
        )
        model = get_peft_model(model, lora)
    return model


@dataclass
class Run:
    """
    A run that is ready to begin.

    Args:
        model_args (`ModelArguments`), data_args (`DataArguments`): Its fields.
        trainer (`VisualChatTrainer`): With model, data and the other fields.
        checkpoint (`str`, *optional*): The checkpoint to go on from.
        is_changed (`bool`): Whether it goes on with other settings than the checkpoint's.
        table (`str`): What it trains on, for the model card.
        push_to_hub (`bool`): Whether the model is published at the end.
        hub_token (`str`, *optional*): The access token for that.
        lock (`TextIO`, *optional*): Keeps other runs out of `output_dir` as long as it is open.
    """

    model_args: ModelArguments
    data_args: DataArguments
    trainer: VisualChatTrainer
    checkpoint: str | None
    is_changed: bool
    table: str
    push_to_hub: bool
    hub_token: str | None
    lock: TextIO | None


def main(argv: list[str]) -> dict[str, float]:
    """Trains with the recipe and the options of `visualchat train`. Returns the metrics; none if the run is finished."""
    run = prepare(argv)
    return {} if run is None else train(run)


def prepare(argv: list[str]) -> Run | None:
    """
    Everything before the first step.

    Returns:
        The run, or `None` if it is to be resumed and is finished. Nothing is written then.

    Raises:
        ImportError, OSError, TypeError, ValueError: If a field, a file, the data or the model cannot be used.
    """
    model_args, data_args, training_args = parse_arguments(argv)
    check_arguments(model_args, data_args, training_args)
    training_args.remove_unused_columns = False  # the collator reads all columns
    training_args.accelerator_config.dispatch_batches = False  # would cut streamed pixel_values by the number of examples
    training_args.prediction_loss_only = True  # accuracy comes from generated answers
    output_dir = Path(training_args.output_dir)
    # The model is published once, at the end: the Trainer would send all of output_dir with every checkpoint. It also
    # pickles its arguments, which therefore must not hold the token
    push_to_hub, training_args.push_to_hub = training_args.push_to_hub, False
    hub_token, training_args.hub_token = training_args.hub_token, None

    # Seed and logging
    set_seed(training_args.seed)
    logging.basicConfig(
        level=logging.INFO if training_args.process_index == 0 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if push_to_hub and training_args.process_index == 0:
        check_access(hub_token)

    # The folder: what cannot be begun or resumed in it is refused before any work starts
    arguments = record_arguments(model_args, data_args, training_args)
    if data_args.resume and on_main_process(training_args, lambda: is_finished(output_dir, arguments)):
        logger.info("%s: this run is finished", output_dir)
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = None

    def open_output() -> str | None:
        nonlocal lock
        lock = take_lock(output_dir)
        inputs = [model_args.model_name_or_path, model_args.vision_name_or_path, model_args.text_name_or_path]
        return open_folder(training_args, data_args.resume, data_args.overwrite, [*inputs, *data_args.datasets])

    checkpoint = on_main_process(training_args, open_output)
    if data_args.resume:
        logger.info("Resuming from %s", checkpoint or "the start: there is no complete checkpoint")
    if training_args.deepspeed:
        import deepspeed  # of the extra `train`

        # Before the model, which ZeRO-3 shares out while it is loaded
        backend = "gloo" if training_args.use_cpu else None
        deepspeed.init_distributed(backend, auto_mpi_discovery=False)

    # Data
    processor = prepare_processor(model_args)
    if not model_args.model_name_or_path:
        model_args.model_name_or_path = str(output_dir / "joined")
        with training_args.main_process_first(desc="joining tower and decoder"):
            joined = (output_dir / "joined" / "processor_config.json").exists()  # written last
            if training_args.process_index == 0 and not (checkpoint and joined):
                join_parts(model_args, processor, output_dir / "joined")
        processor = load_processor(model_args.model_name_or_path)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code)
    max_length = fit_context(data_args.max_length, config.text_config)
    with training_args.main_process_first(desc="preparing examples"):
        prepared = prepare_dataset(
            data_args.datasets,
            processor,
            max_length,
            data_args.weights,
            data_args.streaming,
            data_args.num_proc,
            training_args.seed,
            data_args.skip_broken_images,
        )
    table = ""
    train_dataset, eval_dataset = prepared.dataset, None
    if not data_args.streaming and data_args.eval_fraction > 0:
        split = prepared.dataset.train_test_split(data_args.eval_fraction, seed=training_args.seed)
        train_dataset, eval_dataset = split["train"], split["test"]
    data = {"training": record_data(train_dataset), "evaluation": record_data(eval_dataset)}
    record = {"arguments": arguments, "model": record_config(config), "data": data}
    is_changed = checkpoint is not None and check_same_run(Path(checkpoint), record, data_args.accept_changes)
    if not data_args.streaming and training_args.process_index == 0:
        table = report_statistics(prepared.dataset, output_dir)
        logger.info("Examples, with those held out for evaluation:\n%s", table)

    # Model
    model = prepare_model(model_args, training_args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("Mode %s trains %s parameters", model_args.mode, f"{trained:,}")

    # Trainer
    trainer = VisualChatTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=TrainingCollator(
            processor,
            data_args.skip_broken_images,
            ModelRequirements.of(processor, model.config),
            broken_rows=sum(prepared.invalid.values()),
            fallback_examples=train_dataset,
        ),
        processing_class=processor,
        callbacks=[SetEpochCallback()],
        run_record=record,
    )

    return Run(model_args, data_args, trainer, checkpoint, is_changed, table, push_to_hub, hub_token, lock)


def train(run: Run) -> dict[str, float]:
    """
    Trains, saves, evaluates, and publishes if that was asked for. Returns the metrics.

    Raises:
        Interrupted: If SIGTERM or SIGINT arrived; a checkpoint is saved.
    """
    trainer, training_args = run.trainer, run.trainer.args
    output_dir = Path(training_args.output_dir)

    # Train
    if trainer.is_world_process_zero():
        write_record(output_dir, trainer.run_record, finished=False)
    if run.is_changed:
        trainer.add_callback(RestoreParamGroupsCallback())
    if run.checkpoint and world_size_changed(Path(run.checkpoint), training_args):
        load_universal_checkpoint(trainer)
    try:
        trainer.train(resume_from_checkpoint=run.checkpoint)
    except Interrupted:
        leave_process_group()
        raise

    # Save
    folder = output_dir / "model"
    trainer.save_model(str(folder))

    # Evaluate
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    metrics["broken_rows"] = trainer.data_collator.broken_rows.value

    # Card and push
    if trainer.is_world_process_zero():
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
        (output_dir / "log.json").write_text(json.dumps(trainer.state.log_history, indent=2))
        plot_curves(trainer.state.log_history, output_dir / "curves.png")
        write_card(folder, run.model_args, run.data_args, training_args, run.table, metrics, output_dir)
        if run.push_to_hub:
            commit = push(
                folder,
                training_args.hub_model_id or output_dir.name,
                private=training_args.hub_private_repo,
                revision=training_args.hub_revision,
                token=run.hub_token,
            )
            logger.info("Published as %s", commit.commit_url)
        write_record(output_dir, trainer.run_record, finished=True)
        if run.lock is not None:
            run.lock.close()
    leave_process_group()
    return metrics


def leave_process_group() -> None:
    """Waits for the other processes, if there are any, and parts from them."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
