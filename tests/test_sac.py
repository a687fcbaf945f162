"""Networks, Adam and the SAC update against independent references."""

import copy
import math
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers_model import CPU, A, S, assert_close, flat, random_batch
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import sac

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
    """Numbers in float64, so that a reference may be compared to some ten digits."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(alpha: float = 0.3, seed: int = 0):
    """Networks and an agent whose targets are other networks than its critics."""
    torch.manual_seed(seed)
    nets = {"actor": sac.mlp(S, 2 * A), "critic": sac.Critic(S, A)}
    agent = sac.sac_init(nets, alpha, CPU)
    agent["target"] = sac.adam_init(sac.Critic(S, A), CPU)["params"]
    return nets, agent


def test_mlp_has_orthogonal_weights_of_gain_root_two_and_zero_biases():
    """Rows or columns, whichever are fewer, are orthogonal and of length sqrt 2."""
    net = sac.mlp(S, 2 * A)
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    sizes = [tuple(layer.weight.shape) for layer in layers]
    assert sizes == [(256, S), (256, 256), (2 * A, 256)]
    assert [type(layer) for layer in net][1::2] == [nn.ReLU, nn.ReLU]
    for layer in layers:
        weight = layer.weight if layer.out_features < layer.in_features else layer.weight.T
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)))
        assert not layer.bias.any()


def test_log_std_stays_between_its_bounds():
    """Whatever the network says, log std is in [-10, 2], and reaches both ends and the middle."""
    raw = torch.tensor([-1e6, -1.0, 0.0, 1.0, 1e6])[:, None]
    obs = torch.cat([torch.zeros_like(raw), raw], -1)  # at mean 0 and noise 0, log pi is log N(0)
    _, log_prob = sac.sample_action({"actor": nn.Identity()}, {}, obs, torch.zeros_like(raw))
    expected = [-10.0, -4 - 6 * math.tanh(1), -4.0, -4 + 6 * math.tanh(1), 2.0]
    log_std = -log_prob - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_std, torch.tensor(expected))


@pytest.mark.parametrize("size", [0.3, 3.0, 50.0])
def test_log_probability_is_that_of_torch_distributions(size):
    """Action and log-probability are those of a Normal sent through tanh, also far out."""
    mean, raw, noise = size * torch.randn(64, A), torch.randn(64, A), torch.randn(64, A)
    nets, obs = {"actor": nn.Identity()}, torch.cat([mean, raw], -1)
    action, log_prob = sac.sample_action(nets, {}, obs, noise)
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
    mean = torch.tensor([[1000.0], [-1000.0]], dtype=torch.float32)
    obs = torch.cat([mean, torch.zeros_like(mean)], -1).requires_grad_()
    zero = torch.zeros_like(mean)
    action, log_prob = sac.sample_action({"actor": nn.Identity()}, {}, obs, zero)
    log_prob.sum().backward()
    assert action.abs().eq(1).all()
    assert log_prob.isfinite().all()
    assert log_prob.min() > 1900  # 2 (|u| - log 2), less the normal's part
    assert obs.grad.isfinite().all()


def test_adam_step_is_torch_adam():
    """Fifty steps with gradients of many sizes, zero among them, end where torch's Adam does."""
    net = nn.Linear(4, 3)
    reference = copy.deepcopy(net)
    learner, optimizer = sac.adam_init(net, CPU), torch.optim.Adam(reference.parameters(), 1e-2)
    for step in range(50):
        grads = {k: torch.randn_like(p) * 10.0 ** (step % 9 - 8) for k, p in net.named_parameters()}
        grads["bias"] *= step > 5
        for name, param in reference.named_parameters():
            param.grad = grads[name].clone()
        optimizer.step()
        learner = sac.adam_step(learner, grads, 1e-2)
    assert learner["t"] == 50
    assert_close(learner["params"], {k: p.data for k, p in reference.named_parameters()})
    state = {name: optimizer.state[param] for name, param in reference.named_parameters()}
    assert_close(learner["m"], {name: s["exp_avg"] for name, s in state.items()})
    assert_close(learner["v"], {name: s["exp_avg_sq"] for name, s in state.items()})


