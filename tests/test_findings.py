"""What both READMEs say in words of the recorded runs, held against benchmarks/results/.

A test begins with the sentences that it checks, so that neither they nor the files change alone.
"About", "near", "level with" are read as within a fifth, "well below", "far below" as at most half.
"""

from functools import cache

import numpy as np
import pandas as pd
import report
from helpers_run import ROOT

RESULTS = ROOT / "benchmarks" / "results"
WALKER, QUADRUPED, CARTPOLE = "dmc/walker-run", "dmc/quadruped-walk", "dmc/cartpole-swingup"
HOPPER, CHEETAH = "Hopper-v5", "HalfCheetah-v5"
FTFL, ABLATION = "mbpo_ftfl", "mbpo_residual_ablation"
FITTED = ["mbpo", FTFL, ABLATION, "raw_direct"]  # runs with a model that share all else
FITS2000 = ["mbpo_fits2000", f"{FTFL}_fits2000", f"{ABLATION}_fits2000"]
BIAS, REWARD, SPREAD, CHANGE = report.TRAINING  # tags
UPDATES = "model/updates"
EARLIER = "walker_run_25000"
SAC = ["sac_utd1", "sac_utd10", "sac_utd8"]
STANDING = 1000 / 6  # return of an episode of standing still on walker-run
MOST = 100  # a discounted return of rewards of at most 1, gamma = 0.99
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]


def says(*sentences: str) -> None:
    """Fails unless each of these stands in a README, whatever its line breaks and bold words."""
    texts = [" ".join(path.read_text().replace("**", "").split()) for path in DOCUMENTS]
    for sentence in sentences:
        assert any(" ".join(sentence.split()) in text for text in texts), sentence


@cache
def runs(folder: str = ".") -> dict:
    """Recorded runs of a folder in results/: {(task, experiment): {seed: what read_run gives}}."""
    found = {}
    for file in sorted((RESULTS / folder).glob("*__*__*/args.json")):
        args, *rows = report.read_run(file.parent)
        found.setdefault((args["env_id"], args["exp_name"]), {})[args["seed"]] = args, *rows
    return found


def curves(task: str, experiment: str, tag: str = "return", folder: str = ".") -> pd.DataFrame:
    """Values of a tag of an experiment: a row per step, a column per seed."""
    columns = {}
    for seed, (_, evaluations, scalars) in runs(folder)[task, experiment].items():
        if tag == "return":
            columns[seed] = evaluations.set_index("step")["mean"]
        else:
            rows = scalars[scalars.tag == tag].drop_duplicates("step", keep="last")
            columns[seed] = rows.set_index("step").value
    return pd.DataFrame(columns)


def at(step: int, task: str, experiment: str, tag: str = "return") -> pd.Series:
    """Values of a tag at a step, by seed."""
    return curves(task, experiment, tag).loc[step].dropna()


def means(step: int, task: str, experiments: list[str], tag: str = "return") -> pd.Series:
    """Means over seeds of a tag at a step, by experiment."""
    return pd.Series({name: at(step, task, name, tag).mean() for name in experiments})


def both(experiment: str, tag: str = "return") -> pd.DataFrame:
    """A cell's runs on walker-run, those in the tables and the earlier three: (set, seed)."""
    sets = {folder: curves(WALKER, experiment, tag, folder) for folder in (".", EARLIER)}
    return pd.concat(sets, axis=1)


def setting(name: str, task: str, experiment: str) -> dict:
    """What a setting was, by seed."""
    return {seed: args[name] for seed, (args, *_) in runs()[task, experiment].items()}


def published(task: str, algorithm: str) -> pd.DataFrame:
    """Published mean and std by step."""
    rows = pd.read_csv(ROOT / "benchmarks" / "published.csv")
    return rows[(rows.task == task) & (rows.algorithm == algorithm)].set_index("step")


def test_runs_with_a_model_are_ahead_of_sac_with_the_same_settings():
    says(
        """At 30,000 on walker-run every run with 500-step fits is above every SAC run with its
        settings, but not above every run of `sac_utd8`""",
        "on quadruped-walk none comes near it.",
        "At 30,000 one seed of `sac_utd8` is ahead of most runs with a model",
        """25,000 steps after its own random ones, at 35,000, its mean is above that of each script
        with a model after as many.""",
    )
    sac = pd.concat([at(30_000, WALKER, name) for name in ("sac_utd1", "sac_utd10")])
    model = pd.concat([at(30_000, WALKER, name) for name in FITTED])
    assert len(sac) == 6
    assert len(model) == 12
    assert model.min() > sac.max()
    ahead = [(model < one).mean() for one in at(30_000, WALKER, "sac_utd8")]
    assert sorted(share > 0.5 for share in ahead) == [False, False, True]
    assert at(35_000, WALKER, "sac_utd8").mean() > means(30_000, WALKER, FITTED).max()
    names = [*FITTED[:3], "sac_utd10", "sac_utd8"]
    assert max(at(30_000, QUADRUPED, name).max() for name in names) < 500 / 2


def test_ftfl_and_mbpo_on_walker_run():
    says(
        """Our 20,000 to 30,000 steps (papers: 500,000), on four of its tasks, neither confirm nor
        refute its published lead.""",
        """FTFL is far above MBPO in one seed, level with it in two. There most match standing
        still, and which seeds get beyond it may be luck;""",
        """By step 25,000 most runs with a model are near that. More than a third above it are by
        then two of the ablation's six runs, one of `raw_direct`'s, and with `_fits2000` one of FTFL
        and MBPO's; at 30,000 one of FTFL's three and one of the ablation's; of MBPO's with 500
        steps none.""",
        """Seed by seed FTFL is above MBPO in one of six pairs at 25,000, and in that one alone at
        30,000, by more than 150; the other two are level.""",
        """two runs of one seed differ about as much as two seeds do, so runs of one seed on two
        kinds of hardware are not a pair.""",
    )
    sets = {name: both(name) for name in FITTED}
    assert {run.shape[1] for run in sets.values()} == {6}
    ends = {name: run.loc[30_000, "."] for name, run in sets.items()}
    longer = {name: curves(WALKER, name).loc[25_000] for name in FITS2000}
    every = {name: run.loc[25_000].droplevel(1) for name, run in sets.items()}
    every = pd.concat(every | longer)
    assert every.between(0.8 * STANDING, 1.2 * STANDING).mean() > 0.5
    every, last = (x[x > 4 / 3 * STANDING].groupby(level=0) for x in (every, pd.concat(ends)))
    assert every.size().to_dict() == {
        ABLATION: 2,
        "raw_direct": 1,
        f"{FTFL}_fits2000": 1,
        "mbpo_fits2000": 1,
    }
    assert last.size().to_dict() == {FTFL: 1, ABLATION: 1}
    pairs = sets[FTFL] - sets["mbpo"]
    assert (pairs.loc[25_000] > 0).sum() == 1
    assert pairs.loc[25_000].idxmax() == (".", 2)
    assert pairs.loc[30_000, (".", 2)] > 150
    level = (ends[FTFL] / ends["mbpo"]).drop(2)
    assert level.between(0.8, 1.2).all()
    again, seeds = [], []
    for run in sets.values():
        one, other = run["."], run[EARLIER]
        again.append((one - other).loc[15_000:25_000].abs())
        for a, b in ((1, 2), (1, 3), (2, 3)):
            seeds += [(x[a] - x[b]).loc[15_000:25_000].abs() for x in (one, other)]
    assert 0.7 < np.mean(again) / np.mean(seeds) < 1.2
    tasks = [task for task, name in runs() if name == FTFL and task.startswith("dmc/")]
    ends = [curves(task, FTFL).index.max() for task in tasks]
    assert sorted(ends) == [20_000, 20_000, 30_000, 30_000]
    folders = ".", "first_curves", "early_stopping", "quadruped_causes"
    every = [run for folder in folders for seeds in runs(folder).values() for run in seeds.values()]
    assert 30_000 < max(run[1].step.max() for run in every) < 500_000


