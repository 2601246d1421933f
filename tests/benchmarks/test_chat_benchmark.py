"""The benchmark of a chat's rounds, at a toy size."""

from benchmarks import chat_rounds


def test_the_rounds_of_a_chat_are_compared():
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sides = chat_rounds.make_model_and_processor(text, {**vision, "image_size": 16, "patch_size": 8})
    seconds = chat_rounds.measure_rounds(*sides, rounds=3, repeats=2)
    assert [len(rounds) for rounds in seconds.values()] == [3, 3]
    assert len(chat_rounds.to_results(seconds)) == 3
