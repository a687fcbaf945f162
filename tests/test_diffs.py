"""Every diff in benchmarks/diffs/ applies, trains and resumes, and does what it says."""

import itertools
import math

import diffs
import numpy as np
import pytest
import torch
from common import load_script
from helpers_run import ROOT, folder_of, read_checkpoint, read_scalars, same, small

import mbpo_ftfl

MODEL = ["mbpo", "mbpo_ftfl", "mbpo_residual_ablation"]
FOUR = ["layernorm", "resets", "softlearning"]  # these apply to sac.py as well
PAIRS = [*itertools.product([x.stem for x in diffs.DIFFS], MODEL), *((x, "sac") for x in FOUR)]
OWN = {"reject": {"rollout_schedule": (0, 1, 3, 3)}, "resets": {"reset_updates": 25}}


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The module that a diff makes of a script."""
    folder = tmp_path_factory.mktemp("patched")

    def of(diff: str, script: str):
        file = folder / f"{script}_{diff}.py"
        if not file.exists():
            file.write_text(diffs.patched(script, ROOT / f"benchmarks/diffs/{diff}.diff"))
        return load_script(file)

    return of


def fitted(script, updates: int = 20, **settings) -> tuple:
    """Arguments, a model fitted to 200 random transitions of 3 numbers, 2 actions; these; actor."""
    torch.manual_seed(0)
    obs, action = torch.randn(200, 3), torch.rand(200, 2) * 2 - 1
    next_obs = obs @ torch.randn(3, 3) + action @ torch.randn(2, 3)
    data = script.Batch(obs, action, obs[:, 0] - action[:, 1], next_obs, torch.zeros(200))
    args = script.Args(model_hidden=16, ensemble_size=4, num_elites=3, compile=False, **settings)
    update = script.compiled_update(script.model_update, args)
    learner = script.adam_init(script.init_ensemble(4, 5, 4, 16), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    model, _ = script.fit_ensemble(learner, data, updates, update, args, generator)
    return args, model, data, script.init_actor(3, 2)


def steps(script, args, model, actor, obs, choice=None) -> tuple:
    """What model_step makes of states with fixed noise; every branch follows a random elite."""
    torch.manual_seed(1)
    noise = torch.randn(len(obs), 2), torch.randn(len(obs), 4)
    choice = torch.randint(3, (len(obs),)) if choice is None else choice
    return script.model_step(model, actor, obs, choice, noise, args)


def roll(script, args, model, data, actor, horizon: int, extra):
    """Rows of a rollout from all the data's states, and the doubts of every step."""
    doubts = []

    def step_model(*given):
        result = script.model_step(*given, args)
        doubts.append(result[-1])
        return result

    never, generator = script.termination_function(script.Args()), torch.Generator()
    rows = script.rollout(model, actor, data, horizon, step_model, never, generator, extra)
    return rows, doubts


def train(module, script: str, root, **changes) -> dict:
    """A small run's checkpoint."""
    args = module.Args(**small(script, device="cpu", run_root=str(root)) | changes)
    module.train(args)
    return read_checkpoint(folder_of(root, args.exp_name, args.env_id))


def learned(saved: dict) -> dict:
    """What a checkpoint holds, but for settings and the clock."""
    return {part: saved[part] for part in saved.keys() - {"settings", "progress"}}


class Cut(BaseException):
    """The power goes."""


@pytest.mark.parametrize(("diff", "script"), PAIRS)
def test_a_variant_trains_and_resumes(diff, script, patched, tmp_path, monkeypatch):
    """It applies exactly, changes at most 40 lines, and trains, cut off to the same end."""
    assert 1 <= diffs.changed_lines(ROOT / f"benchmarks/diffs/{diff}.diff") <= 40
    assert diffs.origin(f"{script}_{diff}.py") == script
    module, changes = patched(diff, script), {"checkpoint_frequency": 10, **OWN.get(diff, {})}
    whole = train(module, script, tmp_path / "whole", **changes)
    assert whole["settings"]["exp_name"] == f"{script}_{diff}"
    assert whole["progress"]["step"] == 80
    if script not in ("sac", "mbpo_ftfl"):  # they would take time, and tell nothing more
        return

    def check_finite(step, **_):
        if step == 70:
            raise Cut

    with monkeypatch.context() as changed:
        changed.setattr(module, "check_finite", check_finite)
        with pytest.raises(Cut):
            train(module, script, tmp_path / "cut", **changes)
    again = train(module, script, tmp_path / "cut", **changes, resume=True)
    assert same(learned(whole), learned(again))