def test_first_fits_of_the_reward_on_walker_run():
    says(
        """On walker-run, with rewards small beside s' - s, MBPO's first fit has three times the
        ablation's reward error, nine times FTFL's; later fits are level. On cartpole-swingup
        (rewards large) MBPO leads, on finger-spin (rare) SAC.""",
        """so of each cell there are six runs until then. After the first fit the error of the
        reward is largest in the six runs of `mbpo` and least in the six of FTFL; between them it
        is, on average, larger with `raw_direct` than with the ablation.""",
        """From step 11,250 on the means of these errors differ by less than a factor of two
        (mostly MBPO's is the largest). From 20,000 to 25,000 those with raw targets are
        on average level with the others, but the spread that they predict is larger by about a
        quarter.""",
    )
    first = pd.DataFrame({name: both(name, REWARD).loc[5000] for name in FITTED})
    assert len(first.dropna()) == 6
    between = first[["raw_direct", ABLATION]]
    assert first["mbpo"].min() > between.max(axis=None)
    assert first[FTFL].max() < between.min(axis=None)
    assert between["raw_direct"].mean() > between[ABLATION].mean()
    assert round(first["mbpo"].mean() / first[ABLATION].mean()) == 3
    assert round(first["mbpo"].mean() / first[FTFL].mean()) == 9
    every = pd.DataFrame({name: both(name, REWARD).mean(axis=1) for name in FITTED})
    apart = every.max(axis=1) / every.min(axis=1)
    assert (apart.loc[11_250:] < 2).all()
    assert apart.loc[11_000] >= 2
    assert (every.loc[11_250:25_000].idxmax(axis=1) == "mbpo").mean() > 0.5
    for task, first in ((CARTPOLE, "mbpo"), ("dmc/finger-spin", "sac_utd10")):
        assert means(20_000, task, [*FITTED[:3], "sac_utd10"]).idxmax() == first
    for tag, low, high in ((REWARD, 0.8, 1.2), (SPREAD, 1.2, 1.35)):
        late = {name: both(name, tag).loc[20_000:25_000].stack([0, 1]).mean() for name in FITTED}
        raw, scaled = ((late[x] + late[y]) / 2 for x, y in (("mbpo", "raw_direct"), FITTED[1:3]))
        assert low < raw / scaled < high


def test_fits_that_stop_early():
    says(
        "Fits that stop early cost FTFL return by 15,000, MBPO not clearly;",
        """keep some thousands of gradient steps at first; later most keep fewer than a hundred, a
        few some thousands. The mean return at step 15,000 is lower than that of the six runs
        without, for `mbpo.py` as for `mbpo_ftfl.py`, though their ranges overlap, and MBPO's is
        above that of the three in the table.""",
        """with raw targets its predicted spread begins at a third of the reward's deviation or
        more, and its error at several times FTFL's. The error in s' is at first larger with FTFL.
        At the end the two scripts' errors and returns are about the same.""",
    )
    stopped = "mbpo_patience5", f"{FTFL}_patience5"
    for name, other in zip(stopped, ("mbpo", FTFL), strict=True):
        updates = curves(WALKER, name, UPDATES)
        assert updates.iloc[0].between(2000, 5000).all()
        later = updates.iloc[1:].stack()
        assert (later < 100).mean() > 0.5
        assert 0 < (later > 1000).sum() < 10
        early, six = at(15_000, WALKER, name), both(other).loc[15_000]
        assert early.mean() < six.mean()
        assert early.max() > six.min()
        assert [early.mean() < mean for mean in six.groupby(level=0).mean()] == [
            name != stopped[0],
            True,
        ]
    raw, ftfl = ({tag: curves(WALKER, name, tag) for tag in report.TRAINING} for name in stopped)
    assert raw[SPREAD].iloc[0].min() > 1 / 3
    assert raw[REWARD].iloc[0].min() > 3 * ftfl[REWARD].iloc[0].max()
    assert ftfl[CHANGE].iloc[0].min() > raw[CHANGE].iloc[0].max()
    for tag in (REWARD, CHANGE):
        assert 0.8 < raw[tag].loc[15_000].mean() / ftfl[tag].loc[15_000].mean() < 1.2
    one, other = (means(15_000, WALKER, [name])[name] for name in stopped)
    assert 0.8 < one / other < 1.2