class EagerSAC:
    """SAC as it is mostly written: modules, autograd's backward, torch's optimizers."""

    def __init__(self, nets: dict, agent: dict, args):
        self.args = args
        self.actor, self.critic = copy.deepcopy(nets["actor"]), copy.deepcopy(nets["critic"])
        self.target = copy.deepcopy(self.critic)
        self.target.load_state_dict(agent["target"])
        log_alpha = agent["temperature"]["params"]["log_alpha"]
        self.log_alpha = log_alpha.clone().requires_grad_()
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.q_lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.q_lr)

    def act(self, obs, noise):
        """Action and log-probability, by way of torch.distributions."""
        mean, raw = self.actor(obs).chunk(2, -1)
        std = (-4 + 6 * torch.tanh(raw)).exp()
        squash = TanhTransform(cache_size=1)
        action = squash(mean + std * noise)
        distribution = TransformedDistribution(Normal(mean, std), [squash])
        return action, distribution.log_prob(action).sum(-1)

    def target_of(self, batch, noise):
        """What the critics should say."""
        action, log_prob = self.act(batch.next_obs, noise)
        value = (
            torch.minimum(*self.target(batch.next_obs, action)) - self.log_alpha.exp() * log_prob
        )
        return (batch.reward + self.args.gamma * (1 - batch.terminated) * value).detach()

    def update(self, batch, noise):
        """One step of all; returns the three losses."""
        alpha, y = self.log_alpha.exp().detach(), self.target_of(batch, noise[0])
        q1, q2 = self.critic(batch.obs, batch.action)
        critic_loss = nn.functional.mse_loss(q1, y) + nn.functional.mse_loss(q2, y)
        self.step(self.critic_optimizer, critic_loss)
        with torch.no_grad():
            for old, new in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                old.mul_(1 - self.args.tau).add_(self.args.tau * new)
        action, log_prob = self.act(batch.obs, noise[1])
        actor_loss = (alpha * log_prob - torch.minimum(*self.critic(batch.obs, action))).mean()
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


def test_sac_update_is_that_of_an_eager_reference():
    """Twenty updates, different step sizes each, leave every tensor where the reference has it."""
    rates = {"policy_lr": 1e-3, "q_lr": 2e-3, "tau": 0.05, "gamma": 0.9, "target_entropy": -2.0}
    args = sac.Args(**rates)
    nets, agent = make_agent()
    reference = EagerSAC(nets, agent, args)
    for _ in range(20):
        batch, noise = random_batch(16), torch.randn(2, 16, A)
        agent, metrics = sac.sac_update(agent, batch, noise, nets, args)
        critic_loss, actor_loss = reference.update(batch, noise)
        close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
        close(metrics["q_loss"], critic_loss)
        close(metrics["actor_loss"], actor_loss)
    tolerance = {"rtol": 1e-6, "atol": 1e-8}  # Adam magnifies rounding where gradients are tiny
    for name in ("actor", "critic"):
        params = {k: p.data for k, p in getattr(reference, name).named_parameters()}
        assert_close(agent[name]["params"], params, **tolerance)
    target = {k: p.data for k, p in reference.target.named_parameters()}
    assert_close(agent["target"], target, **tolerance)
    temperature = agent["temperature"]["params"]["log_alpha"]
    torch.testing.assert_close(temperature, reference.log_alpha.data, **tolerance)


class Spaces(gym.Env):
    """A task of which only the sizes are known."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (S,))
    action_space = gym.spaces.Box(-1, 1, (A,))


class LogStd(nn.Linear):
    """Our log std, from -10 to 2 by tanh; what SB3 cuts off then, below -20, never comes."""

    def forward(self, x):
        return -10 + 6 * (1 + torch.tanh(super().forward(x)))


def stable_baselines(agent: dict, args, monkeypatch):
    """SB3's SAC with our weights, without its 1e-6 against log(0) and its cast to float32."""
    import stable_baselines3  # here, for only one of pytest's workers to wait for it
    from stable_baselines3.common.logger import configure

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
    for theirs, ours in twins(sb3.critic_target, agent["target"]):
        theirs.data.copy_(ours)
    return sb3


