"""A run that is killed goes on to the same end; what a run folder holds is never lost."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers_run import (
    Outcome,
    alter,
    at_step,
    cut,
    flags,
    folder_of,
    one_error,
    read_checkpoint,
    read_evaluations,
    read_scalars,
    same_learning,
    saved_step,
    small,
)

import mbpo
import mbpo_ftfl
import sac

# The last 60 steps learn; the ring of real transitions is full by then.
CHANGES = {"total_timesteps": 1010, "learning_starts": 950, "eval_frequency": 100}
CHANGES |= {"checkpoint_frequency": 40, "buffer_size": 700, "device": "cpu"}


def settings(script, root, **changes) -> dict:
    """Settings of a run of a few seconds with many checkpoints."""
    fits = {} if script is sac else {"model_train_frequency": 25}
    return small(script.__name__, **(CHANGES | fits | {"run_root": str(root)} | changes))


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


def assert_goes_on(done, script, words: list[str], folder, undisturbed) -> None:
    """Resumed, a run says from where, and ends as one that nothing has stopped."""
    time.sleep(1)  # the files of TensorBoard's curves are in the order of their seconds
    saved = saved_step(folder)
    out = done(script, [*words, "--resume"])
    assert out.splitlines()[0].endswith(f"from step {saved}")
    assert not list(folder.glob("*.tmp"))
    assert_equal_runs(folder, undisturbed(script))


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


def test_a_killed_process_goes_on_to_the_same_end(undisturbed, tmp_path, done):
    """So does one that SIGKILL ends at any moment after a checkpoint."""
    words, folder = flags(settings(mbpo_ftfl, tmp_path)), folder_of(tmp_path, "mbpo_ftfl")
    child = subprocess.Popen([sys.executable, mbpo_ftfl.__file__, *words])
    while child.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    time.sleep(random.Random(time.time()).uniform(0, 0.5))
    child.kill()
    assert child.wait() in (-signal.SIGKILL, 0)  # 0: it was faster
    assert_goes_on(done, mbpo_ftfl, words, folder, undisturbed)


def test_a_run_cut_off_before_its_checkpoint_starts_anew(undisturbed, tmp_path, done, refused):
    """With nothing saved yet, --resume refuses other settings, says so, and begins anew."""
    words, folder = settings(sac, tmp_path), folder_of(tmp_path, "sac")
    cut(sac, 100, **(words | {"checkpoint_frequency": 600}))
    assert (folder / "eval.csv").exists()
    assert not (folder / "checkpoint.pt").exists()
    words = [*flags(words), "--resume"]
    assert "holds a run with gamma 0.99, not 0.5" in refused(sac, [*words, "--gamma", "0.5"])
    first = done(sac, words).splitlines()[0]
    assert first.endswith("from step 0: no checkpoint is there to go on from")
    assert_equal_runs(folder, undisturbed(sac))


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """On a full disk it is an error, and the one before stays."""
    file = tmp_path / "checkpoint.pt"
    sac.write_checkpoint(file, {"step": 1})

    def full(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint.pt could not be written: no space left"):
        sac.write_checkpoint(file, {"step": 2})
    assert torch.load(file) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_its_episode(number, main, done, undisturbed, tmp_path):
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
    assert_goes_on(done, sac, words, folder, undisturbed)


@pytest.mark.parametrize(("times", "every"), [(2, 10), (1, 0)])
def test_a_second_interruption_ends_the_run_at_once(times, every, main, tmp_path):
    """So does the first of a run that saves nothing; the line says what is kept."""
    with at_step(sac, 55, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(times)]):
        code, _, err = main(sac, flags(small("sac", checkpoint_frequency=every)))
    folder, told = folder_of(tmp_path, "sac"), "nothing is saved"
    if every:
        assert 40 <= saved_step(folder) < 55
        told = f"saved up to step {saved_step(folder)}, from where --resume goes on"
    assert code == 1
    assert one_error(err).startswith(f"error: interrupted; {told}")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of a short finished run with a model."""
    return Outcome(mbpo, small("mbpo", run_root=str(tmp_path_factory.mktemp("once")))).folder


@pytest.fixture
def finished(once, tmp_path):
    """A copy of a short finished run: the flags that resume it, and the folder."""
    folder = shutil.copytree(once, tmp_path / once.name)
    return [*flags(small("mbpo")), "--resume"], folder


def spoil(folder, change) -> None:
    """Changes a checkpoint's settings, or all of it, or leaves args.json alone, with other text."""
    file = folder / "checkpoint.pt"
    if isinstance(change, dict):
        alter(folder, lambda saved: saved["settings"].update(change))
    elif isinstance(change, str):
        file.unlink()
        (folder / "args.json").write_text(change)
    elif change:
        file.write_bytes(change(file.read_bytes()))


DAMAGED = "/checkpoint.pt can't be read, it may be damaged"
REFUSED = [  # what is done to a finished run's folder, the words, and what the line says
    (None, "--no-resume", " holds a run: give --resume, or choose another --exp-name"),
    (None, "--gamma 0.5", " holds a run with gamma 0.99, not 0.5: choose another --exp-name"),
    (None, "--total-timesteps 60", " has 80 steps: --total-timesteps must not be less"),
    ({"version": 0}, "", " holds a run with version 0, not 1: choose another --exp-name"),
    ({"script": "sac.py"}, "", " holds a run with script sac.py, not mbpo.py: "),
    (lambda content: content[: len(content) // 2], "", DAMAGED),
    (lambda content: b"notes", "", DAMAGED),
    ("[1]", "", " holds no run to go on from: choose another --exp-name"),
    ("{}", "", " holds a run with alpha unknown to its script, not 1.0"),
]


@pytest.mark.parametrize(("change", "words", "said"), REFUSED)
def test_a_folder_that_a_run_cannot_go_on_in_is_refused(change, words, said, finished, refused):
    """A line names the folder and what is wrong; nothing in it is touched."""
    given, folder = finished
    spoil(folder, change)
    line = refused(mbpo, [*given, *words.split()])
    assert f"{folder}{said}" in line


def test_resume_goes_on_with_more_steps(finished, done):
    """A finished run is extended, without args.json and on another kind of device, too."""
    words, folder = finished
    (folder / "args.json").unlink()
    alter(folder, lambda saved: saved.update(generator=saved["generator"][:16]))  # as of a GPU
    out = done(mbpo, [*words, "--device", "cpu", "--total-timesteps", "120"])
    assert "from step 80" in out.splitlines()[0]
    assert [row[0] for row in read_evaluations(folder)] == ["step", "0", "40", "80", "120"]
    assert saved_step(folder) == 120
    assert '"total_timesteps": 120,' in (folder / "args.json").read_text()
