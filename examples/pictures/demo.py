# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
A chat about pictures, from pretrained parts, in under an hour on two CPU cores (`make pictures`):

    python -m examples.pictures.demo

1. The parts come from pip packages: SmolLM2-135M-Instruct, a DINOv2-small, and OpenMoji's drawings (`parts.py`).
2. The data are conversations about scenes of drawings (`dataset.py`).
3. Tower and decoder are joined, and the projector learns the decoder's words (`words.py`).
4. `visualchat train` trains the projector and the learned numbers of images through the frozen decoder, with the recipe
   `examples/recipes/pictures.yaml`.
5. The model is measured on other scenes (`measure.py`).

Everything is in `outputs/pictures`: `model/` with its card, `metrics.json`, and `conversation/` and `conversation.png`, a
conversation of the test in which as many answers are right as in all of them. What is complete is kept: a command that was
stopped continues where it was.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from transformers import AutoTokenizer, set_seed

from examples.digits_demo.demo import check_saved_folder, save_conversation
from examples.digits_demo.report import draw_conversation
from examples.digits_demo.talk import run_conversation
from examples.pictures.dataset import CONVERSATIONS, image_path, make_data, read_examples
from examples.pictures.measure import list_typical, measure
from examples.pictures.parts import make_parts
from examples.pictures.precision import computes_bfloat16, find_device
from examples.pictures.report import CREDIT, write_model_card
from examples.pictures.scenes import Scene
from examples.pictures.words import CLASS_TOKEN_OUTPUTS, see, teach_words
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from visualchat.cli import main as visualchat
from visualchat.loading import find_image_size, load_image_processor


RECIPE = Path("examples/recipes/pictures.yaml")

MOST_IMAGES = 8


def main(argv: list[str] | None = None) -> dict:
    """Runs what is not there yet, and returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path("outputs/parts"), help="folder of the pretrained parts")
    parser.add_argument("--output", type=Path, default=Path("outputs/pictures"), help="folder for all output")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    device = find_device()
    set_seed(0)

    print("\n1. Pretrained parts, from pip packages", flush=True)
    make_parts(args.parts)

    print("\n2. Scenes of drawings, and conversations about them", flush=True)
    data = args.output / "data"
    scenes = make_data(data, args.parts / "drawings/openmoji.ttf", load_tokenizer(args.parts))

    print("\n3. The parts are joined, and the projector learns the decoder's words", flush=True)
    make_start(args.output / "start", args.parts, data, scenes["train"], device)

    print("\n4. The projector and the numbers of images train through the frozen decoder", flush=True)
    overrides = {
        "model_name_or_path": args.output / "start",
        "datasets": data / "train.jsonl",
        "output_dir": args.output,
        "use_cpu": device == "cpu",
        "bf16": computes_bfloat16(device),
    }
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    if status := visualchat(["train", str(RECIPE), *options, "--resume"]):
        sys.exit(status)

    print("\n5. Other scenes, and text alone", flush=True)
    model = VisualChatForCausalLM.from_pretrained(args.output / "model").to(device)
    processor = VisualChatProcessor.from_pretrained(args.output / "model")
    metrics, right = measure(model, processor, data, args.parts / "decoder")
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))

    # To be looked at: a conversation in which the model is as good as it is in all
    typical = list_typical(read_examples(data / "test.jsonl"), right)
    for example in typical:
        example["images"] = [Image.open(path) for path in example["images"]]
    conversation = save_conversation(typical, args.output / "conversation")
    answers = run_conversation(model.cpu(), processor, conversation)
    draw_conversation(conversation, answers, args.output / "conversation.png", CREDIT)
    kinds = {thing.kind for scene in scenes["train"] for thing in scene.things}
    sizes = {"kinds": len(kinds), "images": len(scenes["train"]), "training_conversations": CONVERSATIONS["train"]}
    write_model_card(args.output, metrics, sizes)
    check_saved_folder(args.output, answers)
    print(f"\nAll output is in {args.output}. This took {time.perf_counter() - started:.0f} seconds.")
    print(f"Now try: visualchat chat {args.output / 'model'} --image {args.output / 'conversation/image-1.png'}")
    return metrics


def load_tokenizer(parts: Path):
    return AutoTokenizer.from_pretrained(parts / "decoder")


def make_start(folder: Path, parts: Path, data: Path, scenes: list[Scene], device: str) -> None:
    """
    Joins tower and decoder, and teaches the projector words. `folder` appears when it is complete, and one that is there is
    kept.
    """
    if folder.exists():
        return
    processor = VisualChatProcessor(load_image_processor(str(parts / "tower")), load_tokenizer(parts), chat_format="decoder")
    model = VisualChatForCausalLM.from_vision_text_pretrained(
        str(parts / "tower"),
        str(parts / "decoder"),
        image_token_id=processor.image_token_id,
        image_size=find_image_size(processor.image_processor),
        multimodal_attention="mmca_merged",
        image_prefix_ids=processor.image_prefix_ids(),
        learned_image_numbers=MOST_IMAGES,
        projector="pooled",
        pool_factor=4,
        class_token_outputs=CLASS_TOKEN_OUTPUTS,
    ).to(device)
    processor.image_seq_length = model.config.image_seq_length
    features = see(model, processor, [str(image_path(data, "train", index)) for index in range(len(scenes))])
    teach_words(model, processor, scenes, features)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
