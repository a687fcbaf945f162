"""Networks, Adam, the SAC update and the evaluation against independent references."""

import copy
import random
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers_model import (
    CPU,
    A,
    S,
    as_module,
    as_params,
    assert_close,
    assert_equal,
    flat,
    random_batch,
    seeded,
    stack,
    unstack,
)
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.utils._pytree import tree_map

import sac

double = pytest.mark.usefixtures("float64")
near = {"rtol": 1e-6, "atol": 1e-8}  # Adam magnifies rounding where gradients are tiny


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Numbers in float64, so that a reference may be compared to some ten digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(seed: int = 0) -> dict:
    """An agent with biases, a temperature of 0.3, and other targets than its critics."""
    torch.manual_seed(seed)
    agent = sac.init_agent(S, A, 0.3, CPU)
    agent["target"] = sac.init_critic(S, A)
    for params in (agent["actor"]["params"], agent["critic"]["params"], agent["target"]):
        for _, bias in params:
            bias.normal_(std=0.1)
    return agent


def fixed(mean: torch.Tensor, raw: torch.Tensor) -> tuple:
    """Parameters and states of an actor of one layer, which is the identity: it says the state."""
    obs = torch.cat([mean, raw], -1)
    return [(torch.eye(obs.shape[-1]), torch.zeros(obs.shape[-1]))], obs


@double
def test_initial_weights_are_orthogonal_of_gain_root_two_with_zero_biases():
    """Rows or columns, whichever are fewer, are orthogonal and of length sqrt 2."""
    nets = [sac.init_actor(S, A), *unstack(sac.init_critic(S, A))]
    for params, ends in zip(nets, [(S, 2 * A), (S + A, 1), (S + A, 1)], strict=True):
        sizes = [tuple(weight.shape) for weight, _ in params]
        assert sizes == [(ends[0], 256), (256, 256), (256, ends[1])]
        for weight, bias in params:
            weight = weight if len(weight) < len(weight.T) else weight.T
            torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)))
            assert not bias.any()
    assert not torch.equal(nets[1][0][0], nets[2][0][0])


@double
@pytest.mark.parametrize("size", [0.3, 3.0, 50.0])
def test_log_probability_is_that_of_torch_distributions(size):
    """Action and log-probability are those of a Normal sent through tanh, also far out."""
    mean, raw, noise = size * torch.randn(64, A), torch.randn(64, A), torch.randn(64, A)
    action, log_prob = sac.sample_action(*fixed(mean, raw), noise)
    std = torch.exp(-4 + 6 * torch.tanh(raw))
    squash = TanhTransform(cache_size=1)  # the cache has u where tanh(u) rounds to 1
    reference = squash(u := mean + std * noise)
    expected = TransformedDistribution(Normal(mean, std), [squash]).log_prob(reference).sum(-1)
    torch.testing.assert_close(action, torch.tanh(u))
    torch.testing.assert_close(log_prob, expected)
    plain = (Normal(mean, std).log_prob(u) + 2 * torch.log(torch.cosh(u))).sum(-1)
    torch.testing.assert_close(log_prob, plain)  # 1 - tanh^2 = cosh^-2, exact up to |u| = 700


def test_log_probability_is_finite_in_float32_where_tanh_is_one():
    """At u = +-1000 the log-probability is finite, and so is its gradient."""
    mean = torch.tensor([[1000.0], [-1000.0]])
    params, obs = fixed(mean, torch.zeros_like(mean))
    obs.requires_grad_()
    action, log_prob = sac.sample_action(params, obs, torch.zeros_like(mean))
    log_prob.sum().backward()
    assert action.abs().eq(1).all()
    assert log_prob.isfinite().all()
    assert log_prob.min() > 1900  # 2 (|u| - log 2), less the normal's part
    assert obs.grad.isfinite().all()


