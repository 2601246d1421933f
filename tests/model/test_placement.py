"""The model compiled, sharded, offloaded, in other precisions, and with other LLaMAs as its decoder."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import compute_module_sizes
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.tiny import copy_llama_weights, make_inputs, make_model


@torch.no_grad()
def assert_same_answers(model, placed, inputs):
    kept = inputs["attention_mask"].bool()
    assert torch.equal(placed(**inputs).logits[kept], model(**inputs).logits[kept])
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(placed.generate(**inputs, **greedy), model.generate(**inputs, **greedy))


class TestPlacement:
    @pytest.mark.parametrize("variant", ["mmca", "causal"])
    def test_torch_compile_of_the_forward(self, variant):
        model = make_model(multimodal_attention=variant, image_number_keys=True)
        inputs = make_inputs(["titit", "tt"], model)
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            kept = inputs["attention_mask"].bool()
            ours = compiled(**inputs, use_cache=False).logits[kept]
            torch.testing.assert_close(ours, model(**inputs).logits[kept], atol=1e-4, rtol=1e-4)

    def test_sharded_safetensors_device_map_and_dtype(self, tmp_path):
        model = make_model()
        inputs = make_inputs(["titit"], model)
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert (tmp_path / "model.safetensors.index.json").exists()
        with torch.no_grad():
            mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto").eval()
            assert torch.equal(mapped(**inputs).logits, model(**inputs).logits)
            half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
            assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
            assert half(**inputs).logits.dtype == torch.bfloat16

    def test_parts_offloaded_to_disk_compute_the_same(self, tmp_path):
        model = make_model(image_number_keys=True)
        inputs = make_inputs(["titit"], model)
        model.save_pretrained(tmp_path / "model")
        device_map = {
            "model.vision_tower": "disk",
            "model.multi_modal_projector": "cpu",
            "model.language_model.embed_tokens": "cpu",
            "model.language_model.layers.0": "disk",
            "model.language_model.layers.1": "cpu",
            "model.language_model.layers.2": "disk",
            "model.language_model.norm": "cpu",
            "model.language_model.rotary_emb": "cpu",
            "lm_head": "cpu",
        }
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        ).eval()
        assert_same_answers(model, offloaded, inputs)

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "causal"])
    def test_what_memory_does_not_hold_goes_to_disk(self, tmp_path, variant):
        model = make_model(multimodal_attention=variant, image_number_keys=True)
        model.save_pretrained(tmp_path / "model")
        # The tower and the first two of three layers, and room to run one from disk
        sizes = compute_module_sizes(model)
        layer = sizes["model.language_model.layers.0"]
        budget = sizes["model"] - sizes["model.language_model.layers"] + 3.5 * layer
        mapped = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map="auto", max_memory={"cpu": int(budget)}, offload_folder=tmp_path / "offload"
        ).eval()
        assert set(mapped.hf_device_map.values()) == {"cpu", "disk"}
        on_disk = [name for name, device in mapped.hf_device_map.items() if device == "disk"]
        assert "model.language_model.layers.2" in on_disk and "model.language_model.layers.0" not in on_disk
        # Where a module ends up is said of whole layers
        layers = ("model.language_model.layers.", "model.vision_tower.encoder.layers.")
        assert not [
            name for name in mapped.hf_device_map if any(len(name) > len(part) + 1 for part in layers if part in name)
        ]
        assert_same_answers(model, mapped, make_inputs(["titit", "tt"], model))

    def test_weights_offloaded_to_the_cpu(self):
        model, offloaded = make_model(image_number_keys=True), make_model(image_number_keys=True)
        cpu_offload(offloaded, execution_device=torch.device("cpu"))
        assert {weight.device.type for weight in offloaded.parameters()} == {"meta"}
        inputs = make_inputs(["titit", "tt"], model)
        assert_same_answers(model, offloaded, inputs)
        with pytest.raises(ValueError, match=r"Image memory needs all weights in memory, but .* is not"):
            offloaded.encode_images(inputs["pixel_values"])

    @pytest.mark.parametrize("projector", ["linear", "vit", "perceiver"])
    def test_modules_that_are_not_split_are_modules_of_the_model(self, projector):
        """FSDP refuses a name that no module has, and a layer that is split computes its residual on two devices."""
        model = make_model(projector=projector)
        names = {"VisualChatDecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"}
        assert model._no_split_modules == model.model._no_split_modules == names
        assert names <= {type(module).__name__ for module in model.modules()}

    def test_rope_scaling_and_biases_of_other_llamas(self):
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 256
        text = {"rope_parameters": rope, "attention_bias": True, "mlp_bias": True, "head_dim": 24}
        model = make_model(text=text)
        llama = copy_llama_weights(model, LlamaForCausalLM._from_config(LlamaConfig(**model.config.text_config.to_dict())))
        inputs = make_inputs(["tttt"], model)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, llama(**inputs).logits)
            assert model(**make_inputs(["titi"], model)).logits.isfinite().all()
