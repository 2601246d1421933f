# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""transformers' common tests of processors, on VisualChat. `tests` is the package that `run.py` fetches."""

import unittest

from tests.test_processing_common import ProcessorTesterMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_visualchat import VisualChatProcessor


class VisualChatProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VisualChatProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["### Image 1:", "### Question:\nlower newer", "### Answer:\nupper older"], trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
        )

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_length": 5}