@double
def test_adam_step_is_torch_adam():
    """Fifty steps with gradients of many sizes, zero among them, end where torch's Adam does."""
    params = [(torch.randn(4, 3), torch.randn(3))]
    reference = [x.clone().requires_grad_() for x in params[0]]
    learner, optimizer = sac.adam_init(params, CPU), torch.optim.Adam(reference, 1e-2)
    assert_equal(learner["params"], params)
    for step in range(50):
        grads = [torch.randn_like(x) * 10.0 ** (step % 9 - 8) for x in reference]
        grads[1] *= step > 5
        for param, grad in zip(reference, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        learner = sac.adam_step(learner, [tuple(grads)], 1e-2)
    assert learner["t"] == 50
    states = [optimizer.state[param] for param in reference]
    assert_close(learner["params"], [[x.data for x in reference]])
    assert_close(learner["m"], [[state["exp_avg"] for state in states]])
    assert_close(learner["v"], [[state["exp_avg_sq"] for state in states]])


class EagerSAC:
    """SAC as it is mostly written: modules, autograd's backward, torch's optimizers."""

    def __init__(self, agent: dict, args):
        self.args, self.actor = args, as_module(agent["actor"]["params"])
        self.critics = nn.ModuleList(map(as_module, unstack(agent["critic"]["params"])))
        self.targets = nn.ModuleList(map(as_module, unstack(agent["target"])))
        self.log_alpha = agent["log_alpha"]["params"].clone().requires_grad_()
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), args.q_lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.q_lr)

    def act(self, obs, noise):
        """Action and log-probability, by way of torch.distributions."""
        mean, raw = self.actor(obs).chunk(2, -1)
        std = (-4 + 6 * torch.tanh(raw)).exp()
        squash = TanhTransform(cache_size=1)
        action = squash(mean + std * noise)
        distribution = TransformedDistribution(Normal(mean, std), [squash])
        return action, distribution.log_prob(action).sum(-1)

    @staticmethod
    def values(critics, obs, action):
        """What two critics say."""
        return [net(torch.cat([obs, action], 1))[:, 0] for net in critics]

    @torch.no_grad()
    def target_of(self, batch, noise):
        """What the critics should say."""
        action, log_prob = self.act(batch.next_obs, noise)
        value = torch.minimum(*self.values(self.targets, batch.next_obs, action))
        value = value - self.log_alpha.exp() * log_prob
        return batch.reward + self.args.gamma * (1 - batch.terminated) * value

    def update(self, batch, noise):
        """One step of all; returns the losses of critics and actor."""
        alpha, y = self.log_alpha.exp().detach(), self.target_of(batch, noise[0])
        q1, q2 = self.values(self.critics, batch.obs, batch.action)
        critic_loss = nn.functional.mse_loss(q1, y) + nn.functional.mse_loss(q2, y)
        self.step(self.critic_optimizer, critic_loss)
        with torch.no_grad():
            for old, new in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                old.mul_(1 - self.args.tau).add_(self.args.tau * new)
        action, log_prob = self.act(batch.obs, noise[1])
        q = torch.minimum(*self.values(self.critics, batch.obs, action))
        actor_loss = (alpha * log_prob - q).mean()
        self.step(self.actor_optimizer, actor_loss)
        gap = -log_prob.mean().detach() - self.args.target_entropy
        self.step(self.alpha_optimizer, self.log_alpha.exp() * gap)
        return critic_loss.detach(), actor_loss.detach()

    @staticmethod
    def step(optimizer, loss):
        """One step of one optimizer."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@double
def test_sac_update_is_that_of_an_eager_reference():
    """Twenty updates, different step sizes each, leave every tensor where the reference has it."""
    rates = {"policy_lr": 1e-3, "q_lr": 2e-3, "tau": 0.05, "gamma": 0.9, "target_entropy": -2.0}
    args, agent = sac.Args(**rates), make_agent()
    reference = EagerSAC(agent, args)
    for _ in range(20):
        batch, noise = random_batch(16), torch.randn(2, 16, A)
        agent, metrics = sac.sac_update(agent, batch, noise, args)
        losses = [metrics["q_loss"], metrics["actor_loss"]]
        assert_close(losses, reference.update(batch, noise), **near)
    assert_close(agent["actor"]["params"], as_params(reference.actor), **near)
    expected = stack([as_params(net) for net in reference.critics])
    assert_close(agent["critic"]["params"], expected, **near)
    assert_close(agent["target"], stack([as_params(net) for net in reference.targets]), **near)
    torch.testing.assert_close(agent["log_alpha"]["params"], reference.log_alpha.data, **near)


class LogStd(nn.Linear):
    """Our log std, from -10 to 2 by tanh; what SB3 cuts off then, below -20, never comes."""

    def forward(self, x):
        return -10 + 6 * (1 + torch.tanh(super().forward(x)))


def pairs(sb3, actor: list, critic: list) -> list[tuple]:
    """The parameters of SB3's actor and critics, and ours of the same place."""
    body, (weight, bias) = actor[:-1], actor[-1]
    ours = [*body, (weight[:, :A], bias[:A]), (weight[:, A:], bias[A:])]
    layers = [sb3.actor.latent_pi[0], sb3.actor.latent_pi[2], sb3.actor.mu, sb3.actor.log_std]
    for net, twin in zip(sb3.critic.q_networks, unstack(critic), strict=True):
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
    for theirs, ours in pairs(sb3, agent["actor"]["params"], agent["critic"]["params"]):
        theirs.data.copy_(ours)
    for net, twin in zip(sb3.critic_target.q_networks, unstack(agent["target"]), strict=True):
        net.load_state_dict(as_module(twin).state_dict())
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

    close = partial(torch.testing.assert_close, **near)
    theirs = {name: torch.tensor(x) for name, x in sb3.logger.name_to_value.items()}
    close(metrics["q_loss"], 2 * theirs["train/critic_loss"])
    close(metrics["actor_loss"], theirs["train/actor_loss"])
    close(metrics["alpha"], theirs["train/ent_coef"])
    states = {**sb3.actor.optimizer.state, **sb3.critic.optimizer.state}
    actor_parameters = set(sb3.actor.parameters())
    for param, moment in pairs(sb3, new["actor"]["m"], new["critic"]["m"]):
        factor = 1 if param in actor_parameters else 2
        close(moment, factor * states[param]["exp_avg"])  # both a tenth of the gradient
    close(new["log_alpha"]["m"], 0.1 * 0.3 * sb3.log_ent_coef.grad[0])
    close(new["log_alpha"]["params"], sb3.log_ent_coef.data[0])
    for param, ours in pairs(sb3, new["actor"]["params"], new["critic"]["params"]):
        close(ours, param.data)
    nets = sb3.critic_target.q_networks
    assert_close(new["target"], stack([as_params(net) for net in nets]), **near)


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_update_writes_the_pure_updates_result_in_place(compiled):
    """Compiled to one graph or not, the state's own tensors get what the pure function returns."""
    agent, args = make_agent(), sac.Args(compile=compiled)
    update, tensors = sac.compiled_update(sac.sac_update, args), flat(agent)
    assert len({x.data_ptr() for x in tensors.values()}) == len(tensors)
    for _ in range(2):
        batch, noise = random_batch(16), torch.randn(2, 16, A)
        expected, expected_metrics = sac.sac_update(agent, batch, noise, args)
        metrics = update(agent, batch, noise)
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if compiled else {"rtol": 0, "atol": 0}
        assert_close(tensors, flat(expected), **tolerance)
        assert_close(metrics, expected_metrics, **tolerance)
    torch.compiler.reset()