def test_older_runs_of_ftfl():
    says(
        """(`results/early_stopping/`, two seeds) a fit had 500 gradient steps at most, most fits
        stopped earlier, and the first temperature was 1: FTFL came last at step 20,000, and its
        critic overestimated.""",
        "(`_first500`; its error in s' is at first 14 times the variance of s' - s)",
        """At step 15,000 each of these five runs returns more than twice what either older run of
        FTFL does, and none has a bias""",
        """its error in s' is about half of that of each seed with 500 steps at step 10,000 (on a
        holdout of which earlier fits have seen most), its error of the reward below theirs, its
        return among theirs (one seed).""",
    )
    old = "early_stopping"
    returns = {name: curves(WALKER, name, folder=old) for _, name in runs(old)}
    assert {run.shape[1] for run in returns.values()} == {2}
    assert min(returns, key=lambda name: returns[name].loc[20_000].mean()) == FTFL
    for name in FITTED[:3]:
        updates = curves(WALKER, name, UPDATES, old).stack()
        assert updates.max() <= 500
        assert (updates < 500).mean() > 0.5
        assert {args["alpha"] for args, *_ in runs(old)[WALKER, name].values()} == {1.0}
    assert curves(WALKER, FTFL, BIAS, old).loc[20_000].min() > 10
    today = [f"{FTFL}_{name}" for name in ("alpha1", "first500", "patience5")]
    five = pd.concat([at(15_000, WALKER, name) for name in today])
    assert len(five) == 5
    assert five.min() > 2 * returns[FTFL].loc[15_000].max()
    assert pd.concat([at(15_000, WALKER, name, BIAS) for name in today]).abs().max() < 2
    assert round(curves(WALKER, f"{FTFL}_first500", CHANGE).iloc[0].item()) == 14
    for tag, low, high in ((CHANGE, 0.4, 0.6), (REWARD, 0, 1)):
        one, six = at(10_000, WALKER, f"{FTFL}_long_fits", tag).item(), both(FTFL, tag).loc[10_000]
        assert len(six) == 6
        assert (one / six).between(low, high).all()
    six = both(FTFL).loc[10_000]
    assert six.min() < at(10_000, WALKER, f"{FTFL}_long_fits").item() < six.max()


def test_more_updates_per_fit():
    says(
        "lower the error in s' for all three scripts, and two of the four runs lead at 25,000.",
        """In fits of 500 steps FTFL's error in s' (`model/change_error_mean`, the mean of six runs
        until 25,000) is above MBPO's at nearly all fits, on average by less than a tenth, and the
        ablation's is at most fits the largest of the three scripts'.""",
        """it is lower at steps 15,000 and 25,000, by about a quarter for MBPO and by about a
        third or more for FTFL and the ablation, and from 15,000 on FTFL's is below MBPO's""",
        """Of the reward FTFL has less than half of MBPO's error up to step 15,000 (but for one
        fit), on average four fifths from 20,000 on.""",
        """at 10,000 each of the four runs is below its script's mean with 500 steps, at 15,000 each
        but FTFL's seed 1. At 25,000 FTFL's seed 1 and MBPO return more than every other run of
        walker-run, FTFL's seed 2 and the ablation about what standing earns.""",
        "the one pair of seeds, in which FTFL is ahead, decides nothing.",
        """with four times as many, runs had about a third to a half of the speed of the
        ablation's seed 3 of `walker_run_25000/`, on a CPU as well""",
    )
    seeds = {name: [*runs()[WALKER, name]] for name in FITS2000}
    assert seeds == dict(zip(FITS2000, ([1], [1, 2], [1]), strict=True))
    like = dict(zip(FITS2000, FITTED[:3], strict=True))
    of_500 = pd.DataFrame({x: both(x, CHANGE).mean(axis=1) for x in FITTED[:3]}).loc[:25_000]
    of_2000 = pd.DataFrame({x: curves(WALKER, x, CHANGE).mean(axis=1) for x in FITS2000}).dropna()
    share = of_500[FTFL] / of_500["mbpo"]
    assert (share > 1).mean() > 0.9
    assert 1 < share.mean() < 1.1
    assert (of_500.idxmax(axis=1) == ABLATION).mean() > 0.5
    assert (of_2000[FITS2000[1]] < of_2000[FITS2000[0]]).loc[15_000:].all()
    for step in (15_000, 25_000):
        less = {name: 1 - of_2000[name][step] / of_500[like[name]][step] for name in FITS2000}
        assert 0.2 < less["mbpo_fits2000"] < 0.3
        assert min(less[name] for name in FITS2000[1:]) > 0.3
    mbpo, ftfl = (curves(WALKER, name, REWARD).mean(axis=1) for name in FITS2000[:2])
    share = ftfl / mbpo
    assert (share.loc[:15_000] > 0.5).sum() == 1
    assert 0.75 < share.loc[20_000:].mean() < 0.85
    for step, expected in ((10_000, set()), (15_000, {(FITS2000[1], 1)})):
        ahead = {name: at(step, WALKER, name) - both(like[name]).loc[step].mean() for name in like}
        ahead = pd.concat(ahead)
        assert {*ahead[ahead > 0].index} == expected
    every = {name: at(25_000, WALKER, name) for name in FITS2000 + SAC}
    every |= {x: run.droplevel(1) for x in FITTED for run in [both(x).loc[25_000]]}
    every = pd.concat(every)
    assert [*every.nlargest(2).index] == [(FITS2000[1], 1), ("mbpo_fits2000", 1)]
    for one in ((FITS2000[1], 2), (FITS2000[2], 1)):
        assert 0.8 < every[one] / STANDING < 1.2
    speed = "train/steps_per_second"
    slow = pd.concat([curves(WALKER, name, speed).median() for name in FITS2000])
    share = slow / curves(WALKER, ABLATION, speed, EARLIER)[3].median()
    one = runs(EARLIER)[WALKER, ABLATION][3][0]
    assert {one["device"], *setting("device", WALKER, FITS2000[1]).values()} == {"cpu"}
    assert 0.3 < share.min() < 0.36
    assert 0.45 < share.max() < 0.55


def test_what_runs_were_made_on():
    says(
        """They were made on a GPU, but for seeds 1 and 2 of walker-run's with 10 updates. All
        others were made on CPUs (hopper-stand's names no device); `_alpha1`, `_first500`,
        `_long_fits`, `_patience5` and `_layernorm` have 5 episodes to an evaluation, all else
        10.""",
    )
    on_gpu = {(WALKER, name) for name in [*FITTED, *SAC[:2]]}
    on_gpu |= {(QUADRUPED, name) for name in [*FITTED[:3], SAC[1]]}
    exceptions = {(WALKER, name, seed): "cpu" for name in [*FITTED, SAC[1]] for seed in (1, 2)}
    exceptions["dmc/hopper-stand", "sac", 1] = "auto"
    five = "_alpha1", "_first500", "_long_fits", "_patience5", "_layernorm"
    for (task, name), seeds in runs().items():
        for seed, (args, *_) in seeds.items():
            usual = "cuda" if (task, name) in on_gpu else "cpu"
            device = exceptions.get((task, name, seed), usual)
            assert args["device"] == device, (task, name, seed)
            assert args["eval_episodes"] == (5 if name.endswith(five) else 10), (task, name, seed)