def twins(critic, ours: dict) -> list[tuple]:
    """The parameters of SB3's two critics, and ours of the same place."""
    layers = [(net[2 * i], i, e) for e, net in enumerate(critic.q_networks) for i in range(3)]
    weights = [(layer.weight, ours[f"weights.{i}"][e].T) for layer, i, e in layers]
    return weights + [(layer.bias, ours[f"biases.{i}"][e, 0]) for layer, i, e in layers]


def pairs(sb3, actor: dict, critic: dict) -> list[tuple]:
    """The parameters of SB3's actor and critics, and ours of the same place."""
    found = twins(sb3.critic, critic)
    mean, log_std = (slice(A), slice(A, 2 * A))
    places = [(sb3.actor.latent_pi[i], i, slice(None)) for i in (0, 2)]
    for layer, i, rows in [*places, (sb3.actor.mu, 4, mean), (sb3.actor.log_std, 4, log_std)]:
        found += [(getattr(layer, x), actor[f"{i}.{x}"][rows]) for x in ("weight", "bias")]
    return found


class SameBatch:
    """A replay buffer that has one batch."""

    def __init__(self, batch):
        from stable_baselines3.common.type_aliases import ReplayBufferSamples

        column = [x[:, None] for x in (batch.terminated, batch.reward)]
        self.samples = ReplayBufferSamples(batch.obs, batch.action, batch.next_obs, *column)

    def sample(self, size, env):
        return self.samples


def test_sac_update_is_that_of_stable_baselines(monkeypatch):
    """One update by SB3's own `train` has our losses, gradients and parameters.

    Its critic loss is half of ours; its temperature loss is log(alpha) (entropy - target) where
    ours is alpha (entropy - target), so that our gradient is alpha times its own.
    """
    args = sac.Args(policy_lr=1e-3, q_lr=1e-3, tau=0.05, gamma=0.9, target_entropy=-2.0)
    nets, agent = make_agent()
    sb3 = stable_baselines(agent, args, monkeypatch)
    batch, noise = random_batch(16), torch.randn(2, 16, A)
    noises = list(noise)  # popped: SB3 acts at s before it does at s'
    draw = "torch.distributions.normal._standard_normal"
    monkeypatch.setattr(draw, lambda *_, **__: noises.pop())
    sb3.replay_buffer = SameBatch(batch)
    sb3.train(1, 16)
    new, metrics = sac.sac_update(agent, batch, noise, nets, args)

    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
    theirs = {name: torch.tensor(x) for name, x in sb3.logger.name_to_value.items()}
    close(metrics["q_loss"], 2 * theirs["train/critic_loss"])
    close(metrics["actor_loss"], theirs["train/actor_loss"])
    close(metrics["alpha"], theirs["train/ent_coef"])
    states = {**sb3.actor.optimizer.state, **sb3.critic.optimizer.state}
    actor_parameters = set(sb3.actor.parameters())
    for param, moment in pairs(sb3, new["actor"]["m"], new["critic"]["m"]):
        factor = 1 if param in actor_parameters else 2
        close(moment, factor * states[param]["exp_avg"])  # both a tenth of the gradient
    close(new["temperature"]["m"]["log_alpha"], 0.1 * 0.3 * sb3.log_ent_coef.grad[0])
    close(new["temperature"]["params"]["log_alpha"], sb3.log_ent_coef.data[0])
    for param, ours in pairs(sb3, new["actor"]["params"], new["critic"]["params"]):
        close(ours, param.data)
    for param, ours in twins(sb3.critic_target, new["target"]):
        close(ours, param.data)


def test_compiled_update_is_the_eager_one():
    """The one graph that torch.compile makes gives the state and metrics of plain PyTorch."""
    nets, agent = make_agent()
    batch, noise = random_batch(16), torch.randn(2, 16, A)
    update = partial(sac.sac_update, nets=nets, args=sac.Args())
    compiled = torch.compile(update, fullgraph=True, dynamic=False)
    state, metrics = compiled(agent, batch, noise)
    expected, expected_metrics = update(agent, batch, noise)
    assert_close(state, expected, rtol=1e-6, atol=1e-8)
    assert_close(metrics, expected_metrics, rtol=1e-6, atol=1e-8)
    torch.compiler.reset()


