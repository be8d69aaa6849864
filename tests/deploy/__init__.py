"""The launcher and the `lorafleet` command, on real processes."""
