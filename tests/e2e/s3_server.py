"""A server that speaks S3, with one bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

BUCKET = "adapters"
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "example",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class S3:
    """Its address, and what fills it."""

    url: str
    client: Any

    def put(self, key: str, body: bytes) -> None:
        """Makes an object."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body)


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Runs one; processes that are started meanwhile have the credentials."""
    for name, value in _CREDENTIALS.items():
        patch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url, config = f"http://{host}:{port}", Config(s3={"addressing_style": "path"})
        client = boto3.client("s3", "us-east-1", endpoint_url=url, config=config)
        client.create_bucket(Bucket=BUCKET)
        yield S3(url, client)
    finally:
        server.stop()