@pytest.mark.parametrize("terminated", [1.0, 0.0], ids=["terminated", "time limit"])
def test_only_a_termination_ends_the_return(terminated):
    """The critics' target is the reward after a termination; a time limit bootstraps from s'."""
    args, (nets, agent) = sac.Args(gamma=0.9), make_agent()
    batch, noise = random_batch(8), torch.randn(2, 8, A)
    batch = batch._replace(terminated=torch.full((8,), terminated))
    _, metrics = sac.sac_update(agent, batch, noise, nets, args)
    y = batch.reward
    if not terminated:
        action, log_prob = sac.sample_action(
            nets, agent["actor"]["params"], batch.next_obs, noise[0]
        )
        critic = copy.deepcopy(nets["critic"])
        critic.load_state_dict(agent["target"])
        y = y + 0.9 * (torch.minimum(*critic(batch.next_obs, action)) - 0.3 * log_prob)
    q1, q2 = nets["critic"](batch.obs, batch.action)
    torch.testing.assert_close(metrics["q_loss"], ((q1 - y) ** 2 + (q2 - y) ** 2).mean().detach())


def test_update_changes_every_tensor_of_every_network():
    """Actor, critics, targets and temperature all learn."""
    nets, agent = make_agent()
    batch, noise = random_batch(64), torch.randn(2, 64, A)
    new, _ = sac.sac_update(agent, batch, noise, nets, sac.Args())
    for path, tensor in flat(agent).items():
        assert not torch.equal(tensor, flat(new)[path]), path


def test_target_moves_by_tau_towards_the_new_critic():
    """A target ends at (1 - tau) times itself plus tau times the critic after its step."""
    nets, agent = make_agent()
    args = sac.Args(tau=0.3, q_lr=0.1)
    batch, noise = random_batch(16), torch.randn(2, 16, A)
    new, _ = sac.sac_update(agent, batch, noise, nets, args)
    critic = new["critic"]["params"]
    expected = {name: 0.7 * old + 0.3 * critic[name] for name, old in agent["target"].items()}
    assert_close(new["target"], expected)


def test_targets_start_as_the_critics():
    """A new agent's targets are its critics, its temperature the one asked for."""
    nets = {"actor": sac.mlp(S, 2 * A), "critic": sac.Critic(S, A)}
    agent = sac.sac_init(nets, 0.3, CPU)
    assert_close(agent["target"], agent["critic"]["params"], rtol=0, atol=0)
    assert agent["temperature"]["params"]["log_alpha"].exp().item() == pytest.approx(0.3)


def test_temperature_is_kept_without_autotune():
    """With autotune off the temperature and its moments stay; the actor still learns."""
    nets, agent = make_agent()
    batch, noise = random_batch(16), torch.randn(2, 16, A)
    new, metrics = sac.sac_update(agent, batch, noise, nets, sac.Args(autotune=False))
    assert_close(new["temperature"], agent["temperature"], rtol=0, atol=0)
    assert metrics["alpha"].item() == pytest.approx(0.3)
    assert not torch.equal(new["actor"]["params"]["0.weight"], agent["actor"]["params"]["0.weight"])


@pytest.mark.parametrize(("target_entropy", "goal"), [(None, -A / 2), (-4.0, -4.0), (0.0, 0.0)])
def test_temperature_follows_the_target_entropy(target_entropy, goal):
    """The gradient is alpha (entropy - target); no target means -A / 2."""
    nets, agent = make_agent()
    batch, noise = random_batch(16), torch.randn(2, 16, A)
    args = sac.Args(target_entropy=target_entropy)
    new, metrics = sac.sac_update(agent, batch, noise, nets, args)
    gradient = new["temperature"]["m"]["log_alpha"] / 0.1  # its moment after the first step
    torch.testing.assert_close(gradient, 0.3 * (metrics["entropy"] - goal))


def test_sac_update_changes_nothing_it_is_given():
    """Agent, batch and noise are the same after the update as before."""
    nets, agent = make_agent()
    batch, noise = random_batch(16), torch.randn(2, 16, A)
    given = {"agent": agent, "batch": batch, "noise": noise}
    given["nets"] = {name: dict(net.state_dict()) for name, net in nets.items()}
    before = copy.deepcopy(given)
    sac.sac_update(agent, batch, noise, nets, sac.Args())
    assert_close(given, before, rtol=0, atol=0)


