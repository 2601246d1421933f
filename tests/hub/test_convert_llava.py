"""A LLaVA 1.5-style folder as a start: its backbones and vocabulary, and what of its projector has a place."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

from helpers.commands import run_command
from helpers.tiny import IMAGE_SIZE, PATCH_SIZE, digit_image, make_inputs, make_processor, user
from visualchat.conversion.llava import check_config
from visualchat.errors import InputError


PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def make_llava(folder, **overrides):
    torch.manual_seed(0)
    processor = make_processor()  # the parts that it shares with LLaVA's
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer) + 5, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    config = LlavaConfig(
        **{"vision_config": vision, "text_config": text, "image_token_index": processor.image_token_id, **overrides}
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.save_pretrained(folder)
    LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return llava


def convert(folder, *arguments):
    run_command("convert llava", folder / "llava", "--output", folder / "ours", *arguments)
    return AutoModel.from_pretrained(folder / "ours").eval()


def test_backbones_features_and_the_first_layer_are_taken_over(tmp_path, capsys):
    llava = make_llava(tmp_path / "llava")
    model = convert(tmp_path)
    printed = capsys.readouterr().out
    assert "projector, linear: from the first layer of LLaVA's MLP" in printed
    assert "the second layer (64, 64) of LLaVA's MLP does not fit" in printed
    for part in ("vision_tower", "language_model"):
        ours, theirs = (getattr(one.model, part).state_dict() for one in (model, llava))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(model.lm_head.weight, llava.lm_head.weight)
    assert model.config.multimodal_attention == "mmca"
    assert model.config.image_token_id == llava.config.image_token_id
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")

    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        features = torch.stack(model.get_image_features(pixel_values).pooler_output)
        selected = llava.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = llava.model.multi_modal_projector.linear_1(selected)
    expected = torch.nn.functional.layer_norm(projected, (64,), eps=1e-12)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_the_processor_is_carried_over_with_our_prompt(tmp_path):
    make_llava(tmp_path / "llava")
    model = convert(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    inputs = processor.apply_chat_template(
        [user("What?", digit_image(0), digit_image(1))],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * PATCHES
    assert "### Image 2:" in processor.decode(inputs["input_ids"][0])
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_with_its_projector_and_causal_attention_it_computes_llavas_logits(bias, tmp_path, capsys):
    llava = make_llava(tmp_path / "llava", multimodal_projector_bias=bias)
    model = convert(tmp_path, "--projector", "mlp", "--attention", "causal")
    printed = capsys.readouterr().out
    assert "projector: from LLaVA" in printed and "before use" not in printed
    for layout in (["tt"], ["tit"], ["titit", "tiis"]):
        inputs = make_inputs(layout, model)
        is_token = inputs["attention_mask"].bool()
        with torch.no_grad():
            ours, theirs = model(**inputs).logits[is_token], llava(**inputs).logits[is_token]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# What the folders of LLaVA 1.5 on the Hub hold, but for the blocks that mark what is learned
HUB_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("begins_blank", [False, True], ids=["byte-level", "LLaMA's"])
def test_with_its_projector_the_prompt_is_llavas(begins_blank, tmp_path):
    make_llava(tmp_path / "llava")
    if begins_blank:  # LLaMA's tokenizer puts a blank before a text
        theirs = AutoProcessor.from_pretrained(tmp_path / "llava")
        theirs.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        theirs.tokenizer.add_tokens(["\u2581US"])
        theirs.save_pretrained(tmp_path / "llava")
    convert(tmp_path, "--projector", "mlp")
    theirs, ours = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("llava", "ours"))
    settings = {"tokenize": True, "return_dict": True}
    questions = (
        [{"type": "text", "text": "What?"}],
        [{"type": "image", "image": digit_image(0)}, {"type": "text", "text": "What is it?"}],
        [*({"type": "image", "image": digit_image(digit)} for digit in (1, 2)), {"type": "text", "text": "Alike?"}],
    )
    for content in questions:
        messages = [{"role": "user", "content": content}]
        expected = theirs.apply_chat_template(messages, chat_template=HUB_TEMPLATE, add_generation_prompt=True, **settings)
        prompt = ours.apply_chat_template(messages, add_generation_prompt=True, **settings)
        assert prompt["input_ids"] == expected["input_ids"]


def test_the_end_of_an_answer_is_learned_too(tmp_path):
    make_llava(tmp_path / "llava")
    convert(tmp_path, "--projector", "mlp")
    ours = AutoProcessor.from_pretrained(tmp_path / "ours")
    talk = [user("What?"), {"role": "assistant", "content": "A one."}, user("And?"), {"role": "assistant", "content": "So."}]
    learned = ours.apply_chat_template(talk, return_assistant_tokens_mask=True, tokenize=True, return_dict=True)
    ids, mask = learned["input_ids"][0], learned["assistant_masks"][0]
    end = ours.tokenizer.eos_token
    assert ours.decode(ids).endswith(f"USER: What? ASSISTANT: A one.{end}USER: And? ASSISTANT: So.{end}")
    answers = ours.decode([token for token, is_learned in zip(ids, mask) if is_learned])
    assert answers.split(end) == [" A one.", " So.", ""]


def test_the_mlp_projector_needs_llavas_activation(tmp_path):
    make_llava(tmp_path / "llava", projector_hidden_act="relu")
    with pytest.raises(InputError, match="`projector_hidden_act` is 'relu': the projector mlp has 'gelu'"):
        convert(tmp_path, "--projector", "mlp")


@pytest.mark.parametrize(
    ("projector", "line"),
    [
        ("vit", "projector, encoder_layer: random"),
        ("perceiver", "projector: random, since the weights of LLaVA's two-layer MLP do not fit its architecture"),
    ],
)
def test_other_projectors_say_what_starts_at_random(projector, line, tmp_path, capsys):
    make_llava(tmp_path / "llava")
    model = convert(tmp_path, "--projector", projector, "--attention", "causal")
    assert line in capsys.readouterr().out
    assert (model.config.projector, model.config.multimodal_attention) == (projector, "causal")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_folders_of_older_versions(tmp_path):
    llava = make_llava(tmp_path / "llava", multimodal_projector_bias=False)
    path = tmp_path / "llava" / "model.safetensors"
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    model = convert(tmp_path)
    embedding = llava.model.vision_tower.embeddings.class_embedding
    assert torch.equal(model.model.vision_tower.embeddings.class_embedding, embedding)
    assert not model.model.multi_modal_projector.linear.bias.any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"`vision_feature_layer` concatenates 2 layers \(\[-2, -1\]\)"),
        (
            {"vision_config": SiglipVisionConfig(num_hidden_layers=1)},
            "`vision_config` has the model_type 'siglip_vision_model': VisualChat supports 'clip_vision_model' only",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_named(overrides, message):
    config = LlavaConfig(**{"vision_config": CLIPVisionConfig(), "text_config": LlamaConfig(), **overrides})
    with pytest.raises(ValueError, match=message):
        check_config(config)


def test_another_tokenizer_is_refused(tmp_path):
    make_llava(tmp_path / "llava", image_token_index=3)
    with pytest.raises(InputError, match=r"The tokenizer's id of <image> is .*, but the model's image token is 3"):
        convert(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    make_llava(tmp_path / "llava")
    path = tmp_path / "llava" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in sorted(weights) if "up_proj" in name))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors: the tensor .*up_proj\.weight is missing"):
        convert(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors is cut off, or is no safetensors file"):
        convert(tmp_path)
