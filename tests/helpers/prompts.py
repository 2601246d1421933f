"""The paper's prompt, to the letter."""

# The paper's prompt (arXiv 2309.14327, section 4.2)
DESIGN_PROMPT = """\
<s>You are a powerful vision-language assistant.

### Image 1:
<image>

### Question:
please describe the image.

### Answer:
It's a cute black cat.</s>
### Image 2:
<image>
### Image 3:
<image>

### Question:
What's the difference between the three cats?

### Answer:
"""
