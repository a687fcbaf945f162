"""The tool that measures variants: what it makes of rates, and what it refuses."""

import pandas as pd
import pytest
import variants
from helpers_run import one_error
from helpers_tools import call


def test_ratios_are_taken_round_by_round():
    """The median of the ratios, not the ratio of medians; the shipped one is one."""
    rates = {variants.SHIPPED: [10, 40, 60], "uncompiled": [5, 10, 60]}
    rows = [
        {"round": number, "kind": "SAC", "variant": name, "rate": float(rate)}
        for name, values in rates.items()
        for number, rate in enumerate(values)
    ]
    lines = [line.split("|") for line in variants.table(pd.DataFrame(rows)).splitlines()[2:]]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert ["SAC", variants.SHIPPED, "40", "1.00", "1.00 to 1.00"] in cells
    assert ["SAC", "uncompiled", "10", "0.50", "0.25 to 1.00"] in cells


@pytest.mark.parametrize("words", [["--rounds", "x"], ["--device", "tpu"]])
def test_bad_input_is_one_line_and_writes_nothing(words, tmp_path):
    """It ends with 2, and what was measured before stays."""
    code, out, err = call(variants.run, variants.Options, *words, "--out", tmp_path / "none")
    assert (code, out) == (2, "")
    assert words[1] in one_error(err)
    assert not list(tmp_path.iterdir())
