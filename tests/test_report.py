"""benchmarks/report.py: statistics, tables, figures that follow from files, recording of runs."""

import itertools
import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import report
from helpers_run import ROOT, folder_of, listing, one_error, read_scalars, small
from helpers_tools import call
from matplotlib.figure import Figure

import sac

RESULTS = ROOT / "benchmarks" / "results"


def main(*words) -> tuple[int, str, str]:
    """Calls the tool in this process."""
    return call(report.report, report.Options, *words)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of what the report reads and writes, in which it then works."""
    for path in [ROOT / "README.md", *ROOT.glob("*.py")]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    yield tmp_path
    report.diffs.source_of.cache_clear()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small finished run."""
    root = tmp_path_factory.mktemp("runs")
    sac.train(sac.Args(**small("sac", run_root=str(root))))
    return folder_of(root, "sac")


def write_run(
    root, experiment="mbpo", seed=1, env_id="dmc/walker-run", returns=(1, 2, 3), bias=0, code=None
):
    """A folder as it is recorded, with evaluations every 1,000 steps; `bias`: the critic's."""
    code = code or report.code_of((ROOT / "sac.py").read_text())
    folder = folder_of(root, experiment, env_id, seed)
    folder.mkdir(parents=True)
    settings = {"script": "sac.py", "env_id": env_id, "exp_name": experiment, "seed": seed}
    settings |= {"total_timesteps": 2000, "eval_frequency": 1000, "updates_per_step": 10}
    settings |= {"code": code}
    (folder / "args.json").write_text(json.dumps(settings))
    curve = pd.DataFrame({"step": 1000 * np.arange(len(returns)), "mean": returns})
    curve.to_csv(folder / "eval.csv", index=False)
    scalars = pd.DataFrame({"step": curve.step[-1:], "tag": "eval/critic_bias", "value": bias})
    scalars.to_csv(folder / "scalars.csv", index=False)
    return folder


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first column."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [word.strip() for word in rest] for first, *rest in lines}


def alter(path, column: int, value: str) -> None:
    """Puts another value into the last line of a CSV file."""
    *lines, last = path.read_text().splitlines()
    words = last.split(",")
    words[column] = value
    path.write_text("\n".join([*lines, ",".join(words)]) + "\n")


def test_interval_of_few_seeds_is_that_of_all_resamples():
    """Two seeds give themselves; three and four what all their resamples give."""
    assert np.allclose(report.interval(np.array([3.0, 11.0])), (3, 11))
    for seeds in ([1.0, 2.0, 10.0], [0.0, 3.0, 4.0, 20.0]):
        means = [np.mean(draw) for draw in itertools.product(seeds, repeat=len(seeds))]
        bounds = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
        assert np.allclose(report.interval(np.array(seeds)), bounds)
    assert np.isnan(report.interval(np.array([3.0]))).all()


def test_interval_of_many_seeds_is_the_normal_one():
    """For the mean of many seeds: 1.96 standard errors to either side."""
    seeds = np.random.default_rng(1).normal(50, 10, 400)
    low, high = report.interval(seeds)
    assert (low + high) / 2 == pytest.approx(seeds.mean(), abs=0.05)
    assert (high - low) / 2 == pytest.approx(1.96 * seeds.std() / 20, rel=0.03)


def test_table_of_a_task(tmp_path):
    """Means, intervals and the dash of one seed stand under their steps; a late seed is told."""
    for seed, value in enumerate((10, 20), 1):
        folder = write_run(tmp_path, seed=seed, returns=(0, value, 2 * value), bias=-value)
        with (folder / "scalars.csv").open("a") as file:  # of the fits, the last comes too late
            fits = enumerate((500, value, 7), 1)
            file.writelines(f"{999 * i},model/updates,{updates}\n" for i, updates in fits)
    write_run(tmp_path, "sac", returns=(0, 60.4, 70))
    write_run(tmp_path, "late", returns=(0, 5, 7))
    write_run(tmp_path, "late", seed=2, returns=(0, 6))
    rows = rows_of(report.tables(report.load(tmp_path)))
    returns = ["return at 1,000", "return at 2,000"]
    assert rows["dmc/walker-run"] == ["seeds", *returns, "critic bias", "model's gradient steps"]
    name = "{}, 10 updates per step".format
    mbpo = ["2", "15 [10, 20]", "30 [20, 40]", "-15 [-20, -10]", "515"]
    assert rows[name("mbpo")] == mbpo
    assert rows[name("sac")] == ["1", "60 [-]", "70 [-]", "0 [-]", ""]
    late = ["2", "6 [5, 6]", "7 [-] (1 of 2 seeds)", "0 [-] (1 of 2 seeds)", ""]
    assert rows[name("late")] == late


