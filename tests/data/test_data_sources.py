# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Every source of the training data: what conversations its raw rows become, and what is wrong with bad ones."""

import base64
import json
from collections import Counter
from pathlib import Path

import pytest

from helpers.raw_data import as_base64, copy_raw, write_json
from visualchat.data import checks, files, formats, sources


SOURCES = sources.SOURCES


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return copy_raw(tmp_path_factory.mktemp("raw"))


def read(name, root, seed=0):
    """The samples of a source by id, as (picture names, question, answer) for each round, and the context."""
    context = sources.open_source(name, root, seed)
    samples = {sample.id: [show(one) for one in sample.rounds] for sample in context.source.samples(context)}
    return samples, context


def show(one):
    return [Path(picture.path).name for picture in one.images], one.question, one.answer


def sorted_rounds(samples):
    return sorted((question, answer) for rounds in samples.values() for _, question, answer in rounds)


def test_there_are_the_sources_of_the_paper():
    assert list(SOURCES) == [
        "llava", "llava_dial", "otter_mimicit_cgd", "otter_mimicit_sd", "otter_mimicit_sn", "otter_mimicit_tvc",
        "otter_mimicit_vst", "llava_otter_blend", "sparkles_dialogue", "minigpt4", "coco_caption", "aokvqa", "ocr_vqa",
    ]  # fmt: skip
    assert {name: one.concatenate for name, one in SOURCES.items() if one.concatenate > 1} == {"llava": 3, "llava_dial": 2}


@pytest.mark.parametrize("name", SOURCES)
def test_sound_data_has_no_problems(raw, name):
    samples, context = read(name, raw)
    assert samples and context.problems == []


def test_llava_takes_the_first_pair(raw):
    assert read("llava", raw)[0] == {
        "detail_23k:000000000001": [(["000000000001.jpg"], "Describe 1.", "Detail 1.")],
        "detail_23k:000000000002": [(["000000000002.jpg"], "Describe 2.", "Detail 2.")],
        "complex_reasoning_77k:000000000001": [(["000000000001.jpg"], "Reason 1?", "Reason 1.")],
        "complex_reasoning_77k:000000000003": [(["000000000003.jpg"], "Reason 3?", "Reason 3.")],
    }


def test_llava_dial_takes_all_pairs_and_the_image_stays_in_its_turn(raw):
    assert read("llava_dial", raw)[0] == {
        "conversation_58k:000000000001": [(["000000000001.jpg"], "Hello 1?", "Hi."), ([], "More of it?", "No.")],
        "conversation_58k:000000000004": [(["000000000004.jpg"], "Hello 4?", "Hi."), ([], "More of it?", "No.")],
        "conversation_58k:000000000005": [([], "Are you there?", "Hi."), (["000000000005.jpg"], "What is it?", "No.")],
    }


def test_cgd_joins_related_records_over_the_same_images_and_uses_each_once(raw):
    samples, _ = read("otter_mimicit_cgd", raw)
    pair = ["000000000001.jpg", "000000000002.jpg"]
    first, second = samples.pop("CGD_instructions:CGD_INS_1")
    assert first[0] == pair and second[0] == []
    assert {first[1:], second[1:]} == {("What differs?", "One."), ("And else?", "Two.")}
    assert samples == {
        "CGD_instructions:CGD_INS_3": [(["000000000006.jpg", "000000000001.jpg"], "Alike?", "No.")],
        "CGD_instructions:CGD_INS_4": [(["000000000003.jpg", "000000000006.jpg"], "Which is red?", "None.")],
        "CGD_instructions:CGD_INS_5": [(["000000000006.jpg", "000000000003.jpg"], "Which first?", "The second.")],
    }


def test_cgd_shuffles_rounds_by_the_seed(raw):
    orders = {tuple(read("otter_mimicit_cgd", raw, seed)[0]["CGD_instructions:CGD_INS_1"][0][1:]) for seed in range(12)}
    assert orders == {("What differs?", "One."), ("And else?", "Two.")}


