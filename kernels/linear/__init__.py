"""Products with the base model's weights."""
