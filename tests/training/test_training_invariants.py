"""`visualchat train`: what must not change a run, from batches to interruptions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from helpers.training import ALIGNMENT, arguments, losses, moved, undo_end
from visualchat.training import trainer as training_loop
from visualchat.training.collator import TrainingCollator
from visualchat.training.dataset import prepare_dataset
from visualchat.training.joining import prepare_processor
from visualchat.training.train import main, parse_arguments, prepare_model
from visualchat.training.trainer import VisualChatTrainer, VisualChatTrainingArguments, group_parameters


class TestInvariants:
    def test_batches_of_4_equal_4_accumulated(self, parts, tmp_path):
        main(arguments(parts, tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1))
        main(arguments(parts, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4))
        assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)
        first, second = (AutoModel.from_pretrained(tmp_path / k / "model").state_dict() for k in "ab")
        for name in ALIGNMENT:
            torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3, msg=name)

    def test_the_same_seed_gives_the_same_losses(self, parts, tmp_path):
        for run in "ab":
            main(arguments(parts, tmp_path / run))
        assert losses(tmp_path / "a") == losses(tmp_path / "b")

    def test_gradient_checkpointing_gives_the_same_losses(self, parts, tmp_path):
        main(arguments(parts, tmp_path / "a"))
        main(arguments(parts, tmp_path / "b", gradient_checkpointing=True))
        assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-6)

    def test_resuming_follows_the_run_that_was_not_interrupted(self, parts, tmp_path):
        main(arguments(parts, tmp_path / "whole", max_steps=6))
        main(arguments(parts, tmp_path / "halves", max_steps=6, save_steps=2, save_strategy="steps"))
        undo_end(tmp_path / "halves")
        for step in (4, 6):  # as a kill would leave them: one cut off while it was written, one never begun
            folder = tmp_path / "halves" / f"checkpoint-{step}"
            (folder / "whole.json").unlink()
        (tmp_path / "halves" / "checkpoint-4" / "trainer_state.json").write_text("{")
        main([*arguments(parts, tmp_path / "halves", max_steps=6, save_steps=2), "--resume"])
        assert losses(tmp_path / "halves") == losses(tmp_path / "whole")

    def test_groups_of_like_length_come_in_an_order_of_seed_and_epoch_alone(self, parts, tmp_path):
        words = arguments(parts, tmp_path, train_sampling_strategy="group_by_length", save_strategy="steps", save_steps=6)
        words += ["--max_steps", "10", "--eval_fraction", "0.2", "--mode", "lora", "--lora_dropout", "0.1"]
        main(words)  # four steps an epoch: the checkpoint is in the middle of the second
        whole = losses(tmp_path)
        undo_end(tmp_path, 10)
        main([*words, "--resume"])
        assert losses(tmp_path) == whole

    def test_batches_hold_rows_of_like_length(self, parts, tmp_path):
        padding = {}
        for strategy in ("sequential", "group_by_length"):
            words = arguments(parts, tmp_path, train_sampling_strategy=strategy)
            model_args, _, training_args = parse_arguments([*words, "--remove_unused_columns", "False"])
            processor = prepare_processor(model_args)
            rows = prepare_dataset([str(parts / "data")] * 5, processor, 512).dataset
            trainer = VisualChatTrainer(
                model=prepare_model(model_args, training_args),
                args=training_args,
                train_dataset=rows,
                data_collator=TrainingCollator(processor),
                processing_class=processor,
            )
            masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
            assert sum(mask.sum() for mask in masks) == sum(rows["length"])  # every row once
            padding[strategy] = sum((mask == 0).sum().item() for mask in masks)
        assert padding["group_by_length"] < 0.8 * padding["sequential"]

    @pytest.mark.parametrize("mode", ["alignment", "lora"])
    def test_the_best_model_is_saved_and_best_and_last_checkpoint_are_kept(self, parts, tmp_path, mode):
        settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        # As the best counts what is worst, which is where training begins
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        metrics = main(arguments(parts, tmp_path, mode=mode, save_total_limit=2, **settings, **best))
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
        evaluations = [e for e in json.loads((tmp_path / "log.json").read_text()) if "eval_loss" in e]
        assert evaluations[0]["eval_loss"] > evaluations[3]["eval_loss"]
        assert metrics["eval_loss"] == pytest.approx(evaluations[0]["eval_loss"], abs=1e-6)
        name = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
        first, saved = (load_file(tmp_path / folder / name) for folder in ("checkpoint-1", "model"))
        assert set(saved) == set(first)
        assert not moved(first, saved)

    def test_older_checkpoints_go_only_when_the_new_one_is_whole(self, parts, tmp_path, monkeypatch):
        def stop(output_dir, save_total_limit, best):
            newest = max(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            assert (newest / "whole.json").exists() and save_total_limit == 1
            assert len(list(Path(output_dir).glob("checkpoint-*"))) == int(newest.name.split("-")[1])

        monkeypatch.setattr(training_loop, "rotate_checkpoints", stop)
        main(arguments(parts, tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1))

    def test_learning_rates_by_part(self, parts):
        model = AutoModel.from_pretrained(parts / "model")
        model.freeze_for_alignment()
        args = VisualChatTrainingArguments(
            "x", learning_rate=1.0, projector_learning_rate=2.0, weight_decay=0.1, use_cpu=True
        )
        groups = [
            (group["name"], group["lr"], group["weight_decay"], len(group["params"]))
            for group in group_parameters(model, args)
        ]
        assert sorted(groups) == [("embedding", 1.0, 0.1, 1), ("projector", 2.0, 0.0, 3), ("projector", 2.0, 0.1, 1)]
