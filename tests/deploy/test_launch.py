"""The launcher over real child processes: readiness, signals, deaths, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.deploy.launcher import Launcher, free_port
from tests.deploy.stand_in import DEATH_CODE


@pytest.fixture
def port() -> int:
    return free_port()


def flags(port: int, *more: str) -> tuple[str, ...]:
    return ("--num-shard=2", "--hostname=127.0.0.1", f"--port={port}", *more)


def assert_clean(launcher: Launcher) -> None:
    assert launcher.survivors() == []
    assert list(launcher.sockets.iterdir()) == []


def test_banner_says_what_is_served(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port)) as launcher:
        banner = launcher.wait_for_banner()
    assert f"http://127.0.0.1:{port}" in banner
    assert "LlamaForCausalLM, float32" in banner
    assert "8,192 tokens" in banner
    assert "loading weights: 50%" in launcher.errors


def test_each_child_gets_its_flags_and_its_share_of_the_cores(tmp_path: Path, port: int) -> None:
    root = tmp_path / "adapters"
    root.mkdir()
    with Launcher(tmp_path, *flags(port, f"--adapter-root={root}")) as launcher:
        launcher.wait_for_banner()
        shards = [launcher.entry(f"shard-{rank}") for rank in (0, 1)]
        router = launcher.entry("router")
    share = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    assert [shard["environment"]["OMP_NUM_THREADS"] for shard in shards] == [share, share]
    assert [shard["args"]["rank"] for shard in shards] == [0, 1]
    assert {shard["args"]["rendezvous"][:7] for shard in shards} == {"file://"}
    assert router["args"]["shards"] == [shard["args"]["listen"] for shard in shards]
    assert router["args"]["adapter_source"] == "local"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_router_before_the_shards(
    tmp_path: Path, port: int, number: signal.Signals
) -> None:
    with Launcher(tmp_path, *flags(port)) as launcher:
        launcher.wait_for_banner()
        launcher.signal(number)
        assert launcher.wait() == 0
        assert_clean(launcher)
        told = [(e["who"], e["what"]) for e in launcher.diary() if e["what"] != "started"]
    assert told[:2] == [("router", "asked to stop"), ("router", "finished")]
    assert sorted(told[2:]) == [
        (f"shard-{rank}", what) for rank in (0, 1) for what in ("asked to stop", "finished")
    ]


def test_a_second_signal_kills(tmp_path: Path, port: int) -> None:
    grace = "--shutdown-grace-seconds=100000"
    with Launcher(tmp_path, *flags(port, grace), habits="router:stubborn") as launcher:
        launcher.wait_for_banner()
        launcher.signal(signal.SIGINT)
        launcher.wait_for_error("stopping")
        launcher.signal(signal.SIGINT)
        assert launcher.wait() == 0
        assert_clean(launcher)


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path, port: int) -> None:
    grace = "--shutdown-grace-seconds=0"
    with Launcher(tmp_path, *flags(port, grace), habits="router:stubborn") as launcher:
        launcher.wait_for_banner()
        launcher.signal(signal.SIGTERM)
        assert launcher.wait() == 0
        assert_clean(launcher)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_stops_it_quietly(tmp_path: Path, port: int, stream: str) -> None:
    with Launcher(tmp_path, *flags(port), without_reader=stream) as launcher:
        assert launcher.wait() == 141
        assert_clean(launcher)
    assert "Traceback" not in launcher.errors


def test_a_dead_shard_takes_the_service_down(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port)) as launcher:
        launcher.wait_for_banner()
        os.kill(launcher.entry("shard-1")["pid"], signal.SIGUSR1)
        assert launcher.wait() == 1
        assert_clean(launcher)
    report = launcher.errors.partition(f"shard 1 exited with code {DEATH_CODE}")[2]
    assert "last words 9\n" not in report  # the last 50 of 60
    assert all(f"    shard-1 last words {line}\n" in report for line in range(10, 60))


def test_a_killed_router_takes_the_service_down(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port)) as launcher:
        launcher.wait_for_banner()
        os.kill(launcher.entry("router")["pid"], signal.SIGKILL)
        assert launcher.wait() == 1
        assert_clean(launcher)
    assert "router was killed by SIGKILL" in launcher.errors


def test_a_shard_that_dies_while_loading(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port), habits="shard-0:dies_loading") as launcher:
        assert launcher.wait() == 1
        assert_clean(launcher)
    assert f"shard 0 exited with code {DEATH_CODE}" in launcher.errors


def test_a_dead_childs_own_child_neither_hides_it_nor_survives(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port), habits="shard-1:leaves_child") as launcher:
        launcher.wait_for_banner()
        os.kill(launcher.entry("shard-1")["pid"], signal.SIGUSR1)
        assert launcher.wait() == 1
        assert_clean(launcher)
    assert f"shard 1 exited with code {DEATH_CODE}" in launcher.errors


def test_a_killed_launcher_leaves_no_orphans(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port), habits="router:stubborn shard-0:stubborn") as launcher:
        launcher.wait_for_banner()
        launcher.signal(signal.SIGKILL)
        launcher.wait()
        assert launcher.survivors() == []


def test_children_are_out_of_reach_of_the_terminals_ctrl_c(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port)) as launcher:
        launcher.wait_for_banner()
        sessions = [os.getsid(pid) for pid in launcher.pids().values()]
        assert os.getsid(launcher.process.pid) not in sessions
        assert len(set(sessions)) == 3


def test_logs_carry_the_childs_name(tmp_path: Path, port: int) -> None:
    with Launcher(tmp_path, *flags(port)) as launcher:
        launcher.wait_for_banner()
        os.kill(launcher.entry("shard-1")["pid"], signal.SIGUSR1)
        launcher.wait()
    assert "[shard 1] shard-1 last words 0\n" in launcher.errors


def test_a_busy_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with Launcher(tmp_path, *flags(port)) as launcher:
            assert launcher.wait() == 2
            assert launcher.diary() == []
    assert f"--port {port} on 127.0.0.1: Address already in use" in launcher.errors


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--adapter-root=/nonexistent", "--adapter-root /nonexistent is not a directory"),
        ("--num-shard=0", "--num-shard must be between 1 and 64"),
        ("--port=70000", "--port must be between 0 and 65535"),
        ("--adapter-source=local", "--adapter-source local needs --adapter-root"),
        (
            "--preloaded-adapter-source=local",
            "--preloaded-adapter-source local needs --adapter-root",
        ),
        ("--model-id=./nowhere", "--model-id ./nowhere is not a directory"),
        ("--model-id=/", "--model-id / has no config.json"),
    ],
)
def test_a_bad_flag_is_named(tmp_path: Path, port: int, flag: str, complaint: str) -> None:
    with Launcher(tmp_path, *flags(port), flag) as launcher:
        assert launcher.wait() == 2
        assert launcher.diary() == []
    assert complaint in launcher.errors


def test_a_model_that_the_shards_cannot_share_is_an_error_before_anything_starts(
    tmp_path: Path, port: int
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 3}')
    with Launcher(tmp_path, *flags(port, f"--model-id={tmp_path}")) as launcher:
        assert launcher.wait() == 2
        assert launcher.diary() == []
    sentence = "lorafleet serve: error: num_attention_heads 3 is not divisible by --num-shard 2\n"
    assert launcher.errors == sentence


def test_the_port_is_free_again(tmp_path: Path, port: int) -> None:
    for run in ("first", "second"):
        folder = tmp_path / run
        folder.mkdir()
        with Launcher(folder, *flags(port)) as launcher:
            launcher.wait_for_banner()
            launcher.signal(signal.SIGTERM)
            assert launcher.wait() == 0


def test_what_must_go_is_there_while_it_serves(tmp_path: Path) -> None:
    with Launcher(tmp_path, "--num-shard=1", "--hostname=127.0.0.1", "--port=0") as launcher:
        launcher.wait_for_banner()
        assert all(psutil.pid_exists(pid) for pid in launcher.pids().values())
        assert len(launcher.pids()) == 2
        (folder,) = launcher.sockets.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        assert launcher.entry("shard-0")["args"]["listen"] == f"unix:{folder}/shard-0.sock"
