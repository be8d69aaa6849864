"""One process per tensor-parallel rank: computes everything, decides nothing.

A step of one rank: `service` takes a StepPlan off the stream, `worker` begins its adapter moves
and hands it to `batch`, which turns its columns into tensors with the help of `rows`; `model` runs
transformers' own decoder over them with `layers` (tensor-parallel linears with LoRA sites) and
`attention` (paged KV); `sampling` draws one token per sampling row, the same on every rank; rank 0
answers.
"""
