# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Answers the questions of a dataset with one model or several, and scores the answers: `visualchat evaluate`."""

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

from modeling_visualchat import VisualChatDataCollator, VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.weight_fingerprint_visualchat import ModelWeights, fingerprint_weights
from visualchat.errors import input_errors
from visualchat.evaluation.answers import generate_answers
from visualchat.evaluation.conversations import Dialogue, read_conversations, read_labelled
from visualchat.evaluation.report import describe_number, describe_share, write_csv, write_report
from visualchat.evaluation.scores import MATCHES, compare, score
from visualchat.loading import choose_device, load_model, load_processor
from visualchat.training.dataset import count_tokens


class Journal:
    """
    A JSON Lines file that keeps results if the process is killed. Entries are added batch by batch. An incomplete last line
    is removed when the file is opened.

    Args:
        path (`Path`): The file.
        key (`tuple[str, ...]`): The fields that identify an entry.

    Attributes:
        entries (`dict`): The entries by the tuple of the values of `key`, or by the value if `key` is one field.
    """

    def __init__(self, path: Path, *key: str):
        self.path, self.key = path, key
        written = path.read_bytes() if path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if len(whole) < len(written):
            os.truncate(path, len(whole))
        self.entries = {self._key_of(entry): entry for entry in map(json.loads, whole.splitlines())}

    def add(self, entries: list[dict]) -> None:
        """Adds the entries and waits until they are on the disk."""
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
        model, processor: The checkpoint's.
        folder (`Path`): The folder of the journals.
        dialogues (`list[Dialogue]`): They are answered in batches of similar size, the longest first, and round by round.
        generation (`dict`): Arguments of `model.generate`.
        batch_size (`int`): How many dialogues a batch has.
        seed (`int`): The seed of sampling. The seed of each batch is derived from it, so that a resumed run samples the same
            answers as a run without an interruption.

    Attributes:
        failures (`dict[int, tuple[int, str]]`): By dialogue, the first round that could not be asked, and the reason.
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
        """Asks all questions without an answer. A dialogue that cannot go on is noted in `failures`."""
        sound = [k for k, dialogue in enumerate(self.dialogues) if not dialogue.fault]
        sound.sort(key=lambda k: (self.dialogues[k].size, k), reverse=True)
        total = sum(len(self.dialogues[k].questions) for k in sound)
        with tqdm(total=total, initial=len(self.answers.entries), desc=name, unit="answer") as bar:
            for start in range(0, len(sound), self.batch_size):
                batch = sound[start : start + self.batch_size]
                if all(self._is_done(k) for k in batch):
                    continue
                images = {}
                for k in batch:
                    images[k], readable, error = self.dialogues[k].open_images(self.processor.image_processor)
                    if error:
                        self.failures[k] = (readable + 1, error)
                for number in range(1, max(len(self.dialogues[k].questions) for k in batch) + 1):
                    torch.manual_seed(int(np.random.SeedSequence([self.seed, start, number]).generate_state(1)[0]))
                    bar.update(self._ask(batch, number, images))
                self._measure_losses(batch, images)

    def _is_done(self, k: int) -> bool:
        questions = self.dialogues[k].questions
        is_answered = all((k, number) in self.answers.entries for number in range(1, len(questions) + 1))
        return is_answered and (questions[0].label is None or k in self.losses.entries)

    def _ask(self, batch: list[int], number: int, images: dict[int, list[Image.Image]]) -> int:
        """Asks the questions of one round, in the dialogues that have this round. Returns how many were answered."""
        conversations = {}
        for k in batch:
            dialogue = self.dialogues[k]
            has_question = number <= len(dialogue.questions) and number < self.failures.get(k, (number + 1,))[0]
            is_answered = (k, number) in self.answers.entries
            # A sampled answer depends on the other conversations of its batch
            if not has_question or (is_answered and not self.generation["do_sample"]):
                continue
            answers = [self.answers.entries[k, earlier]["answer"] for earlier in range(1, number)]
            try:
                messages = dialogue.messages(number, answers, images[k])
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

    def _measure_losses(self, batch: list[int], images: dict[int, list[Image.Image]]) -> None:
        """The loss of the true answers with their end tokens, summed over each labelled dialogue."""
        labelled = {}
        for k in batch:
            dialogue = self.dialogues[k]
            if dialogue.questions[0].label is None or k in self.losses.entries or k in self.failures:
                continue
            messages = dialogue.messages(len(dialogue.questions), [], images[k])
            messages.append({"role": "assistant", "content": dialogue.questions[-1].label})
            try:
                self._check_length(messages, 0)
            except ValueError as error:
                number = len(dialogue.questions)
                self.failures[k] = (number, f"{dialogue.where}, round {number} with its true answer: {error}")
            else:
                labelled[k] = {"messages": messages}
        if not labelled:
            return
        collate = VisualChatDataCollator(self.processor, supervised_logits_only=True)
        inputs = BatchFeature(collate(list(labelled.values()))).to(self.model.device)
        next_tokens = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1))[inputs["logits_to_keep"]]
        losses = torch.nn.functional.cross_entropy(self.model(**inputs).logits.float(), next_tokens, reduction="none")
        counts = inputs["logits_to_keep"].sum(1).tolist()
        sums = [part.double().sum().item() for part in losses.split(counts)]
        self.losses.add([{"dialogue": k, "loss": loss, "tokens": count} for k, loss, count in zip(labelled, sums, counts)])


