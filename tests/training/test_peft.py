"""PEFT's methods on our model: they train, are saved and generate; rows with adapters of their own; merged tied decoders."""

import json

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from transformers import AutoModel

from helpers.tiny import assistant, digit_image, make_inputs, make_model, make_processor, user
from modeling_visualchat import VisualChatDataCollator
from visualchat.cli import main as visualchat
from visualchat.training.train import ModelArguments, set_mode


DECODER = r".*language_model.*\.(q_proj|k_proj|v_proj|down_proj)"
METHODS = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "IA3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "trainable tokens": lambda: TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[40, 41, 42]),
    "all-linear LoRA": lambda: LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_is_its_own_is_saved_and_generates(method, tmp_path):
    rows = [
        {"messages": [user("Which?", digit_image(0)), assistant("zero (*+")]},
        {"messages": [user("And (*+?"), assistant("one, I see")]},
    ]
    batch = VisualChatDataCollator(make_processor())(rows)
    model = get_peft_model(make_model(), METHODS[method]())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert moved <= trained
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    inputs = make_inputs(["titit", "itt"], model)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    assert again.generate(**inputs, max_new_tokens=4, eos_token_id=None).shape[1] == inputs["input_ids"].shape[1] + 4


def make_adapted(targets=DECODER, **settings):
    torch.manual_seed(1)
    lora = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(make_model(**settings), LoraConfig(**lora), "first")
    model.add_adapter("second", LoraConfig(**lora))
    return model.eval()


class TestAdaptersByRow:
    NAMES = ["first", "__base__", "second"]

    @pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "eager"])
    def test_each_row_is_as_with_its_adapter_alone(self, attention):
        model = make_adapted(attn_implementation=attention)
        inputs = make_inputs(["titit", "tt", "iit"], model)
        with torch.no_grad():
            together = model(**inputs, adapter_names=self.NAMES).logits
            for row, name in enumerate(self.NAMES):
                if name == "__base__":
                    with model.disable_adapter():
                        alone = model(**inputs).logits
                else:
                    model.set_adapter(name)
                    alone = model(**inputs).logits
                kept = inputs["attention_mask"][row].bool()
                torch.testing.assert_close(together[row][kept], alone[row][kept], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_each_row_generates_as_with_its_adapter_alone(self, cache):
        model = make_adapted()
        inputs = make_inputs(["titit", "tt", "iit"], model)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
        names = ["first", "second", "second"]
        together = model.generate(**inputs, **settings, adapter_names=names)
        for row, name in enumerate(names):
            model.set_adapter(name)
            assert torch.equal(together[row], model.generate(**inputs, **settings)[row])

    @pytest.mark.parametrize(
        ("targets", "settings", "part"),
        [
            (r".*vision_tower.*\.q_proj", {}, "vision_tower"),
            (r".*multi_modal_projector\.linear", {}, "multi_modal_projector"),
            (DECODER, {"image_number_keys": True}, "k_proj"),
            (r".*\.image_numbers", {"learned_image_numbers": 3}, "image_numbers"),
        ],
    )
    def test_parts_that_see_no_rows_are_named(self, targets, settings, part):
        model = make_adapted(targets, **settings)
        inputs = make_inputs(["titit", "it", "t"], model)
        with pytest.raises(ValueError, match=rf"`adapter_names` is for 3 sequences .* change {part} too.*`set_adapter`"):
            model(**inputs, adapter_names=self.NAMES)

    def test_image_memory_is_refused_by_name(self):
        model = make_adapted()
        inputs = make_inputs(["tit", "it"], model)
        memory = model.get_base_model().encode_images(inputs.pop("pixel_values"))
        with pytest.raises(ValueError, match="no `adapter_names`"):
            model(**inputs, image_memory=memory, adapter_names=["first", "second"])

    def test_activated_lora_counts_places_in_the_sequence(self):
        outputs = []
        for attention in ("sdpa", "eager"):
            torch.manual_seed(1)
            base = make_model(attention)
            alora = LoraConfig(
                task_type="CAUSAL_LM", r=2, target_modules=DECODER, init_lora_weights=False, alora_invocation_tokens=[7, 8]
            )
            model = get_peft_model(base, alora).eval()
            inputs = make_inputs(["titit"], model)
            inputs["input_ids"][0, 7:9] = torch.tensor([7, 8])
            with torch.no_grad():
                outputs.append(model(**inputs).logits)
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


class TestTiedDecoder:
    def test_a_merged_adapter_parts_it_in_both_configs(self, tmp_path, caplog):
        make_model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path / "base")
        adapted = set_mode(AutoModel.from_pretrained(tmp_path / "base"), ModelArguments(mode="lora"))
        with torch.no_grad():
            adapted.get_input_embeddings().modules_to_save.default.weight.add_(0.5)
        adapted.save_pretrained(tmp_path / "adapter")
        make_processor().save_pretrained(tmp_path / "adapter")
        inputs = make_inputs(["titit"], adapted)
        with torch.no_grad():
            expected = adapted.eval()(**inputs).logits
        visualchat(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])

        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert not config.get("tie_word_embeddings", False)
        assert not config["text_config"].get("tie_word_embeddings", False)
        caplog.clear()
        merged = AutoModel.from_pretrained(tmp_path / "merged").eval()
        assert "tie" not in caplog.text
        assert not merged.config.tie_word_embeddings
        assert not merged.config.text_config.tie_word_embeddings
        vocab_size = merged.config.text_config.vocab_size
        merged.resize_token_embeddings(vocab_size + 3, mean_resizing=False)
        with torch.no_grad():
            torch.testing.assert_close(merged(**inputs).logits[..., :vocab_size], expected, atol=1e-4, rtol=1e-4)

    def test_to_set_it_sets_the_decoders(self, tmp_path):
        model = make_model(text={"tie_word_embeddings": True})
        assert model.config.text_config.tie_word_embeddings
        model.config.tie_word_embeddings = False
        assert not model.config.text_config.tie_word_embeddings


def test_adapters_of_the_training_command_have_a_task(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    adapted = set_mode(AutoModel.from_pretrained(tmp_path / "base"), ModelArguments(mode="lora")).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    make_processor().save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    inputs = make_inputs(["titit"], adapted)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, adapted(**inputs).logits)
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):  # PEFT's own rule, which names the class to use
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
