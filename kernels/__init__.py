"""LoRA operations on mixed batches: a contract and a plain-torch form that runs on any device."""
