"""Starting lorafleet: the `lorafleet` command, the local launcher, the demo and the benchmark.

Nothing imports this package; it starts the router and the shards by command line and knows only
their flags.
"""
