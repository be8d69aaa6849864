"""Who holds what: ledgers decide and need no torch, tiers obey.

Ledgers (`pages`, `prefix`, `slots`, `extents`, `residency`) are the router's bookkeeping of KV
pages and adapter bytes. Tiers (`disk_tier`, `host_tier`, `device_tier`, and `store` above them) are
the shard's copies of the adapters themselves.
"""