def test_the_others_do_not_apply_to_sac():
    """What changes the model is no patch of a script without one."""
    apply = {diff.stem for diff in diffs.DIFFS if diffs.patched("sac", diff)}
    assert apply == {*FOUR}
    assert diffs.origin("sac.py") == "sac"
    assert diffs.origin("sac_other.py") is None


@pytest.mark.parametrize("script", MODEL)
def test_penalize_takes_the_spread_off_the_reward(script, patched):
    """The reward falls by lambda times max_e |sigma_e| of [s', r]; s' stays."""
    module = patched("penalize", script)
    args, model, data, actor = fitted(module)
    args.penalty = 0.0
    action, next_obs, reward = steps(module, args, model, actor, data.obs)
    args.penalty = 2.5
    _, same_obs, less = steps(module, args, model, actor, data.obs)
    _, std = module.predict(model, data.obs, action, args)
    spread = torch.stack([(member**2).sum(-1).sqrt() for member in std]).amax(0)
    torch.testing.assert_close(reward - less, 2.5 * spread, rtol=1e-4, atol=1e-5)
    assert torch.equal(next_obs, same_obs)


@pytest.mark.parametrize("script", MODEL)
def test_filter_keeps_the_share_of_least_doubt(script, patched):
    """Of one step the least doubtful 30 %; of two the shares 1/3 and 1/6."""
    module = patched("filter", script)
    args, model, data, actor = fitted(module)
    rows, (doubt,) = roll(module, args, model, data, actor, 1, 0.3)
    kept = doubt.argsort()[:60].sort().values
    torch.testing.assert_close(rows[:, :3], data.obs[kept])
    rows, doubts = roll(module, args, model, data, actor, 2, 0.3)
    assert len(rows) == 66 + 33
    torch.testing.assert_close(rows[:66, :3], data.obs[doubts[0].argsort()[:66].sort().values])


