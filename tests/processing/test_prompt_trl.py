"""TRL's trainers read the prompt that our collator makes."""

import copy

import pytest

from helpers.tiny import digit_image, make_model, make_processor, user
from modeling_visualchat import VisualChatDataCollator


class TestTRL:
    PROMPT = [{"role": "user", "content": "What is <s>this</s>?"}]
    ANSWERS = [[{"role": "assistant", "content": text}] for text in ("A cat </s>.", "A dog.")]

    @pytest.fixture
    def rows(self):
        return [{"prompt": self.PROMPT, "images": [digit_image(k)]} for k in range(2)]

    def expected(self, processor, index: int, answer: list[dict]) -> tuple[list[int], list[int]]:
        """Prompt and completion, as our collator has them."""
        messages = [user(self.PROMPT[0]["content"], digit_image(index)), *answer]
        batch = VisualChatDataCollator(processor)([{"messages": messages}])
        learned = batch["labels"][0] != -100
        ids = batch["input_ids"][0]
        assert ids[-1] == processor.tokenizer.eos_token_id and learned[-1]
        return ids[~learned].tolist(), ids[learned].tolist()

    def test_sft(self, rows):
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        processor = make_processor()
        answered = [{**copy.deepcopy(row), "completion": self.ANSWERS[0]} for row in rows]
        batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(answered)
        messages = [{"messages": [*self.PROMPT, *self.ANSWERS[0]], "images": row["images"]} for row in rows]
        whole = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(messages)
        for index in range(2):
            prompt, completion = self.expected(processor, index, self.ANSWERS[0])
            for one in (batch, whole):
                ids, labels = one["input_ids"][index].tolist(), one["labels"][index]
                assert ids == [*prompt, *completion]
                assert labels[labels != -100].tolist() == completion

    def test_dpo(self, rows):
        from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

        processor = make_processor()
        pairs = [{**copy.deepcopy(row), "chosen": self.ANSWERS[0], "rejected": self.ANSWERS[1]} for row in rows]
        batch = DataCollatorForVisionPreference(processor)(pairs)
        for k in range(4):
            prompt, completion = self.expected(processor, k % 2, self.ANSWERS[k // 2])
            ids, mask = batch["input_ids"][k], batch["attention_mask"][k].bool()
            assert ids[mask].tolist() == [*prompt, *completion]
            assert ids[batch["completion_mask"][k].bool()].tolist() == completion

    @pytest.mark.parametrize("which", ["processor", "tokenizer"])
    def test_datasets_without_pictures(self, which, tmp_path):
        import datasets
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

        processor = make_processor()
        given = processor if which == "processor" else processor.tokenizer
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("A cat.", "A dog."))
        prompt = [{"role": "user", "content": "What?"}]
        expected = VisualChatDataCollator(processor)([{"messages": [*prompt, *chosen]}])
        learned = expected["labels"][0] != -100
        prompt_ids, completion = expected["input_ids"][0][~learned].tolist(), expected["input_ids"][0][learned].tolist()
        options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        rows = datasets.Dataset.from_list([{"prompt": prompt, "completion": chosen}])
        trainer = SFTTrainer(make_model(), SFTConfig(**options), train_dataset=rows, processing_class=given)
        row = trainer.train_dataset[0]
        assert row["input_ids"] == [*prompt_ids, *completion]
        assert [label for label in row["labels"] if label != -100] == completion
        rows = datasets.Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
        trainer = DPOTrainer(make_model(), make_model(), DPOConfig(**options), train_dataset=rows, processing_class=given)
        row = trainer.train_dataset[0]
        assert (row["prompt_ids"], row["chosen_ids"]) == (prompt_ids, completion)
        assert row["rejected_ids"][-1] == 2

    def test_grpo(self, rows, tmp_path, monkeypatch):
        import datasets
        from trl import GRPOConfig, GRPOTrainer

        processor, model = make_processor(), make_model()
        seen = []
        generate = model.generate
        monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))
        options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
        config = GRPOConfig(per_device_train_batch_size=2, num_generations=2, max_completion_length=3, **options)
        table = datasets.Dataset.from_list([{**row, "images": row["images"]} for row in rows[:1]])
        table = table.cast_column("images", datasets.List(datasets.Image()))

        def reward(completions, **_):
            return [0.0] * len(completions)

        GRPOTrainer(model, reward, config, table, processing_class=processor).train()
        expected, _ = self.expected(processor, 0, self.ANSWERS[1])
        assert seen[0]["input_ids"].tolist() == [expected] * 2
