# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Conversations about scenes of drawings: 1 to 4 images, and a question in each round about any image shown so far. Each answer
is a function of the scenes. Equal seeds give equal conversations.
"""

from collections import Counter
from itertools import combinations
from random import Random
from typing import NamedTuple

from examples.pictures.kinds import Kind
from examples.pictures.scenes import Scene, make_scene


COUNTS = ("None.", "One.", "Two.", "Three.", "Four.")
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

TEXT_ROUNDS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What is two plus two?", "Two plus two is four."),
    ("Which planet do we live on?", "We live on Earth."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
)


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


def make_conversations(kinds: list[Kind], count: int, split: str, seed: int = 0) -> list[dict]:
    """
    Makes conversations of 1 to 4 images and 1 to 4 rounds with things of these kinds. The scenes of two splits differ, since
    the name of the split is part of the seed.

    Returns:
        `list[dict]`: Examples with `scenes` (`list[Scene]`), `messages`, and the `kinds` (`list[str]`) of the questions.
    """
    rng = Random(f"{split} {seed}")
    return [make_conversation(kinds, rng) for _ in range(count)]


def make_conversation(kinds: list[Kind], rng: Random) -> dict:
    """Makes one conversation. The first round brings an image, and each later image comes in a random round."""
    num_images, num_rounds = rng.randint(1, 4), rng.randint(1, 4)
    scenes: list[Scene] = []
    for _ in range(num_images):
        # One scene in three shows the same single thing as an earlier one: else "the same thing" would nearly always be "no"
        single = [scene for scene in scenes if len(scene.things) == 1]
        repeated = [rng.choice(single).things[0].kind] if single and rng.random() < 1 / 3 else None
        scenes.append(make_scene(repeated or draw_kinds(kinds, rng), rng))
    arrivals = [0, *sorted(rng.randrange(num_rounds) for _ in range(num_images - 1))]
    messages, question_kinds, asked = [], [], set()
    for number in range(num_rounds):
        shown = scenes[: sum(arrival <= number for arrival in arrivals)]
        question = draw_question([q for q in list_questions(shown, kinds, rng) if q.text not in asked], rng)
        asked.add(question.text)
        content = [{"type": "image"}] * arrivals.count(number) + [{"type": "text", "text": question.text}]
        answer = [{"type": "text", "text": question.answer}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        question_kinds.append(question.kind)
    return {"scenes": scenes, "messages": messages, "kinds": question_kinds}


def draw_kinds(kinds: list[Kind], rng: Random) -> list[Kind]:
    """Draws what a scene shows: one thing (half of the time), two to four of one kind or of two, or two different ones."""
    if rng.random() < 0.5:
        return [rng.choice(kinds)]
    first, second = rng.sample(kinds, 2)
    number = rng.randint(2, 4)
    drawn = [first] * rng.randint(1, number)
    drawn += [second] * (number - len(drawn))
    return rng.sample(drawn, number)


def draw_question(questions: list[Question], rng: Random) -> Question:
    """Draws a kind of question first, so that each kind is asked equally often, whatever the number of its questions."""
    kind = rng.choice(sorted({question.kind for question in questions}))
    return rng.choice([question for question in questions if question.kind == kind])


def list_questions(scenes: list[Scene], kinds: list[Kind], rng: Random) -> list[Question]:
    """Returns the questions about the scenes shown so far. The first is image 1."""
    questions = [Question("text", *pair) for pair in TEXT_ROUNDS]
    for number, scene in enumerate(scenes, 1):
        questions += scene_questions(scene, number, len(scenes) == 1, kinds, rng)
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


def scene_questions(scene: Scene, number: int, only: bool, kinds: list[Kind], rng: Random) -> list[Question]:
    """Returns the questions about one scene. `only` says that no other image was shown, so that "this" is clear."""
    image = f"image {number}"
    counts = Counter(thing.kind for thing in scene.things)
    questions = [
        Question("describe", f"Describe {image}.", describe(scene)),
        Question("ground", f"What color is the background of {image}?", f"{scene.ground.capitalize()}."),
    ]
    if len(scene.things) == 1:
        kind = scene.things[0].kind
        text = "What is this?" if only else f"What is in {image}?"
        questions.append(Question("name", text, f"{kind.phrase.capitalize()}."))
        if kind.group in GROUP_PHRASES:
            text = f"What sort of thing is in {image}?"
            questions.append(Question("sort", text, f"{GROUP_PHRASES[kind.group].capitalize()}."))
    else:
        absent = rng.choice([kind for kind in kinds if kind not in counts])
        questions += [
            Question("count", f"How many {kind.plural} are in {image}?", COUNTS[counts[kind]]) for kind in [*counts, absent]
        ]
        questions += side_questions(scene, image, counts)
    return questions


def side_questions(scene: Scene, image: str, counts: Counter) -> list[Question]:
    """Returns "what is left of" and "right of" for each pair of different things at one height, if there is one of each."""
    questions = []
    for left, right in combinations(sorted(scene.things, key=lambda thing: thing.x), 2):
        same_height = len(scene.things) == 2 or abs(left.y - right.y) < 0.25
        if same_height and right.x - left.x > 0.25 and counts[left.kind] == counts[right.kind] == 1:
            for side, thing, other in (("left", left, right), ("right", right, left)):
                text = f"What is {side} of the {other.kind.name} in {image}?"
                questions.append(Question("side", text, f"{thing.kind.phrase.capitalize()}."))
    return questions


def describe(scene: Scene) -> str:
    """Says what a scene shows, such as "A cat and two dogs on a red background."."""
    counts = Counter(thing.kind for thing in scene.things)
    numbers = ("no", "one", "two", "three", "four")
    parts = [kind.phrase if count == 1 else f"{numbers[count]} {kind.plural}" for kind, count in counts.items()]
    article = "an" if scene.ground == "orange" else "a"
    text = f"{' and '.join(parts)} on {article} {scene.ground} background."
    return text[0].upper() + text[1:]


def same_thing(left: Scene, right: Scene) -> bool:
    return left.things[0].kind == right.things[0].kind