def test_sac_follows_its_published_curve():
    says(
        "`sac_utd8`, near its published curve at all other steps;",
        """At the settings of `grids/walker_run.toml` SAC with 10 updates is above the published
        SAC with 8 until step 20,000, near it at 25,000 and below it at 30,000.""",
        """it follows the curve to its last point, 50,000: the mean is within one standard deviation
        of it at every step but 30,000, where two seeds are below and one within.""",
        """On quadruped-walk, to 30,000, its mean is below the published one from 10,000 on, and
        within one deviation of it at every step.""",
        """So nothing here speaks against `sac.py`. With one update (`sac_utd1`) it is above the
        published SAC with one from 15,000 on; with that curve's settings (`sac_utd1_as_published`)
        its mean is within a deviation of it, to 50,000, at every step but 15,000, where it is
        below.""",
    )
    curve = published(WALKER, "SAC, 8 updates per step")
    equal = curves(WALKER, "sac_utd10").dropna().mean(axis=1)
    far = ((equal - curve["mean"]) / curve["std"]).dropna()
    assert (far.loc[:20_000] > 0).all()
    assert 0.8 < equal[25_000] / curve["mean"][25_000] < 1.2
    assert far[30_000] < -1
    far = (curves(WALKER, "sac_utd8").sub(curve["mean"], axis=0).div(curve["std"], axis=0)).dropna()
    outside = far.mean(axis=1).abs() > 1
    assert far.index.max() == 50_000
    assert [*outside[outside].index] == [30_000]
    assert sorted(far.loc[30_000] < -1) == [False, True, True]
    assert far.loc[30_000].abs().min() < 1

    curve = published(WALKER, "SAC, 1 update per step")
    ours, same = (curves(WALKER, f"sac_utd1{name}").mean(axis=1) for name in ("", "_as_published"))
    above, far = (((x - curve["mean"]) / curve["std"]).dropna() for x in (ours, same))
    assert [*far.index] == [10_000, 15_000, 20_000, 25_000, 30_000, 40_000, 50_000]
    assert (above.loc[15_000:] > 1).all()
    assert far.abs().drop(15_000).max() < 1
    assert far[15_000] < -1

    curve = published(QUADRUPED, "SAC, 8 updates per step")
    ours = curves(QUADRUPED, "sac_utd8").mean(axis=1)
    far = ((ours - curve["mean"]) / curve["std"]).dropna()
    assert [*far.index] == [10_000, 15_000, 20_000, 25_000, 30_000]
    assert far.between(-1, 0).all()


def test_speed_on_a_gpu():
    says(
        """Where `args.json` says cuda it was an H200 with 16 CPU cores. The runs of quadruped-walk
        and seed 3 of walker-run's with a model are single runs. Of the first eight, begun at once,
        the seven with a model had made 81 to 84 steps per second by step 24,000, and SAC more than
        100; of the next eight, beside which other jobs ran at first, the six with a model 58 to 60,
        and SAC 70.""",
        """of five processes at once the four with a model had made 43 to 48 steps of each seed by
        then. So at that point both ways a GPU made some 650 to 700 steps per second in all.""",
    )
    speed = "train/steps_per_second"
    cells = [(QUADRUPED, name, 1) for name in FITTED[:3]] + [(WALKER, name, 3) for name in FITTED]
    alone = [curves(task, name, speed)[seed][24_000] for task, name, seed in cells]
    assert {runs()[task, name][seed][0]["device"] for task, name, seed in cells} == {"cuda"}
    assert 81 < min(alone) <= max(alone) < 84
    sac = curves(QUADRUPED, "sac_utd10", speed).loc[24_000]
    assert [*(sac > 100)] == [True, False, False]
    assert {*sac[1:].round()} == {70}
    later = np.array([curves(QUADRUPED, x, speed).loc[24_000, 2:] for x in FITTED[:3]])
    assert 58 < later.min() <= later.max() < 60.3
    joint = [curves(WALKER, name, speed, EARLIER)[2][24_000] for name in FITTED]
    assert 43 < min(joint) <= max(joint) < 48
    assert 640 < 8 * np.mean(alone) < 700
    assert 640 < 5 * 3 * np.mean(joint) < 700


def test_critics_on_quadruped_walk():
    says(
        "On quadruped-walk Q leaves its possible range in every run, but to 15,000 in none with",
        """Q to hundreds to tens of thousands in `sac.py`, with a model to thousands or far more,
        positive or negative, whatever the model predicts. In two of FTFL's three seeds it is back
        within 100 from step 20,000 on, in none of the other ten runs with 10 updates.""",
        """With the settings of the published curve (`sac_utd8`) Q passes 100 as well, in one of
        three seeds to thousands, and is below it again at the end in two.""",
        """left Q in the hundreds until it was stopped at 12,000, where it had been in the
        thousands, but so it is in seed 2 without""",
        """it returns no more than 250 until step 300,000, and 910 at 400,000, after its first
        reset""",
    )
    names = [name for task, name in runs() if task == QUADRUPED]
    q = {name: curves(QUADRUPED, name, "sac/q") for name in names}
    most = {name: run.abs().max() for name, run in q.items()}
    last = {name: run.ffill().iloc[-1].abs() for name, run in q.items()}
    plain = [name for name in names if not name.endswith("_layernorm")]
    for name in plain:
        assert most[name].min() > MOST
    for name in names:
        assert curves(QUADRUPED, name).iloc[1:].mean(axis=1).max() < 250
    assert most["sac_utd10"].between(100, 100_000).all()
    for name in FITTED[:3]:
        assert most[name].min() > 1000
    signs = [(q[name] > 0).iloc[-1] for name in FITTED[:3]]
    assert {sign for seeds in signs for sign in seeds} == {True, False}
    ends = pd.concat({x: q[x].loc[20_000:].abs().max() for x in [*FITTED[:3], "sac_utd10"]})
    assert [name for name, _ in ends[ends < MOST].index] == [FTFL, FTFL]
    assert len(ends) == 12
    assert (most["sac_utd8"] > 1000).sum() == 1
    other = curves(QUADRUPED, "sac_utd10_alpha1", "sac/q", "quadruped_causes")[3]
    assert other.index.max() == 12_000
    assert 100 < other[12_000] < 1000
    assert 1000 < q["sac_utd10"][3][12_000] < 10_000
    assert most["sac_utd10"][2] < 1000
    assert (last["sac_utd8"] < MOST).sum() == 2
    curve = published(QUADRUPED, "SAC, 8 updates per step")["mean"]
    assert curve.loc[:300_000].max() < 250
    assert round(curve.loc[400_000]) == 910


