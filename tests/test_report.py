"""benchmarks/report.py: statistics, tables, figures that follow from files, recording of runs."""

import itertools
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import report
from helpers_run import ROOT, folder_of, listing, one_error, read_scalars, same, small
from helpers_tools import call

import sac

WALKER = "dmc/walker-run"


def main(*words) -> tuple[int, str, str]:
    """Calls the tool in this process."""
    return call(report.report, report.Options, *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small finished run."""
    root = tmp_path_factory.mktemp("runs")
    sac.train(sac.Args(**small("sac", run_root=str(root))))
    return folder_of(root, "sac")


def write_run(
    root, experiment="mbpo", seed=1, env_id=WALKER, returns=(1, 2, 3), scalars=(), **changes
):
    """A folder as it is recorded, with evaluations every 1,000 steps; scalars: step, tag, value."""
    folder = folder_of(root, experiment, env_id, seed)
    folder.mkdir(parents=True)
    settings = {"script": "sac.py", "env_id": env_id, "exp_name": experiment, "seed": seed}
    (folder / "args.json").write_text(json.dumps(settings | {"updates_per_step": 10} | changes))
    curve = pd.DataFrame({"step": 1000 * np.arange(len(returns)), "mean": returns})
    curve.to_csv(folder / "eval.csv", index=False)
    frame = pd.DataFrame(scalars, columns=["step", "tag", "value"])
    frame.to_csv(folder / "scalars.csv", index=False)


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first column."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [word.strip() for word in rest] for first, *rest in lines}


def test_interval_is_that_of_all_resamples():
    """Two to four seeds give what all their resamples give, one gives none, many 1.96 errors."""
    for seeds in ([3.0, 11.0], [1.0, 2.0, 10.0], [0.0, 3.0, 4.0, 20.0]):
        means = [np.mean(draw) for draw in itertools.product(seeds, repeat=len(seeds))]
        bounds = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
        assert np.allclose(report.interval(np.array(seeds)), bounds)
    assert np.isnan(report.interval(np.array([3.0]))).all()
    seeds = np.random.default_rng(1).normal(50, 10, 400)
    low, high = report.interval(seeds)
    assert (high - low) / 2 == pytest.approx(1.96 * seeds.std() / 20, rel=0.03)


def test_table_of_a_task(tmp_path):
    """Means, intervals and the dash of one seed stand under their steps; a late seed is told."""
    for seed, value in enumerate((10, 20), 1):
        fits = [(999 * i, "model/updates", n) for i, n in enumerate((500, value, 7), 1)]
        write_run(tmp_path, seed=seed, returns=(0, value, 2 * value), scalars=fits)
    write_run(tmp_path, "sac", returns=(0, 60.4, 70))
    write_run(tmp_path, "late", returns=(0, 5, 7))
    write_run(tmp_path, "late", seed=2, returns=(0, 6))
    rows = rows_of(report.tables(report.load(tmp_path)))
    returns = ["return at 1,000", "return at 2,000"]
    assert rows[WALKER] == ["seeds", *returns, "model's gradient steps"]
    name = "{}, 10 updates per step".format
    assert rows[name("mbpo")] == ["2", "15 [10, 20]", "30 [20, 40]", "515"]
    assert rows[name("sac")] == ["1", "60 [-]", "70 [-]", ""]
    assert rows[name("late")] == ["2", "5.5 [5, 6]", "7 [-] (1 of 2 seeds)", ""]
    shutil.rmtree(folder_of(tmp_path, "mbpo", WALKER, 1))
    shutil.rmtree(folder_of(tmp_path, "mbpo", WALKER, 2))
    assert rows_of(report.tables(report.load(tmp_path)))[WALKER] == ["seeds", *returns]


def test_published_returns_stand_beside(tmp_path):
    """At the steps that are shown, with their deviation if they have one."""
    write_run(tmp_path, returns=[0] * 21)
    rows = rows_of(report.tables(report.load(tmp_path)))
    assert rows["SAC, 1 update per step (Nikishin et al. 2022)"] == [
        "10",
        "24.3 ± 4.6",
        "24.6 ± 3.8",
    ]
    still = rows["Standing still (a sixth of 1000: dm_control/suite/walker.py)"]
    assert still == ["", "166.7", "166.7"]


def test_runs_of_other_versions_are_told_apart(tmp_path, monkeypatch):
    """A run bears its version if its script, or the one it is patched from, has another today."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for script in ("sac", "mbpo_ftfl"):
        (tmp_path / f"{script}.py").write_text("# one\nVERSION = 2  # of two\n")
    runs = tmp_path / "runs"
    write_run(runs, "old")
    write_run(runs, "new", version=2)
    write_run(runs, "patched", script="mbpo_ftfl_ridge.py", version=1)
    write_run(runs, "patched", 2, script="mbpo_ftfl_ridge.py", version=2)
    titles = {run.replace(", 10 updates per step", "") for run in report.load(runs).run}
    assert titles == {"old (version 1)", "new", "patched (version 1)", "patched"}


def test_the_readmes_are_current():
    """Every generated part follows from the committed files."""
    assert main("--check") == (0, "", "")


def test_what_is_generated_follows_from_the_files(tmp_path, monkeypatch):
    """Parts in blocks and in sentences are current once written, and a change is noticed."""
    results, readme = tmp_path / "benchmarks/results", tmp_path / "README.md"
    others = shutil.ignore_patterns("*__*")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=others)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "figures_of", lambda _: {})  # which takes seconds
    for seed, value in enumerate((81, 90), 7):
        tag = "model/new_reward_error"
        write_run(results, "mine", seed, returns=(0, value), scalars=[(250, tag, value / 10**4)])
    where, end = f"{WALKER} mine 1000", "<!-- /{} -->".format
    blocks = [f"<!-- {x} -->\n{end(x)}" for x in ("summary", "diff", "diffs", "mechanism/summary")]
    sentence = f"It is <!-- mean {where} -->{end('mean')} (<!-- seeds {where} -->{end('seeds')})"
    sentence += f" or <!-- cell {WALKER} mine 250 model/new_reward_error -->{end('cell')}."
    readme.write_text("\n".join([*blocks, sentence, "<!-- other --> stays", ""]))
    (tmp_path / "benchmarks/README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    assert main("--check", "--results", results)[0] == 1
    assert main("--write", "--results", results) == (0, "", "")
    assert main("--check", "--results", results) == (0, "", "")
    text = readme.read_text()
    assert "It is <!-- mean dmc/walker-run mine 1000 -->86<!-- /mean --> (" in text
    assert ">81, 90<" in text
    assert ">0.0085 [0.0081, 0.009]<" in text
    assert text.endswith("<!-- other --> stays\n")
    assert "<!-- diff -->\n```diff\n" in text
    assert "fit_scaler" in text
    readme.write_text(text.replace(">86<", ">87<"))
    assert main("--check", "--results", results)[1] == f"{readme} is out of date: give --write\n"
    readme.write_text(text.replace("mean dmc/walker-run mine 1000", f"mean {WALKER} mine 1001"))
    assert "has return at step 1001" in one_error(main("--write", "--results", results)[2])


def test_a_folder_of_other_runs_gets_a_report_of_its_own(tmp_path):
    """Document and figures stand beside the runs, and only figures of data there is."""
    for experiment in ("one", "two"):
        write_run(tmp_path, experiment, env_id="Hopper-v5")
    assert main("--results", tmp_path, "--check")[0] == 1
    assert main("--results", tmp_path, "--write")[0] == 0
    text = (tmp_path / "report.md").read_text()
    assert rows_of(text)["one, 10 updates per step"][:3] == ["1", "2 [-]", "3 [-]"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["curves.png"]
    assert "(figures/curves.png)" in text
    assert main("--results", tmp_path, "--check") == (0, "", "")


def test_a_figure_shows_the_mean_its_interval_and_published_points(tmp_path):
    """A panel per task and tag, and in it what its caption says."""
    error = [(10_000, "model/new_change_error", 0.5)]
    write_run(tmp_path, seed=1, returns=(*[0] * 9, 10, 20), scalars=error)
    write_run(tmp_path, seed=2, returns=(*[0] * 9, 30, 60))
    write_run(tmp_path, "sac", env_id="Hopper-v5")
    drawn = report.figures_of(report.load(tmp_path))
    figure, training = (report.draw(*drawn[name]) for name in ("curves", "training"))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["Hopper-v5\nmean return", f"{WALKER}\nmean return"]
    (panel,) = training.axes
    assert (panel.get_yscale(), [*panel.lines[0].get_ydata()]) == ("log", [0.5])
    walker = figure.axes[1]
    assert [*walker.lines[0].get_ydata()] == [*[0] * 9, 20, 40]
    band = walker.collections[0].get_paths()[0].vertices
    assert {(9000, 10), (9000, 30), (10000, 20), (10000, 60)} <= set(map(tuple, band.tolist()))
    points = [bars.lines[0].get_ydata().tolist() for bars in walker.containers]
    quoted = [rows for (*_, seeds), rows in report.published(WALKER) if pd.notna(seeds)]
    assert points == [rows["mean"][rows.step <= 10_000].tolist() for rows in quoted]
    assert [166.7, 166.7] in [list(line.get_ydata()) for line in walker.lines]  # standing still
    names = [text.get_text() for text in figure.legends[0].texts]
    assert {"sac, 10 updates per step", "SAC, 1 update per step\n(Nikishin et al. 2022)"} < {*names}


def test_figures_leave_out_single_seeds_beside_several(tmp_path, monkeypatch):
    """A task that has no others shows them; the first screen never does, nor what ended early."""
    monkeypatch.setattr(report, "FIRST", {WALKER: 2000, "dmc/quadruped-walk": 2000})
    for experiment, seed in itertools.product(("mbpo_ftfl", "short"), (1, 2)):
        write_run(
            tmp_path, experiment, seed, returns=(1, 2, 3)[: 2 if experiment == "short" else 3]
        )
    write_run(tmp_path, "tried")
    write_run(tmp_path, "one", env_id="dmc/quadruped-walk")
    drawn = report.figures_of(report.load(tmp_path))
    names = {name: {run.split(",")[0] for run in x[0].run} for name, x in drawn.items()}
    assert names == {"curves": {"mbpo_ftfl", "short", "one"}, "first": {"mbpo_ftfl"}}


def test_record_copies_a_run(trained, tmp_path):
    """Settings and curve to the byte, scalars to six digits, the policy; same report."""
    results, target = tmp_path / "results", tmp_path / "results" / trained.name
    (trained.parent / "a.log").write_text("passed over")
    for _ in range(2):  # the second time over the first
        code, out, _ = main("--record", *trained.parent.iterdir(), "--results", results)
        assert (code, out) == (0, f"recorded {target}\n")
    files = "args.json", "eval.csv", "scalars.csv", "checkpoint.pt"
    assert {path.name for path in target.iterdir()} == {*files}
    for name in files[:2]:
        assert (target / name).read_bytes() == (trained / name).read_bytes()
    rows = pd.read_csv(target / "scalars.csv")
    assert rows.step.is_monotonic_increasing
    for tag, events in read_scalars(trained).items():
        found = rows[rows.tag == tag]
        expected = [(step, float(f"{value:.6g}")) for step, value in events]
        assert [*zip(found.step, found.value, strict=True)] == expected
    assert same(report.read_policy(target), report.read_policy(trained))
    assert report.read_policy(target)["progress"] == {"step": 80}
    assert main("--results", results)[1] == main("--results", trained.parent)[1]


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
        ("eval.csv", "step,mean\n", "eval.csv: no evaluation yet"),
        ("scalars.csv", "step,tag\n0,a\n", "scalars.csv: "),
        ("checkpoint.pt", "", "checkpoint.pt is damaged"),
    ],
)
def test_record_refuses_what_is_no_run(trained, tmp_path, file, text, said):
    """One line says why, and nothing is recorded, not even the good run before it."""
    folder, results = damaged(trained, tmp_path, file, text), tmp_path / "results"
    code, out, err = main("--record", trained, folder, "--results", results)
    assert (code, out) == (2, "")
    assert said in one_error(err)
    assert str(folder) in err
    assert not results.exists()


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
        assert said in one_error(main("--record", folder, "--results", results)[2])
        assert listing(results) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--results {tmp}/none --write", "holds no runs"),
        ("--write --check", "give one of"),
        ("--frobnicate", "--frobnicate"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, said):
    """It ends with exit code 2 and harms nothing."""
    code, out, err = main(*words.format(tmp=tmp_path).split())
    assert (code, out) == (2, "")
    assert said in one_error(err)
    assert not listing(tmp_path)