@pytest.mark.parametrize("name", ["SD", "SN", "TVC", "VST"])
def test_archives_of_mimicit_hold_their_pictures(raw, name):
    context = sources.open_source(f"otter_mimicit_{name.lower()}", raw)
    samples = {sample.id: sample for sample in context.source.samples(context)}
    joined = samples.pop(f"{name}_instructions:{name}_INS_0")
    assert sorted(one.question for one in joined.rounds) == ["What changed?", "What else?"]
    held = [checks.read_image_bytes(picture.path, picture.span) for picture in joined.rounds[0].images]
    assert held == [base64.b64decode(as_base64(0)), base64.b64decode(as_base64(1))]
    if name == "SD":
        assert not samples and not context.left_out
    else:
        (eight,) = samples.values()
        assert [len(one.images) for one in eight.rounds] == [8]
        assert context.left_out == {"records without 1 to 8 known images": 3}


@pytest.mark.parametrize("seed", range(6))
def test_blend_has_llava_about_each_image_then_cgd(raw, seed):
    samples, context = read("llava_otter_blend", raw, seed)
    # Of image 6 there is no llava conversation: as the earlier image it rules a conversation out, as the last it may stay
    assert list(samples) == ["CGD_instructions:CGD_INS_1", "CGD_instructions:CGD_INS_4"]
    assert context.left_out == {"CGD conversations whose earlier image has no llava conversation": 2}
    rounds = samples["CGD_instructions:CGD_INS_1"]
    assert [name for one in rounds for name in one[0]] == ["000000000001.jpg", "000000000002.jpg"]
    about_first = {"Describe 1.", "Reason 1?", "Hello 1?", "More of it?"}
    questions = [question for _, question, _ in rounds]
    end = questions.index("Describe 2.")
    assert end >= 1 and set(questions[:end]) <= about_first and len(set(questions[:end])) == end
    assert ("Hello 1?" in questions) == ("More of it?" in questions)
    assert rounds[0][0] == ["000000000001.jpg"] and rounds[end][0] == ["000000000002.jpg"]
    assert sorted(questions[end + 1 :]) == ["And else?", "What differs?"]
    assert samples["CGD_instructions:CGD_INS_4"] == [
        (["000000000003.jpg"], "Reason 3?", "Reason 3."),
        (["000000000006.jpg"], "Which is red?", "None."),
    ]


def test_blend_draws_how_many_llava_conversations(raw):
    lengths = {len(read("llava_otter_blend", raw, seed)[0]["CGD_instructions:CGD_INS_1"]) for seed in range(20)}
    assert min(lengths) == 4 and max(lengths) == 7


def test_sparkles_names_images_in_one_style_a_dialogue(raw):
    samples, context = read("sparkles_dialogue", raw, seed=1)
    assert context.left_out == {"dialogues with more than 8 images": 2} and len(samples) == 8
    allowed = [
        [
            (["1417.jpg", "14.jpg"], f"Link {a} and {b}, please.", f"{b} is old, {a} is new."),
            (["3.jpg"], f"And {c}?", f"It is like {b}."),
        ]
        for a, b, c in (
            ("image a", "image b", "image c"),
            ("image A", "image B", "image C"),
            ("the first image", "the second image", "the third image"),
        )
    ]
    assert all(rounds in allowed for rounds in samples.values())
    assert all(rounds in samples.values() for rounds in allowed)
    folders = [sample.rounds[0].images[0].path for sample in context.source.samples(context)]
    assert Counter(Path(path).parts[-3] for path in folders) == {"SparklesDialogueCC": 4, "SparklesDialogueVG": 4}


def test_captions_are_asked_for_in_many_ways(raw):
    asked = set()
    for seed in range(30):
        samples, _ = read("minigpt4", raw, seed)
        (pictures, question, answer), *more = samples["filter_cap:7"]
        assert (pictures, answer, more) == (["7.jpg"], "A seven.", [])
        asked.add(question)
    assert asked <= set(formats.DESCRIBE) and len(asked) > 5


