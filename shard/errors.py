"""What stops a shard from starting; the message is for the operator."""


class UnsupportedModel(ValueError):
    """The checkpoint is of a kind, or of a shape, that this build cannot serve."""


class BadCheckpoint(ValueError):
    """The checkpoint is incomplete or does not fit its own configuration."""
