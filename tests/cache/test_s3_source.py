"""Adapters in S3: moto's server on a port of its own, spoken to by boto3 as Amazon's would be."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from lorafleet.cache.disk_tier import DiskTier
from lorafleet.cache.errors import (
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    SourceTimeout,
    SourceUnavailable,
)
from lorafleet.cache.sources.s3 import S3Source, _Folder
from lorafleet.cache.sources.source import Patience
from lorafleet.cache.weight_files import INDEX_FILE
from lorafleet.proto.messages import AdapterKey, FetchProgress
from tests.cache.adapter_cases import (
    pickle_weights,
    split_weights,
    tensors_of,
    write_adapter,
)
from tests.cache.proxy import Proxy

FILES = ("adapter_config.json", "adapter_model.safetensors")
KEY = AdapterKey("s3", "s3://adapters/team/foo")
SECRET = "s3cr3t-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The base URL of an S3 server without buckets."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def uploader(server: str) -> Any:
    """A client for the tests' own uploads."""
    config = Config(s3={"addressing_style": "path"})
    keys = {"aws_access_key_id": "AKIAOTHER", "aws_secret_access_key": "other"}
    return boto3.client("s3", "us-east-1", endpoint_url=server, config=config, **keys)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def client(uploader: Any) -> Iterator[Any]:
    """The same; what it made is gone afterwards."""
    client = uploader
    client.create_bucket(Bucket="adapters")
    yield client
    for bucket in client.list_buckets()["Buckets"]:
        versions = client.list_object_versions(Bucket=bucket["Name"])
        for version in [*versions.get("Versions", []), *versions.get("DeleteMarkers", [])]:
            client.delete_object(
                Bucket=bucket["Name"], Key=version["Key"], VersionId=version["VersionId"]
            )
        client.delete_bucket(Bucket=bucket["Name"])


@pytest.fixture
def folder(client: Any, tmp_path: Path) -> Path:
    """An adapter, uploaded to `team/foo`."""
    folder = write_adapter(tmp_path / "adapter")
    upload(client, folder, "team/foo")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "cache", 1 << 20)


def upload(client: Any, folder: Path, prefix: str, bucket: str = "adapters") -> None:
    for path in folder.iterdir():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())


def ignore(progress: FetchProgress) -> None:
    pass


def test_downloads_every_file_of_sharded_weights(
    client: Any, server: str, disk: DiskTier, tmp_path: Path
) -> None:
    folder = split_weights(write_adapter(tmp_path / "parts"))
    upload(client, folder, "team/parts")
    key = AdapterKey("s3", "s3://adapters/team/parts")
    directory = S3Source(disk, server).fetch(key, "", ignore)
    for path in folder.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()
    client.delete_object(Bucket="adapters", Key="team/parts/adapter_config.json")
    disk.drop(key)
    with pytest.raises(AdapterUnservable, match=r"has no adapter_config\.json"):
        S3Source(disk, server).fetch(key, "", ignore)


