"""One asyncio process: decides everything, computes nothing, and runs where torch is not installed.

A request's life:
 1. a route reads the JSON body (`body`, `fields`, `lorax`, `openai`);
 2. the tokenizer encodes the prompt on a thread; `chat` renders a conversation first;
 3. `engine.submit` waits until the adapter is in host memory (`adapters`) and makes a `Sequence`;
 4. the sequence waits its turn (`waiting`, `admission`);
 5. `scheduler.plan` gives it a row, KV pages and an adapter slot;
 6. `shards` encodes the step once and writes it to every rank;
 7. `scheduler.apply` appends the token that rank 0 sampled, and wakes the handler;
 8. the handler detokenizes, looks for stop strings, and writes JSON or an SSE frame.
"""
