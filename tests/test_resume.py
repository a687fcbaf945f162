"""A run that is killed goes on to the same end; what a run folder holds is never lost."""

import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers_run import (
    Outcome,
    alter,
    flags,
    folder_of,
    one_error,
    read_checkpoint,
    read_evaluations,
    read_scalars,
    same_learning,
    saved_step,
    small,
    start,
)

import mbpo
import mbpo_ftfl
import sac

TOTAL = 1010  # the last 60 steps learn; the ring of real transitions is full by then
CHANGES = {"total_timesteps": TOTAL, "learning_starts": 950, "eval_frequency": 100}
CHANGES |= {"checkpoint_frequency": 40, "model_train_frequency": 25, "model_updates": 5}
CHANGES |= {"buffer_size": 700, "device": "cpu"}


class Cut(BaseException):
    """The power goes: nothing is closed or cleaned up."""


def settings(script, root, **changes) -> dict:
    """Settings of a run of a few seconds with many checkpoints."""
    own = {name: value for name, value in CHANGES.items() if script is not sac or name[0] != "m"}
    return small(script.__name__, **(own | {"run_root": str(root)} | changes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a script's run that nothing has stopped."""
    made = {}

    def of(script):
        if script not in made:
            root = tmp_path_factory.mktemp("undisturbed")
            made[script] = Outcome(script, settings(script, root)).folder
        return made[script]

    return of


@contextmanager
def at_step(script, step: int, act):
    """Has something done in a step of a script's runs, before the environment's step."""
    check = script.check_finite

    def check_finite(now, **quantities):
        check(now, **quantities)
        if now == step and "action" in quantities:
            act()

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(script, "check_finite", check_finite)
        yield


def cut(script, step: int, **settings) -> None:
    """Trains until the power goes in a step."""

    def power_goes():
        raise Cut

    with at_step(script, step, power_goes), pytest.raises(Cut):
        script.train(script.Args(**settings))
    time.sleep(1)  # the files of TensorBoard's curves are in the order of their seconds


def assert_equal_runs(one, other) -> None:
    """Evaluations, all of the checkpoint and TensorBoard's curves are those of the other run."""
    assert read_evaluations(one) == read_evaluations(other)
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert theirs["buffer"]["added"] > len(theirs["buffer"]["rows"])
    assert same_learning(ours, theirs)
    assert ours["progress"]["episode"] == theirs["progress"]["episode"]
    curves = read_scalars(one), read_scalars(other)
    assert all(each.pop("train/steps_per_second") for each in curves)  # the clock's
    assert curves[0] == curves[1]


@pytest.mark.parametrize("script", [sac, mbpo_ftfl], ids=["sac", "mbpo_ftfl"])
def test_a_run_that_is_cut_off_goes_on_to_the_same_end(script, undisturbed, tmp_path):
    """Cut off while it explores and while it learns, a resumed run ends bit-equal."""
    words, folder = settings(script, tmp_path, resume=True), folder_of(tmp_path, script.__name__)
    saved = 0
    for step in (757, 1001):
        cut(script, step, **words)
        assert saved < (saved := saved_step(folder)) < step
    script.train(script.Args(**words))
    assert_equal_runs(folder, undisturbed(script))


def test_a_killed_process_goes_on_to_the_same_end(undisturbed, tmp_path, main):
    """So does one that SIGKILL ends at any moment after a checkpoint."""
    words, folder = flags(settings(mbpo_ftfl, tmp_path)), folder_of(tmp_path, "mbpo_ftfl")
    child = start("mbpo_ftfl", *words)
    while child.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    time.sleep(random.Random(time.time()).uniform(0, 0.5))
    child.kill()
    assert child.wait() in (-signal.SIGKILL, 0), child.stderr.read()  # 0: it was faster
    time.sleep(1)  # the files of TensorBoard's curves are in the order of their seconds
    saved = saved_step(folder)
    code, out, err = main(mbpo_ftfl, [*words, "--resume"])
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith(f"from step {saved}")
    assert_equal_runs(folder, undisturbed(mbpo_ftfl))


def test_a_run_cut_off_before_its_checkpoint_starts_anew(undisturbed, tmp_path, main, refused):
    """With nothing saved yet, --resume refuses other settings, says so, and begins anew."""
    words, folder = settings(sac, tmp_path), folder_of(tmp_path, "sac")
    cut(sac, 100, **(words | {"checkpoint_frequency": 600}))
    assert (folder / "eval.csv").exists()
    assert not (folder / "checkpoint.pt").exists()
    words = [*flags(words), "--resume"]
    assert "holds a run with gamma 0.99, not 0.5" in refused(sac, [*words, "--gamma", "0.5"])
    code, out, err = main(sac, words)
    assert (code, err) == (0, "")
    first = out.splitlines()[0]
    assert first.endswith("from step 0: no checkpoint is there to go on from")
    assert_equal_runs(folder, undisturbed(sac))


def test_a_run_cut_off_while_saving_has_the_one_before(undisturbed, tmp_path, main, monkeypatch):
    """A checkpoint is replaced whole or not at all."""
    words, folder = settings(sac, tmp_path), folder_of(tmp_path, "sac")
    saves, replace = [], os.replace

    def half(new, old) -> None:
        saves.append(new)
        if len(saves) == 2:  # the disk has half of it when the power goes
            os.truncate(new, os.path.getsize(new) // 2)
            raise Cut
        replace(new, old)

    with monkeypatch.context() as changed:
        changed.setattr(os, "replace", half)
        with pytest.raises(Cut):
            sac.train(sac.Args(**words))
    time.sleep(1)
    assert (folder / "checkpoint.tmp").exists()
    saved = saved_step(folder)
    assert 40 <= saved < 120
    code, out, err = main(sac, [*flags(words), "--resume"])
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith(f"from step {saved}")
    assert not (folder / "checkpoint.tmp").exists()
    assert_equal_runs(folder, undisturbed(sac))


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(undisturbed, tmp_path, main):
    """A checkpoint that doesn't fit is an error; with more room, the run goes on from the last."""
    expected = undisturbed(sac)
    row = read_checkpoint(expected)["buffer"]["rows"][0].nbytes
    most = (expected / "checkpoint.pt").stat().st_size - 50 * row
    words, folder = flags(settings(sac, tmp_path)), folder_of(tmp_path, "sac")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        code, _, err = main(sac, words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert f"{folder}/checkpoint.pt" in one_error(err)
    assert 500 <= saved_step(folder) < 700
    assert not list(folder.glob("*.tmp"))
    assert main(sac, [*words, "--resume"])[0] == 0
    assert_equal_runs(folder, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_its_episode(number, main, undisturbed, tmp_path):
    """Ctrl-C and a job system's SIGTERM save at the episode's end, and say how to go on."""
    words = flags(settings(sac, tmp_path, checkpoint_frequency=960))
    with at_step(sac, 970, lambda: signal.raise_signal(number)):
        code, out, err = main(sac, words)
    folder = folder_of(tmp_path, "sac")
    step = saved_step(folder)
    assert code == 1
    assert out.splitlines()[-1].startswith("interrupted: saves when this episode ends")
    assert 970 <= step == read_scalars(folder)["train/episode_length"][-1][0] < 1000
    told = f"error: interrupted; saved up to step {step}, from where --resume goes on"
    assert one_error(err).startswith(told)
    time.sleep(1)
    assert main(sac, [*words, "--resume"])[0] == 0
    assert_equal_runs(folder, undisturbed(sac))


@pytest.mark.parametrize(("times", "every"), [(2, 10), (2, 500), (1, 0)])
def test_a_second_interruption_ends_the_run_at_once(times, every, main, tmp_path):
    """So does the first of a run that saves nothing; the line says what is kept."""

    def interrupt():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    with at_step(sac, 55, interrupt):
        code, _, err = main(sac, flags(small("sac", checkpoint_frequency=every)))
    told, folder = "nothing is saved", folder_of(tmp_path, "sac")
    if every == 10:
        assert 40 <= saved_step(folder) < 55
        told = f"saved up to step {saved_step(folder)}, from where --resume goes on"
    assert code == 1
    assert one_error(err).startswith(f"error: interrupted; {told}")
    assert (folder / "checkpoint.pt").exists() == (every == 10)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of a short finished run with a model."""
    return Outcome(mbpo, small("mbpo", run_root=str(tmp_path_factory.mktemp("once")))).folder


@pytest.fixture
def finished(once, tmp_path):
    """A copy of a short finished run: the flags that resume it, and the folder."""
    folder = shutil.copytree(once, tmp_path / once.name)
    return [*flags(small("mbpo")), "--resume"], folder


def test_a_folder_that_holds_a_run_is_refused(finished, refused):
    """Without --resume nothing is touched."""
    words, folder = finished
    line = refused(mbpo, words[:-1])
    assert all(word in line for word in (str(folder), "--resume", "--exp-name"))


@pytest.mark.parametrize("held", [None, "{}", "[1]", "none", '{"script": "mbpo.py"}'])
def test_resume_refuses_a_folder_that_holds_no_run(held, refused, tmp_path):
    """Files of something else stay as they are, even if one is called args.json."""
    folder = folder_of(tmp_path, "mbpo")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    if held:
        (folder / "args.json").write_text(held)
    assert str(folder) in refused(mbpo, [*flags(small("mbpo")), "--resume"])
    assert str(folder) in refused(mbpo, flags(small("mbpo")))


def test_resume_refuses_a_run_with_other_settings(finished, refused, monkeypatch):
    """The setting is named, and one that the run's older script didn't have, too."""
    words, folder = finished
    assert "gamma 0.99, not 0.5" in refused(mbpo, [*words, "--gamma", "0.5"])
    assert "holds a run with" in refused(sac, [*flags(small("sac", exp_name="mbpo")), "--resume"])
    with monkeypatch.context() as changed:
        changed.setattr(mbpo, "VERSION", mbpo.VERSION + 1)
        line = refused(mbpo, words)
        assert f"version {mbpo.VERSION - 1}, not {mbpo.VERSION}" in line
        (folder / "checkpoint.pt").rename(folder.parent / "kept.pt")
        assert f"version {mbpo.VERSION - 1}, not {mbpo.VERSION}" in refused(mbpo, words)
    (folder.parent / "kept.pt").rename(folder / "checkpoint.pt")
    alter(folder, lambda saved: saved["settings"].pop("model_updates"))
    assert "model_updates unknown to its script, not 5" in refused(mbpo, words)


def test_resume_refuses_fewer_steps_than_are_done(finished, refused):
    """The end of a run can't be moved before what it has done."""
    words, folder = finished
    line = refused(mbpo, [*words, "--total-timesteps", "60"])
    assert f"{folder} has 80 steps: --total-timesteps must not be less" in line


@pytest.mark.parametrize("what", ["half", "text", "folder", "settings"])
def test_resume_refuses_a_checkpoint_that_it_cannot_read(what, finished, refused):
    """The file is said to be damaged only if it can't be read, and never to be removed."""
    (words, folder), file = finished, finished[1] / "checkpoint.pt"
    content = file.read_bytes()
    if what == "settings":
        alter(folder, lambda saved: saved.pop("settings"))
    else:
        file.unlink()
        (file.mkdir if what == "folder" else file.touch)()
    if what in ("half", "text"):
        file.write_bytes(content[: len(content) // 2] if what == "half" else b"notes")
    line = refused(mbpo, words)
    assert (f"{file} can't be read, it may be damaged" in line) == (what != "settings")
    assert str(folder) in line
    assert not any(word in line for word in ("remove", "delete", "rm "))


def test_resume_of_a_finished_run_changes_nothing(finished, main):
    """It says that all steps are done, and returns what the run returned."""
    words, folder = finished
    before = [(folder / name).read_bytes() for name in ("checkpoint.pt", "eval.csv")]
    code, out, err = main(mbpo, words)
    assert (code, err) == (0, "")
    assert "80 steps are done" in out
    result = Outcome(mbpo, small("mbpo", run_root=str(folder.parent), resume=True)).result
    assert [(folder / name).read_bytes() for name in ("checkpoint.pt", "eval.csv")] == before
    assert result["evaluations"] == (folder / "eval.csv").read_text().splitlines()[1:]


def test_resume_goes_on_with_more_steps(finished, main):
    """A finished run is extended, without args.json and on another kind of device, too."""
    words, folder = finished
    (folder / "args.json").unlink()
    alter(folder, lambda saved: saved.update(generator=saved["generator"][:16]))  # as of a GPU
    words = [*words, "--device", "cpu", "--total-timesteps", "120"]
    code, out, err = main(mbpo, words)
    assert (code, err) == (0, "")
    assert "from step 80" in out.splitlines()[0]
    assert [row[0] for row in read_evaluations(folder)] == ["step", "0", "40", "80", "120"]
    assert saved_step(folder) == 120
    held = json.loads((folder / "args.json").read_text())
    assert (held["total_timesteps"], held["version"]) == (120, mbpo.VERSION)


def test_settings_of_numpy_and_paths_are_taken_as_pythons_own(main, tmp_path):
    """From Python, numpy's numbers and a Path do; such a run goes on from the command line."""
    plain = small("mbpo", rollout_schedule=(0, 50, 1, 2))
    given = {"gamma": np.float64(0.99), "policy_lr": np.float32(0.25), "seed": np.int64(1)}
    given |= {"run_root": tmp_path, "autotune": np.bool_(True), "exp_name": Path("mbpo")}
    args = mbpo.Args(**(plain | given))
    mbpo.train(args)
    assert args.run_root is tmp_path  # the caller's own settings stay as they were
    words = flags(plain | {"policy_lr": 0.25})
    code, out, err = main(mbpo, [*words, "--resume", "--total-timesteps", "90"])
    assert (code, err) == (0, "")
    assert "from step 80" in out.splitlines()[0]


@pytest.mark.parametrize("total", [90, 7])
def test_every_run_ends_with_an_evaluation_and_a_checkpoint(total, tmp_path):
    """Whatever its length, so that no step of it is lost."""
    changes = {"total_timesteps": total, "learning_starts": min(total, 40)}
    outcome = Outcome(sac, small("sac", run_root=str(tmp_path), **changes))
    expected = [step for step in (0, 40, 80, total) if step <= total]
    assert [int(row[0]) for row in outcome.evaluations] == expected
    assert outcome.step == len(outcome.rows) == total
