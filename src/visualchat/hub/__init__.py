"""Uploads to the Hugging Face Hub, and the configurations in `hub_configs/`."""
