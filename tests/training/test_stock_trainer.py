"""transformers' own `Trainer` on our model and collator: label smoothing, metrics, and noise on the embeddings."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from helpers.tiny import assistant, digit_image, make_model, make_processor, user
from modeling_visualchat import VisualChatDataCollator


SMOOTHING = 0.1
ROWS = [
    {"messages": [user("Which?", digit_image(0)), assistant("zero"), user("And?", digit_image(1)), assistant("one, I see")]},
    {"messages": [user("What is 1 + 1?"), assistant("two, and nothing else")]},
    {"messages": [user("Both?", digit_image(2), digit_image(3)), assistant("two three")]},
    {"messages": [user("Hello?"), assistant("hi")]},
]
ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def make_trainer(model, folder, supervised_only=False, **settings) -> Trainer:
    compute_metrics = settings.pop("compute_metrics", None)
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 1, **settings}
    arguments = TrainingArguments(
        str(folder),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        learning_rate=1e-2,
        disable_tqdm=True,
        **settings,
    )
    processor = make_processor()
    return Trainer(
        model,
        arguments,
        data_collator=VisualChatDataCollator(processor, supervised_logits_only=supervised_only),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        compute_metrics=compute_metrics,
    )


class TestLabelSmoothing:
    @pytest.mark.parametrize("supervised_only", [False, True], ids=["all logits", "supervised logits only"])
    @pytest.mark.parametrize("adapter", [None, *ADAPTERS])
    def test_the_loss_is_the_smoothed_one_of_the_next_tokens(self, tmp_path, adapter, supervised_only):
        model = make_model(image_number_keys=True)
        if adapter is not None:
            model = get_peft_model(model, ADAPTERS[adapter])
        batch = VisualChatDataCollator(make_processor())(ROWS)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=SMOOTHING
        )
        trainer = make_trainer(model, tmp_path, supervised_only, label_smoothing_factor=SMOOTHING)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
        trainer.train()
        assert trainer.state.log_history[-2]["loss"] == pytest.approx(float(expected), abs=1e-4)

    def test_a_compiled_model_is_refused(self, tmp_path):
        """transformers shifts labels for models that it knows by name, which a compiled one has not."""
        settings = {"torch_compile": True, "torch_compile_backend": "eager", "label_smoothing_factor": SMOOTHING}
        with pytest.raises(ValueError, match="Leave out torch_compile, or label_smoothing_factor"):
            make_trainer(make_model(), tmp_path, **settings).train()

    @pytest.mark.parametrize("supervised_only", [False, True])
    def test_batches_of_4_equal_4_accumulated(self, tmp_path, supervised_only):
        losses = []
        for size in (1, 4):
            trainer = make_trainer(
                make_model(),
                tmp_path / str(size),
                supervised_only,
                label_smoothing_factor=SMOOTHING,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    def test_a_loss_function_of_the_users_gets_the_logits_of_all_positions(self, tmp_path):
        shapes = []

        def compute_loss(outputs, labels, num_items_in_batch):
            shapes.append((outputs.logits.shape[:2], labels.shape))
            return outputs.logits.sum()

        trainer = make_trainer(make_model(), tmp_path, supervised_only=True)
        trainer.compute_loss_func = compute_loss
        trainer.train()
        assert [logits == labels for logits, labels in shapes] == [True]

    def test_what_smoothing_trains_answers_as_without_it(self, tmp_path):
        """The identity, which unshifted labels train, would repeat the last token of the prompt."""
        model, processor = make_model(text={"initializer_range": 0.02}), make_processor()
        make_trainer(model, tmp_path, label_smoothing_factor=SMOOTHING, max_steps=60).train()
        model.eval()
        chat = model.start_chat(processor)
        assert chat.send("What is 1 + 1?", max_new_tokens=40) == "two, and nothing else"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 3, 2), (3, 1, 2, 0)])
@pytest.mark.parametrize("accumulation", [None, 1])
def test_metrics_over_batches_with_and_without_images(tmp_path, order, accumulation):
    seen = []

    def compute_metrics(evaluation):
        seen.append(evaluation)
        return {"rows": len(evaluation.predictions)}

    model = make_model(image_number_keys=True)
    trainer = make_trainer(
        model,
        tmp_path,
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=1,
        eval_accumulation_steps=accumulation,
    )
    rows = [ROWS[k] for k in order]
    assert trainer.evaluate(rows)["eval_rows"] == 4
    (evaluation,) = seen
    assert isinstance(evaluation.predictions, np.ndarray)  # the logits, and nothing that grows by images
    for row, predicted, labels in zip(rows, evaluation.predictions, evaluation.label_ids):
        batch = trainer.data_collator([row])
        with torch.no_grad():
            logits = model(**batch).logits[0]
        torch.testing.assert_close(torch.from_numpy(predicted[: len(logits)]), logits, atol=1e-4, rtol=1e-4)
        assert labels[: len(logits)].tolist() == batch["labels"][0].tolist()


class TestNeftune:
    @pytest.mark.parametrize("adapter", [None, "lora with the embedding"])
    def test_noise_is_the_prompts_and_not_the_numbers(self, tmp_path, adapter):
        model = make_model(image_number_keys=True)
        expected = model.model.embed_image_numbers(model.lm_head.weight).detach()
        given, shapes = [], []
        model.model.language_model.register_forward_pre_hook(lambda *called: given.append(called[2]), with_kwargs=True)
        if adapter is not None:
            lora = LoraConfig(r=2, target_modules=r".*\.q_proj", modules_to_save=["embed_tokens"])
            model = get_peft_model(model, lora)
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, inputs, output: shapes.append(output.dim()))
        make_trainer(model, tmp_path, neftune_noise_alpha=5.0).train()
        assert len(given) == 1
        assert torch.equal(given[0]["number_embeds"], expected)
        batch = VisualChatDataCollator(make_processor())(ROWS)
        # With its first step done, the embedding has changed by the learning rate at most
        clean = embedding(batch["input_ids"])
        assert (given[0]["inputs_embeds"] - clean)[batch["attention_mask"].bool()].abs().max() > 0.05
        assert set(shapes) == {3}  # what hooks expect
        assert embedding.training

    def test_placeholders_are_found_among_embeddings(self):
        """By the placeholder's own embedding, which NEFTune's hook leaves as it is."""
        from transformers.integrations.neftune import activate_neftune

        model = make_model(image_number_keys=True).train()
        batch = VisualChatDataCollator(make_processor())(ROWS)
        input_ids = batch.pop("input_ids")
        expected = model(input_ids=input_ids, **batch).loss
        embeds = model.get_input_embeddings()(input_ids)
        activate_neftune(model, 5.0)
        torch.testing.assert_close(model(inputs_embeds=embeds, **batch).loss, expected)
