"""ShardConfig: every dial of one shard process."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.cache.sources.http_url import AllowedHosts
from lorafleet.proto.flags import Bytes, check_range, flag

PAGE_SIZE = 16  # tokens in a KV page


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """Shards: the base model and its memory."""

    model_id: str = flag(help="base model: a local directory, or a hub id, optionally id@revision")
    revision: str = flag("", "commit, branch or tag of a hub model")
    num_shard: int = flag(1, "tensor-parallel shard processes, one per device")
    dtype: str = flag(
        "auto",
        "serving dtype; auto takes the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    load_format: str = flag(
        "auto",
        "auto reads the checkpoint's safetensors; dummy makes random weights from config.json, "
        "to measure speed without a checkpoint",
        choices=("auto", "dummy"),
    )
    device: str = flag(
        "auto",
        "where shards compute; auto takes cuda when there is one",
        choices=("auto", "cpu", "cuda"),
    )
    max_total_tokens: int = flag(
        0,
        "tokens a sequence may hold, prompt and generated together; "
        "0 = the model's maximum, at most 4096",
    )
    max_batch_size: int = flag(256, "sequences that run at once")
    max_batch_prefill_tokens: int = flag(
        1024, "tokens one step may compute, prompt chunks and decodes together"
    )
    kv_pages: int = flag(0, f"KV cache pages of {PAGE_SIZE} tokens; 0 = fit kv_cache_bytes")
    kv_cache_bytes: Bytes = flag(
        Bytes(0),
        "KV cache bytes per shard; 0 = 1GiB on CPU, on CUDA what cuda_memory_fraction leaves",
    )
    cuda_memory_fraction: float = flag(0.9, "share of a CUDA device's memory to use")
    cuda_graph_tokens: int = flag(
        256,
        "on CUDA, replay steps of up to so many tokens as captured graphs; 0 = launch every "
        "kernel; beyond 256 with FlashInfer only",
    )
    max_active_adapters: int = flag(1024, "adapters that can be on the device at once")
    adapter_device_bytes: Bytes = flag(
        Bytes(0),
        "device bytes per shard for adapters; 0 = 1GiB on CPU, a tenth of the device on CUDA",
    )
    adapter_host_bytes: Bytes = flag(Bytes("4GiB"), "host memory bytes per shard for adapters")
    adapter_disk_bytes: Bytes = flag(
        Bytes("20GiB"), "disk bytes per machine for downloaded adapters"
    )
    adapter_root: str = flag(
        "",
        'directory under which adapter_source "local" finds adapters; '
        "empty = local adapters are refused",
    )
    adapter_cache_dir: str = flag(
        "~/.cache/lorafleet/adapters", "directory for downloaded adapters"
    )
    adapter_s3_endpoint: str = flag(
        "",
        'base URL of the server that adapter_source "s3" asks; empty = boto3\'s own, '
        "AWS_ENDPOINT_URL included",
    )
    adapter_s3_buckets: tuple[str, ...] = flag(
        (), "the only buckets adapters may come from; none = any this server's credentials open"
    )
    adapter_http_hosts: tuple[str, ...] = flag(
        (),
        'hosts, or host:port, that adapter_source "http" may download archives from, redirects '
        "included; none = archives are refused",
    )
    adapter_archive_bytes: Bytes = flag(
        Bytes("2GiB"), "bytes an archive may have, and bytes it may have in it"
    )
    allow_pickled_adapters: bool = flag(
        False,
        "serve adapters that have adapter_model.bin or .pt and no safetensors; torch loads them "
        "as weights alone",
    )
    adapter_answer_seconds: float = flag(
        10.0, "seconds a remote source may take to accept a connection and for each next bytes"
    )
    adapter_download_seconds: float = flag(
        600.0,
        "seconds an adapter's download may take; the next request goes on where it was given up",
    )
    rank: int = flag(0, "this shard's rank, 0 .. num_shard - 1; set by the launcher")
    listen: str = flag(
        "127.0.0.1:7400", "gRPC address of this shard, host:port or unix:PATH; set by the launcher"
    )
    rendezvous: str = flag(
        "",
        "torch.distributed init method all ranks share, e.g. tcp://host:port; set by the launcher",
    )

    def __post_init__(self) -> None:
        check_range("num_shard", self.num_shard, 1, 64)
        check_range("rank", self.rank, 0, self.num_shard - 1)
        check_range("max_batch_size", self.max_batch_size, 1, 4096)
        check_range("max_batch_prefill_tokens", self.max_batch_prefill_tokens, 1, 1 << 20)
        check_range("max_active_adapters", self.max_active_adapters, 1, 1 << 16)
        check_range("cuda_memory_fraction", self.cuda_memory_fraction, 0.05, 1.0)
        check_range("cuda_graph_tokens", self.cuda_graph_tokens, 0, 1024)
        check_range("kv_pages", self.kv_pages, 0, 1 << 31)
        check_range("max_total_tokens", self.max_total_tokens, 0, 1 << 31)
        check_range("adapter_archive_bytes", self.adapter_archive_bytes, 1, 1 << 50)
        check_range("adapter_answer_seconds", self.adapter_answer_seconds, 0.01, 3600)
        check_range("adapter_download_seconds", self.adapter_download_seconds, 0.01, 1 << 20)
        AllowedHosts(self.adapter_http_hosts)
        endpoint = self.adapter_s3_endpoint
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                "--adapter-s3-endpoint must be empty or start with http:// or https://, "
                f"got {endpoint}"
            )
