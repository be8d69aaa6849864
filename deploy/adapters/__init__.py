"""`lorafleet adapters`: manages the adapters of a running server, checks folders without one."""
