"""Fine-tuning: `train` reads a recipe, `rows` and `trainer` do the work, `merge` folds an adapter into the weights."""
