"""Values in messages, and numbers of bytes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_dsa.byte_sizes import read_bytes, written_bytes
from fastdeploy_dsa.wording import nearest, shown


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\nb'"),
        ("x" * 100, "'" + "x" * 76 + "..."),
        (None, "None"),
        ("\u2028", r"'\u2028'"),
        (10**5000, "a int too large to show"),
        (nested(100000), "a list too large to show"),
    ],
    ids=["line break", "long", "none", "separator", "huge int", "deep"],
)
def test_a_value_is_shown_on_one_short_line(value: object, text: str) -> None:
    assert shown(value) == text


@given(st.text())
def test_any_text_is_shown_on_one_line(text: str) -> None:
    assert len(shown(text).splitlines()) == 1


def test_the_nearest_name_is_found() -> None:
    assert nearest("index_topk_frq", ["index_topk", "index_topk_freq", "v_head_dim"]) == "index_topk_freq"
    assert nearest("x" * 10**6, ["a", "b"]) in ("a", "b")


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (7, 7),
        (np.int64(7), 7),
        ("7", 7),
        ("7B", 7),
        (" 1.5 KiB ", 1536),
        ("80GiB", 80 << 30),
        ("80 GB", 80 * 10**9),
        ("0.1TiB", (1 << 40) // 10),
    ],
)
def test_bytes_are_read(value: object, num_bytes: int) -> None:
    assert read_bytes("memory", value) == num_bytes


@pytest.mark.parametrize("value", ["", "GiB", "1 potato", "1e9", "-1", "1,5GiB", "\u0661GiB", "9" * 5000, "nan"])
def test_text_that_is_no_number_of_bytes_is_named(value: str) -> None:
    message = f"memory: expected bytes, such as 1048576 or '512MiB', got {shown(value)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_bytes("memory", value)


@pytest.mark.parametrize("value", [(1 << 60) + 1, "2000000TiB", "99999999999999999999GB"])
def test_more_bytes_than_any_machine_has_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^memory: expected at most 1152921504606846976 bytes, got "):
        read_bytes("memory", value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "0", "0.5B"])
def test_bytes_are_a_positive_int(value: object) -> None:
    with pytest.raises(ValueError, match=r"^memory: expected an int of 1 or more, got "):
        read_bytes("memory", value)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (80 << 30, "80 GiB"), (5 << 40, "5 TiB")],
)
def test_bytes_are_written(num_bytes: int, text: str) -> None:
    assert written_bytes(num_bytes) == text
