"""The model as a transformers model: inputs, parts, precision, placement."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from helpers.tiny import TOKENS_PER_IMAGE, make_config, make_inputs, make_model, make_tokenizer
from modeling_visualchat import VisualChatForCausalLM


TINY_TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_DECODER = {**TINY_TOWER, "num_key_value_heads": 2, "vocab_size": 9}


class TestInputs:
    def test_placeholders_without_images_raise_with_both_counts(self):
        model = make_model()
        inputs = make_inputs(["tit", "tiit"], model)
        del inputs["pixel_values"]
        with pytest.raises(
            ValueError, match=r"15 image placeholder tokens \(5, 10 by sequence\).* 3 images of 5.*but 0 images"
        ):
            model(**inputs)

    @pytest.mark.parametrize("given", [1, 4])
    def test_a_wrong_number_of_images_raises_with_both_counts(self, given):
        model = make_model()
        inputs = make_inputs(["tit", "tiit"], model)
        inputs["pixel_values"] = torch.randn(given, 3, 16, 16)
        with pytest.raises(ValueError, match=rf"3 images of 5 tokens, but {given} images were given"):
            model(**inputs)

    def test_images_without_placeholders_raise(self):
        model = make_model()
        with pytest.raises(ValueError, match="0 images of 5 tokens, but 1 images were given"):
            model(**make_inputs(["ttt"], model), pixel_values=torch.randn(1, 3, 16, 16))

    def test_an_image_cut_off_raises_even_if_the_sum_is_right(self):
        model = make_model()
        image = model.config.image_token_id
        input_ids = torch.tensor([[5, *[image] * 7], [5, *[image] * 3, 5, 5, 5, 5]])
        with pytest.raises(ValueError, match=r"10 image placeholder tokens \(7, 3 by sequence\)"):
            model(input_ids=input_ids, pixel_values=torch.randn(2, 3, 16, 16))

    def test_pixel_values_of_the_wrong_rank_or_size_raise(self):
        model = make_model()
        inputs = make_inputs(["tit"], model)
        with pytest.raises(ValueError, match=r"\(images in the batch, channels, height, width\), got \(1, 1, 3, 16, 16\)"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][None]})
        with pytest.raises(ValueError, match=r"(?i)image size \(24\*24\) doesn't match model \(16\*16\)"):
            model(**{**inputs, "pixel_values": torch.randn(1, 3, 24, 24)})

    def test_both_or_none_of_ids_and_embeds_raise(self):
        model = make_model()
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model()

    def test_mm_token_type_ids_of_another_length_raise(self):
        model = make_model()
        with pytest.raises(ValueError, match=r"`mm_token_type_ids` has the shape \(1, 3\).*\(1, 9\)"):
            model(**make_inputs(["tit"], model), mm_token_type_ids=torch.zeros(1, 3))

    def test_a_prompt_longer_than_the_decoder_raises(self):
        model = make_model(text={"max_position_embeddings": 16})
        message = r"18 tokens long.*max_position_embeddings is 16"
        with pytest.raises(ValueError, match=message):
            model(**make_inputs(["tititt"], model))
        for layout in ("tititt", "t" * 9):
            with pytest.raises(ValueError, match=message):
                model.generate(**make_inputs([layout], model))

    def test_more_images_than_numbers_raise(self):
        model = make_model(image_number_keys=True, image_number_token_ids=[[20], [21]])
        model(**make_inputs(["ititt"], model))
        with pytest.raises(ValueError, match=r"holds 3 images.*has only 2 numbers"):
            model(**make_inputs(["ititit"], model))

    @pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
    def test_a_batch_of_unequal_rows_equals_its_rows_alone(self, numbered):
        model = make_model(image_number_keys=numbered)
        layout = ["tt", "titit", "iitt", "ti"]
        inputs = make_inputs(layout, model)
        with torch.no_grad():
            together = model(**inputs).logits
            image = 0
            for row, parts in enumerate(layout):
                kept = inputs["attention_mask"][row].bool()
                images = parts.count("i")
                pixel_values = inputs["pixel_values"][image : image + images] if images else None
                alone = model(input_ids=inputs["input_ids"][row][kept][None], pixel_values=pixel_values).logits[0]
                torch.testing.assert_close(together[row][kept], alone, atol=1e-5, rtol=1e-5)
                image += images

    @pytest.mark.parametrize("given", ["pixel_values", "features in place", "mm_encoder_outputs"])
    def test_inputs_embeds_equal_input_ids(self, given):
        model = make_model(image_number_keys=True)
        inputs = make_inputs(["titit", "ti"], model)
        with torch.no_grad():
            outputs = model(**inputs)
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            is_image = inputs["input_ids"] == model.config.image_token_id
            kwargs = {"pixel_values": inputs["pixel_values"]}
            if given == "features in place":
                embeds[is_image] = outputs.image_hidden_states.flatten(0, 1)
                kwargs = {"mm_token_type_ids": is_image.long()}
            elif given == "mm_encoder_outputs":
                kwargs = {"mm_encoder_outputs": {"image": model.get_image_features(inputs["pixel_values"])}}
            again = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **kwargs)
        assert torch.equal(again.logits, outputs.logits)

    def test_logits_to_keep_and_unknown_kwargs_that_transformers_passes(self):
        model = make_model()
        inputs = make_inputs(["titit"], model)
        full = model(**inputs).logits
        kept = model(**inputs, logits_to_keep=2, num_items_in_batch=None, return_dict=True).logits
        torch.testing.assert_close(kept, full[:, -2:])
        assert isinstance(model(**inputs, return_dict=False), tuple)


class TestParts:
    @pytest.mark.parametrize(
        ("settings", "tokens"),
        [
            ({"projector": "linear"}, 5),
            ({"projector": "linear", "vision_feature_select_strategy": "default"}, 4),
            ({"projector": "vit"}, 5),
            ({"projector": "vit", "vision_feature_select_strategy": "default", "vision_feature_layer": -2}, 4),
            ({"projector": "perceiver", "num_query_tokens": 9}, 9),
            ({"projector": "mlp"}, 5),
            ({"projector": "mlp", "vision_feature_select_strategy": "default"}, 4),
            ({"projector": "pixel_shuffle"}, 1),
            ({"projector": "pixel_shuffle", "pixel_shuffle_factor": 1}, 4),
            ({"projector": "pooled"}, 2),
            ({"projector": "pooled", "pool_factor": 1, "class_token_outputs": 3}, 7),
            ({"projector": "pooled", "tower": "siglip"}, 1),
            ({"projector": "vit", "tower": "siglip"}, 4),
            ({"projector": "perceiver", "num_query_tokens": 9, "tower": "dinov3_vit"}, 9),
        ],
    )
    def test_projectors(self, settings, tokens):
        model = make_model(**settings)
        assert model.config.image_seq_length == tokens
        inputs = make_inputs(["tit"], model)
        outputs = model(**inputs)
        assert outputs.image_hidden_states.shape == (1, tokens, 64)
        outputs.logits.sum().backward()
        assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())

    def test_the_last_hidden_state_of_the_tower_is_projected(self):
        model = make_model()
        pixel_values = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            last = model.model.vision_tower(pixel_values).last_hidden_state
            features = torch.stack(model.get_image_features(pixel_values).pooler_output)
            assert torch.equal(features, model.model.multi_modal_projector(last))
            earlier = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[1]
            model.config.vision_feature_layer = 1
            features = torch.stack(model.get_image_features(pixel_values).pooler_output)
            assert torch.equal(features, model.model.multi_modal_projector(earlier))

    def test_linear_projector_is_linear_and_layer_norm(self):
        projector = make_model().model.multi_modal_projector
        features = torch.randn(2, 5, 32)
        projected = features @ projector.linear.weight.T + projector.linear.bias
        centred = projected - projected.mean(-1, keepdim=True)
        normalized = centred / (centred.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        expected = normalized * projector.layer_norm.weight + projector.layer_norm.bias
        torch.testing.assert_close(projector(features), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("source", ["models", "folders", "clip with text"])
    def test_from_vision_text_pretrained(self, source, tmp_path):
        config = make_config(text={"vocab_size": 300})
        torch.manual_seed(0)
        vision, text = CLIPVisionModel(config.vision_config), LlamaForCausalLM(config.text_config)
        parts = (vision, text)
        if source == "folders":
            vision.save_pretrained(tmp_path / "vision")
            text.save_pretrained(tmp_path / "text")
            parts = (str(tmp_path / "vision"), str(tmp_path / "text"))
        elif source == "clip with text":
            tiny_text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            clip = CLIPModel(CLIPConfig(vision_config=config.vision_config.to_dict(), text_config=tiny_text))
            vision = clip.vision_model
            parts = (clip, text)
        model = VisualChatForCausalLM.from_vision_text_pretrained(*parts)

        assert model.config.multimodal_attention == "mmca_merged"
        assert model.config.image_token_id == 300
        assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 301
        assert model.config.text_config.vocab_size == 301
        assert text.config.vocab_size == 300
        for name, weight in vision.state_dict().items():
            assert torch.equal(model.model.vision_tower.state_dict()[name], weight), name
        for name, weight in text.model.state_dict().items():
            assert torch.equal(model.model.language_model.state_dict()[name][: len(weight)], weight), name
        assert torch.equal(model.lm_head.weight[:300], text.lm_head.weight)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {
            "model.language_model.embed_tokens.weight",
            "model.multi_modal_projector.linear.weight",
            "model.multi_modal_projector.linear.bias",
            "model.multi_modal_projector.layer_norm.weight",
            "model.multi_modal_projector.layer_norm.bias",
        }
        assert all(not p.is_meta for p in [*model.parameters(), *model.buffers()])
        inputs = make_inputs(["tt"], model)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits[..., :300], text.eval()(**inputs).logits)
        assert model(**make_inputs(["titi"], model)).logits.isfinite().all()

    def test_from_vision_text_pretrained_keeps_a_placeholder_that_has_a_row(self):
        config = make_config()
        model = VisualChatForCausalLM.from_vision_text_pretrained(
            CLIPVisionModel(config.vision_config), LlamaForCausalLM(config.text_config), image_token_id=7
        )
        assert model.config.text_config.vocab_size == config.text_config.vocab_size

    def test_from_vision_text_pretrained_refuses_other_models(self):
        config = make_config()
        with pytest.raises(
            TypeError, match=r"`vision` must be a CLIPVisionModel or .* or DINOv3ViTModel, got LlamaForCausalLM"
        ):
            VisualChatForCausalLM.from_vision_text_pretrained(LlamaForCausalLM(config.text_config), CLIPVisionModel)

    @pytest.mark.parametrize(
        ("part", "make", "model_type"),
        [
            ("text", lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts=2, **TINY_DECODER)), "qwen2_moe"),
            ("text", lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)), "gpt2"),
            ("text", lambda: make_model(), "visualchat"),
            ("vision", lambda: Siglip2VisionModel(Siglip2VisionConfig(**TINY_TOWER)), "siglip2_vision_model"),
            ("vision", lambda: CLIPTextModel(CLIPTextConfig(vocab_size=9, **TINY_TOWER)), "clip_text_model"),
            ("vision", lambda: LlamaForCausalLM(make_config().text_config), "llama"),
        ],
        ids=lambda one: one if isinstance(one, str) else "",
    )
    def test_folders_of_other_families_are_refused_before_weights_are_read(self, part, make, model_type, tmp_path):
        config = make_config()
        parts = {"vision": CLIPVisionModel(config.vision_config), "text": LlamaForCausalLM(config.text_config)}
        for name, model in {**parts, part: make()}.items():
            model.save_pretrained(tmp_path / name)
        for weights in (tmp_path / part).glob("*.safetensors"):
            weights.unlink()
        message = f"`{part}`: {tmp_path / part} has the model_type '{model_type}', but the .* must be of '(clip|llama)"
        with pytest.raises(TypeError, match=message):
            VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))
        with pytest.raises(OSError, match="nowhere"):
            VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path / "nowhere"), str(tmp_path / "text"))

    def test_tied_embeddings(self, tmp_path):
        model = make_model(text={"tie_word_embeddings": True})
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert again.lm_head.weight is again.get_input_embeddings().weight
        inputs = make_inputs(["titit"], model)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, again(**inputs).logits)

    def test_resize_token_embeddings(self):
        model = make_model()
        size = model.config.text_config.vocab_size
        inputs = make_inputs(["titit"], model)
        before = model(**inputs).logits
        model.resize_token_embeddings(size + 10)
        assert model.config.text_config.vocab_size == size + 10
        torch.testing.assert_close(model(**inputs).logits[..., :size], before)


def test_the_tiny_tokenizer_and_config_agree():
    config = make_config()
    assert config.image_token_id == len(make_tokenizer())
    assert config.image_seq_length == TOKENS_PER_IMAGE
