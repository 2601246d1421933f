"""Each family of vision towers, joined with a decoder: the stock tower's features, saved, remembered, trained."""

import json
import textwrap

import pytest
import torch
from transformers import (
    AutoModel,
    LlamaForCausalLM,
    LlavaConfig,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from helpers.elsewhere import run_elsewhere
from helpers.tiny import (
    IMAGE_SIZE,
    TOWERS,
    digit_image,
    make_config,
    make_image_processor,
    make_inputs,
    make_model,
    make_tokenizer,
    make_tower_config,
)
from helpers.versions import needs_transformers
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor


each_tower = pytest.mark.parametrize("tower", TOWERS)


def make_stock_tower(tower: str, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(make_tower_config(tower, **overrides)).eval()


def make_decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(make_config(text={"vocab_size": 300}).text_config)


def make_pixels(count: int = 2, size: int = IMAGE_SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def features_of(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(model.get_image_features(pixel_values).pooler_output)


class TestFeatures:
    @pytest.mark.parametrize(("layer", "strategy"), [(-1, "full"), (-2, "default"), (0, "full"), (2, "default")])
    @each_tower
    def test_they_are_the_stock_towers_hidden_state_through_the_projector(self, tower, layer, strategy):
        stock, pixel_values = make_stock_tower(tower), make_pixels()
        settings = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
        model = VisualChatForCausalLM.from_vision_text_pretrained(stock, make_decoder(), **settings)
        with torch.no_grad():
            outputs = stock(pixel_values, output_hidden_states=True)
        hidden = outputs.last_hidden_state if layer in (-1, 2) else outputs.hidden_states[layer]
        if strategy == "default":
            hidden = hidden[:, -4:]  # the patches
        projector = model.model.multi_modal_projector
        expected = projector.layer_norm(projector.linear(hidden))
        assert torch.equal(features_of(model, pixel_values), expected)
        assert expected.shape[1] == model.config.image_seq_length

    def test_dinos_take_images_of_another_size(self):
        for tower in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
            stock = make_stock_tower(tower, image_size=40)
            model = VisualChatForCausalLM.from_vision_text_pretrained(stock, make_decoder(), image_size=IMAGE_SIZE)
            with torch.no_grad():
                hidden = stock(make_pixels()).last_hidden_state
                assert torch.equal(features_of(model, make_pixels()), model.model.multi_modal_projector(hidden))
            assert hidden.shape[1] == model.config.image_seq_length
            assert model(**make_inputs(["tit"], model)).logits.isfinite().all()
            assert model.model.dummy_pixel_values().shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)

    @each_tower
    def test_training_mode_computes_the_same(self, tower):
        """Frozen towers are in training mode too, in which DINOv3 would scale its positions at random."""
        model = make_model(tower=tower)
        expected = features_of(model, make_pixels())
        torch.testing.assert_close(features_of(model.train(), make_pixels()), expected)


class TestJoining:
    @pytest.mark.parametrize("source", ["model", "folder"])
    @each_tower
    def test_weights_are_the_parts_and_survive_saving(self, tower, source, tmp_path):
        stock = make_stock_tower(tower)
        before = {name: weight.clone() for name, weight in stock.state_dict().items()}
        stock.save_pretrained(tmp_path / "tower")
        config = stock.config.to_dict()
        vision = stock if source == "model" else str(tmp_path / "tower")
        model = VisualChatForCausalLM.from_vision_text_pretrained(vision, make_decoder())
        joined = model.model.vision_tower.state_dict()
        left_out = {name for name in before if name.startswith("head.") or name == "embeddings.mask_token"}
        assert set(joined) == set(before) - left_out
        assert bool(left_out) == (tower != "clip")
        assert all(torch.equal(weight, before[name]) for name, weight in joined.items())
        # The stock model stays as it is, and shares its weights
        assert stock.state_dict().keys() == before.keys()
        assert stock.config.to_dict() == config
        if source == "model":
            own = dict(stock.named_parameters())
            assert all(weight is own[name] for name, weight in model.model.vision_tower.named_parameters())

        model.save_pretrained(tmp_path / "joined")
        again = AutoModel.from_pretrained(tmp_path / "joined").eval()
        inputs = make_inputs(["titit"], model)
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        again.check_weights()
        assert again.image_fingerprint() == model.image_fingerprint()

    @each_tower
    def test_a_tower_that_was_taken_out_of_a_model_joins_again(self, tower, tmp_path):
        model = make_model(tower=tower)
        model.model.vision_tower.save_pretrained(tmp_path)
        again = VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path), make_decoder())
        for name, weight in model.model.vision_tower.state_dict().items():
            assert torch.equal(again.model.vision_tower.state_dict()[name], weight), name

    @pytest.mark.parametrize("source", ["model", "folder"])
    def test_siglip_with_its_text_encoder(self, source, tmp_path):
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        vision = make_tower_config("siglip").to_dict()
        siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 9})).eval()
        siglip.save_pretrained(tmp_path)
        part = siglip if source == "model" else str(tmp_path)
        model = VisualChatForCausalLM.from_vision_text_pretrained(part, make_decoder())
        for name, weight in model.model.vision_tower.state_dict().items():
            assert torch.equal(siglip.vision_model.state_dict()[name], weight), name

    def test_a_folder_that_lacks_a_weight_is_refused(self, tmp_path):
        stock = make_stock_tower("dinov2_with_registers")
        del stock.embeddings.register_tokens
        stock.embeddings.register_buffer("register_tokens", torch.zeros(1, 3, 32), persistent=False)
        stock.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"the tensor embeddings\.register_tokens is missing$"):
            VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path), make_decoder())


