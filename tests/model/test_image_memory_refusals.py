"""Image memory: what it is refused for, and why."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.image_memory import logits_of, pictures, split, text_rows
from helpers.tiny import make_inputs, make_model
from modeling_visualchat.image_memory_visualchat import ImageMemory


class TestRefusals:
    @pytest.mark.parametrize("change", ["in place", "replaced", "another model"])
    def test_a_memory_of_other_weights(self, own, change):
        text, pixel_values = split(make_inputs(["tit"], own))
        memory = own.encode_images(pixel_values)
        layer = own.model.language_model.layers[1]
        if change == "in place":
            with torch.no_grad():
                layer.mlp.up_proj.weight[0, 0] += 0.5
        elif change == "replaced":
            layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight + 0.5)
        else:
            own = make_model(seed=1, image_number_keys=True)
        with pytest.raises(ValueError, match=r"made with other weights.*encode the images again"):
            own(**text, image_memory=memory)
        own(**text, image_memory=own.encode_images(pixel_values))

    def test_a_memory_from_before_lora_was_merged(self, own):
        text, pixel_values = split(make_inputs(["tit"], own))
        peft_model = get_peft_model(own, LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj"))
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        with peft_model.disable_adapter():
            memory = own.encode_images(pixel_values)
            before = logits_of(own, {**text, "pixel_values": pixel_values})
        peft_model.merge_adapter()
        assert not torch.allclose(logits_of(own, {**text, "pixel_values": pixel_values}), before, atol=1e-2)
        with pytest.raises(ValueError, match="made with other weights"):
            own(**text, image_memory=memory)

    def test_a_memory_from_before_an_adapter_was_switched_off(self, own):
        text, pixel_values = split(make_inputs(["tit"], own))
        peft_model = get_peft_model(
            own, LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj", init_lora_weights=False)
        )
        memory = own.encode_images(pixel_values)
        with peft_model.disable_adapter(), pytest.raises(ValueError, match="made with other weights"):
            own(**text, image_memory=memory)

    def test_a_model_made_in_inference_mode(self):
        with torch.inference_mode():
            model = make_model()
            model.encode_images(pictures(1))

    @pytest.mark.parametrize("change", ["negated", "columns swapped", "constant"])
    def test_weights_that_are_easily_taken_for_equal(self, own, change):
        layer = own.model.language_model.layers[0]
        with torch.no_grad():
            layer.input_layernorm.weight.fill_(1.0)
            before = own.image_fingerprint()
            if change == "negated":
                layer.self_attn.v_proj.weight.neg_()
            elif change == "columns swapped":
                layer.self_attn.v_proj.weight.copy_(layer.self_attn.v_proj.weight.flip(1))
            else:
                layer.input_layernorm.weight.fill_(2.0)
        assert own.image_fingerprint() != before

    @pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-2}, {"hidden_act": "gelu"}], ids=str)
    def test_a_memory_of_another_computation_with_the_same_weights(self, own, change):
        memory = own.encode_images(pictures(1))
        other = make_model(image_number_keys=True, text=dict(change))
        other.load_state_dict(own.state_dict())
        assert other.image_fingerprint() != memory.fingerprint

    def test_a_saved_and_reloaded_model_knows_its_memories(self, mmca, tmp_path):
        text, pixel_values = split(make_inputs(["tit"], mmca))
        memory = mmca.encode_images(pixel_values)
        mmca.save_pretrained(tmp_path / "model")
        memory.save(tmp_path / "memory.safetensors")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        loaded = ImageMemory.load(tmp_path / "memory.safetensors")
        ours = logits_of(reloaded, text, image_memory=loaded)
        torch.testing.assert_close(ours, logits_of(mmca, text, image_memory=memory), atol=1e-5, rtol=1e-5)

    def test_a_model_loaded_from_other_weights_refuses(self, own, tmp_path):
        text, pixel_values = split(make_inputs(["tit"], own))
        own.save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        loaded = model.encode_images(pixel_values)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        again(**text, image_memory=loaded)
        saved = load_file(tmp_path / "model" / "model.safetensors")
        name = next(name for name in saved if "projector" in name and name.endswith("linear.weight"))
        saved[name][0, 0] += 0.5
        save_file(saved, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        changed = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        with pytest.raises(ValueError, match="made with other weights"):
            changed(**text, image_memory=loaded)

    def test_variants_whose_image_rows_look_at_text(self, mmca):
        causal = make_model(multimodal_attention="causal")
        text, pixel_values = split(make_inputs(["tit"], causal))
        message = r"'causal' cannot use image memory: its image tokens look at the text"
        with pytest.raises(ValueError, match=message):
            causal.encode_images(pixel_values)
        memory = mmca.encode_images(pixel_values)
        for call in (causal, causal.generate):
            with pytest.raises(ValueError, match=message):
                call(**text, image_memory=memory)

    def test_eager_and_quantized_caches(self, mmca):
        text, pixel_values = split(make_inputs(["tit"], mmca))
        eager = copy.deepcopy(mmca)
        eager.set_attn_implementation("eager")
        memory = eager.encode_images(pixel_values)
        with pytest.raises(ValueError, match="image_memory needs attn_implementation 'sdpa'"):
            eager(**text, image_memory=memory)
        cache = mmca(input_ids=text["input_ids"][:, :1], use_cache=True).past_key_values
        cache.layers.append(copy.deepcopy(cache.layers[0]))  # not what it was made with
        text["attention_mask"] = torch.ones(1, 1 + text["attention_mask"].shape[1], dtype=torch.long)
        with pytest.raises(ValueError, match="a dynamic or static cache or none"):
            mmca(**text, image_memory=mmca.encode_images(pixel_values), past_key_values=cache)

    @pytest.mark.parametrize("given", [1, 3])
    def test_a_wrong_number_of_images_names_both_counts(self, mmca, given):
        text, _ = split(make_inputs(["titit"], mmca))
        memory = mmca.encode_images(pictures(given))
        message = rf"10 image placeholder tokens.*2 images of 5 tokens, but {given} images were given"
        for memories in (memory, list(memory)):
            for call in (mmca, mmca.generate):
                with pytest.raises(ValueError, match=message):
                    call(**text, image_memory=memories)

    def test_no_images_at_all_where_some_are_expected(self, mmca):
        text, _ = split(make_inputs(["titit"], mmca))
        with pytest.raises(ValueError, match="2 images of 5 tokens, but 0 images were given"):
            mmca(**text, image_memory=[])
        with pytest.raises(ValueError, match="0 images of 5 tokens, but 1 images were given"):
            mmca(**make_inputs(["tt"], mmca), image_memory=mmca.encode_images(pictures(1)))

    def test_entries_none_are_as_many_as_new_pictures(self, mmca):
        text, pixel_values = split(make_inputs(["titit"], mmca))
        memory = mmca.encode_images(pixel_values)
        for call in (mmca, mmca.generate):
            with pytest.raises(ValueError, match=r"no entry `None` for the 1 new images|0 entries `None`, but 1 new"):
                call(**text, image_memory=memory, pixel_values=pixel_values[:1])
            with pytest.raises(ValueError, match="1 entries `None`, but 2 new images"):
                call(**text, image_memory=[memory[0], None], pixel_values=pixel_values)
            with pytest.raises(ValueError, match="1 entries `None`, but 0 new images"):
                call(**text, image_memory=[memory[0], None])

    def test_generation_that_cannot_start_from_a_memory(self, mmca):
        ends, pixel_values = split(make_inputs(["ti"], mmca))
        memory = mmca.encode_images(pixel_values)
        with pytest.raises(ValueError, match="ends with a remembered image"):
            mmca.generate(**ends, image_memory=memory)
        text, _ = split(make_inputs(["tit"], mmca))
        with pytest.raises(ValueError, match="`prefill_chunk_size` and `image_memory`"):
            mmca.generate(**text, image_memory=memory, prefill_chunk_size=4)
        with pytest.raises(ValueError, match="`assistant_model`"):
            mmca.generate(**text, image_memory=memory, assistant_model=make_model(seed=3))
        embeds = mmca.get_input_embeddings()(text["input_ids"])
        with pytest.raises(ValueError, match="needs `input_ids`"):
            mmca.generate(inputs_embeds=embeds, image_memory=memory)

    def test_training_the_embedding_keeps_memories_and_training_the_projector_does_not(self, own):
        text, pixel_values = split(make_inputs(["tit"], own))
        memory = own.encode_images(pixel_values)
        own.freeze_for_alignment()
        for part, remains in ((own.get_input_embeddings(), True), (own.model.multi_modal_projector, False)):
            optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
            own(**text, pixel_values=pixel_values, labels=text["input_ids"]).loss.backward()
            optimizer.step()
            if remains:
                kept = text_rows(own, text)
                expected = logits_of(own, {**text, "pixel_values": pixel_values})[kept]
                ours = logits_of(own, text, image_memory=memory)[kept]
                torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
            else:
                with pytest.raises(ValueError, match="made with other weights"):
                    own(**text, image_memory=memory)
