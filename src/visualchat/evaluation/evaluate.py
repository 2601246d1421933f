# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Holds the conversations of a dataset with one model or several and scores the answers: `visualchat evaluate`."""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import BatchFeature
from transformers.utils.peft_utils import find_adapter_config_file

from modeling_visualchat import VisualChatDataCollator, VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.image_memory_visualchat import ModelWeights, fingerprint_weights
from visualchat.evaluation.answers import generate_answers
from visualchat.evaluation.conversations import Dialogue, read_conversations, read_labelled
from visualchat.evaluation.report import describe_number, describe_share, write_csv, write_report
from visualchat.evaluation.scores import MATCHES, compare, score
from visualchat.loading import load_model, load_processor
from visualchat.training.dataset import count_tokens
from visualchat.training.merge import load_merged


class Journal:
    """
    A file of JSON lines that outlives a kill: whole batches are added, and a line that was cut off is removed.

    Args:
        path (`Path`): The file.
        key (`tuple[str, ...]`): The fields that tell entries apart.

    Attributes:
        entries (`dict`): By the values of `key`; by the value alone if it is one.
    """

    def __init__(self, path: Path, *key: str):
        self.path, self.key = path, key
        written = path.read_bytes() if path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if len(whole) < len(written):
            os.truncate(path, len(whole))
        self.entries = {self._key_of(entry): entry for entry in map(json.loads, whole.splitlines())}

    def add(self, entries: list[dict]) -> None:
        """Writes the entries, and does not return before they are on the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
        self.entries |= {self._key_of(entry): entry for entry in entries}

    def _key_of(self, entry: dict):
        values = tuple(entry[name] for name in self.key)
        return values if len(values) > 1 else values[0]


class Evaluation:
    """
    One checkpoint's answers to all dialogues, and its loss on those that are labelled.

    Args:
        model, processor: Of the checkpoint.
        folder (`Path`): Where the journals lie.
        dialogues (`list[Dialogue]`): Held in batches of like size, the longest first, one round of all of them at a time.
        generation (`dict`): As for `model.generate`.
        batch_size (`int`): Dialogues that are held at once.
        seed (`int`): Of sampling: each batch has its own, so that a resumed run draws what it would have drawn.

    Attributes:
        failures (`dict[int, tuple[int, str]]`): By dialogue, its first round that could not be asked, and why.
    """

    def __init__(
        self,
        model: VisualChatForCausalLM,
        processor: VisualChatProcessor,
        folder: Path,
        dialogues: list[Dialogue],
        generation: dict,
        batch_size: int,
        seed: int,
    ):
        self.model, self.processor, self.dialogues = model, processor, dialogues
        self.generation, self.batch_size, self.seed = generation, batch_size, seed
        self.answers = Journal(folder / "answers.jsonl", "dialogue", "round")
        self.losses = Journal(folder / "losses.jsonl", "dialogue")
        self.failures = {k: (1, dialogue.fault) for k, dialogue in enumerate(dialogues) if dialogue.fault}

    @torch.inference_mode()
    def run(self, name: str) -> None:
        """Asks what is not answered yet. A dialogue that cannot go on is left, and noted in `failures`."""
        sound = [k for k, dialogue in enumerate(self.dialogues) if not dialogue.fault]
        sound.sort(key=lambda k: (self.dialogues[k].size, k), reverse=True)
        total = sum(len(self.dialogues[k].questions) for k in sound)
        with tqdm(total=total, initial=len(self.answers.entries), desc=name, unit="answer") as bar:
            for start in range(0, len(sound), self.batch_size):
                batch = sound[start : start + self.batch_size]
                if all(self._is_done(k) for k in batch):
                    continue
                pictures = {}
                for k in batch:
                    pictures[k], readable, error = self.dialogues[k].open_images(self.processor.image_processor)
                    if error:
                        self.failures[k] = (readable + 1, error)
                for number in range(1, max(len(self.dialogues[k].questions) for k in batch) + 1):
                    torch.manual_seed(int(np.random.SeedSequence([self.seed, start, number]).generate_state(1)[0]))
                    bar.update(self._ask(batch, number, pictures))
                self._measure_losses(batch, pictures)

    def _is_done(self, k: int) -> bool:
        questions = self.dialogues[k].questions
        is_answered = all((k, number) in self.answers.entries for number in range(1, len(questions) + 1))
        return is_answered and (questions[0].label is None or k in self.losses.entries)

    def _ask(self, batch: list[int], number: int, pictures: dict[int, list[Image.Image]]) -> int:
        """Asks the question of one round of those dialogues that have one; returns how many were answered."""
        conversations = {}
        for k in batch:
            dialogue = self.dialogues[k]
            has_question = number <= len(dialogue.questions) and number < self.failures.get(k, (number + 1,))[0]
            is_answered = (k, number) in self.answers.entries
            # What is drawn for an answer depends on the others of its batch
            if not has_question or (is_answered and not self.generation["do_sample"]):
                continue
            answers = [self.answers.entries[k, earlier]["answer"] for earlier in range(1, number)]
            try:
                messages = dialogue.messages(number, answers, pictures[k])
                self._check_length(messages, self.generation["max_new_tokens"])
            except ValueError as error:
                self.failures[k] = (number, f"{dialogue.where}, round {number}: {error}")
            else:
                conversations[k] = messages
        missing = [k for k in conversations if (k, number) not in self.answers.entries]
        if not missing:
            return 0
        answers = generate_answers(self.model, self.processor, list(conversations.values()), **self.generation)
        answers = dict(zip(conversations, answers))
        self.answers.add([self._entry(k, number, answers[k]) for k in missing])
        return len(missing)

    def _entry(self, k: int, number: int, answer: str) -> dict:
        dialogue, question = self.dialogues[k], self.dialogues[k].questions[number - 1]
        entry = {
            "dialogue": k,
            "test_name": dialogue.name,
            "round": number,
            "image_path": question.image_path,
            "question": question.text,
            "answer": answer,
        }
        if question.label is not None:
            matches = {name: matches(answer, question.label) for name, matches in MATCHES.items()}
            entry |= {"label": question.label, "task": question.task, **matches}
        return entry

    def _check_length(self, messages: list[dict], new_tokens: int) -> None:
        limit = self.model.config.text_config.max_position_embeddings
        length = count_tokens(messages, self.processor, new_tokens > 0, sanitize_control_tokens=True)
        if length + new_tokens > limit:
            raise ValueError(
                f"the conversation has {length} tokens and the answer up to {new_tokens}, but the model's context"
                f" holds {limit}: shorten the conversation, or lower --max-new-tokens"
            )

    def _measure_losses(self, batch: list[int], pictures: dict[int, list[Image.Image]]) -> None:
        """The loss of the true answers and their end tokens, summed over each dialogue that is labelled."""
        rows = {}
        for k in batch:
            dialogue = self.dialogues[k]
            if dialogue.questions[0].label is None or k in self.losses.entries or k in self.failures:
                continue
            messages = dialogue.messages(len(dialogue.questions), [], pictures[k])
            messages.append({"role": "assistant", "content": dialogue.questions[-1].label})
            try:
                self._check_length(messages, 0)
            except ValueError as error:
                number = len(dialogue.questions)
                self.failures[k] = (number, f"{dialogue.where}, round {number} with its true answer: {error}")
            else:
                rows[k] = {"messages": messages}
        if not rows:
            return
        collate = VisualChatDataCollator(self.processor, supervised_logits_only=True)
        inputs = BatchFeature(collate(list(rows.values()))).to(self.model.device)
        next_tokens = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1))[inputs["logits_to_keep"]]
        losses = torch.nn.functional.cross_entropy(self.model(**inputs).logits.float(), next_tokens, reduction="none")
        counts = inputs["logits_to_keep"].sum(1).tolist()
        sums = [part.double().sum().item() for part in losses.split(counts)]
        self.losses.add([{"dialogue": k, "loss": loss, "tokens": count} for k, loss, count in zip(rows, sums, counts)])


def name_folders(models: list[str], output: Path) -> dict[str, Path]:
    """
    A folder in `output` for each checkpoint, called as it is given.

    Raises:
        ValueError: If two would have the same.
    """
    folders = {}
    for name in models:
        folder = output / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model")
        if folder in folders.values():
            raise ValueError(f"{name!r} is given twice, or its folder {folder} is another one's too")
        folders[name] = folder
    return folders


def find_processor(name: str, trust_remote_code: bool) -> VisualChatProcessor:
    """
    Raises:
        ValueError: If there is none of this name.
    """
    try:
        return load_processor(name, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is neither a folder nor a Hub id of a VisualChat model or an adapter: {error}") from error


def load_checkpoint(name: str, dtype: str, device: str | None, trust_remote_code: bool) -> VisualChatForCausalLM:
    """A VisualChat, or an adapter merged into its base, to generate with."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator.type
    if find_adapter_config_file(name) is not None:
        model = load_merged(name, trust_remote_code=trust_remote_code, dtype=dtype)
    else:
        model = load_model(name, trust_remote_code, dtype=dtype)
    return model.to(device).eval()


