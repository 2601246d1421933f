"""The tools around VisualChat: `visualchat --help` lists them. The model is in `modeling_visualchat`."""

__version__ = "0.2.0"