@double
def test_stacked_agents_learn_as_they_do_alone():
    """torch.vmap over three agents gives the three updates, but for batched products' rounding."""
    agents = [make_agent(seed) for seed in range(3)]
    batch, noise = random_batch(3, 16), torch.randn(3, 2, 16, A)
    update = partial(sac.sac_update, args=sac.Args(q_lr=1e-2, policy_lr=1e-2))
    stacked = tree_map(lambda *tensors: torch.stack(tensors), *agents)
    together = torch.vmap(update)(stacked, batch, noise)
    for i, agent in enumerate(agents):
        alone = update(agent, sac.Batch(*[x[i] for x in batch]), noise[i])
        assert_close(tree_map(lambda x, i=i: x[i], together), alone, **near)


@double
def test_update_is_pure_and_changes_every_tensor():
    """What goes in stays as it was; actor, critics, targets and temperature all come out new."""
    given = make_agent(), random_batch(64), torch.randn(2, 64, A)
    before = copy.deepcopy(given)
    new, _ = sac.sac_update(*given, sac.Args())
    assert_equal(given, before)
    tensors = flat(new)
    assert [path for path, x in flat(given[0]).items() if torch.equal(x, tensors[path])] == []


@double
def test_new_agent_starts_from_its_critics_and_alpha():
    """Its targets are copies of its critics, its temperature the one asked for, moments zero."""
    agent = sac.init_agent(S, A, 0.3, CPU)
    assert_equal(agent["target"], agent["critic"]["params"])
    assert agent["log_alpha"]["params"].exp().item() == pytest.approx(0.3)
    for name in ("actor", "critic", "log_alpha"):
        assert not any(x.any() for part in "mvt" for x in flat(agent[name][part]).values())


