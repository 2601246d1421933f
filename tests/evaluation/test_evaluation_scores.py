"""Scores, their intervals, and a labelled set of digits."""

import numpy as np
import pytest

from visualchat.data import digits
from visualchat.evaluation import answers, scores
from visualchat.evaluation.conversations import read_labelled


class TestScores:
    def test_wilson(self):
        # Newcombe, Statistics in Medicine 17, 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
        for right, count, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))):
            assert scores.wilson_interval(right, count) == pytest.approx(expected, abs=5e-5)
        assert scores.wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
        assert scores.wilson_interval(20, 20)[1] == 1

    def test_bootstrap_is_seeded_and_covers(self):
        rng = np.random.default_rng(0)
        counts = np.full((1, 400), 10.0)
        sums = rng.normal(20, 5, size=(1, 400))
        low, high = scores.bootstrap_interval(sums, counts, seed=3)
        assert (low, high) == scores.bootstrap_interval(sums, counts, seed=3)
        mean, error = sums.mean() / 10, sums.std() / 10 / 20
        assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
        assert scores.bootstrap_interval(np.stack([sums[0], sums[0]]), np.repeat(counts, 2, 0), 0) == (0, 0)

    @pytest.mark.parametrize(
        "answer, label, exact, normalized",
        [
            ("a cat", "a cat", True, True),
            (" a cat\n", "a cat", True, True),
            ("A cat.", "cat", False, True),
            ("The  black, cat!", "black cat", False, True),
            ("black cats", "black cat", False, False),
            ("theatre", "atre", False, False),
            ("another", "other", False, False),
            ("", "A", False, False),
            ("a", "A", False, True),
            ("The", "A", False, False),
            ("", "", True, True),
            ("!", "?", False, False),
            ("3.5", "35", False, True),  # as SQuAD's scorer has it
        ],
    )
    def test_matches(self, answer, label, exact, normalized):
        assert answers.is_exact(answer, label) is exact
        assert answers.is_normalized_match(answer, label) is normalized

    def test_differences_are_paired(self):
        def entries(right):
            return {(k, 1): {"answer": "yes" if one else "no", "label": "yes", "task": ""} for k, one in enumerate(right)}

        first, other = entries([True, False, False, True]), entries([True, True, True, False, True])
        found = scores.compare((first, {}), (other, {}), seed=0)["exact"]
        assert (found["value"], found["only_other"], found["only_first"]) == (0.25, 2, 1)
        assert -1 <= found["low"] < 0.25 < found["high"] <= 1


def test_the_digits_become_a_labelled_set(tmp_path):
    digits.main(["--output", str(tmp_path / "digits.parquet"), "--conversations", "3"])
    dialogues, _ = read_labelled([str(tmp_path / "digits.parquet")])
    assert len(dialogues) == 3
    for dialogue in dialogues:
        assert not dialogue.fault
        assert {question.task for question in dialogue.questions} <= {"digit", "same", "larger", "even"}
        pictures, rounds, error = dialogue.open_images()
        assert rounds == len(dialogue.questions) and not error
        assert all(picture.size == (32, 32) for picture in pictures)