@pytest.mark.parametrize("script", MODEL)
def test_filter_measures_doubt_by_one_versus_the_rest(script, patched):
    """The doubt is torch's own KL from the chosen elite to the other two's moments, and costs."""
    module = patched("filter", script)
    args, model, data, actor = fitted(module)
    choice = torch.full((200,), 1)
    args.doubt_penalty = 10.0
    action, _, reward, doubt = steps(module, args, model, actor, data.obs, choice)
    args.doubt_penalty = 0.0
    free = steps(module, args, model, actor, data.obs, choice)[2]
    torch.testing.assert_close(free - reward, 10 * doubt, rtol=1e-3, atol=1e-4)
    mean, std = module.predict(model, data.obs, action, args)
    center = (mean[0] + mean[2]) / 2
    spread = sum(std[e] ** 2 + (mean[e] - center) ** 2 for e in (0, 2)) / 2
    normals = [torch.distributions.Normal(*x) for x in ((mean[1], std[1]), (center, spread.sqrt()))]
    expected = torch.distributions.kl_divergence(*normals).sum(-1)
    torch.testing.assert_close(doubt, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("script", MODEL)
def test_reject_ends_doubtful_branches(script, patched):
    """With xi = 1 and zeta = 1/2 half of the branches store nothing; thresholds are averaged."""
    module = patched("reject", script)
    args, model, data, actor = fitted(module)
    args.doubt_quantile, borders = 0.5, []
    for args.doubt_factor in (1.0, 1.1):
        rows, doubts = roll(module, args, model, data, actor, 3, args)
        borders.append(args.doubt_factor * doubts[0].quantile(0.5))
        alive, stored = torch.ones(200, dtype=torch.bool), []
        for doubt in doubts:
            alive = alive & (doubt < sum(borders) / len(borders))
            stored.append(alive)
        first = stored[0]
        assert len(rows) == sum(int(x.sum()) for x in stored)
        assert int(first.sum()) == 100 if len(borders) == 1 else 100 < int(first.sum()) < 200
        torch.testing.assert_close(rows[: int(first.sum()), :3], data.obs[first])


@pytest.mark.parametrize("script", MODEL)
def test_reject_doubts_as_torch_says(script, patched):
    """Of two elites: KL(g || p) / 2 + KL(g || q) / 2, g their normalized geometric mean."""
    module = patched("reject", script)
    args, model, data, actor = fitted(module)
    model["elites"] = model["elites"][:2]
    bias = model["learner"]["params"]["layers"][-1][1]
    bias += torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))  # spreads differ
    action, *_, doubt = steps(module, args, model, actor, data.obs, torch.zeros(200).long())
    mean, std = module.predict(model, data.obs, action, args)
    var = 2 / (1 / std**2).sum(0)
    middle = torch.distributions.Normal(var * (mean / std**2).sum(0) / 2, var.sqrt())
    kls = [
        torch.distributions.kl_divergence(middle, torch.distributions.Normal(*p))
        for p in zip(mean, std, strict=True)
    ]
    torch.testing.assert_close(doubt, (sum(kls) / 2).sum(-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("script", MODEL)
def test_ridge_leaves_the_networks_what_is_not_linear(script, patched):
    """Of linear transitions nothing is left to learn, and networks that say 0 predict them."""
    module = patched("ridge", script)
    args, model, data, actor = fitted(module, updates=1)
    layers = [tuple(map(torch.zeros_like, layer)) for layer in model["learner"]["params"]["layers"]]
    bounds = {name: torch.full((4,), -60.0) for name in ("min_log_var", "max_log_var")}
    model["learner"]["params"] = bounds | {"layers": layers}
    action, next_obs, reward = steps(module, args, model, actor, data.obs)
    torch.testing.assert_close(reward, data.obs[:, 0] - action[:, 1], rtol=1e-3, atol=1e-3)
    linear = torch.linalg.lstsq(torch.cat([data.obs, data.action], -1), data.next_obs).solution
    expected = torch.cat([data.obs, action], -1) @ linear
    torch.testing.assert_close(next_obs, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("script", MODEL)
def test_a_reward_unit_matters_to_raw_targets_alone(script, patched, tmp_path):
    """At unit scale it changes nothing, to the bit if it is a power of two; 1 never does."""
    module = patched("reward_unit", script)
    plain = train(load_script(f"{script}.py"), script, tmp_path)
    runs = [train(module, script, tmp_path / str(c), reward_unit=c) for c in (1.0, 2**-10)]
    assert same(learned(plain), learned(runs[0]))
    parts = [{name: run[name] for name in ("agent", "buffer", "synthetic")} for run in runs]
    assert same(*parts) == (script != "mbpo")
    said = []
    for unit in (1.0, 0.001):
        args, model, data, _ = fitted(module, reward_unit=unit)
        said.append(torch.stack(module.predict(model, data.obs, data.action, args)))
    if script == "mbpo":
        assert (said[1] / said[0])[1, ..., -1].min() > 10  # its spread is as if of c r
        return
    torch.testing.assert_close(said[0], said[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("script", ["sac", "mbpo_ftfl"])
def test_resets_make_a_new_agent_and_keep_the_buffers(script, patched, tmp_path):
    """At the last of 41 updates: the buffers of the run without resets, another agent."""
    module = patched("resets", script)
    never, reset = (
        train(module, script, tmp_path, reset_updates=n, exp_name=f"every{n}") for n in (10**6, 41)
    )
    assert same(never["buffer"], reset["buffer"])
    old, new = never["agent"], reset["agent"]
    assert [int(agent["critic"]["t"]) for agent in (old, new)] == [41, 0]
    torch.manual_seed(module.derive_seed(1, 2))
    begun = module.init_agent(4, 1, 1.0, torch.device("cpu"))
    for part in ("actor", "critic"):
        first, *others = (agent[part]["params"][0][0] for agent in (new, old, begun))
        assert not any(torch.equal(first, weight) for weight in others)
        assert torch.linalg.svdvals(first).min() > 1.4  # orthogonal: a new one, not zeros
    assert float(new["log_alpha"]["params"]) == 0.0


@pytest.mark.parametrize("script", ["sac", "mbpo"])
def test_layernorm_bounds_q(script, patched):
    """No state makes |Q| larger than 16 |w| + |b|; without LayerNorm one does."""
    torch.manual_seed(0)
    obs, action = 1e6 * torch.randn(100, 3), torch.rand(100, 2)
    module, plain = patched("layernorm", script), load_script(f"{script}.py")
    params = module.init_critic(3, 2)
    weight, bias = params[-1]
    bound = 16 * weight.norm(dim=(1, 2)) + bias.abs().flatten()  # [2]
    q = module.critic(params, obs, action).abs().amax(1)
    assert ((q > 0) & (q <= bound)).all()
    assert (plain.critic(params, obs, action).abs().amax(1) > 100 * bound).all()


@pytest.mark.parametrize("script", ["sac", "mbpo"])
def test_softlearning_begins_with_a_wide_policy(script, patched):
    """A deviation of 1 where the network says 0, between e^-20 and e^2; Glorot weights."""
    module = patched("softlearning", script)

    def log_std(script, said: float) -> float:
        """The log deviation of an actor whose network says so for it."""
        *hidden, (weight, _) = script.init_actor(3, 2)
        params = [*hidden, (torch.zeros_like(weight), torch.tensor([0.0, 0.0, said, said]))]
        return round(float(script.actor(params, torch.ones(3))[1][0]), 4)

    assert [log_std(module, said) for said in (0, -50, 50, 1)] == [0, -20, 2, 1]
    assert [log_std(mbpo_ftfl, said) for said in (0, -50, 50)] == [-4, -10, 2]
    for weight, bias in module.init_mlp(20, 1):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max() <= bound
        assert (bias == 0).all()


@pytest.mark.parametrize("env_id", ["dmc/walker-run", "Hopper-v5"])
def test_the_perfect_model_repeats_what_was_recorded(env_id, patched, tmp_path):
    """From a recorded state and action the simulator reaches the recorded s' and r."""
    module = patched("perfect_model", "mbpo_ftfl")
    settings = {"learning_starts": 60, "total_timesteps": 60, "eval_frequency": 0}
    saved = train(module, "mbpo_ftfl", tmp_path, env_id=env_id, **settings)
    sim = module.make_env(env_id)
    sim.reset(seed=5)
    sizes = sim.observation_space.shape[0], sim.action_space.shape[0], 1
    for i in torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist():
        _, action, reward, next_obs, _ = saved["buffer"]["rows"][i].split([*sizes, sizes[0], 1])
        module.full_state(sim, saved["states"][i].numpy())
        reached, won, *_ = sim.step(action.numpy())
        np.testing.assert_allclose(reached, next_obs, rtol=1e-4, atol=1e-5)
        assert math.isclose(won, float(reward), rel_tol=1e-4, abs_tol=1e-5)
    assert saved["synthetic"]["rows"].isfinite().all()
    assert len(saved["synthetic"]["rows"]) == 10  # of the one step that learned


def test_epochs_learn_from_whole_episodes_and_roll_out_at_fits(patched, tmp_path, monkeypatch):
    """Rows come by episodes, the random steps at once; rollouts with a fit, as many in all."""
    module, calls = patched("epochs", "mbpo_ftfl"), []
    add, fit = module.ReplayBuffer.add, module.fit_ensemble
    monkeypatch.setattr(
        module.ReplayBuffer, "add", lambda self, rows: (calls.append(len(rows)), add(self, rows))
    )
    monkeypatch.setattr(module, "fit_ensemble", lambda *args: (calls.append("fit"), fit(*args))[1])
    changes = {"rollouts_per_step": 1000, "model_train_frequency": 20, "eval_frequency": 0}
    train(module, "mbpo_ftfl", tmp_path, **changes)
    fits = [i for i, call in enumerate(calls) if call == "fit"]
    assert len(fits) == 3
    assert all(calls[i + 1 : i + 21] == [1000] * 20 for i in fits)
    assert calls.count(1000) == 3 * 20
    scalars = read_scalars(folder_of(tmp_path, "mbpo_ftfl_epochs"))
    ended = {step for step, _ in scalars["train/episode_length"]} | {40}
    blocks = [call for call in calls if call not in ("fit", 1000)]
    assert len(ended) > 3
    assert [*itertools.accumulate(blocks)] == sorted(ended)


@pytest.mark.parametrize("env_id", ["dmc/finger-spin", "InvertedPendulum-v5"])
def test_the_known_reward_is_the_tasks_own(env_id, patched):
    """Of s' that random actions reach, as model_step gives it; other tasks are refused."""
    module = patched("known_reward", "mbpo")
    env, rng, over = module.make_env(env_id), np.random.default_rng(0), True
    reached, earned = [], []
    for i in range(200):
        if over or i % 10 == 0:
            env.reset(seed=i)
        action = rng.choice([-1.0, 1.0], env.action_space.shape)
        for _ in range(10):  # long enough to hit the spinner
            s_next, reward, over, *_ = env.step(action)
            reached.append(s_next)
            earned.append(reward)
            if over:
                break
    reached, earned = (torch.tensor(np.array(x), dtype=torch.float32) for x in (reached, earned))
    assert 0 < earned.mean() < 1
    assert torch.equal(module.REWARDS[env_id](reached).float(), earned)
    with pytest.raises(module.InputError, match="a task whose reward is known"):
        module.check_args(module.Args("dmc/walker-run"))


def test_rollouts_earn_the_known_reward(patched):
    """The ensemble's s' unchanged, its reward replaced by 1 where |s'_1| <= 0.2, else 0."""
    module = patched("known_reward", "mbpo_ftfl")
    args, model, data, actor = fitted(module, env_id="InvertedPendulum-v5")
    _, next_obs, reward = steps(module, args, model, actor, data.obs)
    assert torch.equal(next_obs, steps(mbpo_ftfl, args, model, actor, data.obs)[1])
    assert torch.equal(reward, (next_obs[:, 1].abs() <= 0.2).float())
    assert 0 < reward.mean() < 1
