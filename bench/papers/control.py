"""Offline reinforcement learning as sequence modelling: the setting of the paper's Table 3.

As in the decision transformer (Chen et al. 2021) a causal model reads the return that is still to
come, the observation and the action before, and is trained to say the action. At test it is asked
for a high return. The data are made here: episodes of a scripted policy that errs more or less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.papers.models import SequenceModel, fit, parameters
from bench.papers.part import Options, Plot, Section, Store
from bench.table import Table

NAME = "control"
PAPER = {"minGRU": 78.2, "minLSTM": 78.1, "transformer": 76.4}  # mean normalised score on D4RL
_KINDS = ("minGRU", "minLSTM", "transformer")
_TEST = 10**6  # seed of the first episode in which policies are compared
_ASKED = (0.1, 0.5, 0.95)  # quantiles of the data's returns that a model is asked for
_ERRORS = np.array([1.0, 0.7, 0.4, 0.2])  # shares of random actions in the data's episodes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    environments: tuple[str, ...]
    episodes: int  # of data
    tested: int  # episodes
    context: int
    width: int
    layers: int
    batch: int
    steps: int
    rate: float
    every: int
    dropout: float


QUICK = Setting(("Pendulum-v1",), 200, 32, 20, 64, 2, 64, 600, 1e-3, 200, 0.0)
FULL = Setting(
    ("Pendulum-v1", "MountainCarContinuous-v0"), 2000, 100, 20, 128, 3, 64, 100_000, 1e-4, 5000, 0.1
)


def _swing_up(seen: Array) -> Array:
    """Pendulum: pump energy until it is near the top, then hold it there."""
    cosine, sine, speed = seen.T
    angle = np.arctan2(sine, cosine)
    energy = speed**2 / 6 + 5 * (cosine - 1)  # of a rod of mass and length 1; 0 upright at rest
    hold = -(20 * angle + 4 * speed)
    pump = np.where(speed >= 0, 2.0, -2.0) * np.where(energy < 0, 1.0, -1.0)
    return np.where(cosine > 0.85, hold, pump).clip(-2, 2)[:, None]


def _rock(seen: Array) -> Array:
    """Mountain car: push the way it rolls."""
    return np.where(seen[:, 1] >= 0, 1.0, -1.0)[:, None]


_SCRIPTS: dict[str, Callable[[Array], Array]] = {
    "Pendulum-v1": _swing_up,
    "MountainCarContinuous-v0": _rock,
}


@dataclass
class Episodes:
    """Of N episodes of at most T steps; `running` is false after an episode's end."""

    seen: Array  # (N, T, F)
    actions: Array  # (N, T, A)
    rewards: Array  # (N, T)
    running: NDArray[np.bool_]  # (N, T)

    def returns(self) -> Array:
        return self.rewards.sum(1)


def play(
    environment: str, episodes: int, seed: int, act: Callable[[Array, Array], Array]
) -> Episodes:
    """Episodes side by side; act(observations (N, F), rewards so far (N,)) gives actions (N, A)."""
    worlds = [gymnasium.make(environment) for _ in range(episodes)]
    seen = np.stack([world.reset(seed=seed + i)[0] for i, world in enumerate(worlds)])
    limit = worlds[0].spec.max_episode_steps if worlds[0].spec else None
    assert limit is not None
    running, total = np.ones(episodes, bool), np.zeros(episodes)
    steps: list[tuple[Array, Array, Array, NDArray[np.bool_]]] = []
    for _ in range(limit):
        actions = act(seen.astype(float), total)
        rewards, before = np.zeros(episodes), seen.copy()
        steps.append((before, actions, rewards, running.copy()))
        for i in running.nonzero()[0]:
            seen[i], rewards[i], ended, cut, _ = worlds[i].step(actions[i].astype(np.float32))
            running[i] = not (ended or cut)
        total = total + rewards
        if not running.any():
            break
    for world in worlds:
        world.close()
    return Episodes(*(np.stack(column, 1) for column in zip(*steps, strict=True)))


def _actions(environment: str) -> gymnasium.spaces.Box:
    space = gymnasium.make(environment).action_space
    assert isinstance(space, gymnasium.spaces.Box)
    return space


def scripted(environment: str, errors: Array, seed: int) -> Episodes:
    """One episode for each entry of `errors`, its share of random actions."""
    generator = np.random.default_rng(seed)
    space = _actions(environment)

    def act(seen: Array, total: Array) -> Array:
        random = generator.uniform(space.low, space.high, (len(seen), *space.shape))
        astray = generator.random(len(seen)) < errors
        return np.where(astray[:, None], random, _SCRIPTS[environment](seen))

    return play(environment, len(errors), seed, act)


