# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Conversations about scenes of drawings: 1 to 4 images, and a question in each round about any image shown so far. Each answer
is a function of the scenes. Equal seeds give equal conversations.
"""

from collections import Counter, defaultdict
from functools import cached_property
from itertools import combinations
from random import Random
from typing import NamedTuple

from examples.pictures.kinds import Kind
from examples.pictures.scenes import Scene, make_scene
from examples.pictures.text_rounds import TEXT_ROUNDS


NUMBERS = ("no", "one", "two", "three", "four")
GROUP_PHRASES = {
    "animal": "an animal",
    "fruit": "a fruit",
    "vegetable": "a vegetable",
    "food": "food",
    "drink": "a drink",
    "plant": "a plant",
    "vehicle": "a vehicle",
    "building": "a building",
    "clothing": "clothing",
    "instrument": "a musical instrument",
    "tool": "a tool",
    "sport": "sports gear",
}
"""What a question calls the groups. No question asks for the group "thing", which holds what is in no other group."""

EDIBLE = ("fruit", "vegetable", "food", "drink")
"""The word food may mean each of these groups, so no question asks to tell one of them from another by that word."""

QUESTION_WEIGHTS = {
    "name": 4,
    "count": 4,
    "side": 2,
    "sort": 1,
    "which": 1,
    "same": 1,
    "total": 1,
    "ground": 1,
    "describe": 0.5,
    "text": 0.2,
}
"""The kinds of questions, and how often each is asked where it can be."""


class Question(NamedTuple):
    """A question about scenes, its true answer, and its kind, by which the accuracy is reported."""

    kind: str
    text: str
    answer: str


def split_kinds(kinds: list[Kind], held_out: int = 24, seed: int = 0) -> tuple[list[Kind], list[Kind]]:
    """
    Returns the kinds whose names are trained, and `held_out` others, which belong to groups that a question may ask for.
    """
    candidates = [kind for kind in kinds if kind.group in GROUP_PHRASES]
    unseen = set(Random(f"kinds {seed}").sample(candidates, held_out))
    return [kind for kind in kinds if kind not in unseen], [kind for kind in kinds if kind in unseen]


def make_scenes(kinds: list[Kind], count: int, split: str, seed: int = 0) -> list[Scene]:
    """
    Makes scenes of things of these kinds. Half of them show one thing, each kind equally often; the others show two to four
    of one kind, or two to four different ones. The scenes of two splits differ, since the name of the split is part of the
    seed.
    """
    rng = Random(f"{split} {seed}")
    scenes = []
    for index in range(count):
        if index % (2 * len(kinds)) == 0:
            shuffled = rng.sample(kinds, len(kinds))
        number = rng.randint(2, 4)
        if index % 2 == 0:
            drawn = [shuffled[index // 2 % len(kinds)]]
        else:
            drawn = [rng.choice(kinds)] * number if rng.random() < 0.5 else rng.sample(kinds, number)
        scenes.append(make_scene(drawn, rng))
    return scenes


class ConversationMaker:
    """
    Makes conversations about scenes, which may be in several of them.

    Args:
        scenes (`list[Scene]`): What images may show. Some show one thing, and some several.
        seed (`str`): Seed of the conversations.
        weights (`dict[str, float]`): The kinds of questions, and how often each is asked where it can be.
        rounds (`tuple[int, int]`): The fewest and the most rounds of a conversation.
    """

    def __init__(
        self,
        scenes: list[Scene],
        seed: str,
        weights: dict[str, float] = QUESTION_WEIGHTS,
        rounds: tuple[int, int] = (3, 6),
    ):
        self.scenes, self.rng, self.weights, self.rounds = scenes, Random(seed), weights, rounds
        self.single = [index for index, scene in enumerate(scenes) if len(scene.things) == 1]
        self.several = [index for index, scene in enumerate(scenes) if len(scene.things) > 1]
        self.of_kind = defaultdict(list)
        for index in self.single:
            self.of_kind[scenes[index].things[0].kind].append(index)

    def make_conversation(self) -> dict:
        """
        Makes a conversation of 1 to 4 images. The first round brings an image, and often all; each later
        image comes in a random round.

        Returns:
            `dict`: `scenes` (`list[int]`, the images' indices), `messages`, and the `kinds` (`list[str]`) of the questions.
        """
        num_images, num_rounds = self.rng.randint(1, 4), self.rng.randint(*self.rounds)
        indices = []
        for _ in range(num_images):
            indices.append(self._draw_scene(indices))
        arrivals = [0, *sorted(self.rng.choice([0, 0, *range(num_rounds)]) for _ in range(num_images - 1))]
        messages, question_kinds, asked = [], [], set()
        for number in range(num_rounds):
            shown = [self.scenes[index] for index in indices[: sum(arrival <= number for arrival in arrivals)]]
            questions = [one for one in list_questions(shown) if one.text not in asked and one.kind in self.weights]
            question = self._draw_question(questions)
            asked.add(question.text)
            messages += make_round(question, arrivals.count(number))
            question_kinds.append(question.kind)
        return {"scenes": indices, "messages": messages, "kinds": question_kinds}

    def make_naming(self, num_images: int) -> dict:
        """
        Makes a conversation that brings so many images at once, each with one thing, and asks for each, in a random order.
        The result is that of [`make_conversation`].
        """
        indices = self.rng.sample(self.single, num_images)
        scenes = [self.scenes[index] for index in indices]
        messages = []
        for number in self.rng.sample(range(num_images), num_images):
            questions = list_questions(scenes)
            text = "What is this?" if num_images == 1 else f"What is in image {number + 1}?"
            question = next(one for one in questions if one.text == text)
            messages += make_round(question, 0 if messages else num_images)
        return {"scenes": indices, "messages": messages, "kinds": ["name"] * num_images}

    def make_counting(self) -> dict:
        """
        Makes a conversation that brings an image with several things, and asks how many there are of one kind. The answers
        one to four are equally frequent. The result is that of [`make_conversation`].
        """
        index, question = self.rng.choice(self._counting[self.rng.choice(sorted(self._counting))])
        return {"scenes": [index], "messages": make_round(question, 1), "kinds": ["count"]}

    @cached_property
    def _counting(self) -> dict[str, list[tuple[int, Question]]]:
        """For each answer to "How many cats are in image 1?", the scenes and questions that have it."""
        by_answer = defaultdict(list)
        for index in self.several:
            for question in list_questions([self.scenes[index]]):
                if question.kind == "count":
                    by_answer[question.answer].append((index, question))
        return by_answer

    def _draw_scene(self, earlier: list[int]) -> int:
        """One scene in four shows the thing of an earlier one: else "the same thing" would nearly always be "no"."""
        things = [self.scenes[index].things for index in earlier]
        single = [scene[0].kind for scene in things if len(scene) == 1]
        if single and self.rng.random() < 0.25:
            return self.rng.choice(self.of_kind[self.rng.choice(single)])
        return self.rng.choice(self.single if self.rng.random() < 0.5 else self.several)

    def _draw_question(self, questions: list[Question]) -> Question:
        """
        Draws a kind of question, then an answer, then a question, so that the number of questions of a kind or with the same
        answer does not matter.
        """
        kinds = sorted({question.kind for question in questions})
        kind = self.rng.choices(kinds, [self.weights[kind] for kind in kinds])[0]
        answer = self.rng.choice(sorted({question.answer for question in questions if question.kind == kind}))
        return self.rng.choice([one for one in questions if (one.kind, one.answer) == (kind, answer)])


def make_round(question: Question, num_images: int) -> list[dict]:
    """The messages of a round that brings images before its question."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question.text}]
    answer = [{"type": "text", "text": question.answer}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def list_questions(scenes: list[Scene]) -> list[Question]:
    """Returns the questions about the scenes shown so far. The first is image 1."""
    questions = [Question("text", *pair) for pair in TEXT_ROUNDS]
    for number, scene in enumerate(scenes, 1):
        questions += scene_questions(scene, number, len(scenes) == 1)
    questions += [
        Question("same", f"Do images {i} and {j} show the same thing?", "Yes." if same_thing(left, right) else "No.")
        for (i, left), (j, right) in combinations(enumerate(scenes, 1), 2)
        if len(left.things) == len(right.things) == 1
    ]
    groups = [{thing.kind.group for thing in scene.things} for scene in scenes]
    for group, phrase in GROUP_PHRASES.items() if len(scenes) > 1 else ():
        alike = set(EDIBLE) if group == "food" else {group}
        showing = [number for number, shown in enumerate(groups, 1) if shown & alike]
        if len(showing) == 1 and group in groups[showing[0] - 1]:
            questions.append(Question("which", f"Which image shows {phrase}?", f"Image {showing[0]}."))
    return questions


def scene_questions(scene: Scene, number: int, only: bool) -> list[Question]:
    """Returns the questions about one scene. `only` says that no other image was shown, so that "this" is clear."""
    image = f"image {number}"
    counts = Counter(thing.kind for thing in scene.things)
    questions = [
        Question("describe", f"Describe {image}.", describe(scene)),
        Question("ground", f"What color is the background of {image}?", sentence(scene.ground)),
        Question("total", f"How many things are in {image}?", sentence(NUMBERS[len(scene.things)])),
    ]
    if len(scene.things) == 1:
        kind = scene.things[0].kind
        texts = [f"What is in {image}?"] + ["What is this?"] * only
        questions += [Question("name", text, sentence(kind.phrase)) for text in texts]
        if kind.group in GROUP_PHRASES:
            text = f"What sort of thing is in {image}?"
            questions.append(Question("sort", text, sentence(GROUP_PHRASES[kind.group])))
    else:
        questions += [
            Question("count", f"How many {kind.plural} are in {image}?", sentence(NUMBERS[count]))
            for kind, count in counts.items()
        ]
        questions += side_questions(scene, image, counts)
    return questions


def side_questions(scene: Scene, image: str, counts: Counter) -> list[Question]:
    """Returns the questions about left and right, if the scene shows two different things, which stand side by side."""
    if len(scene.things) != 2 or len(counts) != 2:
        return []
    left, right = (thing.kind for thing in sorted(scene.things, key=lambda thing: thing.x))
    return [
        Question("side", f"What is left of the {right.name} in {image}?", sentence(left.phrase)),
        Question("side", f"What is right of the {left.name} in {image}?", sentence(right.phrase)),
        Question("side", f"What is on the left in {image}?", sentence(left.phrase)),
        Question("side", f"What is on the right in {image}?", sentence(right.phrase)),
    ]


def describe(scene: Scene) -> str:
    """Says what a scene shows, such as "A cat and two dogs on a red background."."""
    counts = Counter(thing.kind for thing in scene.things)
    parts = [kind.phrase if count == 1 else f"{NUMBERS[count]} {kind.plural}" for kind, count in counts.items()]
    things = parts[-1] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    article = "an" if scene.ground == "orange" else "a"
    return sentence(f"{things} on {article} {scene.ground} background")


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def same_thing(left: Scene, right: Scene) -> bool:
    return left.things[0].kind == right.things[0].kind