def test_layernorm_on_quadruped_walk():
    says(
        """LayerNorm in the critics, by the diff above, keeps Q within 100 with MBPO, FTFL and SAC
        until step 15,000""",
        """though overestimation is still most of Q in all seeds of SAC, in two of FTFL's three, in
        none of MBPO's (`sac/q` and `eval/critic_bias` at step 15,000).""",
        "an untrained one has returned more than the best mean over seeds",
    )
    too_high = {}
    for name in ("sac", FTFL, "mbpo"):
        q, bias = (curves(QUADRUPED, f"{name}_layernorm", tag) for tag in ("sac/q", BIAS))
        assert q.abs().max().max() < MOST
        assert q.index.max() == 15_000
        too_high[name] = (bias.loc[15_000] / q.loc[15_000] > 0.5).sum()
    assert too_high == {"sac": 3, FTFL: 2, "mbpo": 0}
    returns = pd.concat([curves(QUADRUPED, x) for task, x in runs() if task == QUADRUPED], axis=1)
    means_later = [
        curves(QUADRUPED, x).iloc[1:].mean(axis=1) for task, x in runs() if task == QUADRUPED
    ]
    assert returns.loc[0].max() > pd.concat(means_later).max()


def test_hopper():
    says(
        """the critic overestimates in every run from step 7,500 to 17,500. At 10,000 its bias is in
        the thousands in one seed of MBPO, whose temperature has grown with it, and in the hundreds
        in the other; with the temperature fixed at 0.2, as mbrl-lib and mbpo_pytorch have it for
        the hopper, it lies between the two (`mbpo_alpha02`, seed 1, cut off there); below 250 with
        FTFL (two seeds) and in SAC with as many updates (`sac_utd20`, one seed); some 50 with the
        simulator in place of the model (`mbpo_perfect_model`, `grids/hopper_causes.toml`, one
        seed), after hundreds at 7,500. In both seeds FTFL's is below MBPO's but for one evaluation
        of seed 2, though its error in s' is mostly the larger.""",
        """Returns swing by hundreds from one evaluation to the next""",
        """FTFL is ahead of MBPO at 7,500 and at 20,000 in both seeds, at 17,500 behind in both.
        MBPO's mean is near the published one at 10,000 and 15,000; at 20,000 both of its seeds are
        more than a deviation below, while FTFL's mean, the simulator's run and SAC's are within
        one.""",
        """an older run of `mbpo.py` (`first_curves/`) returned 1,000 at 20,000 after a bias of more
        than 10,000.""",
        """FTFL ends ahead of MBPO in both seeds of Hopper-v5 (at 17,500 behind), where its critic
        errs less,""",
    )
    names = ["mbpo", FTFL, "mbpo_perfect_model", "mbpo_alpha02", "sac_utd20"]
    returns, bias = ({x: curves(HOPPER, x, tag) for x in names} for tag in ("return", BIAS))
    assert [returns[name].shape[1] for name in names] == [2, 2, 1, 1, 1]
    every = pd.concat(bias, axis=1)
    assert every.loc[7500:17_500].min().min() > 0
    mbpo, ftfl, perfect, kept, sac = (bias[name].loc[10_000] for name in names)
    assert 1000 < mbpo[1] < 10_000
    assert 100 < mbpo[2] < 1000
    assert mbpo[2] < kept[1] < mbpo[1]
    alpha = curves(HOPPER, "mbpo", "sac/alpha")
    assert alpha.loc[10_000, 1] > 5
    assert alpha[2].max() < 2
    assert setting("alpha", HOPPER, "mbpo_alpha02") == {1: 0.2}
    assert bias["mbpo_alpha02"].index.max() == 10_000
    for some in (ftfl, sac):
        assert some.between(50, 250).all()
    assert 40 < perfect.item() < 60
    assert 200 < bias["mbpo_perfect_model"].loc[7500].item() < 1000
    later = (bias[FTFL] < bias["mbpo"]).loc[7500:]
    assert later.sum().to_dict() == {1: 6, 2: 5}
    error, other = (curves(HOPPER, name, CHANGE) for name in (FTFL, "mbpo"))
    assert ((error > other).mean() > 0.9).all()
    for name in names:
        assert (returns[name].loc[5000:].diff().abs().max() > 200).all()
    ahead = returns[FTFL] - returns["mbpo"]
    assert (ahead.loc[[7500, 20_000]] > 0).all(axis=None)
    assert (ahead.loc[17_500] < 0).all()
    assert (bias[FTFL].loc[20_000].abs() < bias["mbpo"].loc[20_000]).all()
    curve = published("Hopper", "MBPO")
    near = returns["mbpo"].mean(axis=1) / curve["mean"]
    assert near[[10_000, 15_000]].between(0.8, 1.2).all()
    mean, std = curve.loc[20_000, ["mean", "std"]]
    assert returns["mbpo"].loc[20_000].max() < mean - std
    for name in (FTFL, "mbpo_perfect_model", "sac_utd20"):
        assert abs(returns[name].loc[20_000].mean() - mean) < std
    (older,) = (run[1:] for run in runs("first_curves")[HOPPER, "mbpo"].values())
    assert 0.9 < older[0]["mean"].iloc[-1] / 1000 < 1.1
    assert older[1].value[older[1].tag == BIAS].max() > 10_000


