"""The sentence and the tiles: never better than what was measured, and honest where an arm lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysize.report.headline import fraction, headline, leader
from tests.report.samples import looking_real, reached, small


@pytest.mark.parametrize(
    ("share", "said"),
    [(0, "0"), (0.018, "1/55"), (1 / 9, "1/9"), (0.112, "1/8"), (0.5, "1/2"), (0.501, "51 %"), (0.7130, "72 %"),
     (0.72, "72 %"), (1, "100 %"), (1.31, "1.4 times"), (1e-5, "1/100,000")],
)  # fmt: skip
def test_shares_are_said_as_people_say_them(share: float, said: str) -> None:
    assert fraction(share) == said


@given(st.floats(1e-6, 50))
def test_a_share_is_never_said_to_be_better_than_it_is(share: float) -> None:
    said = fraction(share).replace(",", "")
    if said.startswith("1/"):
        value = 1 / int(said[2:])
    elif said.endswith(" %"):
        value = int(said[:-2]) / 100
    else:
        value = float(said.removesuffix(" times"))
    assert value >= share - 1e-8
    assert value <= 1.51 * share + 0.1


def test_the_sentence_names_the_arm_that_came_there_in_the_fewest_steps() -> None:
    results = small("random", "slow", "quick")
    rows = [row.model_copy(update={"reached": {"random": reached(steps, 90)}}) if steps else row
            for row, steps in zip(results.rows, (0, 60, 10), strict=True)]  # fmt: skip
    found = headline(results.model_copy(update={"rows": tuple(rows)}))
    assert found.sentence == "quick reaches the final loss of random in 1/9 of its steps."
    assert [tile.value for tile in found.tiles] == ["1/9", "1/9", "1/9", "3.000"]
    swapped = [row.model_copy(update={"reached": {"random": None}}) if row.arm == "quick" else row for row in rows]
    assert headline(results.model_copy(update={"rows": tuple(swapped)})).sentence.startswith("slow reaches")


def test_an_arm_that_starts_below_the_goal_takes_no_steps() -> None:
    results = small()
    row = results.rows[1].model_copy(update={"reached": {"random": reached(0, 90, seconds_share=0.3)}})
    found = headline(results.model_copy(update={"rows": (results.rows[0], row)}))
    assert found.sentence == "ours is at the final loss of random or below it before its first step."
    assert (
        "With calibration, conversion and the teacher that is 1/3 of its seconds and none of its FLOPs"
        in found.beside[0]
    )
    assert found.tiles[0].value == "0"


def test_what_costs_more_than_it_saves_is_said_beside_it() -> None:
    results = small()
    row = results.rows[1].model_copy(update={"reached": {"random": reached(10, 90, seconds_share=2.3)}})
    found = headline(results.model_copy(update={"rows": (results.rows[0], row)}))
    assert "that is 2.3 times its seconds and 1/9 of its FLOPs" in found.beside[0]
    assert found.tiles[1].value == "2.3 times"
    for tile in found.tiles[1:3]:
        assert tile.detail.endswith(", calibration, conversion and teacher included")


def test_a_goal_that_is_not_reached_is_the_headline() -> None:
    found = headline(small(after={"ours": 4.5}))
    assert found.sentence == "ours does not reach the final loss of random."
    assert [tile.value for tile in found.tiles] == ["not reached"] * 3 + ["4.500"]
    found = headline(small("random", "ours", "theirs", after={"ours": 4.5, "theirs": 4.7}))
    assert found.sentence == "No arm reaches the final loss of random."
    assert found.beside[0] == "It ends at 4.500 nats/token, random at 4.000."


def test_steps_are_those_of_the_arm_that_is_spoken_of() -> None:
    lost = small(after={"ours": 4.5})
    runs = tuple(run.model_copy(update={"steps": 30}) if run.arm == "ours" else run for run in lost.runs)
    found = headline(lost.model_copy(update={"runs": runs}))
    assert {tile.detail for tile in found.tiles[:3]} == {"in 30 steps"}
    alone = small("ours", goal=None, steps=180)
    assert headline(alone).tiles[-1].detail == "nats/token after 90 steps"


def test_a_second_goal_is_told_beside_the_first() -> None:
    beside = headline(looking_real()).beside
    assert any(line.startswith("To the final loss of subcloning it takes ") for line in beside)
    results = small("random", "subcloning", "ours", after={"subcloning": 1.0})
    arms = [row.model_copy(update={"reached": {**row.reached, "subcloning": None}}) for row in results.rows]
    arms[1] = arms[1].model_copy(update={"reached": {"random": reached(80, 90), "subcloning": reached(90, 90)}})
    found = headline(results.model_copy(update={"rows": tuple(arms), "goals": ("random", "subcloning")}))
    assert "It does not reach the final loss of subcloning, 1.000 nats/token." in found.beside


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": (), "runs": ()}, "No run has finished."),
        ({"rows": small().rows[:1]}, "Only random has finished: there is nothing to compare it with."),
        (
            {"rows": small().rows[1:]},
            "ours ends at 3.500 nats/token; random, which it is to be measured against, has not finished.",
        ),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, Any], sentence: str) -> None:
    found = headline(small(complete=False, **changes))
    assert found.sentence == sentence
    assert any(line.startswith("Without a finished run: ") for line in found.beside) == bool(
        {"random", "ours"} - {row.arm for row in changes["rows"]}
    )


def test_without_goals_the_lowest_end_leads() -> None:
    results = small("one", "two", goal=None)
    assert leader(results) == results.rows[1]
    assert headline(results).sentence == "two ends at 3.500 nats/token."
