"""The tools around VisualChat: `visualchat --help` lists them. The model is in `modeling_visualchat`."""