def describe(args: argparse.Namespace, name: str, model: VisualChatForCausalLM, digest: str) -> dict:
    """What answers depend on. Seed and batch size are part of it only where answers are drawn."""
    is_drawn = args.temperature > 0
    weights = ModelWeights(model)
    weights.check("Keeping answers")
    return {
        "model": name,
        "weights": fingerprint_weights(weights, {}),
        "dtype": str(model.dtype),
        "data": [str(one) for one in args.labelled or [args.conversations]],
        "data_sha256": digest,
        "image_root": None if args.image_root is None else str(args.image_root),
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed if is_drawn else "any",
        "batch_size": args.batch_size if is_drawn else "any",
    }


def keep_settings(folder: Path, settings: dict) -> None:
    """
    Writes `settings.json`, or compares with the one that is there.

    Raises:
        ValueError: If they differ. Both values are given.
    """
    path = folder / "settings.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{key} {kept.get(key)!r}, now {value!r}" for key, value in settings.items() if kept.get(key) != value]
        if changed:
            raise ValueError(
                f"{folder} holds answers that were made with other settings: {'; '.join(changed)}. Give the same, or"
                " another --output"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    os.replace(unfinished, path)


def summarize(evaluations: dict[str, Evaluation], settings: dict[str, dict], seed: int) -> dict:
    """What `results.json` holds: counts, failures, scores, and differences from the first checkpoint."""
    results = {"models": {}, "differences": {}}
    first = next(iter(evaluations))
    for name, evaluation in evaluations.items():
        answers, losses, dialogues = evaluation.answers.entries, evaluation.losses.entries, evaluation.dialogues
        failures = [
            {
                "test_name": dialogues[k].name,
                "round": number,
                "error": error,
                "unanswered": sum((k, one + 1) not in answers for one in range(len(dialogues[k].questions))),
            }
            for k, (number, error) in sorted(evaluation.failures.items())
        ]
        entry = {"settings": settings[name], "dialogues": len(dialogues), "answers": len(answers), "failures": failures}
        is_labelled = any("label" in answer for answer in answers.values())
        if is_labelled:
            entry |= score(answers, losses, seed)
            if name != first:
                other = evaluations[first]
                results["differences"][name] = compare(
                    (other.answers.entries, other.losses.entries), (answers, losses), seed
                )
        results["models"][name] = entry
    return results


def run(args: argparse.Namespace) -> int:
    """The exit status of `visualchat evaluate` with these options."""
    generation = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if generation["do_sample"]:
        generation |= {"temperature": args.temperature, "top_p": args.top_p}
    evaluations, settings = {}, {}
    try:
        if args.labelled:
            dialogues, digest = read_labelled(args.labelled)
        else:
            dialogues, digest = read_conversations(args.conversations, args.image_root)
        folders = name_folders(args.model, args.output)
        processors = {name: find_processor(name, args.trust_remote_code) for name in folders}
    except (OSError, ValueError) as error:
        return refuse(error)

    for name, folder in folders.items():
        try:
            model = load_checkpoint(name, args.dtype, args.device, args.trust_remote_code)
            settings[name] = describe(args, name, model, digest)
            keep_settings(folder, settings[name])
        except (OSError, ValueError) as error:
            return refuse(error)
        evaluation = Evaluation(model, processors[name], folder, dialogues, generation, args.batch_size, args.seed)
        evaluation.run(name)
        del model, evaluation.model  # room for the next
        evaluations[name] = evaluation
        if args.conversations:
            write_csv(folder / "answers.csv", dialogues, evaluation.answers.entries)

    results = summarize(evaluations, settings, args.seed)
    (args.output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    answers = {name: evaluation.answers.entries for name, evaluation in evaluations.items()}
    write_report(args.output / "report.html", dialogues, answers, results, args.report_limit)

    failed = False
    for name, entry in results["models"].items():
        for failure in entry["failures"]:
            print(f"{name}: not answered: {failure['error']}", file=sys.stderr)
        failed |= bool(entry["failures"])
        print(f"{name}: {entry['answers']} answers, {len(entry['failures'])} of {entry['dialogues']} dialogues failed")
        for metric in ("exact", "normalized"):
            if metric in entry:
                print(f"  {metric:<10} {describe_share(entry[metric])}")
        if "loss" in entry:
            print(f"  {'loss':<10} {describe_number(entry['loss'])}")
    print(f"{args.output / 'report.html'}")
    if not any(answers.values()):
        return 2
    return int(failed)


def refuse(error: Exception) -> int:
    print(f"visualchat evaluate: {error}", file=sys.stderr)
    return 2
