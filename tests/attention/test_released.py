"""Checkpoints of the released code: what it computes, defects included, and their conversion."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from visualchat.conversion import released as converter
from safetensors.torch import load_file, save_file
from test_reload import run_elsewhere
from helpers.tiny import copy_llama_weights, digit_image, make_config, make_inputs, make_model, make_tokenizer, user
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import logging as transformers_logging

from modeling_visualchat import VisualChatForCausalLM
from modeling_visualchat.attention_visualchat import create_multimodal_mask, update_image_numbers
from modeling_visualchat.released_visualchat import create_released_mask, place_in_reverse


PARITY = Path(__file__).parents[3] / "shared" / "released_parity"
LAYOUTS = ["itt", "tti", "tiit", "titittit", "i", "ttt"]
BATCH = ["tt", "titit", "tiit", "tti", "itti"]


def make_released(attn_implementation="sdpa", **overrides):
    return make_model(attn_implementation, multimodal_attention="mmca_released", **overrides)


class TestVariant:
    @pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "i" in layout])
    def test_eager_is_the_released_definition(self, layout):
        """Two masks are added, the lowest number wherever one hides a key; the softmaxes over both sums are summed."""
        model = make_released("eager").double()
        inputs = make_inputs([layout], model)
        is_image = (inputs["input_ids"] == model.config.image_token_id)[0]
        length, config, text_model = len(is_image), model.config.text_config, model.model.language_model
        torch.manual_seed(0)
        hidden_states = torch.randn(1, length, 64, dtype=torch.float64)
        numbers = update_image_numbers(None, is_image[None], 5, (1, length), is_image.device)
        positions = torch.arange(length)[None]
        mask = create_multimodal_mask("mmca_released", config, hidden_states, None, positions, None, *numbers)
        attention, rotary = text_model.layers[1].self_attn, text_model.rotary_emb(hidden_states, positions)
        output, weights = attention(hidden_states, rotary, mask)

        q, k, v = (
            projection(hidden_states).view(1, length, -1, 16).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        lowest = torch.finfo(torch.float64).min
        causal = torch.zeros(length, length).double().masked_fill(torch.ones(length, length).triu(1).bool(), lowest)
        to_text = torch.zeros(length, length).double().masked_fill(is_image[None], lowest)
        to_images = torch.zeros(length, length).double().masked_fill(~is_image[None], lowest)
        to_images[is_image] = lowest
        to_images[is_image, is_image.nonzero()[:, 0]] = 0
        scores = q @ k.mT / math.sqrt(16)
        expected = (scores + (to_text + causal)).softmax(-1) + (scores + (to_images + causal)).softmax(-1)
        torch.testing.assert_close(weights, expected, atol=1e-10, rtol=0)
        expected_output = attention.o_proj((expected @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected_output, atol=1e-10, rtol=0)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_a_batch_equals_its_rows(self, implementation, padding_side):
        model = make_released(implementation)
        inputs = make_inputs(BATCH, model, padding_side=padding_side)
        mask, images = inputs["attention_mask"], iter(inputs["pixel_values"].split([row.count("i") for row in BATCH]))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**inputs, position_ids=positions).logits
            for row, pixel_values in enumerate(images):
                kept = mask[row].bool()
                alone = model(
                    input_ids=inputs["input_ids"][row, kept][None], pixel_values=pixel_values if len(pixel_values) else None
                )
                torch.testing.assert_close(logits[row, kept], alone.logits[0], atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_without_images_it_is_llama(self, implementation):
        model = make_released(implementation)
        llama = LlamaForCausalLM._from_config(model.config.text_config, attn_implementation=implementation)
        llama = copy_llama_weights(model, llama)
        inputs = make_inputs(["ttt", "t"], model)
        kept = inputs["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits[kept], llama(**inputs).logits[kept], atol=1e-5, rtol=1e-5)

    def test_pictures_are_placed_in_reverse_by_sample(self):
        is_image = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1], [0] * 8, [1, 1, 0, 0, 0, 0, 1, 1]]).bool()
        states = torch.arange(10)[:, None]
        placed = place_in_reverse(states, is_image, 2)[:, 0].tolist()
        assert placed == [4, 5, 2, 3, 0, 1, 8, 9, 6, 7]

    def test_features_in_place_and_pixel_values_are_placed_alike(self):
        model = make_released()
        inputs = make_inputs(["titi"], model)
        is_image = inputs["input_ids"] == model.config.image_token_id
        with torch.no_grad():
            features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
            embeds = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(is_image[..., None], features)
            logits = model(inputs_embeds=embeds, mm_token_type_ids=is_image.long()).logits
            torch.testing.assert_close(logits, model(**inputs).logits)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_half_precision_and_gradients_have_no_nan(self, implementation, dtype):
        model = make_released(implementation).to(dtype)
        inputs = make_inputs(BATCH, model)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        outputs = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
        outputs.loss.backward()
        assert outputs.logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_it_trains_from_the_projector_to_the_embedding(self):
        model = make_released()
        model.freeze_for_alignment()
        inputs = make_inputs(["titit"], model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


class TestGeneration:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_cached_steps_equal_one_pass(self, implementation):
        """Text after the last picture; sequences begin with text, as a tokenizer's start token makes them."""
        model = make_released(implementation)
        inputs = make_inputs(["tittt", "ttt", "tiitttt"], model)
        whole = model(**inputs).logits
        prompt = inputs["input_ids"].shape[1] - 4
        outputs = model(
            input_ids=inputs["input_ids"][:, :prompt],
            pixel_values=inputs["pixel_values"],
            attention_mask=inputs["attention_mask"][:, :prompt],
            use_cache=True,
        )
        for seen in range(prompt, inputs["input_ids"].shape[1]):
            kept = inputs["attention_mask"][:, :seen].bool()
            torch.testing.assert_close(outputs.logits[:, -1], whole[:, seen - 1], atol=2e-5, rtol=1e-5)
            assert kept[:, -1].all()
            outputs = model(
                input_ids=inputs["input_ids"][:, seen : seen + 1],
                attention_mask=inputs["attention_mask"][:, : seen + 1],
                past_key_values=outputs.past_key_values,
            )

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_tokens_with_any_cache_equal_those_without(self, implementation):
        model = make_released(implementation)
        inputs = make_inputs(["titit", "ttt", "tiitt"], model)
        settings = {"max_new_tokens": 5, "do_sample": False}
        expected = model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(model.generate(**inputs, **settings), expected)
        length = inputs["input_ids"].shape[1] + 8
        static = StaticCache(model.config.get_text_config(), max_cache_len=length)
        assert torch.equal(model.generate(**inputs, **settings, past_key_values=static), expected)
        beams = model.generate(**inputs, **settings, num_beams=2, use_cache=False)
        assert torch.equal(model.generate(**inputs, **settings, num_beams=2), beams)

    def test_a_conversation_goes_on_from_its_cache_by_text(self):
        model = make_released()
        inputs = make_inputs(["titittt"], model)
        with torch.no_grad():
            first = {name: value[:, :-4] for name, value in inputs.items() if name != "pixel_values"}
            cache = model(**first, pixel_values=inputs["pixel_values"], use_cache=True).past_key_values
            logits = model(input_ids=inputs["input_ids"][:, -4:], past_key_values=cache).logits
            torch.testing.assert_close(logits, model(**inputs).logits[:, -4:], atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("begun_with", ["tt", "tit"])
    def test_pictures_after_what_is_cached_are_refused(self, begun_with):
        model = make_released()
        cache = model(**make_inputs([begun_with], model), use_cache=True).past_key_values
        length = cache.get_seq_length()
        inputs = make_inputs(["it"], model)
        with pytest.raises(ValueError, match=rf"the {length} tokens before them.*without past_key_values"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache)

    @pytest.mark.parametrize("chunk", [4, 7])
    def test_a_prefill_in_chunks_is_refused(self, chunk):
        model = make_released()
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**make_inputs(["titit"], model), max_new_tokens=2, prefill_chunk_size=chunk)


