# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The study's results as `study_results.json`, and from it, and nothing else, `study.md` and its figures.

    python -m benchmarks.study.report docs  # writes them again from the JSON
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

from benchmarks.study.figures import draw_curves, draw_differences
from benchmarks.study.results import Study, accuracy_at, difference, interval, paired, samples_to_reach
from benchmarks.study.runs import ALIGNMENT_RATE, CHANGES, DECODER_RATE, REGIMES, WARMUP_STEPS


LEVELS = (0.8, 0.9, 0.95)
# What the published grid says; the numbers are those of the tables
RECOMMENDATION = """\
- **For a new model, take `multimodal_attention="mmca_merged", image_number_keys=True`.** In the end it is level with causal
  attention on both tasks and in all regimes, and an additional image that no question is about changes no more answers. It
  also has what causal attention cannot have: image memory and the cheaper prefill. With few training conversations and a
  frozen decoder it is behind causal attention.
- `"mmca"`, the paper's definition, learned more slowly than causal attention. Its mean was lower at the end in every column,
  most where the decoder is frozen after it was trained on text, which is the paper's recipe. There, one softmax instead of
  the sum of two made up for part of the difference, and numbered keys for the rest.
- Numbered keys are what lets MMCA tell images apart: without them, an additional image or another order changes answers.
  Causal attention does not need them.
- All variants come closer together if the decoder is trained too, or was trained before with images and the same attention.
- No variant answers well about more images than its training conversations had.

The models and images are small and the seeds few, so the intervals are wide. Measure on your own data before you depend on
it.
"""


def write_report(grid: str, results: list[dict], folder: Path) -> None:
    """
    Args:
        grid (`str`): Its name.
        results (`list[dict]`): Of all jobs, see `study.run_jobs`.
        folder (`Path`): Where everything is written.
    """
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    study = {
        "grid": grid,
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("torch", "transformers", "scikit-learn", "peft")},
        "results": _round(results),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study_results.json").write_text(json.dumps(study, separators=(",", ":")) + "\n")
    write_document(folder)


def write_document(folder: Path) -> None:
    """Writes `study.md` and its figures from `study_results.json`, which is in the same folder."""
    study = Study(json.loads((folder / "study_results.json").read_text()))
    draw_curves(study, folder / "study_curves.png")
    draw_differences(study, folder / "study_differences.png")
    (folder / "study.md").write_text(describe(study))


def percent(value: tuple[float, float], sign: str = "") -> str:
    return f"{100 * value[0]:{sign}.1f} ± {100 * value[1]:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe(study: Study) -> str:
    """The document."""
    sections = [
        introduction(study),
        "## What to take\n",
        headline_table(study),
        RECOMMENDATION,
        "## Accuracy\n",
        "Exact answers to questions about images that no training stage has seen, in percent: mean over seeds ± half of the"
        " 95 % interval (Student's t). Each question is asked after the true answers of the earlier rounds.\n",
        *[accuracy_table(study, task) for task in study.tasks],
        "![Accuracy against conversations](study_curves.png)\n",
        "## Differences\n",
        "In percentage points, paired by seed, after the largest and the smallest number of training conversations. **Bold**"
        " where the 95 % interval excludes zero; among this many comparisons some do so by chance.\n",
        difference_table(study),
        "![Differences from causal attention](study_differences.png)\n",
        "## Conversations to reach a level\n",
        "How many training conversations it takes to reach an accuracy: median over seeds, interpolated between measurements"
        " on a logarithmic scale. – where a seed did not reach it.\n",
        reach_table(study),
        "## Loss\n",
        "Mean loss of an answer's token on held-out conversations, in nats, after the largest number of training"
        " conversations.\n",
        by_regime(study, lambda runs: "{:.3f} ± {:.3f}".format(*interval([run["loss"] for run in runs]))),
        "## By kind of question, images seen, and round\n",
        "Accuracy in percent with the decoder frozen, all seeds together.\n",
        *[share_table(study, task, name) for task in study.tasks for name in ("kind", "images", "round")],
        "## When images change\n",
        robustness_text(study),
        *[robustness_table(study, task) for task in study.tasks],
        "## Where attention goes\n",
        "For the tokens that predict the answer to a question about one of three images, by layer, in percent, decoder"
        " frozen, mean over seeds: the share of all attention that goes to images; and of that, the share that goes to the"
        " image that the question is about (a third if it made no difference). `mmca` gives images and text a weight of 1"
        " each, hence 50.\n",
        *[attention_table(study, task) for task in study.tasks],
        "## Image memory\n",
        memory_text(study),
        *ablation_sections(study),
    ]
    return "\n".join(sections) + "\n"