class TestTraining:
    @each_tower
    def test_every_parameter_gets_a_gradient(self, tower):
        model = make_model(tower=tower).train()
        inputs = make_inputs(["titit"], model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        without = {name for name, weight in model.named_parameters() if weight.grad is None}
        last_norm = {f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")}
        assert without == (last_norm if tower == "clip" else set())  # CLIP's is of the pooled output

    @each_tower
    def test_alignment_trains_projector_and_embedding(self, tower):
        model = VisualChatForCausalLM.from_vision_text_pretrained(make_stock_tower(tower), make_decoder())
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert {name.rsplit(".", 1)[0] for name in trained} == {
            "model.language_model.embed_tokens",
            "model.multi_modal_projector.linear",
            "model.multi_modal_projector.layer_norm",
        }


class TestImageMemory:
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    @each_tower
    def test_it_equals_pixel_values(self, tower, variant):
        model = make_model(tower=tower, multimodal_attention=variant, image_number_keys=True)
        inputs = make_inputs(["tititt"], model)
        pixel_values = inputs.pop("pixel_values")
        is_text = inputs["input_ids"] != model.config.image_token_id
        with torch.no_grad():
            expected = model(**inputs, pixel_values=pixel_values).logits[is_text]
            remembered = model(**inputs, image_memory=model.encode_images(pixel_values)).logits[is_text]
        torch.testing.assert_close(remembered, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("tower", "field", "value"),
        [
            *((tower, "num_attention_heads", 2) for tower in TOWERS),
            *((tower, "layer_norm_eps", 1e-3) for tower in TOWERS),
            *((tower, "hidden_act", "relu") for tower in TOWERS),
            ("dinov3_vit", "rope_theta", 50.0),
        ],
    )
    def test_the_fingerprint_tells_what_the_weights_do_not(self, tower, field, value):
        model = make_model(tower=tower)
        other = VisualChatForCausalLM(make_config(tower=tower, vision={field: value}))
        other.load_state_dict(model.state_dict())
        assert not torch.equal(features_of(other.eval(), make_pixels()), features_of(model, make_pixels()))
        assert other.image_fingerprint() != model.image_fingerprint()

    @needs_transformers("5.23", "CLIP and SigLIP take squares")
    def test_the_fingerprint_tells_grids_that_are_shuffled(self):
        shuffled = {"tower": "dinov3_vit", "projector": "pixel_shuffle"}
        model = make_model(**shuffled, vision={"image_size": [16, 64]})
        other = VisualChatForCausalLM(make_config(**shuffled, vision={"image_size": [32, 32]}))
        other.load_state_dict(model.state_dict())
        assert other.image_fingerprint() != model.image_fingerprint()


class TestProcessor:
    @each_tower
    def test_pixel_values_are_the_stock_image_processors(self, tower):
        image_processor = make_image_processor(tower)
        processor = VisualChatProcessor(image_processor, make_tokenizer(), image_seq_length=5)
        pictures = [digit_image(0), digit_image(1).resize((50, 21)), digit_image(2).resize((20, 90))]
        expected = image_processor(pictures, return_tensors="pt")["pixel_values"]
        assert expected.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE)
        assert torch.equal(processor(text="<image>" * 3, images=pictures, return_tensors="pt")["pixel_values"], expected)


class TestProjectors:
    def test_pixel_shuffle_is_idefics3s(self):
        model = make_model(tower="siglip", projector="pixel_shuffle", vision={"image_size": 32})
        features = torch.randn(2, 16, 32)
        shuffled = Idefics3Connector.pixel_shuffle(None, features, 2)
        projector = model.model.multi_modal_projector
        assert shuffled.shape == (2, 4, 128)
        assert torch.equal(projector(features), projector.layer_norm(projector.linear(shuffled)))

    @needs_transformers("5.23", "CLIP and SigLIP take squares")
    def test_pixel_shuffle_keeps_the_squares_of_any_grid(self):
        """Features that name their own row and column of patches."""
        settings = {"vision": {"image_size": [32, 48]}, "projector": "pixel_shuffle"}
        projector = make_model(tower="dinov3_vit", **settings).model.multi_modal_projector
        projector.linear, projector.layer_norm = torch.nn.Identity(), torch.nn.Identity()
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
        patches = torch.stack([rows, columns], dim=-1).flatten(0, 1)
        tokens = projector(torch.cat([torch.full((3, 2), -1), patches])[None])[0]
        assert tokens[0].tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
        assert tokens[5].tolist() == [2, 4, 2, 5, 3, 4, 3, 5]

    def test_pixel_shuffle_refuses_another_number_of_patches(self):
        model = make_model(tower="dinov2", projector="pixel_shuffle")
        with pytest.raises(ValueError, match="The images have 16 patches, but the model takes 2 × 2"):
            model.get_image_features(make_pixels(size=32))

    @needs_transformers("5.23", "CLIP and SigLIP take squares")
    def test_pooled_tokens_are_of_the_class_token_and_of_squares(self):
        settings = {"vision": {"image_size": [32, 48]}, "projector": "pooled", "class_token_outputs": 2}
        projector = make_model(tower="dinov3_vit", **settings).model.multi_modal_projector
        projector.layer_norm = projector.square_mlp = torch.nn.Identity()  # a mean and a maximum are as wide as a token here
        features = torch.randn(2, 3 + 4 * 6, 32)
        assert projector.positions.shape == (8, 64) and not projector.positions.any()
        tokens = projector(features)
        assert torch.equal(tokens[:, :2].flatten(1), projector.class_mlp(features[:, 0]))
        patches = features[:, 3:].unflatten(1, (4, 6))
        square = patches[:, 2:4, 4:6].flatten(1, 2)
        torch.testing.assert_close(tokens[:, 2 + 5], torch.cat([square.mean(1), square.amax(1)], dim=-1))

    def test_mlp_is_llavas(self):
        model = make_model(projector="mlp", vision_feature_select_strategy="default")
        text, vision = model.config.text_config, model.config.vision_config
        llavas = LlavaMultiModalProjector(LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1))
        model.model.multi_modal_projector.load_state_dict(llavas.state_dict())
        features = torch.randn(2, 5, 32)
        torch.testing.assert_close(model.model.multi_modal_projector(features), llavas(features[:, 1:]))


