"""A process that knows the package only through the folder that it loads."""

import subprocess
import sys
import textwrap


CODE_FILES = {
    "attention_visualchat.py",
    "chat_rounds_visualchat.py",
    "chat_saving_visualchat.py",
    "chat_streaming_visualchat.py",
    "chat_template_visualchat.py",
    "chat_visualchat.py",
    "configuration_visualchat.py",
    "cross_attention_visualchat.py",
    "cross_cache_visualchat.py",
    "cross_weights_visualchat.py",
    "decoder_layer_visualchat.py",
    "decoder_visualchat.py",
    "decoders_visualchat.py",
    "distributed_visualchat.py",
    "generation_visualchat.py",
    "image_inputs_visualchat.py",
    "image_loading_visualchat.py",
    "image_memory_folder_visualchat.py",
    "image_memory_visualchat.py",
    "input_checks_visualchat.py",
    "joining_visualchat.py",
    "kept_logits_visualchat.py",
    "messages_visualchat.py",
    "modality_attention_visualchat.py",
    "modality_cache_visualchat.py",
    "modality_kernels_visualchat.py",
    "modality_positions_visualchat.py",
    "modality_prefix_visualchat.py",
    "modeling_visualchat.py",
    "processing_visualchat.py",
    "projector_visualchat.py",
    "released_attention_visualchat.py",
    "released_projector_visualchat.py",
    "sequence_attention_visualchat.py",
    "sequence_cache_visualchat.py",
    "towers_visualchat.py",
    "weight_checks_visualchat.py",
    "weight_fingerprint_visualchat.py",
}


PRELUDE = """
import sys
sys.modules["modeling_visualchat"] = None  # importing it raises
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
"""


def run_elsewhere(code: str, cwd, **variables) -> None:
    """Runs code in a fresh process that knows this package only through the folder it loads."""
    assignments = "".join(f"{name} = {str(value)!r}\n" for name, value in variables.items())
    script = PRELUDE + assignments + textwrap.dedent(code)
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
