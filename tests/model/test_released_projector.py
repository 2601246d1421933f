"""The projector `perceiver_released`."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
)
from transformers.utils import logging as transformers_logging

from helpers.released import ReleasedCheckpoint
from helpers.tiny import make_model
from modeling_visualchat import VisualChatForCausalLM


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