def introduction(study: Study) -> str:
    settings = study.settings
    return f"""# Causal attention, MMCA and merged MMCA, measured

Written by `python -m benchmarks.study.run --grid {study.grid}` from `study_results.json`, which holds every number below:
{len(study.results)} jobs, {study.minutes:.0f} minutes of one core, on {study.machine};
{", ".join(f"{name} {number}" for name, number in study.versions.items())}.

- **Images**: scikit-learn's scanned digits (1,797; turned and shifted for training), and 16 × 16 patches of its two
  sample photographs, with questions about their brightness and texture. No training stage sees a test image; all patches of
  one 64 × 64 block are in the same split.
- **Models**: a CLIP tower of 2 layers × 64, trained on the labels of both ({settings["tower_steps"]} steps) and always
  frozen, 5 tokens per image; a LLaMA of 3 layers × 128, trained on both kinds of conversation with words in place of
  images ({settings["decoder_steps"]} steps); a linear projector. {len(study.seeds)} seeds; for each, all variants start
  from the same weights, projector included, and read the same conversations in the same order.
- **Training**: up to {study.sizes[-1]} conversations of 1 to 4 images and 1 to 4 rounds, each seen once, in batches of 32,
  with AdamW. Learning rates are constant after a warm-up of {WARMUP_STEPS} steps, so that the state of a run after N
  conversations is the end of a run of N conversations. The rate of projector and token embedding is {ALIGNMENT_RATE}, that
  of the decoder, where it is trained, {DECODER_RATE}. Both were chosen on the validation split of seed 0 and are the same
  for all variants.
- **Regimes**: {"; ".join(f"*{name}*: {REGIMES[name]}" for name in study.regimes)}.
- **Limits**: small models, small images, {len(study.seeds)} seeds, synthetic questions. What holds at 5 tokens per
  image and 128 dimensions need not hold at 257 and 4,096.
"""


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
    """First and other variant: each against causal, merging, numbering."""
    pairs = [("causal", variant) for variant in study.variants if variant != "causal"]
    pairs += [("mmca", "mmca_merged"), ("mmca, numbered", "mmca_merged, numbered"), ("causal, numbered", "mmca, numbered")]
    pairs += [("mmca", "mmca, numbered"), ("mmca_merged", "mmca_merged, numbered")]
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
                    value = difference(study, task, regime, first, other, size)
                    cell = percent(value, "+")
                    cells.append(f"**{cell}**" if abs(value[0]) > value[1] > 0 else cell)
        rows.append([f"`{other}` − `{first}`", *cells])
    return table(head, rows) + "\n"


def reach_table(study: Study) -> str:
    head = ["", *(f"{task}, {regime}: {level:.0%}" for task in study.tasks for regime in study.regimes for level in LEVELS)]
    rows = []
    for variant in study.variants:
        cells = []
        for task in study.tasks:
            for regime in study.regimes:
                for level in LEVELS:
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


def attention_table(study: Study, task: str) -> str:
    layers = range(len(study.runs(task, "frozen", "causal")[0]["image_attention"]["images"]))
    head = [task, *(f"layer {layer + 1}: images" for layer in layers), *(f"layer {layer + 1}: asked" for layer in layers)]
    rows = []
    for variant in study.variants:
        shares = [run["image_attention"] for run in study.runs(task, "frozen", variant)]
        cells = [mean(one[name][layer] for one in shares) for name in ("images", "asked") for layer in layers]
        rows.append([f"`{variant}`", *(f"{100 * cell:.0f}" for cell in cells)])
    return table(head, rows) + "\n"


def count_memory(study: Study) -> dict[str, int]:
    """Summed over all models that were compared."""
    compared = [result["memory"] for result in study.results if "memory" in result]
    totals = {name: sum(one[name] for one in compared) for name in ("questions", "tokens", "different")}
    return {"models": len(compared), **totals}


def memory_text(study: Study) -> str:
    totals = count_memory(study)
    return (
        f"The {totals['models']} models of seed {study.seeds[0]} that can use image memory answered every test question"
        f" twice, from `pixel_values` and from an `ImageMemory`: {totals['questions']} questions, {totals['tokens']} tokens,"
        f" of which **{totals['different']} differ**.\n"
    )


def ablation_sections(study: Study) -> list[str]:
    if not study.changes:
        return []
    base = study.runs(study.tasks[0], "frozen", "mmca, numbered")
    rows = [["linear projector", percent(interval([run["accuracy"] for run in base])), ""]]
    for change in study.changes:
        runs = study.changed(change)
        if not change.endswith("samples"):
            value = paired(base, runs, lambda run: run["accuracy"])
            shown = percent(value, "+")
            shown = f"**{shown}**" if abs(value[0]) > value[1] > 0 else shown
            rows.append([CHANGES[change], percent(interval([run["accuracy"] for run in runs])), shown])
    sections = [
        "## One thing changed\n",
        f"{study.tasks[0]}, `mmca, numbered`, decoder frozen: accuracy in percent after {study.sizes[-1]} conversations"
        " (half as many again where the table says so), and the difference from its first line in percentage points, paired"
        " by seed.\n",
        table(["", "accuracy", "difference"], rows) + "\n",
    ]
    joined = [change for change in study.changes if change.endswith("samples")]
    if joined:
        images = sorted({value for change in joined for run in study.changed(change) for value in run["by_images"]})
        kind = next(iter(base[0]["by_kind"]))
        rows = []
        for change in joined:
            runs = study.changed(change)
            kinds = [run["by_kind"][kind] for run in runs]
            cells = [100 * one["right"] / one["count"] for one in kinds]
            rows.append([CHANGES[change], percent(interval([cell / 100 for cell in cells]))])
        sections += [
            "What joining examples into longer conversations teaches: training on examples of one image and one question of"
            f" the kind `{kind}`, either apart or joined into conversations of one to four (the same examples, the same"
            f" number of steps), tested on the usual conversations of {images[0]} to {images[-1]} images. Accuracy on"
            " questions of that kind, in percent. In joined examples a question is always about the newest image, which can"
            " be learned without numbers.\n",
            table(["", f"`{kind}`"], rows) + "\n",
        ]
    return sections


def _round(value):
    if isinstance(value, dict):
        return {key: _round(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_round(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    write_document(Path(sys.argv[1]))