def test_finger_spin():
    says(
        """Three seeds. The reward is 1 while the body spins fast enough, else 0""",
        """The 5,000 random steps meet it 8, 0 and 4 times. SAC meets it in each episode after step
        9,000, and at 20,000 each of its seeds is within a deviation of the published curve with 8
        updates per step. No run with a learned model returns more than 45 at any evaluation or more
        than a third of what SAC's least does at 20,000, and MBPO's seed 2 never meets the
        reward.""",
        """the reward's error exceeds 0.6 of its variance in most fits (`model/reward_error` in
        `scalars.csv`), with all three in seed 1, which has met it most often, and with FTFL and the
        ablation in seed 3; in seed 2 theirs is mostly lower.""",
        """Of s' FTFL's error is two to three times the others' in two seeds, and about theirs in
        one (the median over fits).""",
        "the same updates return more than SAC at every evaluation from 7,500 on",
        "and more than twice as much from 10,000 on",
        """With the reward that the task itself gives for that model's s' (`mbpo_ftfl_known_reward`,
        seed 1) FTFL returns less than 5 at every evaluation""",
        "on finger-spin (rare) SAC.",
    )
    task, episodes = "dmc/finger-spin", "train/episode_return"
    sac, curve = curves(task, "sac_utd10"), published(task, "SAC, 8 updates per step").loc[20_000]
    assert [*sac] == [1, 2, 3]
    assert ((sac.loc[20_000] - curve["mean"]).abs() < curve["std"]).all()
    assert (curves(task, "sac_utd10", episodes).loc[9001:] > 0).all(axis=None)
    for name in ("mbpo", FTFL, ABLATION):
        assert [*curves(task, name, episodes).loc[:5000].sum()] == [8, 0, 4]
        returns, often = curves(task, name), (curves(task, name, REWARD) > 0.6).mean()
        assert returns.max().max() < 45
        assert returns.loc[20_000].max() < sac.loc[20_000].min() / 3
        assert often[1] > 0.8
        assert (often[3] > 0.8) == (name != "mbpo")
        assert name == "mbpo" or often[2] < 0.1
    assert (curves(task, "mbpo", episodes)[2] == 0).all()
    for name in ("mbpo", ABLATION):
        ratio = (curves(task, FTFL, CHANGE) / curves(task, name, CHANGE)).median()
        assert ratio[[1, 2]].between(2, 3).all()
        assert 0.8 < ratio[3] < 1.2
    simulator = curves(task, f"{FTFL}_perfect_model")[1]
    assert simulator.index.max() == 20_000
    assert (simulator > sac[1]).loc[7500:].all()
    assert (simulator > 2 * sac[1]).loc[10_000:].all()
    known = curves(task, f"{FTFL}_known_reward")[1]
    assert known.index.max() == 20_000
    assert known.max() < 5


def test_halfcheetah():
    says(
        """(two seeds) FTFL ends ahead of MBPO in both. In seed 1 it is ahead at every evaluation
        from 7,500 on, with a lower error of the reward at all fits and of s' at most. In seed 2 it
        is ahead at 7,500, 17,500 and 20,000, level with MBPO at 12,500, and earns a few hundreds at
        10,000 and at 15,000, where its critic overestimates; MBPO's does so nowhere after 5,000.
        Its error of the reward is lower at most fits there, that of s' is not; around 10,000 both
        rise somewhat, around 15,000 neither.""",
        "both repairs lower either error",
        "MBPO is above its published curve, by more than a deviation from 10,000 on.",
        """Two things that its authors do differently hardly explain it
        (`grids/halfcheetah_causes.toml`, seed 1): a step is learned from only once its episode has
        ended, and all rollouts are made at a fit (`mbpo_epochs`); their SAC has other first weights
        and a wider first policy (`mbpo_softlearning`, cut off at 10,000). With either, seed 1
        returns within a tenth of what it does without, or more.""",
        """Our episodes in training, with sampled actions, averaged over eleven, are above it by
        less than a deviation at 10,000 and 15,000. Of two later methods there, on -v4, one (DHMBPO)
        is above our MBPO until 15,000, the other (MACURA) below that curve (`published.csv`).""",
        """SAC with one update (`sac_utd1`, two seeds) is below the one published point there is""",
        """from a temperature of 1 its entropy stays within a fifth of that of uniform actions until
        step 9,000, and above 0 until 17,000; the target is -3. From 0.1 or 0.01 (`_alpha0.1`,
        `_alpha0.01`, two seeds each, `grids/sac_temperatures.toml`) it is below 0 from 9,000 on,
        and at 17,500 each returns about as much as that point or more.""",
        "Fits stop early here.",
        "FTFL ends ahead of MBPO in both seeds of Hopper-v5",
        "where its critic errs less, and of HalfCheetah-v5",
    )
    tags = "return", BIAS, REWARD, CHANGE, UPDATES
    mbpo, ftfl = ({tag: curves(CHEETAH, x, tag) for tag in tags} for x in ("mbpo", FTFL))
    assert [*mbpo["return"]] == [*ftfl["return"]] == [1, 2]
    ahead = ftfl["return"] > mbpo["return"]
    assert ahead.loc[7500:, 1].all()
    assert ahead.loc[[7500, 17_500, 20_000], 2].all()
    assert 0.8 < ftfl["return"].loc[12_500, 2] / mbpo["return"].loc[12_500, 2] < 1.2
    failed = [10_000, 15_000]
    assert ftfl["return"].loc[failed, 2].between(300, 500).all()
    assert (ftfl[BIAS].loc[failed, 2] > 0).all()
    assert (ftfl[BIAS].loc[7500:].drop(failed) < 0).all(axis=None)
    assert (mbpo[BIAS].loc[7500:] < 0).all(axis=None)
    reward, state = (((ftfl[x] / mbpo[x]).dropna() < 1).mean() for x in (REWARD, CHANGE))
    assert reward[1] == 1
    assert state[1] > 0.8
    assert reward[2] > 0.7
    assert state[2] < 0.3
    for tag in (REWARD, CHANGE):
        before, then = (ftfl[tag].loc[x, 2] for x in ([9500, 14_500], [10_250, 15_250]))
        assert 1.1 < then[10_250] / before[9500] < 1.4
        assert then[15_250] / before[14_500] < 1.05
    for runs_of in (mbpo, ftfl):
        assert runs_of[UPDATES].median().max() < 500
    curve = published("HalfCheetah", "MBPO")
    mean = mbpo["return"].mean(axis=1)
    far = ((mean - curve["mean"]) / curve["std"]).dropna()
    assert [*far.index] == [10_000, 15_000, 20_000]
    assert (far > 1).all()
    for name, until in (("epochs", 20_000), ("softlearning", 10_000)):
        ratio = (curves(CHEETAH, f"mbpo_{name}")[1] / mbpo["return"][1]).loc[7500:]
        assert ratio.dropna().index.max() == until
        assert (ratio.dropna() > 0.9).all()
    sampled = curves(CHEETAH, "mbpo", "train/episode_return")
    for step in (10_000, 15_000):
        eleven = sampled.loc[step - 5000 : step + 5000]
        assert len(eleven) == 11
        assert 0 < (eleven.mean().mean() - curve["mean"][step]) / curve["std"][step] < 1
    ahead = (published("HalfCheetah", "DHMBPO")["mean"] - mean).dropna() > 0
    assert ahead.to_dict() == {10_000: True, 15_000: True, 20_000: False}
    assert (published("HalfCheetah", "MACURA")["mean"] < curve["mean"]).all()
    ((step, point),) = published("HalfCheetah", "SAC, 1 update per step")["mean"].items()
    sac = [f"sac_utd1{alpha}" for alpha in ("", "_alpha0.1", "_alpha0.01")]
    returns, entropy = ([curves(CHEETAH, x, tag) for x in sac] for tag in ("return", "sac/entropy"))
    assert {run.shape[1] for run in returns} == {2}
    assert returns[0].loc[: step + 2500].max().max() < point
    assert (entropy[0].loc[6000:9000] > 0.8 * 6 * np.log(2)).all(axis=None)
    assert (entropy[0].loc[6000:17_000] > 0).all(axis=None)
    assert {*setting("target_entropy", CHEETAH, sac[0]).values()} == {-3}
    for i in (1, 2):
        assert (entropy[i].loc[9000:] < 0).all(axis=None)
        assert returns[i].loc[17_500].min() > 0.8 * point
    rows = pd.read_csv(RESULTS / "mechanism" / "fits.csv")
    rows = rows[(rows.task == CHEETAH) & (rows.updates == 3000)].groupby("cell")
    for tag in ("reward_sampled", "change_sampled"):
        error = rows[tag].mean()
        assert error["raw residual"] > error["normalized residual"] > error["normalized direct"]
        assert error["raw residual"] > error["raw direct"] > error["normalized direct"]


