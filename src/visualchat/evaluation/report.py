# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The reports of `visualchat evaluate`: the CSV of the released results, and an HTML page without further files."""

import base64
import csv
import io
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from visualchat.evaluation.conversations import Dialogue


COLUMNS = ("test_name", "image_path", "question", "answer")
THUMBNAIL_SIZE = 240  # pixels of the longer side, at most
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>VisualChat evaluation</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #1a1a1a; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
  table { border-collapse: collapse; width: 100%; table-layout: fixed; }
  th, td { border: 1px solid #d0d0d0; padding: .4rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
  th { background: #f3f3f3; font-weight: 600; } th.narrow { width: 3.5rem; }
  td.text { white-space: pre-wrap; }
  td.exact { background: #e6f4e6; } td.normalized { background: #f3f6d8; } td.wrong { background: #fbe6e4; }
  .failed { color: #a01010; } .dim { color: #666; font-size: .85rem; }
  figure { display: inline-block; margin: 0 .5rem .5rem 0; } figcaption { color: #666; font-size: .8rem; }
  figure img { display: block; max-width: 100%; min-width: 64px; }
  body:has(#faults:checked) .sound { display: none; }
</style>
<h1>VisualChat evaluation</h1>
<p>{{ dialogues_count }} dialogues. {{ settings }}</p>
<table>
  <tr><th></th>{% for name in models %}<th>{{ name }}</th>{% endfor %}</tr>
  {%- for label, cells in summary %}
  <tr><th>{{ label }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
  {%- endfor %}
</table>
{%- if is_labelled %}
<p class="dim">Exact: word for word. Normalized: in lower case, without punctuation and articles. In brackets 95 % confidence
intervals: Wilson's for shares, resampled by dialogue for the loss (mean over the tokens of the true answers, in nats) and
for differences.</p>
{%- endif %}
{%- if differences %}
<h2>Difference from {{ models[0] }}</h2>
<table>
  <tr><th></th>{% for name in models[1:] %}<th>{{ name }}</th>{% endfor %}</tr>
  {%- for label, cells in differences %}
  <tr><th>{{ label }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
  {%- endfor %}
</table>
{%- endif %}
{%- if failures %}
<h2>Not answered</h2>
<table>
  <tr><th>Checkpoint</th><th>Dialogue</th><th class="narrow">From round</th><th>Why</th></tr>
  {%- for name, failure in failures %}
  <tr class="failed"><td>{{ name }}</td><td>{{ failure.test_name }}</td><td>{{ failure.round }}</td>
    <td>{{ failure.error }}</td></tr>
  {%- endfor %}
</table>
{%- endif %}
<h2>Dialogues</h2>
<p>{{ shown | length }} of {{ dialogues_count }}{% if shown | length < dialogues_count %}, those with faults first; the
answers to all are in answers.jsonl{% endif %}. <label><input type="checkbox" id="faults"> Only those with a wrong or missing
answer</label></p>
{%- for dialogue in shown %}
<section class="{{ 'faulty' if dialogue.is_faulty else 'sound' }}">
<h3>{{ dialogue.name }}</h3>
<table>
  <tr><th class="narrow">Round</th><th>Question</th>{% if is_labelled %}<th>True answer</th>{% endif %}
    {%- for name in models %}<th>{{ name }}</th>{% endfor %}</tr>
  {%- for round in dialogue.rounds %}
  <tr><td>{{ loop.index }}</td><td class="text">
    {%- for image in round.images -%}
    <figure>{% if image.url %}<img src="{{ image.url }}" alt="image {{ image.number }}">{% endif -%}
    <figcaption>image {{ image.number }}{{ '' if image.url else ', cannot be read' }}</figcaption></figure>
    {%- endfor %}{{ '\n' if round.images }}{{ round.question }}</td>
    {%- if is_labelled %}<td class="text">{{ round.label }}<div class="dim">{{ round.task }}</div></td>{% endif %}
    {%- for answer in round.answers %}<td class="text {{ answer.verdict }}">
    {%- if answer.text is none %}<span class="failed">not answered</span>{% else %}{{ answer.text }}{% endif -%}
    {%- if answer.verdict %}<div class="dim">{{ answer.verdict }}</div>{% endif %}</td>{% endfor %}
  </tr>
  {%- endfor %}
</table>
</section>
{%- endfor %}
</html>
"""


def write_csv(path: Path, dialogues: list[Dialogue], answers: dict[tuple[int, int], dict]) -> None:
    """
    Writes the columns of DeepSpeed-VisualChat's released results. A round without images has an empty `image_path`, where
    the released files repeat the question.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for k, dialogue in enumerate(dialogues):
            for number in range(1, len(dialogue.questions) + 1):
                if (k, number) in answers:
                    writer.writerow([answers[k, number][name] for name in COLUMNS])


def write_report(
    path: Path, dialogues: list[Dialogue], answers: dict[str, dict[tuple[int, int], dict]], results: dict, limit: int
) -> None:
    """
    Writes the HTML page.

    Args:
        answers (`dict`): By checkpoint, then by dialogue and round.
        results (`dict`): The content of `results.json`.
        limit (`int`): How many dialogues the page shows at most, those with a wrong or missing answer first.
    """
    entries = results["models"]
    settings = next(iter(entries.values()))["settings"]
    is_labelled = any("exact" in entry for entry in entries.values())
    faulty = {k for k, dialogue in enumerate(dialogues) if _is_faulty(k, dialogue, answers)}
    order = range(len(dialogues))
    if len(dialogues) > limit:
        order = sorted(order, key=lambda k: k not in faulty)[:limit]
    shown = [_show(k, dialogues[k], answers, k in faulty) for k in order]
    page = Environment(autoescape=True).from_string(PAGE)
    content = page.render(
        models=list(entries),
        dialogues_count=len(dialogues),
        settings=(
            f"Data: {', '.join(settings['data'])}. Up to {settings['max_new_tokens']} new tokens, "
            + (
                f"sampled at temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, seed {settings['seed']}."
                if settings["temperature"]
                else "greedy decoding."
            )
        ),
        summary=_summary(entries),
        differences=_differences(results["differences"]),
        failures=[(name, failure) for name, entry in entries.items() for failure in entry["failures"]],
        shown=shown,
        is_labelled=is_labelled,
    )
    path.write_text(content, encoding="utf-8")


def describe_share(share: dict) -> str:
    """A fraction with its confidence interval, such as `97.7 % [97.0, 98.2], 2434 of 2491`."""
    percent = [100 * share[name] for name in ("value", "low", "high")]
    return "{:.1f} % [{:.1f}, {:.1f}], ".format(*percent) + f"{share['right']} of {share['count']}"


def describe_number(number: dict, sign: str = "") -> str:
    """A number with its confidence interval, such as `0.0512 [0.0430, 0.0598]`. With `sign="+"` positive ones get a sign."""
    return "{:{s}.4f} [{:{s}.4f}, {:{s}.4f}]".format(*(number[name] for name in ("value", "low", "high")), s=sign)


def _summary(entries: dict[str, dict]) -> list[tuple[str, list[str]]]:
    columns = list(entries.values())
    rows = [
        ("answers", [str(entry["answers"]) for entry in columns]),
        ("dialogues with unanswered questions", [str(len(entry["failures"])) for entry in columns]),
    ]
    for metric in ("exact", "normalized"):
        if any(metric in entry for entry in columns):
            rows.append((metric, [describe_share(entry[metric]) if metric in entry else "" for entry in columns]))
    if any("loss" in entry for entry in columns):
        rows.append(("loss", [describe_number(entry["loss"]) if "loss" in entry else "" for entry in columns]))
    for group, label in (("by_task", "exact, {}"), ("by_round", "exact, round {}")):
        names = dict.fromkeys(name for entry in columns for name in entry.get(group, {}))
        for name in names:
            shares = [entry.get(group, {}).get(name) for entry in columns]
            rows.append((label.format(name), [describe_share(one["exact"]) if one else "" for one in shares]))
    return rows


def _differences(differences: dict[str, dict]) -> list[tuple[str, list[str]]]:
    rows = []
    for metric in ("exact", "normalized", "loss"):
        cells = []
        for one in (difference.get(metric) for difference in differences.values()):
            if one is None:
                cells.append("")
            elif metric == "loss":
                cells.append(describe_number(one, "+"))
            else:
                points = [100 * one[name] for name in ("value", "low", "high")]
                counts = f"{one['only_other']} right here alone, {one['only_first']} right there alone"
                cells.append("{:+.1f} points [{:+.1f}, {:+.1f}], ".format(*points) + counts)
        if any(cells):
            rows.append((metric, cells))
    return rows


def _is_faulty(k: int, dialogue: Dialogue, answers: dict[str, dict]) -> bool:
    found = [entries.get((k, number + 1)) for entries in answers.values() for number in range(len(dialogue.questions))]
    return not found or any(entry is None or entry.get("exact") is False for entry in found)


def _show(k: int, dialogue: Dialogue, answers: dict[str, dict], is_faulty: bool) -> dict:
    opened = [] if dialogue.fault else dialogue.open_images()[0]
    rounds, number = [], 0
    for index, question in enumerate(dialogue.questions, 1):
        images = []
        for _ in (part for part in question.content if part["type"] == "image"):
            number += 1
            images.append({"number": number, "url": _data_url(opened[number - 1]) if number <= len(opened) else ""})
        cells = [_show_answer(entries.get((k, index))) for entries in answers.values()]
        shown = {"images": images, "question": question.text, "label": question.label, "task": question.task}
        rounds.append({**shown, "answers": cells})
    return {"name": dialogue.name, "rounds": rounds, "is_faulty": is_faulty}


def _show_answer(entry: dict | None) -> dict:
    if entry is None:
        return {"text": None, "verdict": ""}
    verdict = ""
    if "label" in entry:
        verdict = "exact" if entry["exact"] else "normalized" if entry["normalized"] else "wrong"
    return {"text": entry["answer"], "verdict": verdict}


def _data_url(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