@double
@pytest.mark.parametrize(("target_entropy", "goal"), [(None, -A / 2), (0.0, 0.0)])
def test_temperature_follows_the_target_entropy_or_is_kept(target_entropy, goal):
    """Its gradient is alpha (entropy - target), no target is -A / 2; without autotune it stays."""
    parts, args = (random_batch(16), torch.randn(2, 16, A)), sac.Args(target_entropy=target_entropy)
    new, metrics = sac.sac_update(agent := make_agent(), *parts, args)
    gradient = new["log_alpha"]["m"] / 0.1  # its moment after the first step
    torch.testing.assert_close(gradient, 0.3 * (metrics["entropy"] - goal))
    args.autotune = False
    kept, _ = sac.sac_update(agent, *parts, args)
    assert_equal((kept["log_alpha"], kept["actor"]), (agent["log_alpha"], new["actor"]))


class Chain(gym.Env):
    """From (t, p) = (0, 0), t grows by 1, p too if the action is positive; the task ends at t = 4.

    Notes seed, actions and rewards of its episodes; seeds the global generators, as tasks may.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, limit: int):
        self.limit, self.episodes = limit, []

    def reset(self, seed=None, options=None):
        self.state, self.actions, self.rewards = np.zeros(2), [], []
        self.episodes.append((seed, self.actions, self.rewards))
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        return self.state, {}

    def step(self, action):
        (t, p), a = self.state, float(action[0])
        self.state = np.array([t + 1, p + (a > 0)])
        self.actions.append(a), self.rewards.append(t + (1 + p) * a)
        return self.state, self.rewards[-1], t + 1 == 4, t + 1 == self.limit, {}


def chain_agent(alpha: float) -> dict:
    """A random agent for the chain, with a standard deviation of about 1/2."""
    agent = sac.init_agent(2, 1, alpha, CPU)
    weight, bias = agent["actor"]["params"][-1]
    weight.mul_(0.1), bias.copy_(torch.tensor([0.1, 0.6]))
    return agent


def exact_q(params: list, alpha: float, gamma: float):
    """The policy's soft Q on the chain, backwards from its end, by sums over a grid of noise."""
    noise = torch.linspace(-8, 8, 8001)[:, None]
    density = torch.softmax(-(noise[:, 0] ** 2) / 2, 0)
    values = torch.zeros(6, 6)  # V(t, p), zero at t = 4

    def q(t, p, action):
        on = torch.where(action > 0, values[t + 1, p + 1], values[t + 1, p])
        return t + (1 + p) * action + gamma * on

    for t in (3, 2, 1, 0):
        for p in range(t + 1):
            action, log_prob = sac.sample_action(params, torch.tensor([t, p]).float(), noise)
            soft = q(t, p, action[:, 0]) - alpha * log_prob
            values[t, p] = (density * soft).sum()
    return q