class TestRefusals:
    def test_image_memory(self):
        model = make_released()
        inputs = make_inputs(["tit"], model)
        with pytest.raises(ValueError, match="'mmca_released' cannot use image memory"):
            model.encode_images(inputs["pixel_values"])

    def test_numbered_keys(self):
        with pytest.raises(
            StrictDataclassError, match="`image_number_keys` is not for multimodal_attention='mmca_released'"
        ):
            make_config(multimodal_attention="mmca_released", image_number_keys=True)

    def test_flex_attention(self):
        mask = create_block_mask(lambda batch, head, query, key: query >= key, 1, None, 8, 8, device="cpu")
        with pytest.raises(ValueError, match="'mmca_released' needs attn_implementation 'eager' or 'sdpa'"):
            create_released_mask(mask, torch.ones(1, 8, dtype=torch.bool), 0, torch.float32, "flex_attention")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "mmca_released" in record.getMessage()]


def test_a_model_warns_once_and_says_how_to_leave_it(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        model = make_released()
        [message] = warnings_of(caplog)
        assert "from_pretrained(..., multimodal_attention='mmca')" in message
        model.save_pretrained(tmp_path)
        caplog.clear()
        AutoModel.from_pretrained(tmp_path)
        assert len(warnings_of(caplog)) == 1
        caplog.clear()
        left = AutoModel.from_pretrained(tmp_path, multimodal_attention="mmca")
        assert warnings_of(caplog) == []
    inputs = make_inputs(["titit"], model)
    with torch.no_grad():
        expected = make_model().eval()
        expected.load_state_dict(model.state_dict())
        assert torch.equal(left(**inputs).logits, expected(**inputs).logits)


class ReleasedVit(nn.Module):
    """The names of the released `vit` projector."""

    def __init__(self, vision_config, hidden_size):
        super().__init__()
        self.vis_layer = CLIPEncoderLayer(vision_config)
        self.projection = nn.Sequential(
            nn.Linear(vision_config.hidden_size, hidden_size), nn.LayerNorm(hidden_size, eps=1e-12)
        )

    def forward(self, features):
        return self.projection(self.vis_layer(features, attention_mask=None))


class ReleasedPerceiver(nn.Module):
    """
    The names of the released `perceiver` projector: 16 × 16 queries, one head for 128 features. Its table of positions is
    frozen when it is made, and trained all the same: the script makes the whole projector trainable afterwards.
    """

    def __init__(self, vision_config, hidden_size):
        super().__init__()
        rows, columns = np.divmod(np.arange(256), 16)
        exponents = np.arange(hidden_size // 4) / (hidden_size / 4)
        angles = [np.outer(places, 10000.0**-exponents) for places in (columns, rows)]
        table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
        self.pos_embed = nn.Parameter(torch.from_numpy(table).float(), requires_grad=False)
        self.query = nn.Parameter(torch.randn(256, hidden_size))
        self.kv_proj = nn.Linear(vision_config.hidden_size, hidden_size)
        self.attn = nn.MultiheadAttention(hidden_size, hidden_size // 128, batch_first=True)
        self.ln_q = nn.LayerNorm(hidden_size, eps=1e-12)
        self.ln_kv = nn.LayerNorm(hidden_size, eps=1e-12)
        self.projection = nn.Sequential(nn.LayerNorm(hidden_size, eps=1e-12), nn.Linear(hidden_size, hidden_size))

    def forward(self, features):
        patches = self.ln_kv(self.kv_proj(features[:, 1:]))
        side, positions = round(patches.shape[1] ** 0.5), self.pos_embed
        if side != 16:
            grid = positions.float().reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
            grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            positions = grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(self.pos_embed)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(features), -1, -1)
        return self.projection(self.attn(queries, patches + positions, patches)[0])


def train_released(projection, features, steps: int = 4) -> None:
    """As the released script does: whatever was frozen in the projector is trained."""
    projection.requires_grad_(True)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.01)
    target = torch.randn_like(projection(features))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(projection(features), target).backward()
        optimizer.step()


class ReleasedCheckpoint:
    """A tiny checkpoint in the released layout, with what its projector makes of pictures."""

    def __init__(self, folder, projector="baseline", image_size=16, patch_size=4, hidden_size=64, base_vocab_size=None):
        torch.manual_seed(0)
        base = base_vocab_size or len(make_tokenizer())
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": image_size, "patch_size": patch_size,
        }  # fmt: skip
        text = {
            "vocab_size": base + 2, "hidden_size": hidden_size, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 2048,
        }  # fmt: skip
        vision_config = CLIPVisionConfig(**vision)
        self.tower = CLIPVisionModel(vision_config).eval()
        self.decoder = LlamaForCausalLM(LlamaConfig(**text)).eval()
        self.embedding = nn.Embedding(base + 2, hidden_size)
        makers = {"vit": ReleasedVit, "perceiver": ReleasedPerceiver}
        if projector in makers:
            self.projection = makers[projector](vision_config, hidden_size)
        else:
            self.projection = nn.Sequential(nn.Linear(32, hidden_size), nn.LayerNorm(hidden_size, eps=1e-12))
        for parameter in self.projection.parameters():
            if parameter.dim() == 1:  # norms and biases, which start at one and zero
                nn.init.normal_(parameter)
        if projector == "perceiver":
            train_released(self.projection, torch.randn(2, 1 + (image_size // patch_size) ** 2, 32))
        self.weights = {
            **{f"vis_encoder.vision_model.{name}": weight for name, weight in self.tower.state_dict().items()},
            **{f"lang_decoder.{name}": weight for name, weight in self.decoder.state_dict().items()},
            **{f"lang_embed.{name}": weight for name, weight in self.embedding.state_dict().items()},
            **{f"projection.{name}": weight for name, weight in self.projection.state_dict().items()},
        }
        self.config = {
            "projector": projector, "vision_config": vision, "text_config": text, "image_token_id": base + 1,
            "base_vocab_size": base,
        }  # fmt: skip
        self.folder = folder

    def convert(self, *arguments):
        torch.save(self.weights, self.folder / "pytorch_model.bin")
        (self.folder / "config.json").write_text(json.dumps(self.config))
        paths = {"checkpoint": "pytorch_model.bin", "config": "config.json", "output": "converted"}
        given = [part for name, path in paths.items() for part in (f"--{name}", str(self.folder / path))]
        converter.main([*given, *map(str, arguments)])
        return AutoModel.from_pretrained(self.folder / "converted").eval()


class TestPositions:
    """The table of positions of the released perceiver: a weight, which begins as sines and cosines."""

    def make(self, patch_size=8):
        settings = {"projector": "perceiver_released", "num_query_tokens": 4}
        return make_model(**settings, vision={"image_size": 16, "patch_size": patch_size})

    def pictures(self):
        return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def table(self, side: int, hidden_size: int) -> torch.Tensor:
        """By its definition, number by number."""
        quarter = hidden_size // 4
        frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
        rows = [
            [
                wave(place * frequency)
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for frequency in frequencies
            ]
            for row in range(side)
            for column in range(side)
        ]
        return torch.tensor(rows)

    def test_a_new_model_begins_with_the_table(self, tmp_path):
        torch.testing.assert_close(self.make().model.multi_modal_projector.positions.detach(), self.table(2, 64))
        released = ReleasedCheckpoint(tmp_path, hidden_size=128)
        tower, decoder = released.tower, released.decoder
        joined = VisualChatForCausalLM.from_vision_text_pretrained(tower, decoder, projector="perceiver_released")
        positions = joined.model.multi_modal_projector.positions
        torch.testing.assert_close(positions.detach(), self.table(16, 128), atol=1e-5, rtol=0)
        assert positions.requires_grad

    @pytest.mark.parametrize("patch_size", [8, 4], ids=["of the queries' grid", "of another grid"])
    def test_a_folder_without_one_computes_as_before_and_warns_of_nothing(self, patch_size, tmp_path, caplog):
        model = self.make(patch_size)
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        torch.testing.assert_close(weights.pop("model.multi_modal_projector.positions"), self.table(2, 64))
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        transformers_logging.enable_propagation()
        try:
            with caplog.at_level(logging.WARNING):
                old, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        finally:
            transformers_logging.disable_propagation()
        assert caplog.messages == [] and not any(report.values())
        with torch.no_grad():
            found, expected = (one.get_image_features(self.pictures()).pooler_output for one in (old, model))
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=0, rtol=0)

    def test_what_is_trained_is_saved_and_loaded(self, tmp_path):
        model = self.make(patch_size=4)
        model.freeze_for_alignment()
        projector = model.model.multi_modal_projector
        before = projector.positions.detach().clone()
        optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
        torch.stack(model.get_image_features(self.pictures()).pooler_output).square().sum().backward()
        optimizer.step()
        assert not torch.isclose(projector.positions, before, atol=1e-4).any(-1).all()
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(again.model.multi_modal_projector.positions, projector.positions)


@pytest.fixture
def checkpoint(tmp_path):
    return ReleasedCheckpoint(tmp_path)


class TestConverter:
    @pytest.mark.skipif(not PARITY.is_dir(), reason=f"needs {PARITY}")
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("variant", ["mmca_released", "causal"])
    def test_parity_with_the_released_code(self, variant, implementation, tmp_path):
        converter.main([
            "--checkpoint", str(PARITY / "released_linear_pytorch_model.bin"),
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
            r"lacks 2 \(lang_embed.weight, projection.1.bias\) and has 1 that have no place in this model"
            r" \(vis_encoder.conv1.weight\)"
        )
        with pytest.raises(ValueError, match=message):
            checkpoint.convert()
        assert not (checkpoint.folder / "converted").exists()

    def test_another_shape_is_named_with_both(self, checkpoint):
        checkpoint.config["text_config"]["vocab_size"] += 1
        rows = checkpoint.config["text_config"]["vocab_size"]
        with pytest.raises(ValueError, match=rf"lang_embed.weight has the shape \({rows - 1}, 64\), but .* \({rows}, 64\)"):
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
        with pytest.raises(ValueError, match=r"projection.pos_embed has the shape \(64, 128\), but .* \(256, 128\)"):
            released.convert()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"projector": "linear"}, "`projector` is 'linear', use one of baseline, vit, perceiver"),
            ({"base_vocab_size": 400}, "`vocab_size` of `text_config` is 322, but `base_vocab_size` is 400"),
            ({"image_token_id": 322}, "`image_token_id` is 322, use one from 320 to 321"),
            ({"lora": 8}, "must hold projector, .*, but holds projector, .*, lora"),
        ],
    )
    def test_a_wrong_config_is_refused(self, checkpoint, changes, message):
        base = checkpoint.config["base_vocab_size"]
        checkpoint.config |= changes
        for number in ("322", "320 ", "321"):
            message = message.replace(number, str(base + int(number) - 320) + " " * number.endswith(" "))
        with pytest.raises(ValueError, match=message):
            checkpoint.convert()

    def test_lora_factors_are_added_or_left_out_as_told(self, checkpoint):
        layer = "lang_decoder.model.layers.0.mlp.up_proj"
        right, left = torch.randn(64, 4), torch.randn(4, 48)
        weight = checkpoint.weights[f"{layer}.weight"].clone()
        checkpoint.weights |= {f"{layer}.lora_right_weight": right, f"{layer}.lora_left_weight": left}
        with pytest.raises(ValueError, match=rf"2 LoRA factors \({layer}.lora_right_weight, .*--lora fused.*--lora unfused"):
            checkpoint.convert()

        def converted(lora):
            return checkpoint.convert("--lora", lora).model.language_model.layers[0].mlp.up_proj

        assert torch.equal(converted("fused").weight, weight)
        states = torch.randn(2, 64)
        expected = states @ weight.T + (states @ right @ left) / 4
        torch.testing.assert_close(converted("unfused")(states), expected, atol=1e-5, rtol=1e-5)
        del checkpoint.weights[f"{layer}.lora_left_weight"]
        with pytest.raises(ValueError, match=f"The LoRA of {layer} lacks {layer}.lora_left_weight"):
            checkpoint.convert("--lora", "fused")
        del checkpoint.weights[f"{layer}.lora_right_weight"]
        with pytest.raises(ValueError, match="--lora fused was given, but the checkpoint holds no LoRA factors"):
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
        assert "No processor was written, for want of --tokenizer" in printed
        assert "give each sample's last picture first" in printed
        assert not (checkpoint.folder / "converted" / "processor_config.json").exists()

    def test_another_tokenizer_is_refused(self, checkpoint, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        base = len(make_tokenizer())
        with pytest.raises(ValueError, match=rf"id of <image> is {base}, but `image_token_id` is {base + 1}"):
            checkpoint.convert("--tokenizer", tmp_path / "tokenizer")
