"""Decoders from GGUF files: dequantized, joined, saved and trained."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from helpers.gguf_files import write_gguf
from helpers.modality import forward
from helpers.tiny import make_config, make_inputs, make_tokenizer
from modeling_visualchat import VisualChatForCausalLM
from modeling_visualchat.decoders_visualchat import DECODERS


FILE = "tiny.Q8_0.gguf"


def make_parts(folder, decoder="llama", **settings):
    """A tower, and a decoder in a GGUF file. Returns the decoder that was written."""
    torch.manual_seed(0)
    # A head size of 128 is what transformers takes for Qwen3, because it does not read it from the file
    text = {
        "vocab_size": len(make_tokenizer()),
        "tie_word_embeddings": True,
        **({"head_dim": 128} if decoder == "qwen3" else {}),
    }
    config = make_config(decoder=decoder, text=text)
    CLIPVisionModel(config.vision_config).save_pretrained(folder / "vision")
    stock = DECODERS[decoder].causal_lm_class(config.text_config).eval()
    (folder / "text").mkdir()
    write_gguf(folder / "text" / FILE, stock, make_tokenizer(), **settings)
    return stock


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "qwen3"])
def test_a_gguf_decoder_joins_dequantized_and_saves(decoder, tmp_path):
    written = make_parts(tmp_path, decoder)
    joined = VisualChatForCausalLM.from_vision_text_pretrained(
        str(tmp_path / "vision"),
        str(tmp_path / "text"),
        gguf_file=FILE,
        image_number_token_ids=[[5]],
        image_number_keys=True,
    )
    assert joined.dtype == torch.float32
    assert "quantization_config" not in joined.config.text_config.to_dict()
    joined.save_pretrained(tmp_path / "joined")
    again = AutoModel.from_pretrained(tmp_path / "joined")
    inputs = make_inputs(["tttt"], joined)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "text", gguf_file=FILE)
    size = stock.config.vocab_size
    ours = forward(again, inputs).logits[..., :size]
    torch.testing.assert_close(ours, forward(stock, inputs).logits, atol=1e-5, rtol=1e-5)
    exact = forward(written, inputs).logits
    assert (ours - exact).norm() / exact.norm() < 0.05  # 8 bits a weight
    assert forward(again, make_inputs(["ti"], again)).logits.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text", gguf_file=FILE)
    assert tokenizer.decode(tokenizer("a cute black cat").input_ids, skip_special_tokens=True) == "a cute black cat"


@pytest.mark.parametrize(
    ("rope_scaling", "found"),
    [("yarn", r"llama\.rope\.scaling\.type 'yarn'"), ("llama3", r"a tensor rope_freqs\.weight")],
)
def test_what_transformers_does_not_read_from_gguf_is_refused(rope_scaling, found, tmp_path):
    make_parts(tmp_path, rope_scaling=rope_scaling)
    with pytest.raises(ValueError, match=rf"{FILE} in .* scales its rotary positions \({found}\)"):
        VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"), gguf_file=FILE)


def test_files_that_cannot_be_used_are_named(tmp_path):
    make_parts(tmp_path)
    parts = [str(tmp_path / "vision"), str(tmp_path / "text")]
    with pytest.raises(OSError, match=r"nothing\.gguf"):
        VisualChatForCausalLM.from_vision_text_pretrained(*parts, gguf_file="nothing.gguf")
    (tmp_path / "text" / "other.gguf").write_bytes(b"no such file" * 9)
    with pytest.raises(ValueError, match=r"other\.gguf in .* cannot be read as GGUF: GGUF magic invalid"):
        VisualChatForCausalLM.from_vision_text_pretrained(*parts, gguf_file="other.gguf")
    whole = (tmp_path / "text" / FILE).read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "text" / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf in .* cannot be read as GGUF"):
            VisualChatForCausalLM.from_vision_text_pretrained(*parts, gguf_file="cut.gguf")
