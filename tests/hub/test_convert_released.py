"""Checkpoints of the released code are converted: `visualchat convert released`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoProcessor,
)

from helpers.elsewhere import run_elsewhere
from helpers.released import ReleasedCheckpoint, ReleasedPerceiver
from helpers.tiny import digit_image, make_tokenizer, user
from visualchat.cli import main as visualchat
from visualchat.errors import InputError


PARITY = Path(__file__).parents[3] / "shared" / "released_parity"


@pytest.fixture
def checkpoint(tmp_path):
    return ReleasedCheckpoint(tmp_path)


class TestConverter:
    @pytest.mark.skipif(not PARITY.is_dir(), reason=f"needs {PARITY}")
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("variant", ["mmca_released", "causal"])
    def test_parity_with_the_released_code(self, variant, implementation, tmp_path):
        visualchat([
            "convert", "released", str(PARITY / "released_linear_pytorch_model.bin"),
            "--config", str(PARITY / "released_linear_config.json"),
            "--attention", variant, "--output", str(tmp_path),
        ])  # fmt: skip
        model = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
        expected = load_file(PARITY / "released_linear_expected.safetensors")
        image_id, per_image = model.config.image_token_id, model.config.image_seq_length
        rows = [
            [token for one in row for token in ([one] * per_image if one == image_id else [one])]
            for row in expected["input_ids"].tolist()
        ]
        modality, pixel_values = expected["expanded_modality"], expected["pixel_values"]
        width = modality.shape[1]
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        assert torch.equal(input_ids == image_id, modality == 2)
        prefix = ""
        if variant == "causal":  # the reversal belongs to the other variant
            prefix, pixel_values = "causal_", pixel_values.unflatten(0, (2, 3)).flip(1).flatten(0, 1)
        with torch.no_grad():
            outputs = model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=(modality != 0).long(),
                labels=expected["expanded_labels"],
            )
        kept = modality != 0
        torch.testing.assert_close(outputs.logits[kept], expected[f"{prefix}logits"][kept], atol=1e-4, rtol=0)
        torch.testing.assert_close(outputs.loss[None], expected[f"{prefix}loss"], atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("projector", "sizes"),
        [
            ("baseline", {}),
            ("vit", {}),
            ("perceiver", {"hidden_size": 256}),
            ("perceiver", {"hidden_size": 128, "image_size": 32, "patch_size": 2}),
        ],
        ids=["baseline", "vit", "perceiver over 4 × 4 patches", "perceiver over 16 × 16 patches"],
    )
    def test_every_projector_and_the_trained_embedding(self, projector, sizes, tmp_path):
        released = ReleasedCheckpoint(tmp_path, projector, **sizes)
        model = released.convert()
        size = released.config["vision_config"]["image_size"]
        pixel_values = torch.randn(3, 3, size, size)
        with torch.no_grad():
            expected = released.projection(released.tower(pixel_values).last_hidden_state)
            features = torch.stack(model.get_image_features(pixel_values).pooler_output)
        assert features.shape[1] == model.config.image_seq_length
        torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(model.get_input_embeddings().weight, released.embedding.weight)
        assert torch.equal(model.lm_head.weight, released.decoder.lm_head.weight)
        assert model.config.multimodal_attention == "mmca_released"

    def test_a_tied_decoder_is_untied(self, checkpoint):
        checkpoint.config["text_config"]["tie_word_embeddings"] = True
        model = checkpoint.convert()
        assert not torch.equal(model.get_input_embeddings().weight, model.lm_head.weight)
        assert torch.equal(model.lm_head.weight, checkpoint.decoder.lm_head.weight)

    def test_half_precision_is_kept_and_buffers_of_older_versions_are_computed_anew(self, checkpoint):
        checkpoint.weights = {name: weight.half() for name, weight in checkpoint.weights.items()}
        checkpoint.weights["vis_encoder.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        checkpoint.weights["lang_decoder.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        assert {parameter.dtype for parameter in checkpoint.convert("--attention", "mmca").parameters()} == {torch.float16}

    def test_what_is_missing_or_left_over_is_named(self, checkpoint):
        del checkpoint.weights["lang_embed.weight"], checkpoint.weights["projection.1.bias"]
        checkpoint.weights["vis_encoder.conv1.weight"] = torch.ones(1)
        message = (
            r"2 are missing in the checkpoint \(lang_embed.weight, projection.1.bias\), and it has 1 unexpected ones"
            r" \(vis_encoder.conv1.weight\)"
        )
        with pytest.raises(InputError, match=message):
            checkpoint.convert()
        assert not (checkpoint.folder / "converted").exists()

    def test_another_shape_is_named_with_both(self, checkpoint):
        checkpoint.config["text_config"]["vocab_size"] += 1
        rows = checkpoint.config["text_config"]["vocab_size"]
        with pytest.raises(InputError, match=rf"lang_embed.weight has the shape \({rows - 1}, 64\), but .* \({rows}, 64\)"):
            checkpoint.convert()

    @pytest.mark.parametrize("distance", [1e-3, 1.0], ids=["near the table", "far from it"])
    def test_half_precision_keeps_the_positions_that_were_learned(self, distance, tmp_path):
        released = ReleasedCheckpoint(tmp_path, "perceiver", hidden_size=128)
        table = ReleasedPerceiver(released.tower.config, 128).pos_embed.detach()
        released.weights["projection.pos_embed"] = table + distance * torch.randn_like(table)
        released.weights = {name: weight.half() for name, weight in released.weights.items()}
        projector = released.convert().model.multi_modal_projector
        assert torch.equal(projector.positions, released.weights["projection.pos_embed"])
        released.projection.load_state_dict(
            {name.removeprefix("projection."): one for name, one in released.weights.items() if "projection." in name}
        )
        features = torch.randn(2, 17, 32)
        expected = released.projection(features)
        torch.testing.assert_close(projector.float()(features), expected, atol=2e-5, rtol=1e-5)

    def test_a_table_of_another_grid_is_named_with_both_shapes(self, tmp_path):
        released = ReleasedCheckpoint(tmp_path, "perceiver", hidden_size=128)
        released.weights["projection.pos_embed"] = torch.zeros(64, 128)
        with pytest.raises(InputError, match=r"projection.pos_embed has the shape \(64, 128\), but .* \(256, 128\)"):
            released.convert()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"projector": "linear"}, "`projector` is 'linear', use one of baseline, vit, perceiver"),
            ({"base_vocab_size": 400}, "`vocab_size` of `text_config` is 322, but `base_vocab_size` is 400"),
            ({"image_token_id": 322}, "`image_token_id` is 322, use one from 320 to 321"),
            ({"lora": 8}, "must have the keys projector, .*, but has projector, .*, lora"),
        ],
    )
    def test_a_wrong_config_is_refused(self, checkpoint, changes, message):
        base = checkpoint.config["base_vocab_size"]
        checkpoint.config |= changes
        for number in ("322", "320 ", "321"):
            message = message.replace(number, str(base + int(number) - 320) + " " * number.endswith(" "))
        with pytest.raises(InputError, match=message):
            checkpoint.convert()

    def test_lora_factors_are_added_or_left_out_as_told(self, checkpoint):
        layer = "lang_decoder.model.layers.0.mlp.up_proj"
        right, left = torch.randn(64, 4), torch.randn(4, 48)
        weight = checkpoint.weights[f"{layer}.weight"].clone()
        checkpoint.weights |= {f"{layer}.lora_right_weight": right, f"{layer}.lora_left_weight": left}
        with pytest.raises(InputError, match=rf"2 LoRA factors \({layer}.lora_right_weight, .*--lora fused.*--lora unfused"):
            checkpoint.convert()

        def converted(lora):
            return checkpoint.convert("--lora", lora).model.language_model.layers[0].mlp.up_proj

        assert torch.equal(converted("fused").weight, weight)
        states = torch.randn(2, 64)
        expected = states @ weight.T + (states @ right @ left) / 4
        torch.testing.assert_close(converted("unfused")(states), expected, atol=1e-5, rtol=1e-5)
        del checkpoint.weights[f"{layer}.lora_left_weight"]
        with pytest.raises(InputError, match=f"The LoRA of {layer} lacks {layer}.lora_left_weight"):
            checkpoint.convert("--lora", "fused")
        del checkpoint.weights[f"{layer}.lora_right_weight"]
        with pytest.raises(InputError, match="--lora fused was given, but the checkpoint holds no LoRA factors"):
            checkpoint.convert("--lora", "fused")

    @pytest.mark.parametrize("extended", [False, True], ids=["the decoder's own", "as saved"])
    def test_a_tokenizer_makes_a_processor_and_the_folder_answers_elsewhere(self, checkpoint, extended, tmp_path, capsys):
        tokenizer = make_tokenizer()
        if extended:
            tokenizer.add_tokens(["### Image:", "<image>"], special_tokens=True)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        model = checkpoint.convert("--tokenizer", tmp_path / "tokenizer")
        assert "No processor" not in capsys.readouterr().out
        processor = AutoProcessor.from_pretrained(tmp_path / "converted")
        base = checkpoint.config["base_vocab_size"]
        assert processor.tokenizer.convert_tokens_to_ids(["### Image:", "<image>"]) == [base, base + 1]
        messages = [user("What?", digit_image(1), digit_image(2))]
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(messages, **settings)
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        if extended:
            return
        torch.save({"inputs": dict(inputs), "tokens": tokens}, tmp_path / "expected.pt")
        run_elsewhere(
            """
            expected = torch.load(root + "/expected.pt")
            model = AutoModel.from_pretrained(root + "/converted", trust_remote_code=True)
            tokens = model.generate(**expected["inputs"], max_new_tokens=5, do_sample=False)
            assert torch.equal(tokens, expected["tokens"])
            assert AutoProcessor.from_pretrained(root + "/converted", trust_remote_code=True).image_seq_length == 17
            """,
            cwd=tmp_path,
            root=tmp_path,
        )

    def test_without_a_tokenizer_there_is_no_processor_and_it_says_so(self, checkpoint, capsys):
        checkpoint.convert("--attention", "causal")
        printed = capsys.readouterr().out
        assert "No processor was saved, since --tokenizer was not given" in printed
        assert "pass images last to first" in printed
        assert not (checkpoint.folder / "converted" / "processor_config.json").exists()

    def test_another_tokenizer_is_refused(self, checkpoint, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        base = len(make_tokenizer())
        with pytest.raises(InputError, match=rf"id of <image> is {base}, but `image_token_id` is {base + 1}"):
            checkpoint.convert("--tokenizer", tmp_path / "tokenizer")