def test_coco_caption_draws_one_of_the_captions_and_leaves_held_out_splits(raw):
    drawn = set()
    for seed in range(20):
        samples, context = read("coco_caption", raw, seed)
        assert sorted(samples) == ["dataset:COCO_1.jpg", "dataset:COCO_2.jpg"]
        assert context.left_out == {"records of a held-out split": 1}
        ((pictures, question, answer),) = samples["dataset:COCO_1.jpg"]
        assert pictures == ["COCO_1.jpg"] and question in formats.DESCRIBE
        drawn.add(answer)
    assert drawn == {"One 1.", "Two 1."}


def test_aokvqa_asks_why(raw):
    drawn = set()
    for seed in range(20):
        ((pictures, question, answer),) = read("aokvqa", raw, seed)[0]["aokvqa_v1p0_train:q1"]
        start = "What digit is it? "
        assert pictures == ["000000000005.jpg"] and question.startswith(start)
        assert question.removeprefix(start) in formats.WHY
        drawn.add(answer)
    assert drawn == {"The answer is five. Because it looks so.", "The answer is five. Because it has a belly."}


def test_ocr_vqa_draws_one_pair(raw):
    drawn = set()
    for seed in range(20):
        samples, context = read("ocr_vqa", raw, seed)
        assert list(samples) == ["dataset:111", "dataset:222"] and context.left_out == {"records of a held-out split": 1}
        ((pictures, *pair),) = samples["dataset:111"]
        assert pictures == ["111.png"]
        drawn.add(tuple(pair))
    assert drawn == {("Who wrote it?", "Me"), ("Title?", "Book 111")}


@pytest.mark.parametrize("name", SOURCES)
def test_draws_depend_on_the_seed_and_the_row_only(raw, name):
    once, again = read(name, raw, 3)[0], read(name, raw, 3)[0]
    assert once == again


def found(root, name):
    """(kind, row, field) of each problem of a source's texts."""
    samples, context = read(name, root)
    return [(one.kind, one.file, one.row, one.field) for one in context.problems], samples


def change(root, path, edit):
    value = json.loads((root / path).read_text())
    edit(value)
    write_json(root / path, value)


def put(*keys):
    """An edit of a JSON value: `put(0, "answer", "")` sets value[0]["answer"] to ""; a value of ... deletes."""

    def edit(value):
        *path, last, new = keys
        for key in path:
            value = value[key]
        if new is ...:
            del value[last]
        else:
            value[last] = new

    return edit


