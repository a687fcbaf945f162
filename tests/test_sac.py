"""Networks, the SAC update and the evaluation against independent references."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers_model import (
    CPU,
    A,
    S,
    assert_close,
    assert_equal,
    check_updates_in_place,
    flat,
    random_batch,
    seeded,
)
from torch import nn
from torch.distributions import Normal

import mbpo
import sac

double = pytest.mark.usefixtures("double")


def unstack(params: list) -> list:
    """The parameters of each of several networks that are stacked."""
    return [[(w[i], b[i, 0]) for w, b in params] for i in range(len(params[0][0]))]


def make_agent() -> dict:
    """An agent with biases, a temperature of 0.3, and other targets than its critics."""
    agent = sac.init_agent(S, A, 0.3, CPU)
    agent["target"] = sac.init_critic(S, A)
    for params in (agent["actor"]["params"], agent["critic"]["params"], agent["target"]):
        for _, bias in params:
            bias.normal_(std=0.1)
    return agent


@double
def test_a_new_agent():
    """Weights are orthogonal of gain root 2, biases and moments 0, targets copies, alpha as asked.

    Rows or columns of a weight, whichever are fewer, are orthogonal and of length root 2.
    """
    agent = sac.init_agent(S, A, 0.3, CPU)
    nets = [agent["actor"]["params"], *unstack(agent["critic"]["params"])]
    for params, (n, m) in zip(nets, [(S, 2 * A), (S + A, 1), (S + A, 1)], strict=True):
        sizes = [tuple(weight.shape) for weight, _ in params]
        assert sizes == [(n, 256), (256, 256), (256, m)]
        for weight, bias in params:
            weight = weight if len(weight) < len(weight.T) else weight.T
            assert_close(weight @ weight.T, 2 * torch.eye(len(weight)))
            assert not bias.any()
    assert not torch.equal(nets[1][0][0], nets[2][0][0])
    assert_equal(agent["target"], agent["critic"]["params"])
    assert agent["log_alpha"]["params"].exp().item() == pytest.approx(0.3)
    for name in ("actor", "critic", "log_alpha"):
        assert not any(x.any() for part in "mvt" for x in flat(agent[name][part]).values())


@pytest.mark.parametrize("u", [1000.0, -1000.0])
def test_log_probability_is_finite_in_float32_where_tanh_is_one(u):
    """At u = +-1000 the log-probability is right, and its gradient finite."""
    obs = torch.tensor([u, 0.0], requires_grad=True)  # an identity as actor says mean and raw
    _, log_prob = sac.sample_action([(torch.eye(2), torch.zeros(2))], obs, 0.0)
    log_prob.backward()
    normal = Normal(0.0, np.exp(-4)).log_prob(torch.tensor(0.0))
    assert log_prob.item() == pytest.approx(normal.item() + 2 * (abs(u) - np.log(2)))  # cosh^2 u
    assert obs.grad.isfinite().all()


class LogStd(nn.Linear):
    """Our log std, from -10 to 2 by tanh; what SB3 cuts off then, below -20, never comes."""

    def forward(self, x):
        return -10 + 6 * (1 + torch.tanh(super().forward(x)))


def pairs(sb3, actor: list, critic: list, critics) -> list[tuple]:
    """The parameters of SB3's actor and critics, and ours of the same place."""
    body, (weight, bias) = actor[:-1], actor[-1]
    ours = [*body, (weight[:, :A], bias[:A]), (weight[:, A:], bias[A:])]
    layers = [sb3.actor.latent_pi[0], sb3.actor.latent_pi[2], sb3.actor.mu, sb3.actor.log_std]
    for net, twin in zip(critics.q_networks, unstack(critic), strict=True):
        layers, ours = [*layers, *net[::2]], [*ours, *twin]
    found = []
    for layer, (weight, bias) in zip(layers, ours, strict=True):
        found += [(layer.weight, weight.T), (layer.bias, bias)]
    return found


