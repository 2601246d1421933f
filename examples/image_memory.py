# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
What the decoder knows of an image, computed once, saved, and used in another conversation, beside another image:

    python examples/image_memory.py outputs/demo/model
"""

import sys

from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoProcessor

from modeling_visualchat import ImageMemory, VisualChatForCausalLM


folder = sys.argv[1] if len(sys.argv) > 1 else "outputs/demo/model"
model = VisualChatForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(folder)
scans = load_digits().images * (255 / 16)
images = [Image.fromarray(scans[k].astype("uint8")).resize((32, 32)) for k in (3, 8)]
pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
model.encode_images(pixel_values[:1]).save("three.safetensors")

memory = ImageMemory.load("three.safetensors", model.device)
parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What digit is in image 2?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
del inputs["pixel_values"]
# Image 1 is new and comes as pixels; image 2 is known: it skips the vision tower and its prefill
output = model.generate(**inputs, pixel_values=pixel_values[1:], image_memory=[None, memory[0]], max_new_tokens=16)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
