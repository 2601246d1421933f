"""What a session does not show: this file alone uses its private names."""

import pytest

from helpers.chat import PROCESSOR, ROUNDS, hold
from modeling_visualchat.chat_streaming_visualchat import find_sure_part


@pytest.mark.parametrize("variant", ["mmca", "causal"])
def test_forks_share_tensors(models, variant):
    session = models[variant].start_chat(PROCESSOR)
    hold(session, ROUNDS[:3])
    fork = session.fork()
    for ours, theirs in zip(session._computed.cache.layers, fork._computed.cache.layers):
        for part, other in zip(*([layer.text, layer.images] if variant == "mmca" else [layer] for layer in (ours, theirs))):
            assert part.keys.data_ptr() == other.keys.data_ptr()


def test_no_piece_shows_what_is_cut_later():
    text = "A cat.\n\n### Image 12:\n### Question:\nx"
    for end in range(len(text)):
        assert "A cat.".startswith(find_sure_part(text[:end]))
    for line in ("### Size\n", "### Image x", "### Answers", "#### ", "###Q"):
        assert find_sure_part(f"a\n{line}") == f"a\n{line.rstrip(chr(10))}"