def stable_baselines(agent: dict, args, monkeypatch):
    """SB3's SAC with our weights, without its 1e-6 against log(0) and its cast to float32."""
    import stable_baselines3  # here, for only one of pytest's workers to wait for it
    from stable_baselines3.common.logger import configure

    class Spaces(gym.Env):  # a task of which only the sizes are known
        observation_space = gym.spaces.Box(-np.inf, np.inf, (S,))
        action_space = gym.spaces.Box(-1, 1, (A,))

    rates = {"learning_rate": args.q_lr, "gamma": args.gamma, "tau": args.tau}
    temperature = {"target_entropy": args.target_entropy, "ent_coef": "auto_0.3"}
    sb3 = stable_baselines3.SAC("MlpPolicy", Spaces(), device="cpu", **rates, **temperature)
    sb3.set_logger(configure(None, []))
    sb3.actor.log_std = LogStd(256, A)
    sb3.actor.optimizer = torch.optim.Adam(sb3.actor.parameters(), args.policy_lr)
    sb3.critic.optimizer.param_groups[0]["eps"] = 0.5e-8  # its gradients are half of ours
    sb3.ent_coef_optimizer.param_groups[0]["eps"] = 1e-8 / 0.3  # and these ours by alpha
    sb3.actor.action_dist.epsilon = 0
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda x, *_, **__: x)
    actor, critic, target = agent["actor"]["params"], agent["critic"]["params"], agent["target"]
    for params, critics in ((critic, sb3.critic), (target, sb3.critic_target)):
        for theirs, ours in pairs(sb3, actor, params, critics):
            theirs.data.copy_(ours)
    return sb3


@double
def test_sac_update_is_that_of_stable_baselines(monkeypatch):
    """One update by SB3's own `train` has our losses, gradients and parameters.

    Its critic loss is half of ours; its temperature loss is log(alpha) (entropy - target) where
    ours is alpha (entropy - target), so that our gradient is alpha times its own.
    """
    args = sac.Args(policy_lr=1e-3, q_lr=1e-3, tau=0.05, gamma=0.9, target_entropy=-2.0)
    agent, batch, noise = make_agent(), random_batch(16), torch.randn(2, 16, A)
    sb3 = stable_baselines(agent, args, monkeypatch)
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    noises = list(noise)  # popped: SB3 acts at s before it does at s'
    draw = "torch.distributions.normal._standard_normal"
    monkeypatch.setattr(draw, lambda *_, **__: noises.pop())
    columns = batch.terminated[:, None], batch.reward[:, None]
    samples = ReplayBufferSamples(batch.obs, batch.action, batch.next_obs, *columns)
    monkeypatch.setattr(sb3.replay_buffer, "sample", lambda *_, **__: samples)
    sb3.train(1, 16)
    new, metrics = sac.sac_update(agent, batch, noise, args)

    theirs = sb3.logger.name_to_value
    compared = [
        (metrics["q_loss"], torch.tensor(2 * theirs["train/critic_loss"])),
        (metrics["actor_loss"], torch.tensor(theirs["train/actor_loss"])),
        (new["log_alpha"]["m"], 0.1 * 0.3 * sb3.log_ent_coef.grad[0]),
        (new["log_alpha"]["params"], sb3.log_ent_coef.data[0]),
    ]
    states = {**sb3.actor.optimizer.state, **sb3.critic.optimizer.state}
    critics = set(sb3.critic.parameters())
    for param, moment in pairs(sb3, new["actor"]["m"], new["critic"]["m"], sb3.critic):
        factor = 2 if param in critics else 1
        compared.append((moment, factor * states[param]["exp_avg"]))  # of the gradient a tenth
    actor, critic = new["actor"]["params"], new["critic"]["params"]
    for params, net in ((critic, sb3.critic), (new["target"], sb3.critic_target)):
        compared += [(ours, param.data) for param, ours in pairs(sb3, actor, params, net)]
    for ours, expected in compared:
        assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("compiled", [True, False])
