# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Questions without an image, and short answers, for rounds between those about images. `measure.py` compares how the model
answers other questions after an image with how its decoder does.
"""

TEXT_ROUNDS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
    ("What is the capital of Russia?", "The capital of Russia is Moscow."),
    ("What is the capital of England?", "The capital of England is London."),
    ("What is the capital of India?", "The capital of India is New Delhi."),
    ("What is the capital of Sweden?", "The capital of Sweden is Stockholm."),
    ("What is the capital of Australia?", "The capital of Australia is Canberra."),
    ("What is half of 20?", "Half of 20 is 10."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("What is the opposite of happy?", "The opposite of happy is sad."),
    ("What is the opposite of early?", "The opposite of early is late."),
    ("What is the opposite of up?", "The opposite of up is down."),
    ("What is the opposite of strong?", "The opposite of strong is weak."),
    ("What color is the sky?", "The sky is a beautiful shade of blue."),
    ("Translate 'hello' to German.", 'In German, "hello" is "Hallo" (Hallo).'),
    ("Name three fruits.", "1. Bananas\n2. Oranges\n3. Grapes"),
    ("Name three colors.", "1. Red\n2. Blue\n3. Green"),
    ("Say hello.", "Hello there, welcome to my world!"),
    ("Thank you!", "I'm glad to help."),
    ("How do birds fly?", "Birds fly using a combination of wings and feathers."),
    ("Why is water important?", "Water is incredibly important for life on Earth."),
)