def test_stacked_agents_learn_as_they_do_alone():
    """torch.vmap over three agents gives the three updates, but for batched products' rounding."""
    args = sac.Args(q_lr=1e-2, policy_lr=1e-2)
    agents = [make_agent(seed=seed)[1] for seed in range(3)]
    nets, _ = make_agent()
    batch, noise = random_batch(3, 16), torch.randn(3, 2, 16, A)
    update = partial(sac.sac_update, nets=nets, args=args)
    stacked = {
        path: torch.stack([flat(agent)[path] for agent in agents]) for path in flat(agents[0])
    }
    together = torch.vmap(update)(unflatten(stacked), batch, noise)
    for i, agent in enumerate(agents):
        alone = update(agent, sac.Batch(*[x[i] for x in batch]), noise[i])
        mine = {path: tensor[i] for path, tensor in flat(together).items()}
        assert_close(mine, flat(alone), rtol=1e-6, atol=1e-8)


def unflatten(tensors: dict) -> dict:
    """Nested dicts of tensors named by path, as `flat` names them."""
    tree = {}
    for path, tensor in tensors.items():
        *folders, name = path.strip("/").split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = tensor
    return tree


class TwoValues(nn.Module):
    """Critics that say s + 2 a + 7 and s + 2 a + 5, of which the latter counts."""

    def forward(self, obs, action):
        value = (obs + 2 * action).squeeze(-1)
        return torch.stack([value + 7, value + 5])


@pytest.mark.parametrize("terminated", [1.0, 0.0], ids=["terminated", "time limit"])
def test_critic_bias_of_a_hand_computed_episode(terminated):
    """The bias is the mean of Q - G, where G has the entropy and, at a time limit, Q at the end."""
    nets = {"actor": nn.Linear(1, 2), "critic": TwoValues()}
    agent = {"actor": sac.adam_init(nets["actor"], CPU), "critic": {"params": {}}}
    agent["temperature"] = {"params": {"log_alpha": torch.tensor(0.5).log()}}
    obs, action = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.1], [-0.2], [0.3]])
    ends = torch.tensor([0.0, 0.0, terminated])
    reward, next_obs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0], [3.0], [4.0]])
    episode = sac.Batch(obs, action, reward, next_obs, ends)
    noise = torch.tensor([[0.5], [-1.0], [2.0], [-3.0]])
    states = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    drawn, log_prob = sac.sample_action(nets, agent["actor"]["params"], states, noise)
    bonus = [-0.5 * x for x in log_prob.tolist()]  # alpha times entropy, at s_0 to s_3
    end = 0.0 if terminated else 4 + 2 * drawn[3].item() + 5 + bonus[3]
    g2 = 3 + 0.9 * end
    g1 = 2 + 0.9 * (g2 + bonus[2])
    g0 = 1 + 0.9 * (g1 + bonus[1])
    expected = ((6.2 - g0) + (6.6 - g1) + (8.6 - g2)) / 3
    bias = sac.critic_bias(agent, nets, 0.9, episode, noise)
    assert bias == pytest.approx(expected)


def test_adam_starts_from_the_networks_parameters():
    """Its state begins at the network's own parameters, no moments and step 0."""
    net = sac.mlp(S, A)
    learner = sac.adam_init(net, CPU)
    assert_close(learner["params"], dict(net.state_dict()), rtol=0, atol=0)
    assert not any(tensor.any() for part in "mv" for tensor in learner[part].values())
    assert learner["t"] == 0


def test_in_place_writes_the_new_state_over_the_old():
    """The state's own tensors get what the pure function returns; none shares memory at first."""
    nets = {"actor": sac.mlp(S, 2 * A), "critic": sac.Critic(S, A)}
    agent, batch = sac.sac_init(nets, 1.0, CPU), random_batch(8)
    tensors, noise = flat(agent), torch.randn(2, 8, A)
    assert len({x.data_ptr() for x in tensors.values()}) == len(tensors)
    settings = {"nets": nets, "args": sac.Args()}
    new, expected = sac.sac_update(agent, batch, noise, **settings)
    metrics = sac.in_place(sac.sac_update, agent, batch, noise, **settings)
    assert_close(tensors, flat(new), rtol=0, atol=0)
    assert_close(metrics, expected, rtol=0, atol=0)
