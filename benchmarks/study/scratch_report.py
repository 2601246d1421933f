# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What docs/study.md says of the study from scratch, written from `study_results.json` and nothing else."""

from statistics import mean

from benchmarks.study.results import Study, interval, paired
from benchmarks.study.scratch_runs import ALIGNMENT_RATE, CHANGES, DECODER_RATE, REGIMES, WARMUP_STEPS
from benchmarks.study.tables import (
    headline_table,
    memory_text,
    percent,
    result_sections,
    robustness_table,
    robustness_text,
    share_table,
    signed,
    table,
)


# What the published grid says; the numbers are those of the tables
RECOMMENDATION = """\
- **Of these, take `multimodal_attention="mmca_merged", image_number_keys=True` for a decoder that you train yourself.** In
  the end it is level with causal attention on both tasks and in all regimes, and an additional image that no question is
  about changes no more answers. It also has what causal attention cannot have: image memory and the cheaper prefill. With
  few training conversations and a frozen decoder it is behind causal attention.
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


def describe(study: Study) -> str:
    """The document."""
    sections = [
        introduction(study),
        "## What to take\n",
        headline_table(study),
        RECOMMENDATION,
        *result_sections(study, "study"),
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
    return f"""# From scratch

Written by `python -m benchmarks.study.run scratch --grid {study.grid}` from `study_results.json`, which holds every number
below: {len(study.results)} jobs, {study.minutes:.0f} minutes of one core, on {study.machine};
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


def attention_table(study: Study, task: str) -> str:
    layers = range(len(study.runs(task, "frozen", "causal")[0]["image_attention"]["images"]))
    head = [task, *(f"layer {layer + 1}: images" for layer in layers), *(f"layer {layer + 1}: asked" for layer in layers)]
    rows = []
    for variant in study.variants:
        shares = [run["image_attention"] for run in study.runs(task, "frozen", variant)]
        cells = [mean(one[name][layer] for one in shares) for name in ("images", "asked") for layer in layers]
        rows.append([f"`{variant}`", *(f"{100 * cell:.0f}" for cell in cells)])
    return table(head, rows) + "\n"


def ablation_sections(study: Study) -> list[str]:
    if not study.changes:
        return []
    base = study.runs(study.tasks[0], "frozen", "mmca, numbered")
    rows = [["linear projector", percent(interval([run["accuracy"] for run in base])), ""]]
    for change in study.changes:
        runs = study.changed(change)
        if not change.endswith("samples"):
            shown = signed(paired(base, runs, lambda run: run["accuracy"]))
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