def test_the_pair_is_compared_over_common_seeds(tmp_path):
    """Differences are those within a seed, at the last step that all common seeds have."""
    for seed, value in enumerate((100, 10, 500), 1):
        write_run(tmp_path, "mbpo_ftfl", seed, returns=(0, value, value))
    assert "less" not in report.tables(report.load(tmp_path))
    for seed, value in ((1, 80), (2, 6), (4, 1000)):
        write_run(tmp_path, "sac_utd10", seed, returns=(0, 0, value))
    name = "mbpo_ftfl less sac_utd10, paired by seed"
    assert rows_of(report.tables(report.load(tmp_path)))[name] == ["2", "", "12 [4, 20]", ""]
    write_run(tmp_path, "sac_utd10", 3, returns=(0, 200))
    assert rows_of(report.tables(report.load(tmp_path)))[name] == ["3", "137 [10, 300]", "", ""]


CODE = '"""A script."""\nX = 1\n\n\ndef f():\n    """Doubles."""\n    return 2 * X\n'


@pytest.mark.parametrize(
    ("old", "new", "other"),
    [
        ("A script", "Some script", False),
        ('    """Doubles."""\n', "", False),
        ("X = 1", "X  =  (1)  # one", False),
        ("2 * X", "3 * X", True),
        ("2 * X", "X * 2", True),
        ("return", "return not", True),
        ("X = 1", "X = None", True),
        ("X = 1", "X: int = 1", True),
    ],
)
def test_code_is_what_is_executed(old, new, other):
    """Comments, docstrings and layout are none of it; every number is."""
    assert old in CODE
    assert (report.code_of(CODE) != report.code_of(CODE.replace(old, new))) == other