def name_folders(models: list[str], output: Path) -> dict[str, Path]:
    """
    A folder in `output` for each checkpoint, named after it.

    Raises:
        ValueError: If two checkpoints would have the same folder.
    """
    folders = {}
    for name in models:
        folder = output / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model")
        if folder in folders.values():
            raise ValueError(f"{name!r} is given twice, or another model has the same folder {folder}")
        folders[name] = folder
    return folders


def load_checkpoint(name: str, dtype: str, device: str | None, trust_remote_code: bool) -> VisualChatForCausalLM:
    """Loads a VisualChat model, or an adapter merged into its base model, for generation."""
    return load_model(name, trust_remote_code, dtype=dtype).to(choose_device(device)).eval()


def describe(args: argparse.Namespace, name: str, model: VisualChatForCausalLM, digest: str) -> dict:
    """The settings that answers depend on. Seed and batch size count only if answers are sampled."""
    is_sampled = args.temperature > 0
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
        "seed": args.seed if is_sampled else "any",
        "batch_size": args.batch_size if is_sampled else "any",
    }


def write_or_check_settings(folder: Path, settings: dict) -> None:
    """
    Writes `settings.json`, or compares the settings with those of an earlier run.

    Raises:
        ValueError: If they differ. Both values are given.
    """
    path = folder / "settings.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{key} {kept.get(key)!r}, now {value!r}" for key, value in settings.items() if kept.get(key) != value]
        if changed:
            raise ValueError(
                f"{folder} holds answers that were made with other settings: {'; '.join(changed)}. Use the same settings, or"
                " another --output"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    os.replace(unfinished, path)


def summarize(evaluations: dict[str, Evaluation], settings: dict[str, dict], seed: int) -> dict:
    """The content of `results.json`: counts, failures, scores, and differences from the first checkpoint."""
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
    with input_errors():
        if args.labelled:
            dialogues, digest = read_labelled(args.labelled)
        else:
            dialogues, digest = read_conversations(args.conversations, args.image_root)
        folders = name_folders(args.model, args.output)
        processors = {name: load_processor(name, args.trust_remote_code) for name in folders}

    for name, folder in folders.items():
        with input_errors(f"cannot evaluate {name}: "):
            model = load_checkpoint(name, args.dtype, args.device, args.trust_remote_code)
            settings[name] = describe(args, name, model, digest)
            write_or_check_settings(folder, settings[name])
        evaluation = Evaluation(model, processors[name], folder, dialogues, generation, args.batch_size, args.seed)
        evaluation.run(name)
        del model, evaluation.model  # frees the memory for the next model
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
