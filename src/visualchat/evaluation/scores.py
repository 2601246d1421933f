# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Scores on labelled datasets, with 95 % confidence intervals, and paired differences between checkpoints.

Accuracies have Wilson's interval, which assumes independent answers. Losses and differences have bootstrap intervals,
resampled by conversation, since the rounds of one conversation are not independent.
"""

from collections import defaultdict
from math import sqrt

import numpy as np

from visualchat.evaluation.answers import is_exact, is_normalized_match


Z = 1.959964  # of a standard normal variable, 95 % lie within ± Z
RESAMPLES = 2000
MATCHES = {"exact": is_exact, "normalized": is_normalized_match}


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927)."""
    share = right / count
    centre = share + Z**2 / (2 * count)
    spread = Z * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    low, high = ((centre + sign * spread) / (1 + Z**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float]:
    """
    Percentile interval of a ratio of sums over conversations, which are drawn with replacement.

    Args:
        sums (`np.ndarray` of shape `(terms, conversations)`): The numerators. With one term the value is `sums[0] /
            counts[0]`; with two it is this ratio minus that of the second term, over the same conversations.
        counts (`np.ndarray` of shape `(terms, conversations)`): The denominators.
    """
    rng = np.random.default_rng(seed)
    signs = np.array([1, -1])[: len(sums)]
    values = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(sums.shape[1], size=sums.shape[1])
        values.append(float(signs @ (sums[:, drawn].sum(1) / counts[:, drawn].sum(1))))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def score(answers: dict[tuple[int, int], dict], losses: dict[int, dict], seed: int) -> dict:
    """
    Args:
        answers (`dict`): Entries with `answer`, `label` and `task`, by dialogue and round.
        losses (`dict`): Entries with `loss`, the sum over `tokens` tokens, by dialogue.
        seed (`int`): The seed of the bootstrap.

    Returns:
        The accuracies `exact` and `normalized`, each also by task and by round, and `loss`, the mean over tokens in nats.
    """
    by_task, by_round = defaultdict(list), defaultdict(list)
    for (_, number), entry in sorted(answers.items()):
        by_task[entry["task"]].append(entry)
        by_round[str(number)].append(entry)
    scores = {**_shares(list(answers.values()))}
    scores["by_task"] = {task: _shares(entries) for task, entries in sorted(by_task.items())}
    scores["by_round"] = {number: _shares(by_round[number]) for number in sorted(by_round, key=int)}
    if losses:
        sums, tokens = _columns(losses, sorted(losses))
        low, high = bootstrap_interval(sums[None], tokens[None], seed)
        value = float(sums.sum() / tokens.sum())
        scores["loss"] = {
            "value": value,
            "low": low,
            "high": high,
            "tokens": int(tokens.sum()),
            "conversations": len(losses),
        }
    return scores


def _shares(entries: list[dict]) -> dict[str, dict]:
    shares = {}
    for name, matches in MATCHES.items():
        right = sum(matches(entry["answer"], entry["label"]) for entry in entries)
        low, high = wilson_interval(right, len(entries))
        shares[name] = {"value": right / len(entries), "low": low, "high": high, "right": right, "count": len(entries)}
    return shares


def _columns(losses: dict[int, dict], indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([losses[index][name] for index in indices], dtype=float) for name in ("loss", "tokens"))


def compare(
    first: tuple[dict[tuple[int, int], dict], dict[int, dict]],
    other: tuple[dict[tuple[int, int], dict], dict[int, dict]],
    seed: int,
) -> dict:
    """
    How much higher the other checkpoint scores than the first, over the questions that both answered.

    Args:
        first, other: `answers` and `losses`, as for [`score`].

    Returns:
        The differences of `exact` and `normalized`, with the numbers of questions that only one of the two answered right;
        and the difference of `loss`.
    """
    differences = {}
    shared = sorted(first[0].keys() & other[0].keys())
    dialogues = {index: k for k, index in enumerate(sorted({index for index, _ in shared}))}
    for name, matches in MATCHES.items() if shared else ():
        right, counts = np.zeros((2, len(dialogues))), np.zeros((2, len(dialogues)))
        only = [0, 0]
        for key in shared:
            pair = [matches(answers[key]["answer"], answers[key]["label"]) for answers in (other[0], first[0])]
            right[:, dialogues[key[0]]] += pair
            counts[:, dialogues[key[0]]] += 1
            if pair[0] != pair[1]:
                only[pair.index(True)] += 1
        low, high = bootstrap_interval(right, counts, seed)
        value = float((right[0].sum() - right[1].sum()) / len(shared))
        differences[name] = {"value": value, "low": low, "high": high, "only_other": only[0], "only_first": only[1]}
    if indices := sorted(first[1].keys() & other[1].keys()):
        pairs = [_columns(losses, indices) for losses in (other[1], first[1])]
        sums, tokens = (np.stack(column) for column in zip(*pairs))
        low, high = bootstrap_interval(sums, tokens, seed)
        means = sums.sum(1) / tokens.sum(1)
        differences["loss"] = {"value": float(means[0] - means[1]), "low": low, "high": high}
    return differences