def test_runs_of_other_code_are_marked(tree, trained):
    """One seed marks them all; a script that is reworded, committed or not, is no other."""
    results, script = tree / "runs", tree / "sac.py"
    git = ["git", "-C", tree, "-c", "user.name=a", "-c", "user.email=b"]
    name, source = "sac, 1 update per step", script.read_text()

    def say(**options) -> str:
        report.diffs.source_of.cache_clear()
        code, out, err = main("--results", results)
        assert code == 0, err
        return out

    shutil.copytree(trained, results / trained.name)
    assert rows_of(say())[name][0] == "1"
    script.write_text(source + "# more\n")  # of the version that trained nothing is left
    assert rows_of(say())[f"{name} †"][0] == "1"
    assert say().endswith(
        "\n\n† Some of these runs were made by other code than that of today's script.\n"
    )
    script.write_text(source)
    for words in (["init", "-q"], ["add", "sac.py"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    script.write_text(source + "# more\n")
    assert rows_of(say())[name][0] == "1"
    recorded = tree / "recorded" / trained.name
    assert main("--record", results / trained.name, "--results", tree / "recorded")[0] == 0
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    held = json.loads((recorded / "args.json").read_text())
    assert held["commit"] == head.strip()
    assert held["code"] == report.code_of(source)
    script.write_text(source + "X = 1\n")
    assert rows_of(say())[f"{name} †"][0] == "1"
    write_run(results, "sac", 2, "InvertedPendulum-v5", code=held["code"])
    write_run(results, "sac", 3, "InvertedPendulum-v5", code=report.code_of(script.read_text()))
    shutil.rmtree(results / trained.name)
    assert rows_of(say())["sac, 10 updates per step †"][0] == "2"


def test_the_readmes_are_current():
    """Every generated part follows from the committed files."""
    assert main("--check") == (0, "", "")


def test_what_is_generated_follows_from_the_files(tree, monkeypatch):
    """Written anew it is current, and published figures stand at the steps that are shown.

    One altered return and a word between markers are noticed.
    """
    for draw in ("draw_curves", "draw_training"):  # which takes seconds
        monkeypatch.setattr(report, draw, lambda rows: Figure())
    results, first = tree / "benchmarks/results", tree / "README.md"
    readme = tree / "benchmarks/README.md"
    assert main("--write", "--results", results) == (0, "", "")
    assert main("--check", "--results", results) == (0, "", "")
    assert "| 24.6 ± 3.8" in readme.read_text()
    standing = "Standing still (a sixth of 1000: dm_control/suite/walker.py)"
    assert {*rows_of(readme.read_text())[standing]} == {"166.7", ""}  # no seeds, no deviation
    alter(results / "dmc-walker-run__mbpo_ftfl__1/eval.csv", 1, "987.5")
    found = "".join(f"{path} is out of date: give --write\n" for path in (first, readme))
    assert main("--check", "--results", results) == (1, found, "")
    assert main("--write", "--results", results)[0] == 0
    assert "988" in readme.read_text()
    parts = {first: ("summary", "diff"), readme: ("results", "diffs", "updates_needed/summary")}
    for file, part in [(file, part) for file, names in parts.items() for part in names]:
        current = file.read_text()
        file.write_text(current.replace(f"<!-- /{part} -->", f"by hand\n<!-- /{part} -->"))
        assert main("--check", "--results", results)[1].split()[0] == str(file)
        assert main("--write", "--results", results)[0] == 0
        assert file.read_text() == current


def test_a_folder_of_other_runs_gets_a_report_of_its_own(tree):
    """The README keeps what it says; document and figures stand beside the runs."""
    before = (tree / "README.md").read_bytes()
    for experiment in ("one", "two"):
        write_run(tree / "runs", experiment, env_id="Hopper-v5")
    assert main("--results", tree / "runs", "--check")[0] == 1
    assert main("--results", tree / "runs", "--write")[0] == 0
    rows = rows_of((tree / "runs/report.md").read_text())
    assert rows["one, 10 updates per step"][:3] == ["1", "2 [-]", "3 [-]"]
    for name in ("curves", "training"):
        assert f"(figures/{name}.png)" in (tree / "runs/report.md").read_text()
        assert (tree / f"runs/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tree / "README.md").read_bytes() == before
    assert main("--results", tree / "runs", "--check") == (0, "", "")


def test_curves_show_the_mean_its_interval_and_published_points(tmp_path):
    """A panel per task, and in it what its caption says."""
    write_run(tmp_path, seed=1, returns=(*[0] * 9, 10, 20))
    write_run(tmp_path, seed=2, returns=(*[0] * 9, 30, 60))
    write_run(tmp_path, "sac", env_id="Hopper-v5")
    data = report.load(tmp_path)
    grid = report.draw_curves(data[data.tag == "return"])
    axes = grid.axes_dict
    assert [*axes] == ["dmc/walker-run", "Hopper-v5"]  # as on the README's first screen
    explained = [text.get_text() for text in grid.legend.texts]
    assert explained[:2] == ["sac, 10 updates per step", "mbpo, 10 updates per step"][::-1]
    assert {"SAC, 1 update per step\n(Nikishin et al. 2022)"} < {*explained[2:]}
    walker = axes["dmc/walker-run"]
    ours = [list(line.get_ydata()) for line in walker.lines if len(line.get_ydata()) == 11]
    assert [*[0] * 9, 20, 40] in ours
    band = walker.collections[0].get_paths()[0].vertices
    assert {(9000, 10), (9000, 30), (10000, 20), (10000, 60)} <= set(map(tuple, band.tolist()))
    points = [bars.lines[0].get_ydata().tolist() for bars in walker.containers]
    groups = [*report.published("dmc/walker-run")]
    quoted = [rows for (*_, seeds), rows in groups if pd.notna(seeds)]
    (level,) = (rows for (*_, seeds), rows in groups if pd.isna(seeds))  # standing still
    assert [*level["mean"].unique()] * 2 in [list(line.get_ydata()) for line in walker.lines]
    assert points == [rows["mean"][rows.step <= 10_000].tolist() for rows in quoted]
    assert all(map(len, points))
    assert any(rows.step.max() > 10_000 for rows in quoted)


def test_figures_leave_out_single_seeds_beside_several(tmp_path):
    """A task that has no others shows them; the first screen never does, nor what ended early."""
    for experiment, seed in itertools.product(("mbpo_ftfl", "sac_utd10", "short"), (1, 2)):
        returns = (1, 2) if experiment == "short" else (1, 2, 3)
        write_run(tmp_path, experiment, seed, returns=returns)
    write_run(tmp_path, "tried")
    for experiment in ("one", "two"):
        write_run(tmp_path, experiment, env_id="dmc/quadruped-walk")
    drawn = report.figures_of(report.load(tmp_path))
    names = {name: {run.split(",")[0] for run in rows.run} for name, (_, rows) in drawn.items()}
    first = {"mbpo_ftfl", "sac_utd10"}
    every = first | {"short", "one", "two"}
    assert names == {"curves": every, "first": first, "training": every}


def test_variants_have_the_colour_of_their_script(tmp_path):
    """What has the shortest name is solid and the variant is not."""
    names = ["mbpo_early", "mbpo", "mbpo_ftfl", "mbpo_ftfl_late", "sac_utd10", "other"]
    for name in names:
        write_run(tmp_path, name)
    for name in names[1:3]:
        write_run(tmp_path, name, seed=2)
    grid = report.draw_curves(report.load(tmp_path))
    lines = zip(grid.legend.texts, grid.legend.get_lines(), strict=False)
    look = {text.get_text().split(",")[0]: (x.get_color(), x.is_dashed()) for text, x in lines}
    colours = {name: look[name][0] for name in names}
    assert colours["mbpo"] == colours["mbpo_early"]
    assert colours["mbpo_ftfl"] == colours["mbpo_ftfl_late"]
    assert len({*colours.values()}) == 4
    assert [name for name in names if look[name][1]] == ["mbpo_early", "mbpo_ftfl_late"]


def test_record_copies_a_run(trained, tmp_path):
    """Settings, curve to the byte, all scalars to six digits; the report is that of the run."""
    target = tmp_path / "results" / trained.name
    for _ in range(2):  # the second time over the first
        code, out, _ = main("--record", trained, "--results", tmp_path / "results")
        assert (code, out) == (0, f"recorded {target}\n")
    assert {path.name for path in target.iterdir()} == {"args.json", "eval.csv", "scalars.csv"}
    assert (target / "eval.csv").read_bytes() == (trained / "eval.csv").read_bytes()
    held, made = (json.loads((path / "args.json").read_text()) for path in (target, trained))
    assert held.pop("code") == report.code_of((ROOT / "sac.py").read_text())
    assert held.keys() - made.keys() == {"commit"}
    assert held | made == held
    rows = pd.read_csv(target / "scalars.csv")
    assert rows.columns.tolist() == ["step", "tag", "value"]
    assert rows.step.is_monotonic_increasing
    for tag, events in read_scalars(trained).items():
        recorded = rows[rows.tag == tag]
        assert recorded.step.tolist() == [step for step, _ in events]
        assert recorded.value.tolist() == [float(f"{value:.6g}") for _, value in events]
    assert main("--results", tmp_path / "results")[1] == main("--results", trained.parent)[1]


def test_record_takes_a_run_that_was_cut_off(trained, tmp_path):
    """Only if asked to; its table ends where it ended."""
    folder = damaged(trained, tmp_path, "eval.csv", "step,mean\n0,4\n40,5\n")
    words = "--record", folder, "--results", tmp_path / "results"
    assert main(*words)[0] == 2
    assert main(*words, "--unfinished")[0] == 0
    said = main("--results", tmp_path / "results")[1]
    assert "return at 40" in said
    assert "return at 80" not in said


def damaged(trained, tmp_path, file: str, text: str | None):
    """A copy of a run with another text in a file, or without it."""
    folder = shutil.copytree(trained, tmp_path / "damaged" / trained.name)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("args.json", None, "args.json: No such file"),
        ("args.json", "{", "args.json: Expecting"),
        ("eval.csv", "", "eval.csv: No columns"),
        ("eval.csv", "step,mean\n", "eval.csv: no evaluation yet"),
        ("eval.csv", "step,mean\n0,4\n40,5\n", "is at step 40 of 80: --resume it"),
        ("scalars.csv", "step,tag\n0,a\n", "scalars.csv: "),
    ],
)
def test_record_refuses_what_is_no_finished_run(trained, tmp_path, file, text, said):
    """One line says why, and nothing is recorded, not even the good run before it."""
    folder = damaged(trained, tmp_path, file, text)
    code, out, err = main("--record", trained, folder, "--results", tmp_path / "results")
    assert (code, out) == (2, "")
    assert said in one_error(err)
    assert str(folder) in err
    assert not (tmp_path / "results").exists()


def test_record_refuses_other_settings_and_folders(trained, tmp_path):
    """A recorded run is replaced by one of the same settings only; a folder must be a run's own."""
    results = tmp_path / "results"
    main("--record", trained, "--results", results)
    before = listing(results)
    settings = json.loads((trained / "args.json").read_text())
    other = json.dumps(settings | {"gamma": 0.5, "run_root": "elsewhere"})
    for folder, said in [
        (damaged(trained, tmp_path, "args.json", other), "gamma 0.99, not 0.5: remove it"),
        (results / trained.name, "holds no TensorBoard events"),
        (tmp_path / "nothing", "args.json: No such file"),
    ]:
        code, _, err = main("--record", folder, "--results", results)
        assert code == 2
        assert said in one_error(err)
        assert listing(results) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--results {tmp}", "holds no runs"),
        ("--results {tmp}/none --write", "holds no runs"),
        ("--write --check", "give one of"),
        ("--unfinished", "--unfinished is for the last"),
        ("--frobnicate", "--frobnicate"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, said):
    """It ends with exit code 2 and harms nothing."""
    code, out, err = main(*words.format(tmp=tmp_path).split())
    assert (code, out) == (2, "")
    assert said in one_error(err)
    assert not listing(tmp_path)