def test_updates_in_place_are_the_pure_ones(compiled):
    """Compiled to one graph, or not, the state's own tensors get what the pure functions return."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if compiled else {"rtol": 0, "atol": 0}
    check_updates_in_place(mbpo, compiled, "cpu", 3, **tolerance)


@pytest.mark.parametrize("terminated", [1.0, 0.0], ids=["terminated", "time limit"])
def test_critic_bias_of_a_hand_computed_episode(terminated):
    """The bias is the mean of Q - G, where G has the entropy and, at a time limit, Q at the end."""
    weight, bias = torch.tensor([[1.0], [2.0]]).expand(2, 2, 1), torch.tensor([7.0, 5.0])
    agent = {"critic": {"params": [(weight, bias[:, None, None])]}}  # s + 2 a + 7, s + 2 a + 5
    agent["log_alpha"] = {"params": torch.tensor(0.5).log()}
    obs, action = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.1], [-0.2], [0.3]])
    ends = torch.tensor([0.0, 0.0, terminated])
    episode = sac.Batch(obs, action, torch.tensor([1.0, 2.0, 3.0]), obs + 1, ends)
    g2 = 3 if terminated else 8.6
    g1 = 2 + 0.9 * (g2 - 0.5 * -0.6)
    g0 = 1 + 0.9 * (g1 - 0.5 * 0.4)
    expected = ((6.2 - g0) + (6.6 - g1) + (8.6 - g2)) / 3
    log_prob = torch.tensor([9.0, 0.4, -0.6])  # the first belongs to no return
    assert sac.critic_bias(agent, episode, log_prob, 0.9) == pytest.approx(expected)


def test_evaluation_plays_mean_actions_and_then_sampled_ones_for_the_bias():
    """Returns are of the former, the bias is of the latter; no random number outside is used up."""
    env, args = sac.make_env("environments:NumpysGenerator-v0"), sac.Args(eval_episodes=10)
    agent, before = sac.init_agent(3, 1, 0.3, CPU), np.random.get_state()[1].tolist()
    params = agent["actor"]["params"]
    returns, bias = sac.evaluate(env, agent, args, 7)
    assert np.random.get_state()[1].tolist() == before
    generator = seeded(sac.derive_seed(args.seed, 1, 7))
    seeds = [sac.derive_seed(args.seed, 1, 7, i) for i in range(12)]
    played = [sac.play(env, params, seed, None) for seed in seeds[:10]]
    drawn = [sac.play(env, params, seed, generator) for seed in seeds[10:]]
    assert returns == pytest.approx([each.reward.sum().item() for each, _ in played])
    assert bias == pytest.approx(sum(sac.critic_bias(agent, *each, 0.99) for each in drawn) / 2)
    for episode, is_mean in ((played[0][0], True), (drawn[0][0], False)):
        mean = torch.tanh(sac.actor(params, episode.obs)[0])
        assert torch.allclose(episode.action, mean, atol=1e-6) == is_mean
    assert sac.evaluate(env, agent, args, 8)[1] != bias


def test_loaded_policy_is_the_saved_actor(tmp_path):
    """Its action is tanh(mean) or, sampled, tanh of numbers of the actor's mean and deviation."""
    agent, obs = make_agent(), np.random.default_rng(0).normal(size=(6, S))
    agent["actor"]["params"][-1][0].mul_(0.1)
    mean, log_std = sac.actor(agent["actor"]["params"], torch.tensor(obs).float())
    mean, std = mean.numpy(), log_std.exp().numpy()
    with pytest.raises(sac.InputError, match="holds no checkpoint"):
        sac.load_policy(tmp_path)
    torch.save({"agent": agent}, tmp_path / "checkpoint.pt")
    np.testing.assert_allclose(sac.load_policy(tmp_path)(obs), np.tanh(mean), rtol=1e-5, atol=1e-6)
    acts = sac.load_policy(tmp_path, sampled=True)(np.tile(obs, (3000, 1, 1)))
    unit = (np.arctanh(acts) - mean) / std
    assert np.abs(unit.mean(0)).max() < 0.1  # 5 standard deviations
    assert np.abs(unit.std(0) - 1).max() < 0.07
