"""Numbers in words: digits, units and what stands for nothing."""

import pytest

from hpc_train.core.formatting import amount, energy_text, interval_text, plural, ratio_text, significant


@pytest.mark.parametrize(
    ("joules", "quality", "text"),
    [
        (123.4, "measured", "123 J"),
        (123.4, "estimated", "123 J est."),
        (0.0123, "measured", "12.3 mJ"),
        (4.5e6, "measured", "4.50 MJ"),
        (0.0, "measured", "0 J"),
        (0.0, "missing", "missing"),
        (None, "missing", "missing"),
    ],
)
def test_joules_in_words(joules: float | None, quality: str, text: str) -> None:
    assert energy_text(joules, quality) == text


def test_numbers_in_words() -> None:
    assert [significant(value, 4) for value in (4.9312, 123456.7, 0.00012345, 0.0, None)] == [
        "4.931",
        "123457",
        "0.0001234",
        "0",
        "-",
    ]
    assert significant(9.9996) == significant(10.0) == "10.0" and amount(5.84e-8, "J") == "58.4 nJ"
    assert significant(float("nan")) == "nan" and significant(1e-9) == "1.00e-09"
    assert interval_text((0.00481, 0.01002), 1e3) == "4.81-10.02" and interval_text(None, 1.0) == "-"
    assert [amount(value, "B") for value in (1.5e13, 47100.0, 0.0, 0.0002, None)] == [
        "15.0 TB",
        "47.1 kB",
        "0 B",
        "200 uB",
        "missing",
    ]
    assert [ratio_text(value) for value in (1.617, 0.5, 0.0123)] == ["1.62x", "0.50x", "0.012x"]


def test_counts_have_their_plural() -> None:
    assert [plural(count, "rank") for count in (0, 1, 2, 4096)] == ["0 ranks", "1 rank", "2 ranks", "4,096 ranks"]
