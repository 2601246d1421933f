"""The config: strict, declarative, and stable through saving."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from helpers.tiny import make_config
from modeling_visualchat import VisualChatConfig


def test_defaults_are_clip_l_14_and_llama_2_7b():
    config = VisualChatConfig()
    assert config.image_seq_length == 257
    assert config.multimodal_attention == "mmca"
    assert config.projector == "linear"
    assert config.vision_feature_layer == -1
    assert config.vision_feature_select_strategy == "full"
    assert not config.image_number_keys
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    assert isinstance(config.text_config, LlamaConfig)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("multimodal_attention", "mmca_summed"),
        ("multimodal_attention", None),
        ("image_number_keys", "yes"),
        ("image_number_token_ids", [[1, "2"]]),
        ("projector", "qformer"),
        ("pixel_shuffle_factor", 0),
        ("pool_factor", 0),
        ("class_token_outputs", -1),
        ("pixel_shuffle_factor", 1.5),
        ("image_size", "large"),
        ("vision_feature_layer", 2.5),
        ("vision_feature_layer", 3),
        ("vision_feature_layer", -4),
        ("vision_feature_select_strategy", "patch"),
        ("image_token_id", "<image>"),
        ("image_token_id", -1),
        ("num_query_tokens", 10),
        ("num_query_tokens", 0),
        ("vision_config", 3),
        ("text_config", "llama"),
    ],
)
def test_wrong_types_and_values_are_refused_with_the_fields_name(field, value):
    with pytest.raises((StrictDataclassError, TypeError), match=field):
        VisualChatConfig(**{"vision_config": {"num_hidden_layers": 2}, field: value})


def test_other_architectures_are_refused():
    with pytest.raises(TypeError, match="`text_config` has the model_type 'gpt2', but the decoder must be of 'llama'"):
        VisualChatConfig(text_config={"model_type": "gpt2"})
    with pytest.raises(
        TypeError, match=r"`vision_config` must be a CLIPVisionConfig or .*, got one with model_type 'llama'"
    ):
        VisualChatConfig(vision_config=LlamaConfig())
    with pytest.raises(TypeError, match=r"Dinov2Config or .* or DINOv3ViTConfig, got one with model_type 'siglip2_vision"):
        VisualChatConfig(vision_config={"model_type": "siglip2_vision_model"})


def test_numbered_keys_need_the_spelling_of_every_number():
    with pytest.raises(StrictDataclassError, match="`image_number_keys` needs `image_number_token_ids`"):
        VisualChatConfig(image_number_keys=True)
    with pytest.raises(StrictDataclassError, match="`image_number_token_ids` holds no token for the number 2"):
        VisualChatConfig(image_number_keys=True, image_number_token_ids=[[1], [], [2]])


@pytest.mark.parametrize(
    ("ids", "attention", "message"),
    [
        ([], "mmca", "is an empty list"),
        ([5, 999], "mmca", r"holds 999, which is no token: it takes ids from 0 to \d+"),
        ([-1], "mmca_merged", "holds -1, which is no token"),
        ([5, None], "mmca", r"\[5, None\]"),
        (["5"], "mmca", r"\['5'\]"),
        ([5], "causal", "is not for multimodal_attention='causal'"),
        ([5], "mmca_released", "is not for multimodal_attention='mmca_released'"),
        ([5] * 1024, "mmca", "has 1024 tokens, but `max_position_embeddings` is 1024"),
    ],
)
def test_an_image_prefix_is_text_for_attentions_that_have_one(ids, attention, message):
    with pytest.raises(StrictDataclassError, match=f"image_prefix_ids.*{message}"):
        make_config(image_prefix_ids=ids, multimodal_attention=attention)
    with pytest.raises(StrictDataclassError, match="`image_prefix_ids` holds 7, which is that of the image placeholder"):
        make_config(image_prefix_ids=[5, 7], image_token_id=7)


def test_image_seq_length():
    vision = {"image_size": [28, 56], "patch_size": 14}
    assert VisualChatConfig(vision_config=vision).image_seq_length == 9
    assert VisualChatConfig(vision_config=vision, vision_feature_select_strategy="default").image_seq_length == 8
    assert VisualChatConfig(vision_config=vision, projector="perceiver").image_seq_length == 256
    shuffled = {"projector": "pixel_shuffle", "vision_config": {"image_size": [56, 112], "patch_size": 14}}
    assert VisualChatConfig(**shuffled).image_seq_length == 8
    assert VisualChatConfig(**shuffled, pixel_shuffle_factor=4).image_seq_length == 2


@pytest.mark.parametrize(
    ("tower", "prefix"), [("clip", 1), ("siglip", 0), ("dinov2", 1), ("dinov2_with_registers", 4), ("dinov3_vit", 3)]
)
def test_image_seq_length_follows_from_the_tower(tower, prefix):
    assert make_config(tower=tower).image_seq_length == 4 + prefix
    few = {"projector": "pooled", "pool_factor": 1}
    for fields, tokens in (
        ({"projector": "mlp"}, 4 + prefix),
        ({"projector": "pixel_shuffle"}, 1),
        (few, 4 + min(prefix, 1)),
        ({**few, "class_token_outputs": 3 * min(prefix, 1)}, 4 + 3 * min(prefix, 1)),
    ):
        assert make_config(tower=tower, **fields).image_seq_length == tokens
    assert make_config(tower=tower, vision_feature_select_strategy="default").image_seq_length == 4


def test_a_grid_that_the_factor_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(StrictDataclassError, match=r"`pixel_shuffle_factor` is 3, which does not divide .* 2 × 4 patches"):
        make_config(projector="pixel_shuffle", pixel_shuffle_factor=3, vision={"image_size": [16, 32]})
    with pytest.raises(StrictDataclassError, match=r"`pool_factor` is 4, which does not divide .* 2 × 4 patches"):
        make_config(projector="pooled", pool_factor=4, vision={"image_size": [16, 32]})
    with pytest.raises(StrictDataclassError, match=r"`class_token_outputs` is 2, but SigLIP .* has no class token"):
        make_config(tower="siglip", projector="pooled", class_token_outputs=2)


def test_images_of_another_size_than_the_towers():
    config = make_config(tower="dinov2", vision={"image_size": 40}, image_size=16)
    assert (config.input_size, config.patch_grid, config.image_seq_length) == ((16, 16), (2, 2), 5)
    assert make_config(image_size=[16, 16]).image_size is None  # the tower's own
    for tower in ("clip", "siglip"):
        with pytest.raises(StrictDataclassError, match=r"`image_size` is 32, but this tower of .* of 16 × 16 pixels only"):
            make_config(tower=tower, image_size=32)


def test_the_vit_projector_is_for_towers_with_such_layers():
    with pytest.raises(StrictDataclassError, match="'vit' adds a layer of CLIP's, which does not fit a tower of DINOv2"):
        make_config(tower="dinov2", projector="vit")


def test_a_tied_decoder_ties_the_model():
    assert make_config(text={"tie_word_embeddings": True}).tie_word_embeddings
    assert not make_config().tie_word_embeddings


def test_saving_and_loading_keeps_every_field(tmp_path):
    config = make_config(
        multimodal_attention="mmca_merged",
        image_number_keys=True,
        image_prefix_ids=[5, 7],
        projector="perceiver",
        num_query_tokens=9,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is VisualChatConfig
    expected = {**config.to_dict(), "auto_map": again.auto_map, "_name_or_path": again.name_or_path}
    assert again.to_dict() == expected
    assert type(again.text_config) is LlamaConfig