def test_falls_of_halfcheetah():
    says(
        """so that in 17 of 20 episodes the second half earns less than 0. Of every first half the
        model expects more than the best of the 20 earns, and more than twice their mean.""",
        "no half earns less than 2,700, and the model is within a tenth of each",
        "for a while, unforeseen by its model.",
    )
    failing, good = (
        pd.read_csv(RESULTS / "ahead" / f"{CHEETAH}__{FTFL}__2__{step}.csv")
        for step in (16_000, 20_000)
    )
    for table in (failing, good):
        assert [*table.step] == [0, 500] * 20
        assert table.episode.nunique() == 20
    first, second = (failing[failing.step == step] for step in (0, 500))
    assert (second.real < 0).sum() == 17
    assert first.model.min() > first.real.max()
    assert first.model.min() > 2 * first.real.mean()
    assert (good.real > 2700).all()
    assert (good.model / good.real).between(0.9, 1.1).all()


def fits(name: str) -> pd.DataFrame:
    """Recorded fits of a mode of mechanism.py at learning rate 1e-3, as means over seeds.

    Data are of a random policy, or "trained": of or along the training of one.
    """
    rows = pd.read_csv(RESULTS / name / "fits.csv")
    rows["data"] = np.where(rows.data == "random", "random", "trained")
    rows = rows[rows.lr == 1e-3].groupby(["task", "data", "updates", "cell"])
    return rows.mean(numeric_only=True)[["reward_sampled", "slow_sampled", "fast_sampled"]]


def test_updates_that_each_target_needs():
    says(
        """With a learning rate of 1e-3 and the data gathered along training of walker-run, s' is
        the better target in all parts once it has caught up. On the quadruped it is so for the
        reward, and nearly for what changes fast; its slow dimensions do not catch up.""",
        """What ridge regression leaves is with few updates learned best, or level with s' - s, and
        at the end, on the data of both runs, within a tenth of s' - s or better.""",
        """In fast dimensions of the humanoid and the quadruped all targets get worse after some
        8,000 steps""",
    )
    errors = fits("updates_needed").unstack("cell").swaplevel(axis=1)
    direct, ridge = (
        errors[f"normalized {name}"] / errors["normalized residual"] for name in ("direct", "ridge")
    )
    walker, quadruped = ((task, "trained", 30_000) for task in (WALKER, QUADRUPED))
    assert (direct.loc[walker] < 0.9).all()
    assert direct.loc[quadruped, "reward_sampled"] < 0.9
    assert 0.9 < direct.loc[quadruped, "fast_sampled"] < 1
    assert direct.xs(QUADRUPED)["slow_sampled"].min() > 2
    few = ridge.xs(500, level="updates")
    assert (few < 1.1).all(axis=None)
    assert (few < direct.xs(500, level="updates")).all(axis=None)
    assert (ridge.loc[[walker, quadruped]] < 1.1).all(axis=None)
    for task in ("dmc/humanoid-stand", QUADRUPED):
        fast = errors.xs("fast_sampled", axis=1, level=1).loc[task].droplevel("data")
        assert (fast.loc[12_000:].min() > 1.2 * fast.loc[8000]).all()


def test_what_unit_scale_does_to_a_fit():
    says(
        """most on the suite's humanoids, where a raw reward is predicted with more noise than it
        has variance.""",
        """For the reward of a random policy it brings little or nothing on Hopper-v5 and
        cartpole-swingup, where the scales are closest, nor on quadruped-walk, where they are far
        apart; on walker-run it brings less with a trained policy.""",
        "On hopper-hop and hopper-stand a random policy sees hardly any reward",
        """in dimensions whose rho, the correlation of s_i and s'_i in
        `results/mechanism/dimensions.csv`, is negative, as FTFL's paper has it, and on
        HalfCheetah-v5, which has the most of them; elsewhere it mostly costs, and most for what
        changes slowly. Where rho is above 0.99, as for positions and angles, a third of the
        dimensions come out with more noise than a step changes them, also with the data of trained
        policies""",
    )
    reward = fits("mechanism").reward_sampled.xs(3000, level="updates").unstack("cell")
    gain = reward["normalized residual"] / reward["raw residual"]
    humanoids = [name for name, _ in reward.index if name.startswith("dmc/humanoid")]
    assert len(humanoids) == 3
    assert (reward.loc[humanoids, ["raw residual", "raw direct"]] > 1).all(axis=None)
    seen = gain.drop(["dmc/hopper-hop", "dmc/hopper-stand"])
    assert {name for name, _ in seen.nsmallest(3).index} == {*humanoids}
    scales = pd.read_csv(RESULTS / "mechanism" / "scales.csv").set_index(["task", "data"])
    random = scales.xs("random", level="data")
    closest = random.residual_over_reward.nsmallest(2)
    assert {*closest.index} == {CARTPOLE, HOPPER}
    assert random.residual_over_reward[QUADRUPED] > 10_000
    assert 0.75 < gain[CARTPOLE, "random"] < 1
    assert gain[HOPPER, "random"] > 1
    assert gain[QUADRUPED, "random"] > 1
    assert gain[WALKER, "trained"] > 5 * gain[WALKER, "random"]
    hardly = {*random.index[random.mean_reward.between(0, 1e-4)]}
    assert hardly == {"dmc/hopper-hop", "dmc/hopper-stand"}

    rows = pd.read_csv(RESULTS / "mechanism" / "dimensions.csv")
    names = ["task", "data", "dimension", "rho"]
    long = rows.dropna(subset="error")  # later tasks have a row for each seed and cell
    long = long.pivot_table(index=names, columns="cell", values="error").reset_index()
    rows = pd.concat([rows[rows.error.isna()], long])
    ratio = rows["normalized direct"] / rows["normalized residual"]
    assert ratio.notna().all()
    cheetah = rows.task == "HalfCheetah-v5"
    assert (rows.rho < 0).groupby(rows.task).mean().idxmax() == "HalfCheetah-v5"
    assert (ratio[rows.rho < 0] < 1).mean() > 0.8
    assert (ratio[cheetah] < 1).mean() > 0.8
    assert (ratio[(rows.rho > 0) & ~cheetah] < 1).mean() < 0.2
    slow = rows.rho > 0.99
    assert ratio[slow].median() > 2 * ratio[~slow].median()
    noise = rows["normalized direct"] / (2 - 2 * rows.rho)  # error in s' over Var[s' - s]
    assert 0.3 < (noise[slow] > 1).mean() < 0.37
    assert (noise[slow & (rows.data != "random")] > 1).any()


