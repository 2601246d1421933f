# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What docs/study.md says of the study with pretrained parts, written from `study_pretrained_results.json` alone."""

from math import exp
from statistics import mean

from benchmarks.study.pretrained_runs import (
    BATCH_SIZE,
    CHANGED_VARIANT,
    GRIDS,
    LORA_CHANGES,
    RATES,
    REGIMES,
    TRIED_RATES,
    WARMUP_STEPS,
    list_jobs,
)
from benchmarks.study.results import Study, interval, paired
from benchmarks.study.tables import (
    by_regime,
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
- **With a frozen decoder, as in the paper's recipe, take `mmca_merged` with learned numbers and an image prefix.** For each
  of the three seeds it learned faster than causal attention (+20.1 ± 13.2 points). With learned numbers, causal attention
  comes near to it. A recipe that joins two parts makes such a model by default. It has what causal attention cannot have:
  image memory, with which the first token about four known images came in a third of the time.
- **With LoRA, causal attention was ahead**, by 5.6 ± 10.4 points of that model, and by more of all others. LoRA changed what
  the decoder answers to text alone; the frozen decoder kept all of it, whatever the attention.
- **`mmca`, the paper's definition, hardly learned with the decoder frozen, and was far behind with LoRA.** Such a decoder
  was pretrained without it. Three things together cure it, and no one of them is enough:
  - *One softmax.* The decoder never saw attention weights that sum to 2: before the first conversation `mmca` has no answer
    right, while `mmca_merged` has as many as causal attention. Half the weight on images helps with a prefix, but less.
  - *An image prefix.* Without it each image token is an attention sink; LoRA did not cure that within these conversations.
    The prefix adds 23.4 ± 12.8 points with the decoder frozen, and 29.0 ± 13.9 with LoRA.
  - *Learned numbers*, where the decoder is frozen. They help causal attention as well.
- **Nothing else clearly paid.** With all three, attention within an image was lower with the decoder frozen (46.6 ± 18.2,
  from 53.4 ± 16.1) and higher with LoRA (62.4 ± 11.7, from 58.3 ± 7.6), within the intervals. A learned weight of the second
  softmax and other positions of image keys changed little, and keys that are made of number tokens (`image_number_keys`)
  were worse than learned ones. So the config has no new fields.
- **`cross`** was far behind the best of the others in both regimes, and named none of three images. It has three times the
  weights to train. Its training step, and its first token about new images, take the least time of all.

**How sure this is.** What the prefix adds, and how far `mmca` is behind causal attention, holds for every seed and both
regimes. Which of the best two is ahead, merged MMCA or causal attention with learned numbers, is within the intervals. All
this is the beginning of learning, 320 conversations, with one small decoder, one tower, and images of 7 tokens. With more
training the variants may come closer, as in the study from scratch. Measure on your own data before you depend on it.
"""


def describe(study: Study) -> str:
    """The document's part."""
    task = study.tasks[0]
    sections = [
        introduction(study),
        "## What to take\n",
        headline_table(study),
        RECOMMENDATION,
        *result_sections(study, "study_pretrained"),
        "## Before the first conversation\n",
        start_section(study),
        "## By kind of question, images seen, and round\n",
        "Accuracy in percent with the decoder frozen, all seeds together. `name` asks what is in an image, `count` how many"
        " of a kind are in it, `same` whether two images show the same thing, `sort` what sort of thing it is.\n",
        *[share_table(study, task, name) for name in ("kind", "images", "round")],
        "## Kinds of things that were never trained\n",
        "“What sort of thing is in image 1?” about kinds of things of which no training conversation had an image: accuracy"
        " in percent.\n",
        by_regime(study, lambda runs: percent(interval([run["unseen"] for run in runs]))),
        "## When images change\n",
        robustness_text(study),
        robustness_table(study, task),
        "## What the decoder still knows of text\n",
        text_section(study),
        "## Image memory\n",
        memory_text(study),
        "## What it costs\n",
        cost_section(study),
        "## MMCA with one thing changed\n",
        change_section(study),
        "## Learning rates\n",
        rate_section(study),
    ]
    return "\n".join(sections) + "\n"


def introduction(study: Study) -> str:
    settings = study.settings
    train, test, unseen = settings["scenes"]
    jobs = sum(map(len, list_jobs(GRIDS[study.grid])))
    return f"""# With pretrained parts

Written by `python -m benchmarks.study.run pretrained --grid {study.grid}` from `study_pretrained_results.json`, which holds
every number below: {len(study.results)} of {jobs} jobs, {study.minutes:.0f} minutes of one core, on {study.machine};
{", ".join(f"{name} {number}" for name, number in study.versions.items())}.

- **Parts**: SmolLM2-135M-Instruct and a DINOv2-small, both pretrained by others, as `make pictures` gets them from pip
  packages. An image is 7 tokens: three of the tower's class token, and one for each quarter.
- **Images**: scenes of one to four drawings of things on a colored ground ({train} to train, {test} to test, {unseen} of
  kinds of things that are never trained). The tower sees each once; its features are stored.
- **Start**: the projector first learns the decoder's words from the tower's features alone, without the decoder, as in
  `make pictures`. For each of {len(study.seeds)} seeds, all variants start from the same projector, and read the same
  conversations in the same order.
- **Training**: up to {study.sizes[-1]} conversations of 1 to 4 images and 1 to 3 rounds, each seen once, in batches of
  {BATCH_SIZE}; matrix products are in bfloat16 where the processor has it. Learning rates are constant after a warm-up of
  {WARMUP_STEPS} steps, so that the state of a run after N conversations is the end of a run of N conversations.
- **Test**: {settings["conversations"]} conversations about other scenes for each seed.
- **Variants**: *numbered* models have learned numbers of images. `cross` has new blocks of cross attention in every third
  layer, through which text looks at images, which do not pass through the decoder.
- **Regimes**: {"; ".join(f"*{name}*: {REGIMES[name]}" for name in study.regimes)}.
- **Limits**: one small decoder, one tower, drawings, {len(study.seeds)} seeds, questions made by a program.
"""


def text_section(study: Study) -> str:
    """Text alone, before and after the training."""
    before = next(result for result in study.results if result["kind"] == "features")
    rows = [["SmolLM2 itself", f"{exp(before['text_loss']):.2f}", str(len(before["text_answers"]))]]
    for regime in study.regimes:
        for variant in study.variants:
            runs = study.runs(study.tasks[0], regime, variant)
            same = sum(map(str.__eq__, runs[0]["text_answers"], before["text_answers"]))
            shown = f"{mean(exp(run['text_loss']) for run in runs):.2f}"
            rows.append([f"`{variant}`, {regime}", shown, str(same)])
    return (
        "Without an image: the perplexity of English text (scikit-learn's descriptions of its data sets), and how many of"
        f" {len(before['text_answers'])} questions get the answer that SmolLM2 gives, word for word (seed"
        f" {study.seeds[0]}). Where nothing of the decoder trains, neither may change.\n\n"
        + table(["", "perplexity", "same answers"], rows)
        + "\n"
    )


def cost_section(study: Study) -> str:
    cost = next((result for result in study.results if result["kind"] == "cost"), None)
    if cost is None:
        return "Not measured yet.\n"
    costs, base = cost["costs"], cost["costs"]["causal"]
    rows = [
        [
            f"`{variant}`",
            f"{one['trained_weights'] / 1e6:.2f}",
            f"{one['step_seconds'] / base['step_seconds']:.2f}",
            f"{one['saved_bytes'] / base['saved_bytes']:.2f}",
            f"{one['new_seconds'] / base['new_seconds']:.2f}",
            f"{one['known_seconds'] / base['new_seconds']:.2f}",
            f"{one['kept_bytes'] / 2**20:.1f}",
        ]
        for variant, one in costs.items()
    ]
    head = ["", "weights that train, millions", "training step", "its memory", "first token, new images"]
    head += ["first token, known images", "kept of them, MiB"]
    return (
        f"Times and memory relative to `causal`, decoder frozen. A training step is that of the runs ({BATCH_SIZE}"
        " conversations, stored features), and its memory is what the forward pass keeps for the backward pass. The first"
        f" token is that of an answer to a question about four images of {cost['image_seq_length']} tokens each"
        f" ({cost['prompt_tokens']} tokens in all), tower included; *known* images were in another conversation, and what"
        " can be kept of them was: the image memory, or where there is none the projected features. Times are medians; the"
        " variants took turns.\n\n" + table(head, rows) + "\n"
    )


def start_section(study: Study) -> str:
    """What each variant answers with the projector that has learned words alone."""
    rows = [
        [f"`{variant}`", percent(interval([run["start"] for run in study.runs(study.tasks[0], "frozen", variant)]))]
        for variant in study.variants
    ]
    return (
        "The projector has learned the decoder's words, and the decoder has not taken part yet: accuracy in percent.\n\n"
        + table(["", "accuracy"], rows)
        + "\n"
    )


def rate_section(study: Study) -> str:
    """What was tried to choose the learning rates."""
    rows = []
    for (regime, variant, part), rates in TRIED_RATES.items():
        found = {
            result["change"]: result
            for result in study.results
            if (result["kind"], result["regime"], result["variant"]) == ("rate", regime, variant)
        }
        tried = {rate: found[f"{part} {rate:g}"] for rate in rates}
        cells = [f"{rate:g}: {100 * one['accuracy']:.1f} ({one['loss']:.2f})" for rate, one in tried.items()]
        rows.append([part.rstrip("_"), f"`{variant}`, {regime}", "; ".join(cells), f"{RATES[part]:g}"])
    tried_parts = {part for _, _, part in TRIED_RATES}
    untried = ", ".join(f"{part} {rate:g}" for part, rate in RATES.items() if part not in tried_parts)
    return (
        "Accuracy in percent, and the loss, of conversations about training scenes that no other measure uses, after"
        f" {study.sizes[-1]} training conversations, seed {study.seeds[0]}."
        f" A rate is the same for all variants. Not tried: {untried}.\n\n"
        + table(["rate of", "tried with", "rate: accuracy (loss)", "taken"], rows)
        + "\n"
    )


def change_section(study: Study) -> str:
    """MMCA with one thing changed, beside MMCA and causal attention."""
    with_lora = [(name, study.changed(name, "lora")) for name in LORA_CHANGES]
    sections = [
        f"`{CHANGED_VARIANT}` with one thing changed, decoder frozen: accuracy in percent after {study.sizes[-1]}"
        " conversations, the difference from the first line in percentage points, paired by seed, and the accuracy on kinds"
        " of things that were never trained.\n\n"
        "- *image weight*: what the second softmax, over images, is multiplied by. The paper's is 1; a learned one is a"
        " number for each head.\n"
        "- *sees own image*: an image's token attends to the earlier tokens of its image. It remains a function of the"
        " picture alone.\n"
        "- *keys*: at which position an image's keys are rotated for the queries of text, instead of their own.\n"
        "- *keys of number tokens*: the embeddings of the tokens 1, 2, … number the images (`image_number_keys`), instead of"
        " learned numbers.\n"
        "- *one softmax*: as `mmca_merged`.\n"
        "- *image prefix*: an image's token attends to the beginning of a conversation, which is the same for all images"
        " (`image_prefix_ids`).\n",
        change_table(study, "frozen", CHANGED_VARIANT, [(name, study.changed(name)) for name in study.changes]),
    ]
    if "lora" in study.regimes:
        sections += ["With LoRA:\n", change_table(study, "lora", "mmca_merged, numbered, prefix", with_lora)]
    return "\n".join(sections)


def change_table(study: Study, regime: str, first: str, changed: list[tuple[str, list[dict]]]) -> str:
    """The first variant, the changed ones, and others; each with its difference from the first."""
    others = ["mmca_merged, numbered", "mmca_merged, numbered, prefix", "causal, numbered"]
    shown = [*changed, *((f"`{name}`", study.runs(study.tasks[0], regime, name)) for name in others if name != first)]
    base, rows = study.runs(study.tasks[0], regime, first), []
    for name, runs in [(f"`{first}`", base), *shown]:
        pairs = [(run, other) for run in base for other in runs if run["seed"] == other["seed"]]
        if not pairs:  # of a study that is not finished
            continue
        step = paired(*zip(*pairs), lambda run: run["accuracy"])
        cells = [percent(interval([run[measure] for run in runs])) for measure in ("accuracy", "unseen")]
        rows.append([name, cells[0], "" if runs is base else signed(step), cells[1]])
    return table(["", "accuracy", "difference", "never trained"], rows) + "\n"