@pytest.mark.parametrize(
    ("tower", "decoder", "projector"),
    [
        ("siglip", "qwen2", "mlp"),
        ("dinov2", "llama", "pixel_shuffle"),
        ("dinov2_with_registers", "llama", "pooled"),
        ("dinov2_with_registers", "qwen3", "linear"),
        ("dinov3_vit", "mistral", "perceiver"),
    ],
)
def test_pairs_of_families_save_reload_and_remember_images(tower, decoder, projector, tmp_path):
    settings = {"projector": projector, "num_query_tokens": 4, "multimodal_attention": "mmca_merged"}
    model = make_model(tower=tower, decoder=decoder, image_number_keys=True, **settings)
    model.save_pretrained(tmp_path)
    inputs = make_inputs(["tititt"], model)
    is_text = inputs["input_ids"] != model.config.image_token_id
    with torch.no_grad():
        expected = model(**inputs).logits
        model = AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(model(**inputs).logits, expected)
        memory = model.encode_images(inputs.pop("pixel_values"))
        remembered = model(**inputs, image_memory=memory).logits
    torch.testing.assert_close(remembered[is_text], expected[is_text], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", [pytest.param("siglip", marks=pytest.mark.slow), "dinov3_vit"])
def test_a_saved_folder_works_where_the_package_is_not_installed(tower, tmp_path):
    model = make_model(tower=tower, projector="pixel_shuffle", image_number_keys=True)
    model.save_pretrained(tmp_path / "model")
    inputs = make_inputs(["titit"], model)
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": model(**inputs).logits}, tmp_path / "expected.pt")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vision_config"]["model_type"] == model.config.vision_config.model_type
    code = """
        expected = torch.load(root + "/expected.pt")
        model = AutoModel.from_pretrained(root + "/model", trust_remote_code=True)
        assert sys.modules["modeling_visualchat"] is None
        with torch.no_grad():
            assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
    """
    run_elsewhere(textwrap.dedent(code), cwd=tmp_path, root=tmp_path)
