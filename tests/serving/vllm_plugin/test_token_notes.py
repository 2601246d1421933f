"""What rides in the positions of tokens comes back out of them, cut anywhere."""

import torch

from visualchat.serving.vllm.token_notes import SEEN, read_notes, write_notes


def test_notes_of_a_prompt_with_two_images():
    positions, offset = write_notes(9, [(2, 3), (6, 3)], tokens_per_number=3)
    notes = read_notes(positions)
    assert notes.rotary.tolist() == list(range(9))
    assert notes.numbers.tolist() == [0, 0, 1, 1, 1, 0, 2, 2, 2]
    assert notes.is_image.tolist() == [number > 0 for number in notes.numbers]
    assert notes.has_seen.tolist() == [False, False] + [True] * 7
    generated = torch.full((3, 1), 9 + offset)  # vLLM's own: the same in all rows
    for cut, rotary, seen in ((positions[:, 3:5], [3, 4], True), (positions[:, :2], [0, 1], False), (generated, [9], True)):
        part = read_notes(cut)
        assert part.rotary.tolist() == rotary and set(part.has_seen.tolist()) == {seen}
    assert not read_notes(generated).is_image.any()


def test_each_token_has_a_number_where_numbers_are_learned():
    positions, _ = write_notes(7, [(0, 2), (4, 2)], tokens_per_number=1)
    assert read_notes(positions).numbers.tolist() == [1, 2, 0, 0, 3, 4, 0]


def test_text_has_plain_positions():
    positions, offset = write_notes(3, [], tokens_per_number=5)
    assert offset == 0 and positions.tolist() == [[0, 1, 2]] * 3
    assert positions.max() < SEEN
