"""benchmarks/report.py: tables, figures and sentences that follow from files; recording of runs."""

import json
import shutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import report
from helpers_run import (
    ROOT,
    folder_of,
    read_checkpoint,
    read_scalars,
    same,
    small,
)
from helpers_tools import call, refusal

import sac

WALKER, POLE = "dmc/walker-run", "dmc/cartpole-swingup"


def main(*words) -> tuple[int, str, str]:
    """Calls the tool in this process."""
    return call(report.report, report.Options, *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small finished run."""
    root = tmp_path_factory.mktemp("runs")
    sac.train(sac.Args(**small("sac", run_root=str(root))))
    return folder_of(root, "sac")


def write_run(root, name="mbpo", seed=1, task=WALKER, returns=(1, 2, 3), scalars=(), **also):
    """A folder as it is recorded, evaluated every 1,000 steps; scalars: step, tag, value."""
    folder = folder_of(root, name, task, seed)
    folder.mkdir(parents=True)
    settings = {"script": "sac.py", "env_id": task, "exp_name": name, "seed": seed}
    (folder / "args.json").write_text(json.dumps(settings | {"updates_per_step": 10} | also))
    curve = pd.DataFrame({"step": 1000 * np.arange(len(returns)), "mean": returns})
    curve.to_csv(folder / "eval.csv", index=False)
    frame = pd.DataFrame(scalars, columns=["step", "tag", "value"])
    frame.to_csv(folder / "scalars.csv", index=False)


def rows_of(text: str, column: int = 1) -> dict[str, list[str]]:
    """The rows of a Markdown table by one of their columns."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    lines = [[word.strip() for word in line] for line in lines]
    return {line[column]: line for line in lines}


def test_table_of_all_runs(tmp_path):
    """Means and ranges over the seeds, at the last step that all of them have reached."""
    for seed, value in enumerate((10, 20), 1):
        write_run(tmp_path, seed=seed, returns=(0, value, 2 * value))
    write_run(tmp_path, "sac", returns=(0, 60.4, 70.6), updates_per_step=1)
    write_run(tmp_path, "late", returns=(0, 5, 7))
    write_run(tmp_path, "late", seed=2, returns=(0, 6))
    rows = rows_of(main("--results", tmp_path)[1])
    assert rows["mbpo, 10 updates per step"][2:] == ["2", "2000", "30 [20, 40]"]
    assert rows["sac, 1 update per step"][2:] == ["1", "2000", "71"]
    assert rows["late, 10 updates per step"][2:] == ["2", "1000", "5.5 [5, 6]"]


def test_runs_of_other_versions_are_told_apart(tmp_path, monkeypatch):
    """A run bears its version if its script, or the one it is patched from, has another today."""
    monkeypatch.setattr(report, "load_script", lambda _: SimpleNamespace(VERSION=2))
    write_run(tmp_path, "old")
    write_run(tmp_path, "new", version=2)
    for version in (1, 2):
        write_run(tmp_path, "patched", version, script="mbpo_ftfl_ridge.py", version=version)
    titles = {run.replace(", 10 updates per step", "") for run in report.load(tmp_path).run}
    assert titles == {"old (version 1)", "new", "patched (version 1)", "patched"}


@pytest.fixture
def units(tmp_path):
    """Runs on the task of the units: SAC goes further, MBPO has two seeds and units."""
    values = {"sac": 30, "mbpo": 300, "mbpo_unit0.001": 7, "mbpo_unit0.1": 8, "mbpo_beta": 600}
    values |= {"mbpo_ftfl": 600, "mbpo_ftfl_unit0.001": 9, "raw_direct_unit1": 600}
    for name, value in values.items():
        returns = *[0] * 15, value, *[40] * (name == "sac")
        write_run(tmp_path, name, task=POLE, returns=returns)
    write_run(tmp_path, "mbpo", 2, POLE, (*[0] * 15, 500))
    return report.load(tmp_path)


def test_summary(units):
    """Where the shorter of MBPO and FTFL ends, in the reward's own unit."""
    rows = rows_of(report.summary(units), 0)
    assert rows["task"] == ["task", "steps", "seeds", *report.COLUMNS]
    assert rows[POLE] == [POLE, "15,000", "2", "30", "400 [300, 500]", "600", "", ""]
    assert POLE not in report.summary(units[units.exp_name.isin(["sac", "mbpo"])])  # without FTFL


def test_the_readmes_are_current():
    """Every generated part follows from the committed files."""
    assert main("--check") == (0, "", "")


def test_what_is_generated_follows_from_the_files(tmp_path):
    """Parts in blocks and in sentences, which stay as they are the second time."""
    for seed, value in enumerate((81, 90), 7):
        parts = (250, value / 10**4), (500, 9), (750, 0), (800, 9)
        scalars = [(step, "model/new_reward_error", part) for step, part in parts]
        write_run(tmp_path, "mine", seed, returns=(0, value), scalars=scalars)
    write_run(tmp_path, "other", returns=(1.23, 4567))
    data = report.load(tmp_path)
    names = "summary", "diff", "diffs", "mechanism/table", "mechanism/no"
    blocks = [f"<!-- {name} -->\n<!-- /{name} -->" for name in names]
    sentence = f"It is <!-- mean {WALKER} mine 1000 --><!-- /mean -->, then <!-- course {WALKER} "
    sentence += f"other -->?<!-- /course --> or <!-- mean {WALKER} mine 250-750"
    sentence += " model/new_reward_error --><!-- /mean -->."
    blocks += [sentence, "<!-- no --> stays\n"]
    text = report.filled("\n".join(blocks), data)
    assert report.filled(text, data) == text
    assert f"It is <!-- mean {WALKER} mine 1000 -->86 [81, 90]<!-- /mean -->, then <!--" in text
    assert ">1.2, 4,567<" in text
    assert ">0.0085 [0.0081, 0.009]<" in text
    assert text.endswith("<!-- no --> stays\n")
    measured = (ROOT / "benchmarks/results/mechanism/table.md").read_text()
    for part in ("<!-- diff -->\n```diff\n", "fit_scaler", "[ridge](diffs/ridge.diff)", measured):
        assert part in text
    assert "<!-- mechanism/no -->\nNot measured yet.\n<!--" in text
    with pytest.raises(report.InputError, match="has return at step 1001"):
        report.filled(text.replace("mine 1000 -->", "mine 1001 -->"), data)


def test_a_folder_of_other_runs_gets_a_report_of_its_own(tmp_path):
    """Document and figure stand beside the runs; --check notices a change."""
    write_run(tmp_path, "one", task="Hopper-v5")
    assert [main("--results", tmp_path, how)[0] for how in ("--check", "--write")] == [1, 0]
    text = (tmp_path / "report.md").read_text()
    assert rows_of(text)["one, 10 updates per step"][2:] == ["1", "2000", "3"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["curves.png"]
    assert "(curves.png)" in text
    assert main("--results", tmp_path, "--check") == (0, "", "")
    (tmp_path / "report.md").write_text(text.replace("3", "4"))
    said = f"{tmp_path / 'report.md'} is out of date: give --write\n"
    assert main("--results", tmp_path, "--check")[:2] == (1, said)


def test_curves_show_means_ranges_and_published_points(tmp_path):
    """A panel per task, and in it what its caption says."""
    write_run(tmp_path, seed=1, returns=(*[0] * 9, 10, 20))
    write_run(tmp_path, seed=2, returns=(*[0] * 9, 30, 60))
    write_run(tmp_path, "sac", task="Hopper-v5")
    figure = report.curves(report.load(tmp_path))
    _, walker = figure.axes
    assert [*walker.lines[0].get_ydata()] == [*[0] * 9, 20, 40]
    band = walker.collections[0].get_paths()[0].vertices
    assert {(9000, 10), (9000, 30), (10000, 20), (10000, 60)} <= set(map(tuple, band.tolist()))
    quoted = pd.read_csv(ROOT / "benchmarks/published.csv")
    quoted = quoted[(quoted.task == WALKER) & (quoted.step <= 10_000) & quoted.seeds.notna()]
    points = [bars.lines[0].get_ydata().tolist() for bars in walker.containers]
    assert [*chain(*points)] == quoted["mean"].tolist()
    assert [166.7, 166.7] in [list(line.get_ydata()) for line in walker.lines]  # standing still
    names = [text.get_text() for text in figure.legends[0].texts]
    assert {"sac, 10 updates per step", "SAC, 1 update per step\n(Nikishin et al. 2022)"} < {*names}


def lines_of(axis) -> dict[tuple, tuple]:
    """The lines of a panel with data: x to y of each, by color."""
    lines = [x for x in axis.lines if len(x.get_xdata()) > 1]
    return {x.get_color(): dict(zip(*np.round(x.get_data(), 6), strict=True)) for x in lines}


def test_figures_of_repairs_and_evidence(units, tmp_path, monkeypatch):
    """Returns and errors stand at Var[s' - s] / Var[c r], s' at 2 (1 - rho); a fit's by steps."""
    for name in ("mechanism", "units", "representation"):
        (tmp_path / name).mkdir()
    scales = pd.DataFrame({"task": [POLE, WALKER], "residual_over_reward": [2.0, 50.0]})
    scales.to_csv(tmp_path / "mechanism/scales.csv", index=False)
    fit = {"data": "random", "schedule": "one fit", "beta": 0.0, "transitions": 5000}
    fit["set"], names = "actions", ["cell", "updates", "reward"]
    cells = [("raw s' - s", 100, 0.9), ("raw s' - s", 200, 0.7), ("unit s'", 100, 0.2)]
    cells = pd.DataFrame([*cells, ("unit s'", 200, 0.1)], columns=names)
    cells = cells.assign(task=report.FITTED, **fit)
    cells = pd.concat([cells, cells.assign(set="rows", reward=9.0)])
    cells.to_csv(tmp_path / "mechanism/errors.csv")
    unit = "build/mbpo_reward_unit --reward-unit "
    rows = [(f"{unit}1", 100, 9.0), (f"{unit}1", 200, 0.3), (f"{unit}0.1", 200, 0.4)]
    pd.DataFrame(rows, None, names).assign(task=POLE, **fit).to_csv(tmp_path / "units/errors.csv")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    mbpo, ftfl = report.COLORS["MBPO"], report.COLORS["FTFL"]
    rows = [("unit s'", "actions", 3, 0.9), ("unit s' - s", "actions", 1, 0.9)]
    rows += [("unit s'", "rows", 9, 0.9), ("unit s'", "actions", 9, np.nan)]
    shares = pd.DataFrame(rows, None, ["cell", "set", "error", "rho"])
    shares = shares.assign(task=POLE, dimension="s", spread=1)
    shares.to_csv(tmp_path / "representation/dimensions.csv")
    axis, right = report.repairs(units).axes
    assert lines_of(axis) == {mbpo: {2: 400, 200: 8, 2e6: 7}, ftfl: {2: 600, 2e6: 9}}
    assert right.collections[0].get_offsets().tolist() == [[pytest.approx(0.2), 2]]
    monkeypatch.setattr(report, "LEARNED", (POLE, POLE))
    left, right, *_ = report.evidence(units).axes
    assert lines_of(left) == {mbpo: {2: 0.3, 200: 0.4}}
    assert lines_of(right) == {mbpo: {100: 0.9, 200: 0.7}, ftfl: {100: 0.2, 200: 0.1}}


def test_record_copies_a_run(trained, tmp_path):
    """Settings and curve to the byte, scalars to six digits, the policy; same report."""
    results, target = tmp_path / "results", tmp_path / "results" / trained.name
    (trained.parent / "a.log").write_text("passed over")
    for _ in range(2):  # the second time over the first
        code, out, _ = main("--record", *trained.parent.iterdir(), "--results", results)
        assert (code, out) == (0, f"recorded {target}\n")
    assert len([*target.iterdir()]) == 4
    for name in ("args.json", "eval.csv"):
        assert (target / name).read_bytes() == (trained / name).read_bytes()
    found, events = pd.read_csv(target / "scalars.csv"), read_scalars(trained)
    expected = {(x, tag, float(f"{y:.6g}")) for tag, points in events.items() for x, y in points}
    assert {*found.itertuples(index=False, name=None)} == expected
    assert found.step.is_monotonic_increasing
    ours, theirs = read_checkpoint(target), read_checkpoint(trained)
    assert same(ours["agent"], {"actor": {"params": theirs["agent"]["actor"]["params"]}})
    assert (ours["settings"], ours["progress"]) == (theirs["settings"], {"step": 80})
    assert main("--results", results)[1] == main("--results", trained.parent)[1]


GAMMA = "holds a run with gamma 0.99, not 0.5: remove it"
DAMAGES = [  # a file, its text if there is any, and what the line must say
    ("args.json", None, "args.json: No such file"),
    ("args.json", "{", "args.json: Expecting"),
    ("args.json", '{"gamma": 0.5, "run_root": "elsewhere"}', GAMMA),
    ("eval.csv", "step,mean\n", "eval.csv: no evaluation yet"),
    ("scalars.csv", "step,tag\n0,a\n", "scalars.csv: "),
    ("checkpoint.pt", "", "checkpoint.pt can't be read"),
]


@pytest.mark.parametrize(("file", "text", "said"), DAMAGES)
def test_record_refuses_what_is_no_run_or_another_one(trained, tmp_path, file, text, said):
    """One line says why, and nothing is recorded, not even the good run before it."""
    folder = shutil.copytree(trained, tmp_path / "damaged" / trained.name)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    good, results = shutil.copytree(trained, tmp_path / "good"), tmp_path / "results"
    main("--record", trained, "--results", results)
    words = "--record", good, folder, "--results", results
    assert said in refusal(tmp_path, report.report, report.Options, *words)


@pytest.mark.parametrize(
    ("words", "said"), [("--write", "holds no runs"), ("--write --check", "give one of")]
)
def test_bad_input_is_one_line(tmp_path, words, said):
    """It ends with exit code 2 and harms nothing."""
    words = "--results", tmp_path, *words.split()
    assert said in refusal(tmp_path, report.report, report.Options, *words)
