"""The curriculum: levels over progress, the adaptive kind's memory, and what is refused."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from atat_fast.config import CurriculumConfig
from atat_fast.diffusion.curriculum import Curriculum, check_curriculum
from atat_fast.errors import UsageError


def levels(kind, *progress, **settings):
    curriculum = Curriculum(CurriculumConfig(kind=kind, **settings))
    return [curriculum.at(p).level for p in progress]


def test_exponential_runs_ahead_of_linear_to_the_same_ends():
    for a, b, end in zip(levels("exponential", 0, 0.3, 0.7), levels("linear", 0, 0.3, 0.7), (-1, 0, 1), strict=True):
        assert a == pytest.approx(b) == pytest.approx(end)
    assert levels("exponential", 0.1)[0] > levels("linear", 0.1)[0] + 0.3


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_no_jumps(kind):
    path = levels(kind, *(i / 20_000 for i in range(20_001)))
    assert max(abs(a - b) for a, b in itertools.pairwise(path)) < 0.002
    assert path[-1] == 0 and min(path) == -1 and max(path) == 1


def test_every_curriculum_ends_at_the_uniform_process():
    for kind, half in {"linear": 0.25, "step": 0.25, "exponential": 0.25, "adaptive": 1.0}.items():
        assert levels(kind, 1.0, 0.975, levels=[2.0, -1.0, 0.5]) == [0, pytest.approx(half)]


def test_adaptive_goes_on_when_the_loss_stops_falling():
    curriculum = Curriculum(CurriculumConfig(kind="adaptive", patience=2, threshold=0.1))
    ended = [curriculum.observe(loss) for loss in (5.0, 4.0, 3.95, 3.85, 3.8, math.nan)]
    assert ended == [False, False, False, False, False, True]  # 3.85 is 0.15 below the phase's best of 4.0
    assert curriculum.at(0.5).phase == "mixed"
    assert [curriculum.observe(9.0) for _ in range(3)] == [False, False, True]  # a new phase has no best to beat
    assert curriculum.at(0.5).phase == "hard"
    assert not any(curriculum.observe(9.0) for _ in range(20)) and curriculum.at(0.5).level == 1


def test_the_adaptive_state_goes_through_json():
    make = lambda: Curriculum(CurriculumConfig(kind="adaptive", patience=3))  # noqa: E731
    assert make().state() == {"phase": 0, "best": None, "stale": 0}
    losses, whole = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, math.nan], make()
    for loss in losses:
        whole.observe(loss)
    assert whole.phase == 2
    for stop in range(len(losses)):
        before, resumed = make(), make()
        for loss in losses[:stop]:
            before.observe(loss)
        resumed.load(json.loads(json.dumps(before.state(), allow_nan=False)))
        for loss in losses[stop:]:
            resumed.observe(loss)
        assert resumed.state() == whole.state()


def test_words_for_people():
    words = Curriculum(CurriculumConfig(kind="linear")).describe()
    assert words == "linear: easy (-1) to 30%, mixed (0) to 70%, hard (+1) to 95%, to 0 over the last 5%"
    assert "when valid loss stops falling" in Curriculum(CurriculumConfig(kind="adaptive")).describe()
    assert Curriculum(CurriculumConfig()).describe() == "none: level 1 throughout"


BAD = [
    ({"boundaries": [0.7, 0.3]}, r"curriculum.boundaries \[0.7, 0.3\] are out of order; they must rise between 0 and 1"),
    ({"boundaries": [0.0, 0.3]}, "are out of order"),
    ({"boundaries": [0.3, 1.0]}, "are out of order"),
    ({"boundaries": [0.3]}, "there must be a level for each phase and one boundary fewer"),
    ({"levels": [1.0]}, "there must be a level for each phase"),
    ({"phases": ["a"]}, "there must be a level for each phase"),
    ({"levels": [0.0, math.inf, 1.0]}, "curriculum.levels must be numbers"),
    ({"cooldown": 1.0}, "curriculum.cooldown must be in"),
    ({"kind": "adaptive", "patience": 0}, "curriculum.patience must be at least 1"),
    ({"kind": "adaptive", "threshold": -1.0}, "curriculum.patience must be at least 1 and threshold at least 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_curricula_that_are_none(change, message):
    config = CurriculumConfig(**{"kind": "linear"} | change)
    with pytest.raises(UsageError, match=message) as caught:
        check_curriculum(config, max_steps=1000, eval_every=10, log_every=10)
    assert "\n" not in str(caught.value)


def test_adaptive_without_values_to_look_at_is_refused():
    config = CurriculumConfig(kind="adaptive", patience=3)
    check_curriculum(config, max_steps=1001, eval_every=250, log_every=1000)
    with pytest.raises(UsageError, match=r"sees 0 values of the valid loss before .* 1000 steps.*make eval.every 249 or"):
        check_curriculum(config, max_steps=1000, eval_every=1000, log_every=1)
    config.watch = "train"
    check_curriculum(config, max_steps=1000, eval_every=1000, log_every=1)
    with pytest.raises(UsageError, match=r"values of the train loss.*make train.log_every 249 or less"):
        check_curriculum(config, max_steps=1000, eval_every=1, log_every=1000)


TWO = {"phases": ["a", "b"], "boundaries": [0.5], "levels": [0.0, 3.0], "cooldown": 0.0}
ONE = {"phases": ["all"], "boundaries": [], "levels": [2.0], "cooldown": 0.1}


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("none", {}, {0.0: 1, 0.5: 1, 0.99: 1, 1.0: 1}),
        ("linear", {}, {0.0: -1, 0.15: -0.5, 0.3: 0, 0.5: 0.5, 0.7: 1, 0.9: 1, 0.95: 1, 0.975: 0.5, 1.0: 0}),
        ("step", {"cooldown": 0.0}, {0: -1, 0.29: -1, 0.3: 0, 0.69: 0, 0.7: 1, 0.94: 1}),
        ("linear", TWO, {0.0: 0, 0.25: 1.5, 0.5: 3, 1.0: 3}),
        ("step", ONE, {0.0: 2, 0.89: 2, 0.95: 1}),
    ],
)
def test_levels_run_through_the_phases(kind, settings, wanted):
    assert levels(kind, *wanted, **settings) == pytest.approx([*wanted.values()])


def test_phases_have_names():
    curriculum = Curriculum(CurriculumConfig(kind="linear"))
    phases = [curriculum.at(step / 50_000).phase for step in (0, 14_999, 15_000, 34_999, 35_000, 49_999)]
    assert phases == ["easy", "easy", "mixed", "mixed", "hard", "hard"]
