"""Every diff in benchmarks/diffs/ applies, trains and resumes, and does what it says."""

import importlib.util
import itertools
import math
import sys

import diffs
import numpy as np
import pytest
import torch
from helpers_run import ROOT, folder_of, read_checkpoint, read_scalars, same, small

import mbpo_ftfl

NAMES = [diff.stem for diff in diffs.DIFFS]
MODEL = ["mbpo", "mbpo_ftfl", "mbpo_residual_ablation"]
FOUR = ["layernorm", "resets", "softlearning"]  # these apply to sac.py as well
PAIRS = [*itertools.product(NAMES, MODEL), *itertools.product(FOUR, ["sac"])]
OWN = {"reject": {"rollout_schedule": (0, 1, 3, 3)}, "resets": {"reset_updates": 25}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The module that a diff makes of a script."""
    made, folder = {}, tmp_path_factory.mktemp("patched")

    def of(diff: str, script: str):
        name = f"{script}_{diff}"
        if name not in made:
            path = folder / f"{name}.py"
            path.write_text(diffs.patched(script, ROOT / f"benchmarks/diffs/{diff}.diff"))
            spec = importlib.util.spec_from_file_location(name, path)
            made[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(made[name])
        return made[name]

    return of


def fitted(script, updates: int = 20):
    """Arguments, networks and a model fitted to 200 random transitions of 3 numbers, 2 actions."""
    torch.manual_seed(0)
    obs, action = torch.randn(200, 3), torch.rand(200, 2) * 2 - 1
    next_obs = obs @ torch.randn(3, 3) + action @ torch.randn(2, 3)
    data = script.Batch(obs, action, obs[:, 0] - action[:, 1], next_obs, torch.zeros(200))
    args = script.Args(model_hidden=16, ensemble_size=4, num_elites=3)
    nets = {"actor": script.mlp(3, 4), "ensemble": script.Ensemble(4, 5, 4, 16)}
    draw = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}

    def update(learner, x, y):
        new, loss = script.model_update(learner, x, y, nets["ensemble"], args)
        learner["params"].update(new["params"])
        update.targets = y
        return loss

    learner = script.adam_init(nets["ensemble"], CPU)
    model, _ = script.fit_ensemble(learner, data, updates, update, nets["ensemble"], args, draw)
    return args, nets, model, data, draw, update


def steps(script, args, nets, model, obs) -> tuple:
    """What model_step makes of states with fixed noise."""
    torch.manual_seed(1)
    noise = torch.randn(len(obs), 2), torch.randn(len(obs), 4)
    choice = torch.randint(3, (len(obs),))
    actor = dict(nets["actor"].named_parameters())
    with torch.no_grad():
        return script.model_step(model, actor, obs, choice, noise, nets, args)


def roll(script, args, nets, model, data, draw, horizon: int, extra):
    """Rows of a rollout from all the data's states, and the doubts of every step."""
    doubts = []

    def step_model(model, actor, obs, choice, noise):
        result = script.model_step(model, actor, obs, choice, noise, nets, args)
        doubts.append(result[-1])
        return result

    actor = dict(nets["actor"].named_parameters())
    never = script.termination_function(script.Args())
    with torch.no_grad():
        rows = script.rollout(model, actor, data, horizon, step_model, never, draw, extra)
    return rows, doubts


class Cut(BaseException):
    """The power goes."""


@pytest.mark.parametrize(("diff", "script"), PAIRS)
def test_a_variant_trains_and_resumes(diff, script, patched, tmp_path, monkeypatch):
    """It applies exactly, changes at most 40 lines, and a run cut off ends like a whole one."""
    assert 1 <= diffs.changed_lines(ROOT / f"benchmarks/diffs/{diff}.diff") <= 40
    module = patched(diff, script)
    settings = small(script, checkpoint_frequency=10, device="cpu", **OWN.get(diff, {}))
    whole = module.Args(**settings, run_root=str(tmp_path / "whole"))
    assert whole.exp_name == f"{script}_{diff}"
    module.train(whole)

    def check_finite(step, **quantities):
        if step == 70:
            raise Cut

    with monkeypatch.context() as changed:
        changed.setattr(module, "check_finite", check_finite)
        with pytest.raises(Cut):
            module.train(module.Args(**settings, run_root=str(tmp_path / "cut")))
    module.train(module.Args(**settings, run_root=str(tmp_path / "cut"), resume=True))
    folders = [folder_of(tmp_path / name, whole.exp_name) for name in ("whole", "cut")]
    one, other = map(read_checkpoint, folders)
    assert one["progress"][0] == 80
    for part in one.keys() - {"settings", "progress"}:
        assert same(one[part], other[part]), part


@pytest.mark.parametrize("script", MODEL)
def test_penalize_takes_the_spread_off_the_reward(script, patched):
    """The reward falls by lambda times max_e |sigma_e|, in units of the targets; s' stays."""
    module = patched("penalize", script)
    args, nets, model, data, *_ = fitted(module)
    args.penalty = 0.0
    _, next_obs, reward = steps(module, args, nets, model, data.obs)
    args.penalty = 2.5
    action, same_obs, less = steps(module, args, nets, model, data.obs)
    x = module.normalize(torch.cat([data.obs, action], -1), model["scaler"]["inputs"])
    _, log_var = torch.func.functional_call(nets["ensemble"], model["learner"]["params"], (x,))
    spread = torch.stack([log_var[e].exp().sum(-1).sqrt() for e in model["elites"]]).amax(0)
    unit = model["scaler"]["targets"][1][-1] if "targets" in model["scaler"] else 1.0
    torch.testing.assert_close(reward - less, 2.5 * spread * unit, rtol=1e-4, atol=1e-5)
    assert torch.equal(next_obs, same_obs)


@pytest.mark.parametrize("script", MODEL)
def test_filter_keeps_the_share_of_least_doubt(script, patched):
    """Of one step the least doubtful 30 %; of two the shares 1/3 and 1/6."""
    module = patched("filter", script)
    args, nets, model, data, draw, _ = fitted(module)
    rows, (doubt,) = roll(module, args, nets, model, data, draw, 1, 0.3)
    kept = doubt.argsort()[:60].sort().values
    torch.testing.assert_close(rows[:, :3], data.obs[kept])
    rows, doubts = roll(module, args, nets, model, data, draw, 2, 0.3)
    assert len(rows) == 66 + 33
    torch.testing.assert_close(rows[:66, :3], data.obs[doubts[0].argsort()[:66].sort().values])


@pytest.mark.parametrize("script", MODEL)
def test_filter_measures_doubt_by_one_versus_the_rest(script, patched):
    """The doubt is torch's own KL from the chosen elite to the other two's moments."""
    module = patched("filter", script)
    args, nets, model, data, *_ = fitted(module)
    args.doubt_penalty = 10.0
    action, _, reward, doubt = steps(module, args, nets, model, data.obs)
    args.doubt_penalty = 0.0
    free = steps(module, args, nets, model, data.obs)[2]
    torch.testing.assert_close(free - reward, 10 * doubt, rtol=1e-3, atol=1e-5)
    torch.manual_seed(1)
    torch.randn(200, 2), torch.randn(200, 4)
    choice = torch.randint(3, (200,))
    x = module.normalize(torch.cat([data.obs, action], -1), model["scaler"]["inputs"])
    params = model["learner"]["params"]
    mean, log_var = torch.func.functional_call(nets["ensemble"], params, (x,))
    mean, var = mean[model["elites"]], log_var[model["elites"]].exp()
    for b in range(0, 200, 20):
        rest = [e for e in range(3) if e != choice[b]]
        center = mean[rest, b].mean(0)
        spread = (var[rest, b] + (mean[rest, b] - center) ** 2).mean(0).sqrt()
        chosen = torch.distributions.Normal(mean[choice[b], b], var[choice[b], b].sqrt())
        kl = torch.distributions.kl_divergence(chosen, torch.distributions.Normal(center, spread))
        torch.testing.assert_close(doubt[b], kl.sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("script", MODEL)
def test_reject_ends_doubtful_branches(script, patched):
    """With xi = 1 and zeta = 1/2 half of the branches store nothing; thresholds are averaged."""
    module = patched("reject", script)
    args, nets, model, data, draw, _ = fitted(module)
    args.doubt_quantile, borders = 0.5, []
    for args.doubt_factor in (1.0, 1.1):
        rows, doubts = roll(module, args, nets, model, data, draw, 3, args)
        borders.append(args.doubt_factor * doubts[0].quantile(0.5))
        alive, stored = torch.ones(200, dtype=torch.bool), []
        for doubt in doubts:
            alive &= doubt < sum(borders) / len(borders)
            stored.append(alive.clone())
        assert len(rows) == sum(int(x.sum()) for x in stored)
        first = stored[0]
        assert int(first.sum()) == 100 if len(borders) == 1 else 100 < int(first.sum()) < 200
        torch.testing.assert_close(rows[: int(first.sum()), :3], data.obs[first])


@pytest.mark.parametrize("script", MODEL)
def test_ridge_leaves_the_networks_what_is_not_linear(script, patched):
    """Of linear transitions nothing is left to learn, and networks that say 0 predict them."""
    module = patched("ridge", script)
    args, nets, model, data, _, update = fitted(module, updates=1)
    if "targets" in model["scaler"]:
        assert model["scaler"]["targets"][1].max() < 1e-4
    else:
        assert update.targets.abs().max() < 1e-4
    silent = {name: torch.zeros_like(p) for name, p in model["learner"]["params"].items()}
    model["learner"]["params"] = silent | {"min_log_var": torch.full((4,), -60.0)}
    model["learner"]["params"]["max_log_var"] = torch.full((4,), -60.0)
    action, next_obs, reward = steps(module, args, nets, model, data.obs)
    torch.testing.assert_close(reward, data.obs[:, 0] - action[:, 1], rtol=1e-3, atol=1e-3)
    x = torch.cat([data.obs, data.action], -1)
    linear = torch.linalg.lstsq(x, data.next_obs).solution
    expected = torch.cat([data.obs, action], -1) @ linear
    torch.testing.assert_close(next_obs, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("script", ["sac", "mbpo_ftfl"])
def test_resets_make_a_new_agent_and_keep_the_buffers(script, patched, tmp_path):
    """At the last of 41 updates: the buffers of the run without resets, another agent."""
    module = patched("resets", script)
    settings = small(script, device="cpu", checkpoint_frequency=80)
    saved = {}
    for name, every in {"never": 10**6, "at the end": 41}.items():
        args = module.Args(**settings, reset_updates=every, exp_name=name, run_root=str(tmp_path))
        module.train(args)
        saved[name] = read_checkpoint(folder_of(tmp_path, name))
    assert torch.equal(saved["never"]["rows"], saved["at the end"]["rows"])
    old, new = saved["never"]["agent"], saved["at the end"]["agent"]
    assert [int(agent["critic"]["t"]) for agent in (old, new)] == [41, 0]
    for part, name in [("actor", "0.weight"), ("critic", "weights.0")]:
        weight = new[part]["params"][name]
        assert torch.linalg.svdvals(weight.reshape(-1, weight.shape[-1])).min() > 0
        torch.manual_seed(module.derive_seed(1, 2))
        begun = {"actor": module.mlp(4, 2), "critic": module.Critic(4, 1)}[part]
        assert not torch.equal(weight, dict(begun.named_parameters())[name])
        assert not torch.equal(weight, old[part]["params"][name])
    assert float(new["temperature"]["params"]["log_alpha"]) == 0.0


@pytest.mark.parametrize("script", ["sac", "mbpo"])
def test_layernorm_bounds_q(script, patched):
    """No state makes |Q| larger than 16 |w| + |b|; without LayerNorm one does."""
    torch.manual_seed(0)
    obs, action = 1e6 * torch.randn(100, 3), torch.rand(100, 2)
    critic = patched("layernorm", script).Critic(3, 2)
    bound = 16 * critic.weights[2].norm(dim=(1, 2)) + critic.biases[2].abs().flatten()  # [2]
    q = critic(obs, action).abs().amax(1)
    assert (q > 0).all()
    assert (q <= bound).all()
    plain = patched("resets", script).Critic(3, 2)
    assert (plain(obs, action).abs().amax(1) > 100 * bound).all()


@pytest.mark.parametrize("script", ["sac", "mbpo"])
def test_softlearning_begins_with_a_wide_policy(script, patched):
    """A deviation of 1, not e^-4, where the network says 0, e^-20 to e^2; Glorot weights."""
    module, shipped = patched("softlearning", script), patched("resets", script)

    def log_std(module, said: float) -> float:
        """The log deviation of two actions of mean 0 whose network says so for it."""
        actor = module.mlp(3, 4)
        params = {name: torch.zeros_like(p) for name, p in actor.named_parameters()}
        params["4.bias"] = torch.tensor([0.0, 0.0, said, said])
        _, log_prob = module.sample_action({"actor": actor}, params, torch.ones(3), torch.zeros(2))
        return -(float(log_prob) + math.log(2 * math.pi)) / 2

    assert [round(log_std(module, said), 4) for said in (0, -50, 50, 1)] == [0, -20, 2, 1]
    assert [round(log_std(shipped, said), 4) for said in (0, -50, 50)] == [-4, -10, 2]
    for layer in module.mlp(20, 1)[::2]:
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("env_id", ["dmc/walker-run", "Hopper-v5"])
def test_the_perfect_model_repeats_what_was_recorded(env_id, patched, tmp_path):
    """From a recorded state and action the simulator reaches the recorded s' and r."""
    module = patched("perfect_model", "mbpo_ftfl")
    settings = {"env_id": env_id, "learning_starts": 60, "total_timesteps": 60, "device": "cpu"}
    settings |= {"eval_frequency": 0, "checkpoint_frequency": 60, "run_root": str(tmp_path)}
    module.train(module.Args(**small("mbpo_ftfl", **settings)))
    saved = read_checkpoint(folder_of(tmp_path, "mbpo_ftfl_perfect_model", env_id))
    sim = module.make_env(env_id)
    sim.reset(seed=5)
    parts = [sim.observation_space.shape[0], sim.action_space.shape[0], 1]
    for i in torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist():
        _, action, reward, next_obs, _ = saved["rows"][i].split([*parts, parts[0], 1])
        module.full_state(sim, saved["states"][i].numpy())
        reached, won, *_ = sim.step(action.numpy())
        np.testing.assert_allclose(reached, next_obs, rtol=1e-4, atol=1e-5)
        assert math.isclose(won, float(reward), rel_tol=1e-4, abs_tol=1e-5)
    assert saved["synthetic"].isfinite().all()
    assert len(saved["synthetic"]) == 10  # of the one step that learned


def test_epochs_learn_from_whole_episodes_and_roll_out_at_fits(patched, tmp_path, monkeypatch):
    """Rows come by episodes, the random steps at once; rollouts with a fit, as many in all."""
    module, calls = patched("epochs", "mbpo_ftfl"), []
    add, fit = module.ReplayBuffer.add, module.fit_ensemble
    monkeypatch.setattr(
        module.ReplayBuffer, "add", lambda self, rows: (calls.append(len(rows)), add(self, rows))
    )
    monkeypatch.setattr(module, "fit_ensemble", lambda *args: (calls.append("fit"), fit(*args))[1])
    changes = {"rollouts_per_step": 1000, "model_train_frequency": 20, "eval_frequency": 0}
    module.train(module.Args(**small("mbpo_ftfl", **changes), run_root=str(tmp_path)))
    run_folder = folder_of(tmp_path, "mbpo_ftfl_epochs")
    fits = [i for i, call in enumerate(calls) if call == "fit"]
    assert len(fits) == 3
    for i in fits:
        assert calls[i + 1 : i + 21] == [1000] * 20
    assert calls.count(1000) == 3 * 20
    blocks = [call for call in calls if call not in ("fit", 1000)]
    ended = {step for step, _ in read_scalars(run_folder)["train/episode_length"]} | {40}
    assert len(ended) > 3
    assert [*itertools.accumulate(blocks)] == sorted(ended)
    assert sum(blocks[: calls.index("fit")]) == 40


@pytest.mark.parametrize("env_id", ["dmc/finger-spin", "InvertedPendulum-v5"])
def test_the_known_reward_is_the_tasks_own(env_id, patched):
    """Of s' that random actions reach, as model_step gives it; other tasks are refused."""
    module = patched("known_reward", "mbpo")
    env, rng, over = module.make_env(env_id), np.random.default_rng(0), True
    reached, earned = [], []
    for i in range(2000):
        if over:
            env.reset(seed=i)
        s_next, reward, terminated, truncated, _ = env.step(
            rng.uniform(-1, 1, env.action_space.shape)
        )
        over = terminated or truncated or i % 20 == 19
        reached.append(s_next)
        earned.append(reward)
    reached, earned = (torch.tensor(np.array(x), dtype=torch.float32) for x in (reached, earned))
    assert 0 < earned.mean() < 1
    assert torch.equal(module.REWARDS[env_id](reached).float(), earned)
    with pytest.raises(module.InputError, match="a task whose reward is known"):
        module.check_args(module.Args("dmc/walker-run"))


def test_rollouts_earn_the_known_reward(patched):
    """The ensemble's s' unchanged, its reward replaced by 1 where |s'_1| <= 0.2, else 0."""
    module = patched("known_reward", "mbpo_ftfl")
    args, nets, model, data, *_ = fitted(module)
    args.env_id = "InvertedPendulum-v5"
    _, next_obs, reward = steps(module, args, nets, model, data.obs)
    assert torch.equal(next_obs, steps(mbpo_ftfl, args, nets, model, data.obs)[1])
    assert torch.equal(reward, (next_obs[:, 1].abs() <= 0.2).float())
    assert 0 < reward.mean() < 1