INS = "CGD_INS_3"
DETAIL, DIAL = "llava/detail_23k.json", "llava/conversation_58k.json"
CGD_FILE, SD_FILE = "MIMIC-IT/CGD_instructions.json", "MIMIC-IT/SD_instructions.json"
SPARKLES = "SparklesDialogueVG/annotations/SparklesDialogueVG.json"
CAPTIONS, COCO_FILE = "cc_sbu_align/filter_cap.json", "coco_caption/dataset.json"
AOKVQA, BOOKS = "aokvqa/annotations/aokvqa_v1p0_train.json", "OCR_VQA/dataset.json"
BAD_TEXTS = [
    ("llava", DETAIL, put(1, "image", ...), "missing field", "1", "image"),
    ("llava", DETAIL, put(1, "conversations", 0, "value", 5), "missing field", "1", "conversations[0].value"),
    ("llava", DETAIL, put(1, "a string"), "missing field", "1", "record"),
    ("llava", DETAIL, put(1, "conversations", 0, "value", "<image>\n"), "empty question", "1", "conversations[0].value"),
    ("llava", DETAIL, put(1, "conversations", 1, "value", " \n"), "empty answer", "1", "conversations[1].value"),
    ("llava", DETAIL, put(1, "conversations", 1, "value", "A <image>."), "image count", "1", "conversations[1].value"),
    ("llava", DETAIL, put(1, "conversations", 1, "from", "human"), "odd turns", "1", "conversations[1].from"),
    ("llava", DETAIL, put(1, "conversations", 1, ...), "odd turns", "1", "conversations"),
    ("llava", DETAIL, put(1, "conversations", []), "odd turns", "1", "conversations"),
    ("llava", DETAIL, put(1, "conversations", 0, "value", "What?"), "image count", "1", "conversations"),
    ("llava", DETAIL, put(1, "id", "000000000001"), "duplicate id", "1", "id"),
    ("llava_dial", DIAL, put(0, "conversations", 2, "value", "<image>?"), "image count", "0", "conversations"),
    ("llava_otter_blend", DIAL, put(0, "conversations", 3, "value", ""), "empty answer", "0", "conversations[3].value"),
    ("otter_mimicit_cgd", CGD_FILE, put("data", INS, "answer", ""), "empty answer", INS, "answer"),
    ("otter_mimicit_cgd", CGD_FILE, put("data", INS, "image_ids", []), "image count", INS, "image_ids"),
    ("otter_mimicit_cgd", CGD_FILE, put("data", INS, "instruction", ...), "missing field", INS, "instruction"),
    ("otter_mimicit_cgd", CGD_FILE, put("data", INS, "rel_ins_ids", ["x"]), "unknown record", INS, "rel_ins_ids[0]"),
    ("otter_mimicit_sd", SD_FILE, put("data", "SD_INS_1", "image_ids", 1, "x"), "missing image", "SD_INS_1", "image_ids[1]"),
    ("sparkles_dialogue", SPARKLES, put(2, "dialogue", 1, "content", "IMAGE#3."), "image count", "2", "dialogue[1].content"),
    ("sparkles_dialogue", SPARKLES, put(2, "dialogue", 0, "role", "assistant"), "odd turns", "2", "dialogue[0].role"),
    ("sparkles_dialogue", SPARKLES, put(2, "dialogue", 3, ...), "odd turns", "2", "dialogue"),
    ("sparkles_dialogue", SPARKLES, put(2, "dialogue", 0, "images", 1, 5), "missing field", "2", "dialogue[0].images[1]"),
    ("sparkles_dialogue", SPARKLES, put(2, "id", "SparklesDialogueVG-0"), "duplicate id", "2", "id"),
    ("minigpt4", CAPTIONS, put("annotations", 1, "caption", ""), "empty answer", "1", "caption"),
    ("minigpt4", CAPTIONS, put("annotations", 1, "image_id", "7"), "duplicate id", "1", "image_id"),
    ("coco_caption", COCO_FILE, put("images", 0, "sentences", 1, "raw", ""), "empty answer", "0", "sentences[1]"),
    ("coco_caption", COCO_FILE, put("images", 0, "sentences", []), "empty answer", "0", "sentences"),
    ("aokvqa", AOKVQA, put(0, "correct_choice_idx", 2), "missing field", "0", "correct_choice_idx"),
    ("aokvqa", AOKVQA, put(0, "rationales", []), "empty answer", "0", "rationales"),
    ("ocr_vqa", BOOKS, put("111", "answers", ["Me"]), "odd turns", "111", "answers"),
    ("ocr_vqa", BOOKS, put("111", "questions", 1, ""), "empty question", "111", "questions[1]"),
]  # fmt: skip


@pytest.mark.parametrize("name, path, edit, kind, row, field", BAD_TEXTS, ids=lambda value: str(value)[:30])
def test_bad_rows_are_named_and_dropped(tmp_path, name, path, edit, kind, row, field):
    _, sound = found(copy_raw(tmp_path), name)
    change(tmp_path, path, edit)
    problems, samples = found(tmp_path, name)
    assert problems == [(kind, path, row, field)]
    if kind == "unknown record":
        assert samples == sound
    else:
        assert len(sorted_rounds(samples)) < len(sorted_rounds(sound))
        assert set(sorted_rounds(samples)) <= set(sorted_rounds(sound))