def test_an_index_of_very_many_files_asks_for_none_of_them(
    client: Any, server: str, disk: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {f"t{number}": f"adapter_model-{number}.safetensors" for number in range(1001)}
    folder = split_weights(write_adapter(tmp_path / "many"))
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": parts}))
    upload(client, folder, "team/many")
    asked: list[str] = []
    head = _Folder._head

    def note(self: _Folder, name: str) -> Any:
        asked.append(name)
        return head(self, name)

    monkeypatch.setattr(_Folder, "_head", note)
    with pytest.raises(AdapterUnservable, match="more than 1000 files of weights"):
        S3Source(disk, server).fetch(AdapterKey("s3", "s3://adapters/team/many"), "", ignore)
    assert asked == [*FILES, INDEX_FILE]


def test_downloads_pickled_weights_only_if_allowed(
    client: Any, server: str, disk: DiskTier, tmp_path: Path
) -> None:
    upload(client, pickle_weights(write_adapter(tmp_path / "pickled")), "team/pickled")
    key = AdapterKey("s3", "s3://adapters/team/pickled")
    with pytest.raises(AdapterUnservable, match="--allow-pickled-adapters"):
        S3Source(disk, server).fetch(key, "", ignore)
    directory = S3Source(disk, server, allow_pickles=True).fetch(key, "", ignore)
    assert (directory / "adapter_model.bin").exists()


def assert_same(directory: Path, folder: Path) -> None:
    for name in FILES:
        assert (directory / name).read_bytes() == (folder / name).read_bytes()


def test_a_tokenizer_comes_along(disk: DiskTier, server: str, client: Any, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "vocab.json").write_text("not needed")
    upload(client, folder, "team/foo")
    directory = S3Source(disk, server).fetch(KEY, "", ignore)
    found = {path.name for path in directory.iterdir()}
    assert found == {*FILES, "chat_template.jinja", "download.json"}


def test_downloads_once_and_pins_what_it_saw(disk: DiskTier, server: str, folder: Path) -> None:
    seen: list[FetchProgress] = []
    source = S3Source(disk, server)
    directory = source.fetch(KEY, "a token of the hub's", seen.append)
    assert_same(directory, folder)
    size = sum((folder / name).stat().st_size for name in FILES)
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (size, size)
    assert source.disk_bytes(KEY) == size
    assert source.list() == [(KEY, directory)]
    download = disk.get(KEY)
    assert download is not None
    assert hashlib.md5((folder / FILES[1]).read_bytes()).hexdigest() in download.commit
    before = len(seen)
    assert source.fetch(KEY, "", seen.append) == directory
    assert len(seen) == before
    source.drop(KEY)
    assert source.list() == []


@pytest.mark.parametrize(
    "name", ["s3://adapters/team/foo", "s3://adapters/team/foo/", "adapters/team/foo"]
)
def test_names_of_the_same_folder(disk: DiskTier, server: str, folder: Path, name: str) -> None:
    assert_same(S3Source(disk, server).fetch(AdapterKey("s3", name), "", ignore), folder)


def test_a_prefix_is_exact(disk: DiskTier, server: str, client: Any, tmp_path: Path) -> None:
    """LoRAX's listing of a prefix finds its longer siblings too."""
    upload(client, write_adapter(tmp_path / "adapter"), "team/foobar")
    source = S3Source(disk, server)
    for name in ("s3://adapters/team/foo", "s3://adapters/team", "s3://adapters/team/fooba"):
        with pytest.raises(AdapterNotFound, match="S3 has no"):
            source.fetch(AdapterKey("s3", name), "", ignore)
    upload(client, write_adapter(tmp_path / "other", tensors=tensors_of(seed=1)), "team/foo")
    assert_same(source.fetch(KEY, "", ignore), tmp_path / "other")


def test_the_endpoint_of_the_environment_is_honoured(
    disk: DiskTier, server: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert_same(S3Source(disk).fetch(KEY, "", ignore), folder)


@pytest.mark.parametrize(
    "name",
    ["", "foo", "s3://adapters", "s3://adapters/", "s3://UPPER/foo", "s3://a/../b", "gs://b/foo",
     "s3://adapters/a\nb", "s3://adapters/nothing", "s3://no-such-bucket/foo", "s3://adapters//"],
)  # fmt: skip
def test_what_is_not_there_is_not_found(
    disk: DiskTier, server: str, client: Any, tmp_path: Path, name: str
) -> None:
    with pytest.raises(AdapterNotFound):
        S3Source(disk, server).fetch(AdapterKey("s3", name), "", ignore)
    assert list((tmp_path / "cache").rglob("partial.json")) == []


def test_there_are_no_revisions_to_ask_for(disk: DiskTier, server: str, folder: Path) -> None:
    with pytest.raises(AdapterNotFound, match="no revision 'v1'"):
        S3Source(disk, server).fetch(AdapterKey("s3", KEY.id, "v1"), "", ignore)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_without_an_adapter_is_unservable(
    disk: DiskTier, server: str, client: Any, folder: Path, name: str
) -> None:
    client.delete_object(Bucket="adapters", Key=f"team/foo/{name}")
    with pytest.raises(AdapterUnservable, match=f"no {name}"):
        S3Source(disk, server).fetch(KEY, "", ignore)


def test_other_buckets_than_the_operators_are_forbidden(
    disk: DiskTier, server: str, folder: Path
) -> None:
    with pytest.raises(AdapterForbidden, match="'adapters' are not served"):
        S3Source(disk, server, ["others"]).fetch(KEY, "", ignore)
    S3Source(disk, server, ["others", "adapters"]).fetch(KEY, "", ignore)


def test_a_bucket_with_versions_and_one_uploaded_in_parts(
    disk: DiskTier, server: str, client: Any, folder: Path
) -> None:
    client.put_bucket_versioning(Bucket="adapters", VersioningConfiguration={"Status": "Enabled"})
    upload(client, folder, "team/foo")
    part = {"Bucket": "adapters", "Key": f"team/foo/{FILES[1]}"}
    part["UploadId"] = client.create_multipart_upload(**part)["UploadId"]
    body = (folder / FILES[1]).read_bytes()
    etag = client.upload_part(**part, PartNumber=1, Body=body)["ETag"]
    done = client.complete_multipart_upload(
        **part, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]}
    )
    source = S3Source(disk, server)
    assert_same(source.fetch(KEY, "", ignore), folder)
    download = disk.get(KEY)
    assert download is not None
    assert done["VersionId"] in download.commit


