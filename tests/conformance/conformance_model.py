# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""transformers' common tests of models and configurations, on VisualChat. `tests` is the package that `run.py` fetches."""

import unittest
from unittest.mock import patch

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatModel
from tests import test_modeling_common


# The tests look a class up by its name in the library's own tables, to see whether it has a head and what it is for
MODEL_MAPPING_NAMES["visualchat"] = "VisualChatModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["visualchat"] = "VisualChatForCausalLM"

VOCAB_SIZE = 99
# Above the ids 1 to 19 of the training test, and below what remains where a test takes 15 ids from the vocabulary
IMAGE_TOKEN_ID = 60


def text_ids(shape, vocab_size, rng=None, name=None) -> torch.Tensor:
    """The suite's random ids without the placeholder, which is an error where there is no image."""
    ids = ids_tensor(shape, vocab_size, rng, name)
    return ids.where(ids != IMAGE_TOKEN_ID, IMAGE_TOKEN_ID + 1)


class VisualChatModelTester:
    """Makes what the common tests run on: a tiny configuration, and a batch with one image in each row."""

    causal_lm_class = VisualChatForCausalLM
    is_training = True
    # The tests that compare attention implementations take seven rows, and fill up with ids of their own
    batch_size = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    text_length = 7

    def __init__(self, vision_fields: dict, text_fields: dict, **config_fields):
        self.config_fields = config_fields
        self.vision_config = {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 32,
            **vision_fields,
        }
        self.text_config = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            # The training test learns sequences that begin with 1, and the embedding of padding does not learn
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **text_fields,
        }
        self.image_seq_length = self.get_config().image_seq_length
        self.seq_length = self.text_length + self.image_seq_length

    def get_config(self) -> VisualChatConfig:
        return VisualChatConfig(
            vision_config=self.vision_config,
            text_config=self.text_config,
            image_token_id=IMAGE_TOKEN_ID,
            **self.config_fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[VisualChatConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = text_ids([self.batch_size, self.seq_length], VOCAB_SIZE)
        input_ids[:, 3 : 3 + self.image_seq_length] = IMAGE_TOKEN_ID
        size = config.vision_config.image_size
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, config.vision_config.num_channels, size, size]),
        }


class VisualChatTests(ModelTesterMixin, GenerationTesterMixin):
    """The tests of every variant."""

    all_model_classes = (VisualChatModel, VisualChatForCausalLM)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    # Of all parameters; `test_parameters_have_gradients` names the exceptions
    test_all_params_have_gradient = False
    config_fields = {}
    vision_fields = {}
    text_fields = {}
    # CLIP's pooled output alone goes through this norm, and it is not used
    without_gradient = ("vision_tower.post_layernorm.",)

    def setUp(self):
        self.model_tester = VisualChatModelTester(self.vision_fields, self.text_fields, **self.config_fields)
        self.config_tester = ConfigTester(self, VisualChatConfig, has_text_modality=False, **self.config_fields)
        draws_text = patch.object(test_modeling_common, "ids_tensor", text_ids)
        draws_text.start()
        self.addCleanup(draws_text.stop)

    # transformers hands no images to an `assistant_model`, and `generate` refuses one that needs them, as these tests bring
    ASSISTED = (
        "An assistant that needs images is refused by name: tests/generation/test_generation.py assists by a text model"
    )

    @unittest.skip(ASSISTED)
    def test_assisted_decoding_matches_greedy_search_0_random(self):
        pass

    @unittest.skip(ASSISTED)
    def test_assisted_decoding_matches_greedy_search_1_same(self):
        pass

    @unittest.skip(ASSISTED)
    def test_assisted_decoding_sample(self):
        pass

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_parameters_have_gradients(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = VisualChatForCausalLM(config).train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            expected = not name.startswith(tuple(f"model.{prefix}" for prefix in self.without_gradient))
            self.assertEqual(parameter.grad is not None, expected, name)


class VisualChatModelTest(VisualChatTests, TrainingTesterMixin, unittest.TestCase):
    """The defaults, which are the paper's: `mmca` and the linear projector."""

    model_tester = None

    def test_training_overfit(self):
        # The test reads the vocabulary's size off the outer config
        with patch.object(VisualChatConfig, "vocab_size", VOCAB_SIZE, create=True):
            super().test_training_overfit()


class VisualChatNumberedKeysTest(VisualChatTests, unittest.TestCase):
    config_fields = {"image_number_keys": True, "image_number_token_ids": [[5], [6], [5, 6]], "projector": "vit"}


class VisualChatQwen3Test(VisualChatTests, unittest.TestCase):
    """Another decoder, whose heads are normalized and larger than their share of the hidden size."""

    config_fields = {"image_number_keys": True, "image_number_token_ids": [[11], [12]]}
    text_fields = {"model_type": "qwen3", "head_dim": 16}


class VisualChatSiglipQwen2Test(VisualChatTests, unittest.TestCase):
    """A tower without a class token, and a decoder whose projections have biases."""

    config_fields = {"projector": "mlp"}
    vision_fields = {"model_type": "siglip_vision_model"}
    text_fields = {"model_type": "qwen2"}
    without_gradient = ()


class VisualChatDinov3MistralTest(VisualChatTests, unittest.TestCase):
    """A tower with registers and rotary positions."""

    config_fields = {"multimodal_attention": "mmca_merged", "projector": "pixel_shuffle"}
    vision_fields = {"model_type": "dinov3_vit", "num_register_tokens": 2}
    text_fields = {"model_type": "mistral", "sliding_window": None}


class VisualChatImagePrefixTest(VisualChatTests, unittest.TestCase):
    """Image tokens that attend to a constant text besides themselves."""

    # Below the 84 ids that remain where a test makes the vocabulary smaller
    config_fields = {"multimodal_attention": "mmca_merged", "image_prefix_ids": [11, 12, 13]}


class VisualChatMergedTest(VisualChatTests, unittest.TestCase):
    config_fields = {"multimodal_attention": "mmca_merged", "projector": "perceiver", "num_query_tokens": 4}


class VisualChatCausalTest(VisualChatTests, unittest.TestCase):
    """LLaVA's choices."""

    config_fields = {
        "multimodal_attention": "causal",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    without_gradient = ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm.")


class VisualChatCrossTest(VisualChatTests, unittest.TestCase):
    """Flamingo's choice: images do not pass through the decoder."""

    config_fields = {"multimodal_attention": "cross"}
