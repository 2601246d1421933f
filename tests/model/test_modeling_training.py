"""The model in training: what gets a gradient, and which losses are equal."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaForCausalLM,
)

from helpers.tiny import copy_llama_weights, make_inputs, make_model
from modeling_visualchat import VisualChatForCausalLM


def loss_and_gradients(model, inputs):
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestTraining:
    @pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "causal", "cross"])
    def test_gradients_reach_projector_and_embedding_and_nothing_frozen(self, variant, numbered):
        model = make_model(multimodal_attention=variant, image_number_keys=numbered).train()
        model.freeze_for_alignment()
        _, gradients = loss_and_gradients(model, make_inputs(["titit", "tt"], model))
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert set(gradients).isdisjoint(frozen)
        assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())

    def test_numbered_keys_train_the_numbers_embedding(self):
        model = make_model(image_number_keys=True, image_number_token_ids=[[290], [291]])
        inputs = make_inputs(["titit"], model)
        _, gradients = loss_and_gradients(model, inputs)
        embedding = gradients["model.language_model.embed_tokens.weight"]
        assert 290 not in inputs["input_ids"]
        assert embedding[290].abs().sum() > 0
        assert embedding[291].abs().sum() > 0

    def test_a_frozen_tower_keeps_no_activations(self):
        model = make_model().train()
        inputs = make_inputs(["titit"], model)
        assert model.get_image_features(inputs["pixel_values"]).last_hidden_state.requires_grad
        model.freeze_for_alignment()
        outputs = model.get_image_features(inputs["pixel_values"])
        assert not outputs.last_hidden_state.requires_grad
        assert outputs.pooler_output[0].requires_grad

    def test_a_batch_of_text_alone_trains_every_part_with_zero_effect(self):
        model = make_model().train()
        inputs = make_inputs(["tttt"], model)
        loss, gradients = loss_and_gradients(model, inputs)
        llama = LlamaForCausalLM._from_config(model.config.text_config, attn_implementation="sdpa")
        llama = copy_llama_weights(model, llama).train()
        llama_loss, llama_gradients = loss_and_gradients(llama, inputs)
        assert torch.equal(loss, llama_loss)
        for name, gradient in llama_gradients.items():
            ours = gradients[name.replace("model.", "model.language_model.", 1)]
            torch.testing.assert_close(ours, gradient, atol=1e-5, rtol=1e-5, msg=name)
        projector = [gradients[f"model.multi_modal_projector.{n}"] for n in ("linear.weight", "layer_norm.bias")]
        assert all(gradient.abs().sum() == 0 for gradient in projector)
        _, with_types = loss_and_gradients(model, {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])})
        assert set(with_types) == set(gradients)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("frozen", [False, True], ids=["all train", "alignment"])
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "cross"])
    def test_gradient_checkpointing_gives_the_same_gradients(self, variant, frozen, reentrant):
        model = make_model(multimodal_attention=variant, image_number_keys=True).train()
        if frozen:
            model.freeze_for_alignment()
        inputs = make_inputs(["titit", "tt"], model)
        loss, gradients = loss_and_gradients(model, inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        checkpointed_loss, checkpointed = loss_and_gradients(model, inputs)
        assert torch.equal(loss, checkpointed_loss)
        assert set(checkpointed) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)

    def test_the_loss_is_the_mean_over_labelled_positions_or_per_item(self):
        model = make_model()
        inputs = make_inputs(["titit", "tt"], model)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        logits = model(**inputs).logits[:, -3:-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -2:].flatten(), reduction="sum")
        torch.testing.assert_close(model(**inputs, labels=labels).loss, expected / 4)
        torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=8).loss, expected / 8)

    @pytest.mark.parametrize("items", [None, 7])
    def test_logits_of_supervised_positions_alone_give_the_same_loss_and_gradients(self, items):
        model = make_model(image_number_keys=True)
        inputs = make_inputs(["titit", "tt", "itt"], model)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -3:-1] = inputs["input_ids"][:, -3:-1]
        labels[0, 2] = 17
        supervised = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        results = []
        for logits_to_keep in (0, supervised):
            model.zero_grad()
            outputs = model(**inputs, labels=labels, logits_to_keep=logits_to_keep, num_items_in_batch=items)
            outputs.loss.backward()
            results.append((outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        (full, full_gradients), (kept, kept_gradients) = results
        torch.testing.assert_close(kept.loss, full.loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(kept.logits, full.logits[supervised])
        for name, gradient in full_gradients.items():
            torch.testing.assert_close(kept_gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)

    def test_peft_lora_attaches_and_merges(self):
        model = make_model(image_number_keys=True)
        inputs = make_inputs(["titit"], model)
        base = model(**inputs).logits
        lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["linear"])
        peft_model = get_peft_model(copy.deepcopy(model), lora)
        torch.testing.assert_close(peft_model(**inputs).logits, base)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        tuned = peft_model(**inputs).logits
        assert not torch.allclose(tuned, base, atol=1e-3)
        merged = peft_model.merge_and_unload()
        assert isinstance(merged, VisualChatForCausalLM)
        torch.testing.assert_close(merged(**inputs).logits, tuned, atol=1e-4, rtol=1e-4)
