"""Every diff in benchmarks/diffs/ applies, trains and resumes, and does what it says."""

import itertools
import math

import diffs
import numpy as np
import pytest
import torch
from common import load_script
from helpers_model import CPU, assert_close, seeded
from helpers_run import (
    ROOT,
    cut,
    folder_of,
    read_checkpoint,
    read_scalars,
    same,
    same_learning,
    small,
)

import mbpo_ftfl

MODEL = ["mbpo", "mbpo_ftfl", "mbpo_residual_ablation"]
IN_SAC = ["layernorm", "resets", "softlearning"]  # these apply to sac.py as well
PAIRS = [*itertools.product([x.stem for x in diffs.DIFFS], MODEL), *((x, "sac") for x in IN_SAC)]
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
    learner = script.adam_init(script.init_ensemble(4, 5, 4, 16), CPU)
    model, _ = script.fit_ensemble(learner, data, updates, update, args, seeded())
    return args, model, data, script.init_actor(3, 2)


def steps(script, args, model, actor, obs) -> tuple:
    """What model_step makes of states with fixed noise; every branch follows a random elite."""
    torch.manual_seed(1)
    noise = torch.randn(len(obs), 2), torch.randn(len(obs), 4)
    return script.model_step(model, actor, obs, torch.randint(3, (len(obs),)), noise, args)


def roll(script, horizon: int, extra) -> tuple:
    """Rows of a rollout from all the data's states, the doubts of every step, and these states."""
    args, model, data, actor = fitted(script)
    doubts = []

    def step_model(*given):
        result = script.model_step(*given, args)
        doubts.append(result[-1])
        return result

    never = script.termination_function(script.Args())
    rows = script.rollout(model, actor, data, horizon, step_model, never, seeded(), extra)
    return rows, doubts, data.obs


def train(module, script: str, root, **changes) -> dict:
    """A small run's checkpoint."""
    args = module.Args(**small(script, device="cpu", run_root=str(root)) | changes)
    module.train(args)
    return read_checkpoint(folder_of(root, args.exp_name, args.env_id))


@pytest.mark.parametrize(("diff", "script"), PAIRS)
def test_a_variant_trains_and_resumes(diff, script, patched, tmp_path):
    """It applies exactly, changes at most 40 lines, and trains, cut off to the same end."""
    lines = (ROOT / f"benchmarks/diffs/{diff}.diff").read_text().splitlines()
    assert 1 <= sum(line[:1] in ("+", "-") for line in lines) - 2 <= 40
    assert diffs.origin(f"{script}_{diff}.py") == script
    module, changes = patched(diff, script), {"checkpoint_frequency": 10, **OWN.get(diff, {})}
    whole = train(module, script, tmp_path / "whole", **changes)
    assert whole["settings"]["exp_name"] == f"{script}_{diff}"
    assert whole["progress"]["step"] == 80
    if script not in ("sac", "mbpo_ftfl"):  # they would take time, and tell nothing more
        return
    cut(module, 70, **small(script, device="cpu", run_root=str(tmp_path / "cut")) | changes)
    again = train(module, script, tmp_path / "cut", **changes, resume=True)
    assert same_learning(whole, again)


@pytest.mark.parametrize("script", MODEL)
def test_penalize_takes_the_spread_off_the_reward(script, patched):
    """The reward falls by lambda times max_e |sigma_e| of [s', r]; s' stays."""
    module = patched("penalize", script)
    args, model, data, actor = fitted(module, penalty=0.0)
    action, next_obs, reward = steps(module, args, model, actor, data.obs)
    args.penalty = 2.5
    _, same_obs, less = steps(module, args, model, actor, data.obs)
    _, std = module.predict(model, data.obs, action, args)
    spread = torch.stack([(member**2).sum(-1).sqrt() for member in std]).amax(0)
    assert_close(reward - less, 2.5 * spread, rtol=1e-4, atol=1e-5)
    assert torch.equal(next_obs, same_obs)


@pytest.mark.parametrize("script", MODEL)
def test_filter_keeps_the_share_of_least_doubt(script, patched):
    """Of one step the least doubtful 30 %; of two the shares 1/3 and 1/6."""
    module = patched("filter", script)
    for horizon, kept, in_all in ((1, 60, 60), (2, 66, 66 + 33)):
        rows, doubts, obs = roll(module, horizon, 0.3)
        assert len(rows) == in_all
        assert_close(rows[:kept, :3], obs[doubts[0].argsort()[:kept].sort().values])


@pytest.mark.parametrize("script", MODEL)
def test_reject_ends_doubtful_branches(script, patched):
    """With xi = 1 and zeta = 1/2 half of the branches store nothing, others until they doubt."""
    module = patched("reject", script)
    rows, doubts, obs = roll(module, 3, module.Args(doubt_factor=1.0, doubt_quantile=0.5))
    stored = (torch.stack(doubts) < doubts[0].quantile(0.5)).cumprod(0).bool()
    assert stored[0].sum() == 100
    assert len(rows) == stored.sum() > 100
    assert_close(rows[:100, :3], obs[stored[0]])