class Policy:
    """A sequence model over the last `context` steps of (return to come, observation, action)."""

    def __init__(self, setting: Setting, kind: str, data: Episodes, device: str) -> None:
        self.context, self.device = setting.context, device
        observed, acted = data.seen.shape[2], data.actions.shape[2]
        self.model = SequenceModel(
            kind,
            nn.Linear(1 + observed + acted, setting.width),
            setting.width,
            setting.layers,
            acted,
            dropout=setting.dropout,
        ).to(device)
        kept = data.seen[data.running]
        self.mean, self.scale = kept.mean(0), kept.std(0) + 1e-6
        self.action_scale = np.abs(data.actions).max()
        self.return_scale = np.abs(data.returns()).max()

    def inputs(self, to_come: Array, seen: Array, actions: Array) -> Tensor:
        """(N, T, 1 + F + A): the last part is the action before, 0 at an episode's start."""
        before = np.concatenate([np.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
        parts = (
            to_come[..., None] / self.return_scale,
            (seen - self.mean) / self.scale,
            before / self.action_scale,
        )
        return torch.tensor(np.concatenate(parts, -1), dtype=torch.float32, device=self.device)

    def train(self, setting: Setting, data: Episodes, label: str) -> list[dict[str, Any]]:
        """Squared error of the actions; the last tenth of the episodes is held out."""
        to_come = data.rewards[:, ::-1].cumsum(1)[:, ::-1]
        inputs = self.inputs(to_come, data.seen, data.actions)
        wanted, running = (
            torch.tensor(x, dtype=torch.float32, device=self.device)
            for x in (data.actions / self.action_scale, data.running)
        )
        windows = torch.tensor(data.running[:, : data.running.shape[1] - self.context + 1])
        split = len(windows) * 9 // 10
        starts, held_out = windows[:split].nonzero(), windows[split:].nonzero()
        held_out[:, 0] += split
        generator = torch.Generator().manual_seed(0)

        def error(chosen: Tensor) -> Tensor:
            episode, start = chosen.to(self.device).split(1, 1)
            steps = start + torch.arange(self.context, device=self.device)
            weight = running[episode, steps]
            errors = (self.model(inputs[episode, steps]) - wanted[episode, steps]).square().mean(-1)
            return (errors * weight).sum() / weight.sum()

        def draw(starts: Tensor, count: int) -> Tensor:
            return starts[torch.randint(len(starts), (count,), generator=generator)]

        tested = draw(held_out, 4 * setting.batch)
        return fit(
            self.model,
            lambda: error(draw(starts, setting.batch)),
            lambda: float(error(tested)),
            steps=setting.steps,
            rate=setting.rate,
            every=setting.every,
            label=label,
        )

    @torch.no_grad()
    def play(self, environment: str, episodes: int, wanted: float, seed: int) -> Episodes:
        """Episodes in which `wanted` is the return that the model is asked for."""
        self.model.eval()
        space = _actions(environment)
        history: list[tuple[Array, Array, Array]] = []  # to come, seen, actions

        def act(seen: Array, total: Array) -> Array:
            unknown = np.zeros((episodes, *space.shape))
            history.append((wanted - total, seen, unknown))
            recent = history[-self.context - 1 :]  # one more, for the action before the first
            inputs = self.inputs(*(np.stack(column, 1) for column in zip(*recent, strict=True)))
            said = self.model(inputs[:, -self.context :])[:, -1].double().cpu().numpy()
            actions = (said * self.action_scale).clip(space.low, space.high)
            history[-1] = (wanted - total, seen, actions)
            return actions

        return play(environment, episodes, seed, act)


def _data(setting: Setting, environment: str) -> Episodes:
    return scripted(environment, np.resize(_ERRORS, setting.episodes), seed=0)


def _yardsticks(setting: Setting, environment: str) -> dict[str, Any]:
    """Returns of the data; in the test's episodes those of random actions and of the script."""
    return {
        "data": _data(setting, environment).returns().tolist(),
        "random": scripted(environment, np.ones(setting.tested), _TEST).returns().tolist(),
        "script": scripted(environment, np.zeros(setting.tested), _TEST).returns().tolist(),
    }


def _train(setting: Setting, environment: str, kind: str, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    data = _data(setting, environment)
    policy = Policy(setting, kind, data, device)
    curve = policy.train(setting, data, f"control  {environment}, {kind}")
    asked = {}
    for share in _ASKED:
        wanted = float(np.quantile(data.returns(), share))
        episodes = policy.play(environment, setting.tested, wanted, _TEST)
        asked[str(share)] = {"wanted": wanted, "returns": episodes.returns().tolist()}
    return {"curve": curve, "parameters": parameters(policy.model), "asked": asked}


def run(options: Options, store: Store) -> dict[str, Any]:
    setting = FULL if options.full else QUICK
    environments: dict[str, Any] = {}
    for name in setting.environments:
        yardsticks = store.once(name, _yardsticks, setting, name)
        models = {
            kind: store.once(f"{name}, {kind}", _train, setting, name, kind, options.device)
            for kind in _KINDS
        }
        environments[name] = {"yardsticks": yardsticks, "models": models}
    return {"setting": vars(setting), "environments": environments}


def _scores(found: dict[str, Any], returns: Sequence[float]) -> list[float]:
    """Returns in percent of the way from random actions to the script, as D4RL normalises them."""
    low, high = (np.mean(found["yardsticks"][name]) for name in ("random", "script"))
    return [100 * (value - low) / (high - low) for value in returns]


def _spread(values: Sequence[float]) -> str:
    mean = round(float(np.mean(values)), 1) + 0.0  # no "-0.0"
    return f"{mean:.1f} ± {np.std(values) / len(values) ** 0.5:.1f}"


def _best(found: dict[str, Any], kind: str) -> list[float]:
    return found["models"][kind]["asked"][str(max(_ASKED))]["returns"]


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, label in (("random", "random actions"), ("data", "the data"), ("script", "script")):
        returns = found["yardsticks"][name]
        rows.append([label, "", _spread(returns), _spread(_scores(found, returns)), ""])
    for kind in _KINDS:
        model = found["models"][kind]
        score = _spread(_scores(found, _best(found, kind)))
        size = f"{model['parameters']:,}"
        rows.append([kind, size, _spread(_best(found, kind)), score, f"{PAPER[kind]:.1f}"])
    return rows


def _draw(result: dict[str, Any]) -> Callable[[Sequence[Axes]], None]:
    def onto(axes: Sequence[Axes]) -> None:
        for one, (environment, found) in zip(axes, result["environments"].items(), strict=True):
            for kind in _KINDS:
                asked = found["models"][kind]["asked"].values()
                wanted = [entry["wanted"] for entry in asked]
                one.plot(wanted, [np.mean(x["returns"]) for x in asked], "o-", label=kind)
            data = np.mean(found["yardsticks"]["data"])
            one.axhline(data, color="#7a7a7a", linestyle=":", label="the data's mean")
            one.set(title=environment, xlabel="return asked for", ylabel="mean return")
            one.legend(frameon=False)

    return onto


def section(result: dict[str, Any]) -> Section:
    setting, environments = result["setting"], result["environments"]

    def score(returns_of: Callable[[dict[str, Any]], Sequence[float]]) -> float:
        scores = (_scores(found, returns_of(found)) for found in environments.values())
        return float(np.mean([np.mean(values) for values in scores]))

    means = {kind: score(partial(_best, kind=kind)) for kind in _KINDS}
    data = score(lambda found: found["yardsticks"]["data"])
    return Section(
        title="Control by sequence modelling",
        claim="On the nine medium tasks of D4RL a decision transformer's mean score is 76.4; with "
        "minLSTM in place of attention it is 78.1, with minGRU 78.2.",
        found="Asked for a return that one in twenty episodes of the data reaches, the mean score "
        "is "
        + ", ".join(f"{mean:.1f} with {kind}" for kind, mean in means.items())
        + f"; the policy that made the data scores {data:.1f}.",
        comparable="D4RL is not shipped: the data are made here, so only the order of backbones "
        "and how far they rise above their data compare, not the scores; one token holds return, "
        "observation and the action before, where a decision transformer has three.",
        tables=[
            Table(
                environment,
                f"Mean ± standard error of {setting['tested']} episodes (the data: of "
                f"{setting['episodes']}); score: percent of the way from random actions to the "
                f"script that makes no errors. The data's episodes take a random action in "
                f"{', '.join(f'{share:.0%}' for share in sorted(_ERRORS))} of the steps. "
                "One training run of each model.",
                ("policy", "parameters", "return", "score", "paper, mean on D4RL"),
                _rows(found),
            )
            for environment, found in environments.items()
        ],
        plots=[
            Plot(
                "return",
                "Return reached against return asked for (10 %, 50 % and 95 % of the data's).",
                _draw(result),
                columns=len(environments),
            )
        ],
    )
