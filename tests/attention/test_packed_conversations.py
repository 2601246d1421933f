"""Several conversations in one row of a batch, told apart by positions that begin again."""

import pytest
import torch
from transformers import DynamicCache

from helpers.tiny import make_inputs, make_model


VARIANTS = ["mmca", "mmca_merged", "causal"]
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


def pack(conversations: list[dict]) -> dict[str, torch.Tensor]:
    positions = [torch.arange(one["input_ids"].shape[1]) for one in conversations]
    pixel_values = [one["pixel_values"] for one in conversations if "pixel_values" in one]
    return {
        "input_ids": torch.cat([one["input_ids"] for one in conversations], dim=1),
        "position_ids": torch.cat(positions)[None],
        "pixel_values": torch.cat(pixel_values),
    }


def block_diagonal_mask(position_ids: torch.Tensor) -> torch.Tensor:
    owner_Q = (position_ids[0] == 0).cumsum(0)
    return ((owner_Q[:, None] == owner_Q) & torch.ones(len(owner_Q), len(owner_Q), dtype=torch.bool).tril())[None, None]


@pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestPackedConversations:
    def test_equal_those_that_stand_alone(self, implementation, variant, numbered):
        implementation = {"text_config": implementation, "vision_config": "sdpa"}
        model = make_model(implementation, multimodal_attention=variant, image_number_keys=numbered)
        conversations = [make_inputs([layout], model, seed) for seed, layout in enumerate(["titit", "tt", "iitt", "ti"])]
        with torch.no_grad():
            alone = torch.cat([model(**one).logits for one in conversations], dim=1)
            outputs = model(**pack(conversations))
        torch.testing.assert_close(outputs.logits, alone, atol=1e-5, rtol=1e-5)
        assert outputs.past_key_values is None  # which of them would go on?

    def test_may_be_longer_together_than_one_may_be(self, implementation, variant, numbered):
        implementation = {"text_config": implementation, "vision_config": "sdpa"}
        settings = {"multimodal_attention": variant, "image_number_keys": numbered}
        model = make_model(implementation, text={"max_position_embeddings": 16}, **settings)
        conversations = [make_inputs(["titit"], model, seed) for seed in range(2)]
        with torch.no_grad():
            assert model(**pack(conversations)).logits.shape[1] == 2 * 16
            with pytest.raises(ValueError, match=r"18 tokens long.*max_position_embeddings is 16"):
                model(**pack([make_inputs(["tititss"], model), *conversations]))

    def test_under_a_mask_of_four_dimensions(self, implementation, variant, numbered):
        implementation = {"text_config": implementation, "vision_config": "sdpa"}
        model = make_model(implementation, multimodal_attention=variant, image_number_keys=numbered)
        conversations = [make_inputs([layout], model, seed) for seed, layout in enumerate(["titit", "iitt"])]
        packed = pack(conversations)
        mask = block_diagonal_mask(packed["position_ids"])
        if model.config.text_config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        with torch.no_grad():
            alone = torch.cat([model(**one).logits for one in conversations], dim=1)
            logits = model(**packed, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)

    def test_learn_the_same(self, implementation, variant, numbered):
        implementation = {"text_config": implementation, "vision_config": "sdpa"}
        model = make_model(implementation, multimodal_attention=variant, image_number_keys=numbered).train().double()
        conversations = [make_inputs([layout], model, seed) for seed, layout in enumerate(["titt", "iitt"])]
        for one in conversations:
            one["pixel_values"] = one["pixel_values"].double()
        packed = pack(conversations)
        chosen = torch.randn(1, packed["input_ids"].shape[1], model.config.text_config.vocab_size, dtype=torch.double)
        gradients = []
        for batches in ([packed], conversations):
            model.zero_grad()
            logits = torch.cat([model(**batch, use_cache=False).logits for batch in batches], dim=1)
            (logits * chosen).sum().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-8, rtol=1e-8, msg=name)


def test_a_cached_conversation_counts_on_though_positions_are_given():
    model = make_model(image_number_keys=True)
    inputs = make_inputs(["titit"], model)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    split = 4 + model.config.image_seq_length
    with torch.no_grad():
        whole = model(**inputs).logits
        cache = DynamicCache(config=model.config)
        for part, picture in ((slice(None, split), slice(0, 1)), (slice(split, None), slice(1, 2))):
            outputs = model(
                input_ids=inputs["input_ids"][:, part],
                position_ids=positions[:, part],
                pixel_values=inputs["pixel_values"][picture],
                past_key_values=cache,
            )
            torch.testing.assert_close(outputs.logits, whole[:, part], atol=1e-5, rtol=1e-5)


def test_the_released_variant_refuses_them():
    model = make_model(multimodal_attention="mmca_released")
    conversations = [make_inputs([layout], model, seed) for seed, layout in enumerate(["titit", "iitt"])]
    with pytest.raises(
        ValueError, match="takes one conversation in each sequence of a batch, but `position_ids` begin again"
    ):
        model(**pack(conversations))