@pytest.mark.parametrize("limit", [9, 3], ids=["terminated", "time limit"])
def test_critic_bias_of_an_exact_critic_is_zero(limit, monkeypatch):
    """Over 800 sampled episodes the bias of the policy's own soft Q is 0 to 4 standard errors."""
    env, agent, generator = Chain(limit), chain_agent(2.0), seeded()
    params = agent["actor"]["params"]
    q = exact_q(params, 2.0, 0.9)

    def exact(_, obs, action):
        value = q(*obs.long().unbind(1), action[:, 0])
        return torch.stack([value + 1, value])  # of the two, the lesser counts

    monkeypatch.setattr(sac, "critic", exact)
    episodes = [sac.play(env, params, 0, generator) for _ in range(800)]
    biases = np.array([sac.critic_bias(agent, *episode, 0.9) for episode in episodes])
    error = biases.std() / 800**0.5
    assert 0 < error < 0.05
    assert abs(biases.mean()) < 4 * error


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


def global_states() -> tuple:
    """The states of the global generators of Python, numpy and torch."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_evaluation_plays_mean_actions_and_then_sampled_ones_for_the_bias():
    """Returns are of the former, the bias is of the latter; no random number outside is used up."""
    env, agent, args = Chain(9), chain_agent(0.5), sac.Args(eval_episodes=10, gamma=0.9)
    params, before = agent["actor"]["params"], global_states()
    returns, bias = sac.evaluate(env, agent, args, 7)
    assert global_states() == before
    seeds, actions, rewards = zip(*env.episodes, strict=True)
    assert len(set(seeds)) == len(seeds) == 10 + 2
    first = torch.tanh(as_module(params)(torch.zeros(2))[0]).item()
    assert [each[0] for each in actions[:10]] == pytest.approx([first] * 10)
    assert returns == pytest.approx([sum(each) for each in rewards[:10]])
    assert actions[0] == actions[9] != actions[10] != actions[11] != actions[0]
    generator = seeded(sac.derive_seed(args.seed, 1, 7))
    sampled = [sac.play(Chain(9), params, 0, generator) for _ in range(2)]
    assert sampled[1][0].action[:, 0].tolist() == actions[11]
    assert bias == pytest.approx(sum(sac.critic_bias(agent, *each, 0.9) for each in sampled) / 2)
    assert sac.evaluate(env, agent, args, 8)[1] != bias


def test_loaded_policy_is_the_saved_actor(tmp_path):
    """Its action is tanh(mean) or, sampled, tanh of numbers of the actor's mean and deviation."""
    agent, obs = make_agent(), np.random.default_rng(0).normal(size=(6, S))
    agent["actor"]["params"][-1][0].mul_(0.1)
    torch.save({"agent": agent}, tmp_path / "checkpoint.pt")
    with torch.no_grad():
        mean, raw = as_module(agent["actor"]["params"])(torch.tensor(obs).float()).chunk(2, 1)
    mean, std = mean.numpy(), np.exp(-4 + 6 * np.tanh(raw.numpy()))
    np.testing.assert_allclose(sac.load_policy(tmp_path)(obs), np.tanh(mean), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sac.load_policy(tmp_path)(obs[2]), np.tanh(mean[2]), rtol=1e-5)
    sampled = sac.load_policy(tmp_path, sampled=True)(np.tile(obs, (3000, 1, 1)))
    unit = (np.arctanh(sampled) - mean) / std
    assert np.abs(unit.mean(0)).max() < 0.1  # 5 standard deviations
    assert np.abs(unit.std(0) - 1).max() < 0.07
