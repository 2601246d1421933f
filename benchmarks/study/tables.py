# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The tables that both studies have."""

from collections.abc import Callable
from statistics import mean, median

from benchmarks.study.results import Study, accuracy_at, difference, interval, samples_to_reach


def percent(value: tuple[float, float], sign: str = "") -> str:
    return f"{100 * value[0]:{sign}.1f} ± {100 * value[1]:.1f}"


def signed(value: tuple[float, float]) -> str:
    """A difference, in bold where its interval excludes zero."""
    cell = percent(value, "+")
    return f"**{cell}**" if abs(value[0]) > value[1] > 0 else cell


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def headline_table(study: Study) -> str:
    """What docs/attention.md shows: the end of every run, and how much an image disturbs that no question is about."""
    head = ["attention", *(f"{task}, {regime}" for task in study.tasks for regime in study.regimes), "disturbed"]
    rows = []
    for variant in study.variants:
        cells = [
            percent(interval([run["accuracy"] for run in study.runs(task, regime, variant)]))
            for task in study.tasks
            for regime in study.regimes
        ]
        frozen = [run for task in study.tasks for run in study.runs(task, "frozen", variant)]
        disturbed = mean(run["robustness"]["distracted: answers that differ"] for run in frozen)
        rows.append([f"`{variant}`", *cells, f"{100 * disturbed:.1f}"])
    return table(head, rows) + "\n"


def accuracy_table(study: Study, task: str) -> str:
    sizes = study.headline_sizes()
    head = [f"{task}: attention", *(f"{regime}, {size}" for regime in study.regimes for size in sizes)]
    rows = [
        [
            f"`{variant}`",
            *(
                percent(interval([accuracy_at(run, size) for run in study.runs(task, regime, variant)]))
                for regime in study.regimes
                for size in sizes
            ),
        ]
        for variant in study.variants
    ]
    return table(head, rows) + "\n"


def list_comparisons(study: Study) -> list[tuple[str, str]]:
    """First and other variant: each against causal, merging, numbering, the prefix."""
    pairs = [("causal", variant) for variant in study.variants if variant != "causal"]
    pairs += [("mmca", "mmca_merged"), ("mmca, numbered", "mmca_merged, numbered"), ("causal, numbered", "mmca, numbered")]
    pairs += [("mmca", "mmca, numbered"), ("mmca_merged", "mmca_merged, numbered")]
    pairs += [(name, "mmca_merged, numbered, prefix") for name in ("mmca_merged, numbered", "causal, numbered")]
    return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(study.variants)]


def difference_table(study: Study) -> str:
    sizes = (study.sizes[-1], study.sizes[0])
    head = ["", *(f"{task}, {regime}, {size}" for task in study.tasks for regime in study.regimes for size in sizes)]
    rows = []
    for first, other in list_comparisons(study):
        cells = []
        for task in study.tasks:
            for regime in study.regimes:
                for size in sizes:
                    cells.append(signed(difference(study, task, regime, first, other, size)))
        rows.append([f"`{other}` − `{first}`", *cells])
    return table(head, rows) + "\n"


def reach_table(study: Study) -> str:
    head = [
        "",
        *(f"{task}, {regime}: {level:.0%}" for task in study.tasks for regime in study.regimes for level in study.levels),
    ]
    rows = []
    for variant in study.variants:
        cells = []
        for task in study.tasks:
            for regime in study.regimes:
                for level in study.levels:
                    reached = [samples_to_reach(run, level) for run in study.runs(task, regime, variant)]
                    cells.append("–" if None in reached else f"{median(reached):.0f}")
        rows.append([f"`{variant}`", *cells])
    return table(head, rows) + "\n"


def by_regime(study: Study, cell: Callable[[list[dict]], str]) -> str:
    head = ["", *(f"{task}, {regime}" for task in study.tasks for regime in study.regimes)]
    rows = [
        [f"`{variant}`", *(cell(study.runs(task, regime, variant)) for task in study.tasks for regime in study.regimes)]
        for variant in study.variants
    ]
    return table(head, rows) + "\n"


def share_table(study: Study, task: str, name: str) -> str:
    values = sorted({value for run in study.runs(task, "frozen", "causal") for value in run[f"by_{name}"]})
    rows = []
    for variant in study.variants:
        runs = study.runs(task, "frozen", variant)
        cells = []
        for value in values:
            entries = [run[f"by_{name}"][value] for run in runs if value in run[f"by_{name}"]]
            cells.append(f"{100 * sum(one['right'] for one in entries) / sum(one['count'] for one in entries):.1f}")
        rows.append([f"`{variant}`", *cells])
    return table([f"{task}, {name}", *values], rows) + "\n"


def robustness_text(study: Study) -> str:
    return (
        f"{study.settings['probes']} questions for each seed, each about one of three images; decoder frozen, in percent,"
        " mean over seeds. *Three images*: how many answers are right. *Distracted*: the same with a fourth image that no"
        " question is about, and how many answers differ from before. *Reordered*: the same with the images in another order"
        " and the number in the question changed to match (the image that it is about always moves). Then how many answers"
        " are right with 5, 6 and 8 images, where training had 4 at most. A model that finds images by their numbers alone"
        " would change no answer.\n"
    )


def robustness_table(study: Study, task: str) -> str:
    names = list(study.runs(task, "frozen", "causal")[0]["robustness"])
    rows = []
    for variant in study.variants:
        runs = study.runs(task, "frozen", variant)
        rows.append([f"`{variant}`", *(f"{100 * mean(run['robustness'][name] for run in runs):.1f}" for name in names)])
    return table([task, *names], rows) + "\n"


def count_memory(study: Study) -> dict[str, int]:
    """Summed over all models that were compared."""
    compared = [result["memory"] for result in study.results if "memory" in result]
    totals = {name: sum(one[name] for one in compared) for name in ("questions", "tokens", "different")}
    return {"models": len(compared), **totals}


def memory_text(study: Study) -> str:
    totals = count_memory(study)
    return (
        f"The {totals['models']} models of seed {study.seeds[0]} that can use image memory answered test questions"
        f" twice, from `pixel_values` and from an `ImageMemory`: {totals['questions']} questions, {totals['tokens']} tokens,"
        f" of which **{totals['different']} differ**.\n"
    )


def result_sections(study: Study, file: str) -> list[str]:
    """
    The sections on accuracy, on differences, on the conversations to reach a level, and on the loss.

    Args:
        study ([`Study`]): The results.
        file (`str`): How the names of its figures begin.
    """
    return [
        "## Accuracy\n",
        "Exact answers to questions about images that no training stage has seen, in percent: mean over seeds ± half of the"
        " 95 % interval (Student's t). Each question is asked after the true answers of the earlier rounds.\n",
        *[accuracy_table(study, task) for task in study.tasks],
        f"![Accuracy against conversations]({file}_curves.png)\n",
        "## Differences\n",
        "In percentage points, paired by seed, after the largest and the smallest number of training conversations. **Bold**"
        " where the 95 % interval excludes zero; among this many comparisons some do so by chance.\n",
        difference_table(study),
        f"![Differences from causal attention]({file}_differences.png)\n",
        "## Conversations to reach a level\n",
        "How many training conversations it takes to reach an accuracy: median over seeds, interpolated between measurements"
        " on a logarithmic scale. – where a seed did not reach it.\n",
        reach_table(study),
        "## Loss\n",
        "Mean loss of an answer's token on held-out conversations, in nats, after the largest number of training"
        " conversations.\n",
        by_regime(study, lambda runs: "{:.3f} ± {:.3f}".format(*interval([run["loss"] for run in runs]))),
    ]