def test_cartpole_swingup():
    says(
        """Three seeds. All learn to swing the pole up. At step 20,000 MBPO is ahead of FTFL and
        of the ablation in each seed, SAC ahead of FTFL in two and of MBPO in one; at 15,000 and
        17,500 MBPO leads all in each seed. From 7,500 to 12,500 FTFL has the largest mean, though
        not in each seed.""",
        """With a random policy the variances of s' - s add up to a few times that of the reward on
        cartpole-swingup, and to one and a half million times on walker-run; with a trained policy
        to less than it, and to tens of thousands of times it""",
        """after the first fit MBPO's error of it is about the ablation's and well below FTFL's,
        whose is the least at the end. FTFL's error in s' is about two to three times MBPO's from
        step 6,000 to 12,500 (the median of each seed's fits), and about the same at 20,000.""",
        "SAC returns about three times what the one published curve with 1 update per step does.",
    )
    names = ["mbpo", FTFL, ABLATION, "sac_utd10"]
    returns = {name: curves(CARTPOLE, name) for name in names}
    assert {run.shape[1] for run in returns.values()} == {3}
    assert min(run.loc[20_000].min() for run in returns.values()) > 400
    mbpo, ftfl, ablation, sac = (returns[name].loc[20_000] for name in names)
    curve = published(CARTPOLE, "SAC, 1 update per step")["mean"]
    assert 0.8 * 3 < sac.mean() / curve[20_000] < 1.2 * 3
    assert (mbpo > ftfl).all()
    assert (mbpo > ablation).all()
    assert (sac > ftfl).sum() == 2
    assert (sac > mbpo).sum() == 1
    for step in (15_000, 17_500):
        assert all((returns["mbpo"].loc[step] > returns[x].loc[step]).all() for x in names[1:])
    for step in (7500, 10_000, 12_500):
        best = pd.DataFrame({name: run.loc[step] for name, run in returns.items()})
        assert best.mean().idxmax() == FTFL
        assert not (best.idxmax(axis=1) == FTFL).all()

    scales = pd.read_csv(RESULTS / "mechanism" / "scales.csv").set_index(["task", "data"])
    ratio = scales.residual_over_reward
    assert 3 < ratio[CARTPOLE, "random"] < 10
    assert 1.4e6 < ratio[WALKER, "random"] < 1.6e6
    ratio = ratio.drop("random", level="data").droplevel("data")
    assert ratio[CARTPOLE] < 1
    assert 1e4 < ratio[WALKER] < 1e5

    mbpo, ftfl, ablation = (curves(CARTPOLE, name, REWARD) for name in names[:3])
    assert 0.8 < mbpo.iloc[0].mean() / ablation.iloc[0].mean() < 1
    assert (mbpo.iloc[0] < ftfl.iloc[0] / 2).all()
    early = [run.loc[:10_000].mean().mean() for run in (mbpo, ablation, ftfl)]
    assert early == sorted(early)
    assert (ftfl.loc[20_000] < mbpo.loc[20_000]).all()
    assert (ftfl.loc[20_000] < ablation.loc[20_000]).all()
    ratio = curves(CARTPOLE, FTFL, CHANGE) / curves(CARTPOLE, "mbpo", CHANGE)
    assert ratio.loc[6000:12_500].median().between(2 / 1.2, 3 * 1.2).all()
    assert ratio.loc[20_000].between(0.9, 1.1).all()


def test_ridge_in_training():
    says(
        """In training there is one run of it (`mbpo_ftfl_ridge`, walker-run, seed 1): at step
        20,000 its error in s' is below that of five of FTFL's six runs, its return among theirs.
        """,
    )
    error, score = (at(20_000, WALKER, f"{FTFL}_ridge", tag).item() for tag in (CHANGE, "return"))
    assert (error < both(FTFL, CHANGE).loc[20_000]).sum() == 5
    six = both(FTFL).loc[20_000]
    assert six.min() < score < six.max()


def test_default_settings():
    says(
        """With the default settings, untouched (`grids/defaults.toml`, seed 3, cut off after
        30,000, [table](results/defaults/report.md)), FTFL makes 20 updates per step after 10,000
        random steps, from a first temperature of 1. It is ahead of all three seeds of `sac_utd8`,
        which has the same settings but 8 updates, at 15,000, 20,000 and 25,000, and of two at
        30,000, where it earns what standing earns.""",
    )
    ((args, *_),) = runs("defaults")[WALKER, FTFL].values()
    (sac, *_) = runs()[WALKER, "sac_utd8"][3]
    same = "learning_starts", "alpha", "gamma", "tau", "policy_lr", "q_lr", "target_entropy"
    assert {name: args[name] for name in same} == {name: sac[name] for name in same}
    assert [args[name] for name in ("seed", "updates_per_step", "learning_starts", "alpha")] == [
        3,
        20,
        10_000,
        1,
    ]
    ftfl, others = curves(WALKER, FTFL, folder="defaults")[3], curves(WALKER, "sac_utd8")
    ahead = others.lt(ftfl, axis=0).sum(axis=1)
    assert ahead.loc[15_000:30_000].to_dict() == {15_000: 3, 20_000: 3, 25_000: 3, 30_000: 2}
    assert ftfl.index.max() == 30_000
    assert 0.95 < ftfl[30_000] / STANDING < 1.05
