"""Writes tiny decoders as GGUF files, as llama.cpp's converter names and orders what is in them."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, decoder, tokenizer: PreTrainedTokenizerBase, rope_scaling: str | None = None) -> None:
    """
    Matrices in 8 bits (Q8_0), where their width is a multiple of 32; all else in float32. `rope_scaling` is written as for
    LLaMA 3 (`"llama3"`: factors of the frequencies) or by its name (`"yarn"`).
    """
    config = decoder.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if rope_scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    elif rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_scaling))
    write_tokenizer(writer, tokenizer)
    for name, weight in decoder.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        *inside, kind = name.removeprefix("model.layers.").split(".")
        block = f"blk.{inside.pop(0)}." if name.startswith("model.layers.") else ""
        values = weight.float().numpy()
        if config.model_type == "llama" and inside[-1] in ("q_proj", "k_proj"):
            values = interleave(values, config.num_attention_heads if inside[-1] == "q_proj" else config.num_key_value_heads)
        add_tensor(writer, f"{block}{NAMES['.'.join(inside)]}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    if values.ndim == 2 and values.shape[1] % 32 == 0:
        quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, values)


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, transformers the two halves of a head."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    special = {tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