def test_a_broken_connection_is_gone_on_with(disk: DiskTier, server: str, folder: Path) -> None:
    size = (folder / FILES[1]).stat().st_size
    with Proxy(server) as proxy:
        proxy.cut_after = 2_000
        assert_same(S3Source(disk, proxy.url).fetch(KEY, "", ignore), folder)
        assert proxy.num_cuts == 1
        ranges = [head for head in proxy.requests if b"\r\nRange: bytes=" in head]
        assert len(ranges) == 1
        assert size > 2_000


def test_an_object_that_changes_on_the_way_is_not_mixed(
    disk: DiskTier, server: str, client: Any, folder: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", tensors=tensors_of(seed=1))
    with Proxy(server) as proxy:
        proxy.cut_after = 2_000
        proxy.on_cut = lambda: upload(client, other, "team/foo")
        source = S3Source(disk, proxy.url)
        with pytest.raises(SourceUnavailable, match="changed while it was downloaded"):
            source.fetch(KEY, "", ignore)
        assert_same(source.fetch(KEY, "", ignore), other)


def test_a_source_that_answers_nothing_times_out(disk: DiskTier) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        source = S3Source(disk, url, patience=Patience(answer_seconds=0.2))
        with pytest.raises(SourceTimeout, match="too long"):
            source.fetch(KEY, "", ignore)


def test_no_server_is_unavailable(disk: DiskTier) -> None:
    with socket.socket() as listener:  # bound, so that the port stays free of servers
        listener.bind(("127.0.0.1", 0))
        source = S3Source(disk, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(SourceUnavailable, match="cannot be reached"):
            source.fetch(KEY, "", ignore)


def test_no_credentials_are_the_servers_trouble(
    disk: DiskTier, server: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SourceUnavailable, match="no credentials"):
        S3Source(disk, server).fetch(KEY, "", ignore)


@pytest.mark.parametrize(("status", "kind"), [(403, AdapterForbidden), (503, SourceUnavailable)])
def test_refusals_and_no_secret_in_any_word(
    disk: DiskTier, status: int, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Proxy("", status=status) as proxy:
        with pytest.raises(kind) as caught:
            S3Source(disk, proxy.url).fetch(KEY, "hf_token", ignore)
        assert b"AWS4-HMAC-SHA256" in proxy.requests[0]  # it was signed
        assert b"hf_token" not in b"".join(proxy.requests)
    words = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert SECRET not in words
    assert "Signature" not in words


def test_without_boto3_it_says_so(disk: DiskTier, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['boto3'] = None\n"
        "from pathlib import Path\n"
        "from lorafleet.cache.disk_tier import DiskTier\n"
        "from lorafleet.cache.sources.s3 import S3Source\n"
        "from lorafleet.proto.messages import AdapterKey\n"
        "source = S3Source(DiskTier(Path(sys.argv[1]), 1 << 20))\n"
        "try: source.fetch(AdapterKey('s3', 's3://b-b/foo'), '', print)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "other")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("AdapterNotFound ")
    assert "lorafleet[s3]" in done.stdout