@pytest.mark.parametrize("script", MODEL)
def test_ridge_leaves_the_networks_what_is_not_linear(script, patched):
    """Of linear transitions nothing is left to learn, and networks that say 0 predict them."""
    module = patched("ridge", script)
    args, model, data, _ = fitted(module, updates=1)
    for weight, bias in model["learner"]["params"]["layers"]:
        weight.zero_(), bias.zero_()
    mean, _ = module.predict(model, data.obs, data.action, args)
    expected = torch.cat([data.next_obs, data.reward[:, None]], -1).expand(3, -1, -1)
    assert_close(mean, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("script", MODEL)
def test_a_reward_unit_matters_to_raw_targets_alone(script, patched, tmp_path):
    """At unit scale it changes nothing, to the bit if it is a power of two; 1 never does."""
    module = patched("reward_unit", script)
    plain = train(load_script(f"{script}.py"), script, tmp_path)
    runs = [train(module, script, tmp_path / str(c), reward_unit=c) for c in (1.0, 2**-10)]
    assert same_learning(plain, runs[0])
    parts = [{name: run[name] for name in ("agent", "buffer", "synthetic")} for run in runs]
    assert same(*parts) == (script != "mbpo")
    if script == "mbpo":
        reward, small_unit = (run["synthetic"]["rows"][:, 5] for run in runs)
        assert small_unit.std() > 10 * reward.std()  # its spread is as if of c r


@pytest.mark.parametrize("script", ["sac", "mbpo_ftfl"])
def test_resets_make_a_new_agent_and_keep_the_buffers(script, patched, tmp_path):
    """At the last of 41 updates: the buffers of the run without resets, another agent."""
    module, runs = patched("resets", script), []
    for n in (10**6, 41):
        runs.append(train(module, script, tmp_path, reset_updates=n, exp_name=f"every{n}"))
    assert same(runs[0]["buffer"], runs[1]["buffer"])
    old, new = (run["agent"] for run in runs)
    assert [int(agent["critic"]["t"]) for agent in (old, new)] == [41, 0]
    assert new["log_alpha"]["params"] == 0
    torch.manual_seed(module.derive_seed(1, 2))
    begun = module.init_agent(4, 1, 1.0, CPU)
    for part in ("actor", "critic"):
        first, at_first = (agent[part]["params"][0][0] for agent in (new, begun))
        assert not torch.equal(first, at_first)
        assert torch.linalg.svdvals(first).min() > 1.4  # orthogonal: a new one, not zeros


@pytest.mark.parametrize("script", ["sac", "mbpo"])
def test_layernorm_bounds_q(script, patched):
    """No state makes |Q| larger than 16 |w| + |b|, w and b of the last layer."""
    obs, action = 1e6 * torch.randn(100, 3), torch.rand(100, 2)
    module = patched("layernorm", script)
    params = module.init_critic(3, 2)
    bound = 16 * params[-1][0].norm(dim=(1, 2)) + params[-1][1].abs().flatten()  # [2]
    q = module.critic(params, obs, action).abs().amax(1)
    assert ((q > 0) & (q <= bound)).all()


@pytest.mark.parametrize("script", ["sac", "mbpo"])
def test_softlearning_begins_with_a_wide_policy(script, patched):
    """A deviation of 1 where the network says 0, between e^-20 and e^2; Glorot weights."""
    module = patched("softlearning", script)
    for said, log_std in ((0.0, 0), (-50.0, -20), (50.0, 2), (1.0, 1)):
        params = [(torch.zeros(3, 2), torch.tensor([0.0, said]))]
        assert module.actor(params, torch.ones(3))[1].item() == pytest.approx(log_std, abs=1e-4)
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
    for i in torch.randperm(60, generator=seeded()).tolist():
        _, action, reward, next_obs, _ = saved["buffer"]["rows"][i].split([*sizes, sizes[0], 1])
        module.full_state(sim, saved["states"][i].numpy())
        reached, won, *_ = sim.step(action.numpy())
        np.testing.assert_allclose([*reached, won], [*next_obs, *reward], rtol=1e-4, atol=1e-5)
    assert saved["synthetic"]["rows"].isfinite().all()
    assert len(saved["synthetic"]["rows"]) == 10  # of the one step that learned


def test_epochs_learn_from_whole_episodes_and_roll_out_at_fits(patched, tmp_path):
    """Rows come by episodes; rollouts with a fit, those of all steps to the next one at once."""
    module = patched("epochs", "mbpo_ftfl")
    saved = train(module, "mbpo_ftfl", tmp_path, model_train_frequency=30, total_timesteps=82)
    assert saved["synthetic"]["added"] == 2 * 30 * 10
    scalars = read_scalars(folder_of(tmp_path, "mbpo_ftfl_epochs"))
    assert 40 < saved["buffer"]["added"] == scalars["train/episode_length"][-1][0] < 82


@pytest.mark.parametrize("env_id", ["dmc/finger-spin", "InvertedPendulum-v5"])
def test_the_known_reward_is_the_tasks_own(env_id, patched):
    """Of s' that random actions reach, and of rollouts; other tasks are refused."""
    module = patched("known_reward", "mbpo_ftfl")
    env, rng, reached, earned = module.make_env(env_id), np.random.default_rng(0), [], []
    for seed in range(200):
        env.reset(seed=seed // 10)
        action = rng.choice([-1.0, 1.0], env.action_space.shape)
        for _ in range(10):  # long enough to hit the spinner
            next_obs, reward, over, *_ = env.step(action)
            reached.append(next_obs), earned.append(reward)
            if over:
                break
    reached, earned = (torch.tensor(np.array(x), dtype=torch.float32) for x in (reached, earned))
    assert 0 < earned.mean() < 1
    assert torch.equal(module.REWARDS[env_id](reached).float(), earned)
    if env_id == "InvertedPendulum-v5":
        args, model, data, actor = fitted(module, env_id=env_id)
        _, next_obs, reward = steps(module, args, model, actor, data.obs)
        assert torch.equal(next_obs, steps(mbpo_ftfl, args, model, actor, data.obs)[1])
        assert torch.equal(reward, module.REWARDS[env_id](next_obs).float())
    with pytest.raises(module.InputError, match="a task whose reward is known"):
        module.check_args(module.Args("dmc/walker-run"))
