"""RouterConfig: every dial of the router process."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.proto.flags import check_range, flag


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Router: HTTP, queues and scheduling."""

    hostname: str = flag("0.0.0.0", "address to listen on", variable="LORAFLEET_HOSTNAME")
    port: int = flag(3000, "port to listen on", short="-p")
    shards: tuple[str, ...] = flag(
        (),
        "gRPC addresses of the group's ranks, rank 0 first; set by the launcher",
    )
    adapter_source: str = flag(
        "",
        "source of adapters whose request names none: local, hub, s3 or http; empty = local when "
        "there is an adapter root, else hub",
        choices=("", "local", "hub", "s3", "http"),
    )
    adapter_failure_seconds: float = flag(
        60.0,
        "longest time a remote adapter that failed is not tried again with the same token; the "
        "first time is a second, each next twice as long; 0 = always try",
    )
    adapter_access_ttl: float = flag(
        60.0,
        "seconds a source's word holds that a token may read a private adapter; so long, at most, "
        "a token works that was taken back; 0 = ask for every request",
    )
    admin_api_key: str = flag(
        "",
        "key of the admin routes (/v1/adapters, /v1/aliases, vLLM's load and unload routes), sent "
        "as a bearer token; rather an environment variable than a flag; without one they answer "
        "only callers on this machine",
        secret=True,
    )
    preloaded_adapter_ids: tuple[str, ...] = flag(
        (), "adapters loaded before the first request and pinned in host memory"
    )
    preloaded_adapter_source: str = flag(
        "",
        "source of preloaded_adapter_ids; empty = adapter_source",
        choices=("", "local", "hub", "s3", "http"),
    )
    adapter_aliases: tuple[str, ...] = flag(
        (),
        "names that stand for adapters from the start, each as NAME=ADAPTER_ID; operators may "
        "point them elsewhere (/v1/adapters)",
    )
    metrics_max_adapters: int = flag(
        100, "busiest adapters that have metrics of their own; the others share one label, other"
    )
    max_concurrent_requests: int = flag(
        1024,
        "sequences of all requests in the service at once; more get 429. A request is one sequence "
        "for each prompt, times n or best_of",
    )
    max_waiting_per_adapter: int = flag(
        0,
        "requests of one adapter, or of the base model, that may wait for its fetch or for a row; "
        "more get 429; 0 = no limit",
    )
    max_running_per_adapter: int = flag(
        0, "sequences of one adapter, or of the base model, that may run at once; 0 = no limit"
    )
    priority_ageing_seconds: float = flag(
        10.0,
        "a line of waiting requests none of which started for this long counts as one priority "
        "better, so that no priority waits forever",
    )
    request_timeout: float = flag(
        0.0,
        "seconds a request may take, queueing and adapter fetch included, before it ends with 504; "
        "a request's own timeout may be shorter; 0 = no limit",
    )
    max_input_length: int = flag(
        0,
        "prompt tokens a request may have; 0 = what max_total_tokens leaves",
    )
    max_stop_sequences: int = flag(16, "stop strings a request may have")
    max_best_of: int = flag(4, "sequences one request may ask for (best_of, n)")
    prefill_chunk_tokens: int = flag(
        0,
        "prompt tokens of one sequence computed per step; 0 = up to the step's budget",
    )
    prefix_caching: bool = flag(
        True,
        "reuse KV pages of equal prompt prefixes under the same adapter",
    )
    validation_workers: int = flag(2, "threads that tokenize")
    shutdown_grace_seconds: float = flag(
        30.0,
        "seconds running requests get to finish after SIGTERM",
    )
    shard_connect_seconds: float = flag(600.0, "seconds to wait for the shards to load")

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("max_concurrent_requests", self.max_concurrent_requests, 1, 1 << 20)
        check_range("max_waiting_per_adapter", self.max_waiting_per_adapter, 0, 1 << 20)
        check_range("max_running_per_adapter", self.max_running_per_adapter, 0, 1 << 20)
        check_range("priority_ageing_seconds", self.priority_ageing_seconds, 0.001, 86_400)
        check_range("metrics_max_adapters", self.metrics_max_adapters, 0, 10_000)
        check_range("request_timeout", self.request_timeout, 0, 86_400)
        check_range("adapter_failure_seconds", self.adapter_failure_seconds, 0, 86_400)
        check_range("adapter_access_ttl", self.adapter_access_ttl, 0, 86_400)
        check_range("max_stop_sequences", self.max_stop_sequences, 0, 1024)
        check_range("max_best_of", self.max_best_of, 1, 128)
        check_range("prefill_chunk_tokens", self.prefill_chunk_tokens, 0, 1 << 20)
        check_range("validation_workers", self.validation_workers, 1, 64)
