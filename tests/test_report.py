"""The generated parts of the README are those that the recorded files give."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402


@pytest.mark.parametrize("part", ["diff", "timing", "results"])
def test_readme_holds_the_current_output(part):
    """A figure that no longer follows from the files is found."""
    made = {
        "diff": report.diff_block,
        "timing": report.timing_text,
        "results": report.results_table,
    }[part]()
    assert f"<!-- {part} -->\n{made}\n<!-- /{part} -->" in (ROOT / "README.md").read_text()


def test_table_follows_the_recorded_runs(tmp_path, monkeypatch):
    """Altering one recorded return alters the table."""
    before = report.results_table()
    copy = shutil.copytree(report.RESULTS, tmp_path / "results")
    path = sorted(copy.glob("dmc-walker-run__sac__*/eval.csv"))[0]
    lines = path.read_text().splitlines()
    step, _, rest = lines[-1].split(",", 2)
    path.write_text("\n".join([*lines[:-1], f"{step},987654,{rest}"]) + "\n")
    monkeypatch.setattr(report, "RESULTS", copy)
    after = report.results_table()
    assert after != before
