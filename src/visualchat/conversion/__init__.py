"""Checkpoints of DeepSpeed-VisualChat and LLaVA, converted."""
