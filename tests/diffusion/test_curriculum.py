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


def test_linear_runs_through_the_seeds_phases():
    places = [0.0, 0.15, 0.3, 0.5, 0.7, 0.9, 0.95, 0.975, 1.0]
    assert levels("linear", *places) == pytest.approx([-1, -0.5, 0, 0.5, 1, 1, 1, 0.5, 0])
    curriculum = Curriculum(CurriculumConfig(kind="linear"))
    phases = [curriculum.at(step / 50_000).phase for step in (0, 14_999, 15_000, 34_999, 35_000, 49_999)]
    assert phases == ["easy", "easy", "mixed", "mixed", "hard", "hard"]


def test_step_keeps_each_phases_level():
    assert levels("step", 0, 0.29, 0.3, 0.69, 0.7, 0.94, cooldown=0.0) == [-1, -1, 0, 0, 1, 1]


def test_exponential_runs_ahead_of_linear_to_the_same_ends():
    for a, b, end in zip(levels("exponential", 0, 0.3, 0.7), levels("linear", 0, 0.3, 0.7), (-1, 0, 1), strict=True):
        assert a == pytest.approx(b) == pytest.approx(end)
    assert levels("exponential", 0.1)[0] > levels("linear", 0.1)[0] + 0.3


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_no_jumps(kind):
    path = levels(kind, *(i / 20_000 for i in range(20_001)))
    assert max(abs(a - b) for a, b in itertools.pairwise(path)) < 0.002
    assert path[-1] == 0 and min(path) == -1 and max(path) == 1


@pytest.mark.parametrize("kind", ["linear", "step", "exponential", "adaptive"])
def test_every_curriculum_ends_at_the_uniform_process(kind):
    curriculum = Curriculum(CurriculumConfig(kind=kind, levels=[2.0, -1.0, 0.5]))
    assert curriculum.at(1.0).level == 0
    half = {"adaptive": 1.0}.get(kind, 0.25)
    assert curriculum.at(0.975).level == pytest.approx(half)


def test_none_is_level_one_throughout():
    assert levels("none", 0.0, 0.5, 0.99, 1.0) == [1, 1, 1, 1]


def test_any_number_of_phases():
    settings = {"phases": ["a", "b"], "boundaries": [0.5], "levels": [0.0, 3.0], "cooldown": 0.0}
    assert levels("linear", 0.0, 0.25, 0.5, 1.0, **settings) == [0, 1.5, 3, 3]
    one = {"phases": ["all"], "boundaries": [], "levels": [2.0], "cooldown": 0.1}
    assert levels("step", 0.0, 0.89, 0.95, **one) == pytest.approx([2, 2, 1])


def test_adaptive_goes_on_when_the_loss_stops_falling():
    curriculum = Curriculum(CurriculumConfig(kind="adaptive", patience=2, threshold=0.1))
    ended = [curriculum.observe(loss) for loss in (5.0, 4.0, 3.95, 3.85, 3.8, 3.8)]
    assert ended == [False, False, False, False, False, True]  # 3.85 is 0.15 below the phase's best of 4.0
    assert curriculum.at(0.5).phase == "mixed"
    assert [curriculum.observe(9.0) for _ in range(3)] == [False, False, True]  # a new phase has no best to beat
    assert curriculum.at(0.5).phase == "hard"
    assert not any(curriculum.observe(9.0) for _ in range(20)) and curriculum.at(0.5).level == 1


def test_adaptive_takes_no_comfort_from_nan():
    curriculum = Curriculum(CurriculumConfig(kind="adaptive", patience=2))
    assert [curriculum.observe(math.nan) for _ in range(2)] == [False, True]


def test_the_adaptive_state_goes_through_json():
    curriculum = Curriculum(CurriculumConfig(kind="adaptive", patience=3))
    losses = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0]
    for stop in range(len(losses)):
        whole, parts = (Curriculum(CurriculumConfig(kind="adaptive", patience=3)) for _ in range(2))
        for loss in losses[:stop]:
            parts.observe(loss)
        resumed = Curriculum(CurriculumConfig(kind="adaptive", patience=3))
        resumed.load(json.loads(json.dumps(parts.state(), allow_nan=False)))
        for loss in losses:
            whole.observe(loss)
        for loss in losses[stop:]:
            resumed.observe(loss)
        assert (resumed.state() == whole.state() and whole.phase == 2) or stop == 0
    assert curriculum.state() == {"phase": 0, "best": None, "stale": 0}


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
