"""Fine-tuning: `train` runs a recipe with `dataset` and `trainer`; `merge` merges an adapter into the weights."""
