"""`lorafleet bench`: loads a running server and measures it from outside.

`workload` decides what is asked and when, `client` sends one streaming request and notes when its
tokens came, `load` keeps many in flight, `report` turns the notes into numbers.
"""
