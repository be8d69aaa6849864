"""Flags: the command line wins over the environment, which wins over the default."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass

import pytest

from lorafleet.proto.flags import (
    Bytes,
    add_flags,
    check_range,
    flag,
    from_flags,
    secrets_of,
    to_flags,
)


@dataclass(frozen=True)
class Engine:
    """Engine: what drives."""

    num_gears: int = flag(5, "gears to shift")
    fuel: str = flag("diesel", "what it burns", choices=("diesel", "petrol"))
    turbo: bool = flag(False, "a turbo")
    tank: Bytes = flag(Bytes("2KiB"), "how much fits")
    drivers: tuple[str, ...] = flag((), "who drives")
    shell: str = flag("steel", "what is around", variable="ENGINE_SHELL")

    def __post_init__(self) -> None:
        check_range("num_gears", self.num_gears, 1, 9)


@dataclass(frozen=True)
class Vault:
    """Vault: what is locked."""

    code: str = flag("", "what opens it", secret=True)


@dataclass(frozen=True)
class Needed:
    """Needed: no default."""

    name: str = flag(help="must be given")


def parse(*line: str) -> Engine:
    parser = ArgumentParser()
    add_flags(parser, Engine)
    return from_flags(Engine, parser.parse_args(line))


def test_defaults() -> None:
    assert parse() == Engine()


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM_GEARS", "7")
    monkeypatch.setenv("TURBO", "true")
    monkeypatch.setenv("TANK", "3MiB")
    monkeypatch.setenv("DRIVERS", "ann bob")
    assert parse() == Engine(7, turbo=True, tank=Bytes(3 << 20), drivers=("ann", "bob"))
    assert parse("--num-gears=4", "--no-turbo").num_gears == 4
    assert not parse("--no-turbo").turbo


def test_an_empty_variable_counts_as_not_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NUM_GEARS", "FUEL", "TURBO", "TANK", "DRIVERS", "NAME"):
        monkeypatch.setenv(name, "")
    assert parse() == Engine()
    parser = ArgumentParser()
    add_flags(parser, Needed)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "required: --name" in capsys.readouterr().err


def test_a_flag_may_have_another_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/sh")
    assert parse().shell == "steel"
    monkeypatch.setenv("ENGINE_SHELL", "tin")
    assert parse().shell == "tin"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("NUM_GEARS", "many", "argument --num-gears: 'many' is not a whole number"),
        ("FUEL", "water", "argument --fuel: 'water' is none of 'diesel', 'petrol'"),
        ("TURBO", "maybe", "'maybe' is none of 1, true, yes, on, 0, false, no, off"),
        ("TANK", "12XB", "'12XB' is not a byte count such as 512MiB or 20GB"),
    ],
)
def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    complaint: str,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse()
    assert f"{complaint} (environment variable {name})" in capsys.readouterr().err


def test_a_flag_wins_over_a_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM_GEARS", "many")
    monkeypatch.setenv("TURBO", "maybe")
    assert parse("--num-gears=4", "--turbo") == Engine(4, turbo=True)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--num-gears=many", "argument --num-gears: 'many' is not a whole number\n"),
        ("--tank=12XB", "'12XB' is not a byte count such as 512MiB or 20GB\n"),
    ],
)
def test_a_bad_value_is_told_as_its_type_tells_it(
    capsys: pytest.CaptureFixture[str], line: str, complaint: str
) -> None:
    with pytest.raises(SystemExit):
        parse(line)
    assert complaint in capsys.readouterr().err


def test_to_flags_is_the_inverse() -> None:
    config = Engine(3, "petrol", True, Bytes("20GB"), ("ann", "bob"))
    assert parse(*to_flags(config)) == config


def test_a_secret_travels_in_the_environment_and_is_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vault = Vault("sesame")
    assert to_flags(vault) == []
    assert "sesame" not in repr(vault)
    for name, value in secrets_of(vault).items():
        monkeypatch.setenv(name, value)
    parser = ArgumentParser()
    add_flags(parser, Vault)
    assert from_flags(Vault, parser.parse_args([])) == vault
    assert "sesame" not in parser.format_help()
    assert "default: set; env CODE" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("text", ["12XB", "much", "", "-3MiB", "1e3"])
def test_bad_byte_counts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a byte count"):
        Bytes(text)


def test_out_of_range_names_flag_and_range() -> None:
    with pytest.raises(ValueError, match=r"--num-gears must be between 1 and 9, got 12"):
        parse("--num-gears=12")


def test_out_of_range_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM_GEARS", "12")
    with pytest.raises(ValueError, match=r"got 12 \(environment variable NUM_GEARS\)$"):
        parse()
    with pytest.raises(ValueError, match=r"got 13$"):
        parse("--num-gears=13")


def test_required_and_choices_exit_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    add_flags(parser, Needed)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    with pytest.raises(SystemExit):
        parse("--fuel=water")
    assert "--name" in capsys.readouterr().err


def test_help_shows_default_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "gears to shift (default: 5; env NUM_GEARS)" in text
    assert "(default: 2KiB; env TANK)" in text
