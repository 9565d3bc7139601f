import pytest

from gpustack.schemas.workers import Device
from gpustack.worker.detectors.reading import checked, json_of, number, percent, size, text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("81920MiB", 81920 << 20),
        ("32768 MiB", 32768 << 20),
        ("16 GB", 16 << 30),
        ({"value": 8176, "unit": "MB"}, 8176 << 20),
        ({"value": 192, "unit": "GB"}, 192 << 30),
        ("21458059264", None),
        ("N/A", None),
        ({"value": "N/A", "unit": "MB"}, None),
        ("-1 MiB", None),
        ("99999999 TB", None),
        (True, None),
        ([], None),
    ],
)
def test_a_size_is_bytes_or_nothing(value: object, expected: int | None) -> None:
    assert size(value) == expected


def test_a_number_without_a_unit_has_the_one_of_its_column() -> None:
    assert size("21458059264", "B") == 21458059264
    assert size(65520, "MB") == 65520 << 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "NaN", None, {}, "W", ""])
def test_what_is_no_number_is_none(value: object) -> None:
    assert number(value) is None


def test_a_percentage_above_a_hundred_is_misread() -> None:
    assert percent("58%") == 58
    assert percent("340 %") is None


def test_a_word_has_one_line_and_no_control_characters() -> None:
    assert text("  MTT S80\x00\n ") == "MTT S80"
    assert text("N/A") == text("-") == text(None) == ""


@pytest.mark.parametrize(
    "output",
    [
        "",
        "no such device",
        "[WARNING] 3 cards",
        '{"card0": {',
        "[" * 100_000,
        '[{"gpu": 0}, \n  {"gpu": 1',
        "[1, 2]",
    ],
)
def test_what_is_no_json_is_said(output: str) -> None:
    with pytest.raises(ValueError, match="the-smi printed"):
        json_of(output, "the-smi")


def test_json_is_found_after_warnings() -> None:
    assert json_of('[WARNING] x\nWARNING: {y}\n{"a": 1}\ntrailing', "the-smi") == {"a": 1}
    assert json_of("[]\n", "the-smi") == []


def test_two_devices_with_one_index_are_refused() -> None:
    one = Device(index=1, vendor="x", memory_total_bytes=1)
    with pytest.raises(ValueError, match="index 1"):
        checked([one, one], "the-smi")