def test_of_a_repeated_id_the_first_record_without_a_fault_is_used(tmp_path):
    copy_raw(tmp_path)
    change(tmp_path, DETAIL, lambda records: records.extend(2 * [{**records[1], "id": "new"}]))
    change(tmp_path, DETAIL, put(2, "conversations", 1, "value", ""))
    change(tmp_path, DETAIL, lambda records: records.append(records[3]))
    problems, samples = found(tmp_path, "llava")
    assert problems == [
        ("empty answer", DETAIL, "2", "conversations[1].value"),
        ("duplicate id", DETAIL, "4", "id"),
    ]
    assert "detail_23k:new" in samples


def test_keys_that_repeat_in_a_file_are_found(tmp_path):
    copy_raw(tmp_path)
    books = (tmp_path / BOOKS).read_text()
    (tmp_path / BOOKS).write_text(books.replace('"222": {', '"111": {"imageURL": "other", "split": 1},\n"222": {', 1))
    problems, samples = found(tmp_path, "ocr_vqa")
    assert problems == [("duplicate id", BOOKS, "111", "key")] and len(samples) == 2
    archive = tmp_path / "MIMIC-IT/SD.json"
    archive.write_text(archive.read_text()[:-1] + ', "SD_IMG_0": "AAAA"}')
    assert found(tmp_path, "otter_mimicit_sd")[0] == [("duplicate id", "MIMIC-IT/SD.json", "SD_IMG_0", "key")]


def test_pictures_of_an_archive_are_found_however_it_is_laid_out(tmp_path):
    strings = {"a": as_base64(1), "b": "data:image/png;base64," + as_base64(2)}
    for text in (json.dumps(strings, indent=2), json.dumps(strings).replace("/", "\\/"), json.dumps(strings) + "\n"):
        (tmp_path / "X.json").write_text(text)
        spans = files.index_images(tmp_path, "X.json", pytest.fail)
        held = {name: checks.read_image_bytes(tmp_path / "X.json", span) for name, span in spans.items()}
        assert held == {"a": base64.b64decode(as_base64(1)), "b": base64.b64decode(as_base64(2))}
    (tmp_path / "X.json").write_text("{}")
    assert files.index_images(tmp_path, "X.json", pytest.fail) == {}
    for text in ('{"a": "AA', '{"a": "AA"', '{"a": 5}', "[]", ""):
        (tmp_path / "X.json").write_text(text)
        with pytest.raises(ValueError, match=r"X\.json"):
            files.index_images(tmp_path, "X.json", pytest.fail)


def test_files_that_are_missing_or_no_json_are_named(tmp_path):
    copy_raw(tmp_path)
    (tmp_path / DETAIL).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"the source llava needs .*/llava/detail_23k\.json"):
        sources.open_source("llava", tmp_path)
    for content in (b'[{"id": ', b"", b'["\xe9"]', b"[" * 100_000):
        (tmp_path / DETAIL).write_bytes(content)
        with pytest.raises(ValueError, match=r"detail_23k\.json is not valid JSON"):
            read("llava", tmp_path)
    write_json(tmp_path / CAPTIONS, [])
    with pytest.raises(ValueError, match=r"filter_cap\.json: expected an object with the field 'annotations'"):
        read("minigpt4", tmp_path)
    with pytest.raises(ValueError, match="no source 'lava': use one of llava, "):
        sources.open_source("lava", tmp_path)


def test_the_digest_of_prepared_data_stays_that_of_version_0_1():
    """`prepared.json` keeps a digest of these texts: if they change, finished data is taken for that of other settings."""
    image = checks.ImageReference("/data/1.jpg", "image", (3, 9))
    sample = formats.Sample("llava/x.json", "0", "x:1", (formats.Round("Q?", "A.", (image,)),))
    assert repr([sample]) == (
        "[Sample(file='llava/x.json', row='0', id='x:1', rounds=(Round(question='Q?', answer='A.', pictures=("
        "Picture(path='/data/1.jpg', field='image', span=(3, 9)),)),))]"
    )
