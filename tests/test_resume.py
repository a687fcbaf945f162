"""A run that is killed goes on to the same end; what a run folder holds is never lost."""

import hashlib
import json
import os
import random
import re
import resource
import signal
import time

import pytest
import torch
from helpers_run import (
    ROOT,
    flags,
    folder_of,
    one_error,
    read_checkpoint,
    read_evaluations,
    read_scalars,
    same,
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
            script.train(script.Args(**settings(script, root)))
            made[script] = folder_of(root, script.__name__)
        return made[script]

    return of


@pytest.fixture
def cut(monkeypatch):
    """Trains until the power goes in a step."""

    def at(script, step: int, **settings) -> None:
        check = script.check_finite

        def check_finite(now, **quantities):
            check(now, **quantities)
            if now == step:
                raise Cut

        with monkeypatch.context() as changed:
            changed.setattr(script, "check_finite", check_finite)
            with pytest.raises(Cut):
                script.train(script.Args(**settings))
        time.sleep(1)  # the files of TensorBoard's curves are in the order of their seconds

    return at


def curves(folder) -> dict:
    """TensorBoard's curves, but for the one of the clock."""
    scalars = read_scalars(folder)
    assert scalars.pop("train/steps_per_second")
    return scalars


def assert_equal_runs(one, other) -> None:
    """Evaluations, all of the checkpoint and TensorBoard's curves are those of the other run."""
    assert read_evaluations(one) == read_evaluations(other)
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert ours.keys() == theirs.keys()
    assert theirs["added"] > len(theirs["rows"])
    for part in ours.keys() - {"settings", "progress"}:
        assert same(ours[part], theirs[part]), part
    assert ours["progress"][:2] == theirs["progress"][:2]
    assert curves(one) == curves(other)


@pytest.mark.parametrize("script", [sac, mbpo_ftfl], ids=["sac", "mbpo_ftfl"])
def test_a_run_that_is_cut_off_goes_on_to_the_same_end(script, cut, undisturbed, tmp_path):
    """Cut off while it explores and while it learns, a resumed run ends bit-equal."""
    words, folder = settings(script, tmp_path, resume=True), folder_of(tmp_path, script.__name__)
    saved = 0
    for step in (757, 1001):
        cut(script, step, **words)
        assert saved < (saved := read_checkpoint(folder)["progress"][0]) < step
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
    saved = read_checkpoint(folder)["progress"][0]
    code, out, err = main(mbpo_ftfl, [*words, "--resume"])
    assert (code, err) == (0, "")
    assert str(saved) in out.splitlines()[0]
    assert_equal_runs(folder, undisturbed(mbpo_ftfl))


def test_a_run_cut_off_before_its_first_checkpoint_starts_anew(undisturbed, cut, tmp_path, main):
    """With nothing saved yet, --resume says so, and begins from the start."""
    words, folder = settings(sac, tmp_path), folder_of(tmp_path, "sac")
    cut(sac, 100, **(words | {"checkpoint_frequency": 600}))
    assert (folder / "eval.csv").exists()
    assert not (folder / "checkpoint.pt").exists()
    code, out, err = main(sac, [*flags(words), "--resume"])
    assert code == 0, err
    assert "from step 0" in out.splitlines()[0]
    assert_equal_runs(folder, undisturbed(sac))


def test_a_run_cut_off_while_saving_has_the_checkpoint_before(
    undisturbed, tmp_path, main, monkeypatch
):
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
    saved_step = read_checkpoint(folder)["progress"][0]
    assert 40 <= saved_step < 120
    code, out, err = main(sac, [*flags(words), "--resume"])
    assert code == 0, err
    assert f"from step {saved_step}" in out.splitlines()[0]
    assert not (folder / "checkpoint.tmp").exists()
    assert_equal_runs(folder, undisturbed(sac))


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(undisturbed, tmp_path, main):
    """A checkpoint that doesn't fit is an error; with more room, the run goes on from the last."""
    expected = undisturbed(sac)
    row = read_checkpoint(expected)["rows"][0].nbytes
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
    assert 500 <= read_checkpoint(folder)["progress"][0] < 700
    assert not list(folder.glob("*.tmp"))
    assert main(sac, [*words, "--resume"])[0] == 0
    assert_equal_runs(folder, expected)


@pytest.mark.parametrize("name", ["checkpoint.pt", "eval.csv"])
def test_a_folder_in_a_files_place(name, main, tmp_path):
    """A file that can't be replaced ends the run with a line that names it."""
    folder = folder_of(tmp_path, "sac")
    (folder / name).mkdir(parents=True)
    code, out, err = main(sac, [*flags(small("sac", checkpoint_frequency=30)), "--resume"])
    assert code == 1
    assert f"{folder}/{name}" in one_error(err)
    assert "80 steps are done" not in out


@pytest.fixture
def heeded():
    """Ctrl-C as a terminal has it; pytest's workers may ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(number, main, monkeypatch, tmp_path):
    """Ctrl-C and a job system's SIGTERM end a run with one line that names the saved step."""
    check = sac.check_finite

    def check_finite(step, **quantities):
        check(step, **quantities)
        if step == 55:
            signal.raise_signal(number)

    monkeypatch.setattr(sac, "check_finite", check_finite)
    error, _, _ = main(sac, flags(small("sac", checkpoint_frequency=10)))
    step = read_checkpoint(folder_of(tmp_path, "sac"))["progress"][0]
    assert 40 <= step < 55
    assert re.fullmatch(f"error: interrupted;.*step {step}\\b.*--resume.*", error), error


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of a short finished run with a model."""
    root = tmp_path_factory.mktemp("once")
    mbpo.train(mbpo.Args(**small("mbpo", run_root=str(root))))
    return folder_of(root, "mbpo")


@pytest.fixture
def finished(once, tmp_path):
    """A copy of a short finished run: the flags, and the folder."""
    folder = tmp_path / once.name
    folder.mkdir()
    for file in once.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return flags(small("mbpo")), folder


def alter(folder, change) -> None:
    """Changes what a checkpoint holds."""
    saved = read_checkpoint(folder)
    change(saved)
    torch.save(saved, folder / "checkpoint.pt")


def test_a_folder_that_holds_a_run_is_refused(finished, refused):
    """Without --resume nothing is touched."""
    words, folder = finished
    line = refused(mbpo, words)
    assert all(word in line for word in (str(folder), "--resume", "--exp-name"))


def test_resume_refuses_a_run_with_other_settings(finished, refused):
    """The setting is named, and one that the run's older script didn't have, too."""
    words, folder = finished
    assert "gamma 0.99, not 0.5" in refused(mbpo, [*words, "--resume", "--gamma", "0.5"])
    other = [*flags(small("sac", exp_name="mbpo")), "--resume"]
    assert "holds a run with" in refused(sac, other)
    alter(folder, lambda saved: saved["settings"].pop("model_updates"))
    line = refused(mbpo, [*words, "--resume"])
    assert "model_updates" in line
    assert "older script" in line


def test_resume_refuses_fewer_steps_than_are_done(finished, refused):
    """The end of a run can't be moved before what it has done."""
    words, folder = finished
    line = refused(mbpo, [*words, "--resume", "--total-timesteps", "60"])
    assert f"{folder} has 80 steps" in line
    assert "--total-timesteps" in line


def test_resume_of_a_finished_run_changes_nothing(finished, main):
    """It says that all steps are done, and returns what the run returned."""
    words, folder = finished
    before = [(folder / name).read_bytes() for name in ("checkpoint.pt", "eval.csv")]
    code, out, err = main(mbpo, [*words, "--resume"])
    assert (code, err) == (0, "")
    assert "80 steps are done" in out
    assert [(folder / name).read_bytes() for name in ("checkpoint.pt", "eval.csv")] == before
    args = small("mbpo", run_root=str(folder.parent), resume=True)
    result = mbpo.train(mbpo.Args(**args))
    assert result["evaluations"] == (folder / "eval.csv").read_text().splitlines()


def rename(params: dict) -> None:
    """Gives the first of some tensors another name."""
    params["renamed"] = params.pop(next(iter(params)))


def reshape(params: dict) -> None:
    """Gives the first of some tensors another shape."""
    params[next(iter(params))] = torch.zeros(3, 5, 7)


@pytest.mark.parametrize("change", [rename, reshape])
def test_resume_refuses_tensors_of_another_script(change, finished, refused):
    """Of other names or shapes, a checkpoint is of another version, whatever its settings say."""
    words, folder = finished
    alter(folder, lambda saved: change(saved["agent"]["actor"]["params"]))
    line = refused(mbpo, [*words, "--resume", "--total-timesteps", "120"])
    assert f"{folder} holds a run of another version of this script" in line


def test_resume_refuses_a_file_that_is_no_checkpoint(finished, refused):
    """Cut short, or of something else, the file is named."""
    words, folder = finished
    words, file = [*words, "--resume", "--total-timesteps", "120"], folder / "checkpoint.pt"
    alter(folder, lambda saved: saved.pop("progress"))
    assert str(folder) in refused(mbpo, words)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = refused(mbpo, words)
    assert str(file) in line
    assert f"remove {folder} to start anew" in line


def test_resume_needs_the_checkpoint_alone(finished, main):
    """Without args.json, a run still goes on from its checkpoint."""
    words, folder = finished
    (folder / "args.json").unlink()
    code, out, _ = main(mbpo, [*words, "--resume", "--total-timesteps", "90"])
    assert code == 0
    assert "from step 80" in out.splitlines()[0]


def test_resume_goes_on_with_more_steps(finished, main):
    """A finished run is extended, on a device of any name and by a script that was edited."""
    words, folder = finished
    source = hashlib.sha256((ROOT / "mbpo.py").read_bytes()).hexdigest()
    assert read_checkpoint(folder)["settings"]["source"] == source
    assert json.loads((folder / "args.json").read_text())["source"] == source
    alter(folder, lambda saved: saved["settings"].update(source="of another day"))
    words = [*words, "--resume", "--device", "cpu", "--total-timesteps", "120"]
    code, out, err = main(mbpo, words)
    assert (code, err) == (0, "")
    assert "from step 80" in out.splitlines()[0]
    assert [row[0] for row in read_evaluations(folder)] == ["step", "0", "40", "80", "120"]
    assert read_checkpoint(folder)["progress"][0] == 120
    held = json.loads((folder / "args.json").read_text())
    assert (held["total_timesteps"], held["device"], held["source"]) == (120, "cpu", source)


def test_resume_on_another_kind_of_device(finished, main):
    """The noise of a GPU's generator can't go on elsewhere; the run does, with new noise."""
    words, folder = finished
    alter(folder, lambda saved: saved.update(generator=saved["generator"][:16]))
    code, out, err = main(mbpo, [*words, "--resume", "--total-timesteps", "90"])
    assert code == 0, err
    assert "from step 80" in out.splitlines()[0]
