"""Adapters made of others: what is asked for, what may be merged, and the merge itself."""
