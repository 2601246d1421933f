# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
A chat of two rounds over two images:

    python examples/chat.py outputs/demo/model
"""

import sys

from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoProcessor

from modeling_visualchat import VisualChatForCausalLM


folder = sys.argv[1] if len(sys.argv) > 1 else "outputs/demo/model"
model = VisualChatForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(folder)
scans = load_digits().images * (255 / 16)
three, eight = (Image.fromarray(scans[k].astype("uint8")).resize((32, 32)) for k in (3, 8))

chat = model.start_chat(processor)
for question, images in [("What digit is in image 1?", [three]), ("Which digit is larger, image 1 or image 2?", [eight])]:
    print(f"> {question}")
    print(chat.send(question, images, max_new_tokens=16))
