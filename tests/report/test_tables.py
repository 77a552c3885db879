"""Tables and cards: every arm has its row, losers too, and text stays text."""

from __future__ import annotations

import re

from anysize.report.card import card_table
from anysize.report.schema import Results, Row
from anysize.report.tables import Cell, Table, costs, lines, rates, share, summary
from tests.report.samples import HOSTILE, looking_real, small


def cells(table: Table, arm: str) -> dict[str, Cell]:
    row = next(row for row in table.rows if row[0].text == arm)
    headings, _ = lines(table)
    return dict(zip(headings, row, strict=True))


def changed(results: Results, arm: str, **changes: object) -> Results:
    rows: list[Row] = [row.model_copy(update=changes) if row.arm == arm else row for row in results.rows]
    return results.model_copy(update={"rows": tuple(rows)})


def test_every_arm_has_a_row_and_losers_stay() -> None:
    results = small("random", "ours", "worse", after={"worse": 9.0})
    table = summary(results)
    assert [row[0].text for row in table.rows] == ["random", "ours", "worse"]
    lost = cells(table, "worse")
    assert {lost[f"{what} to random"].text for what in ("steps, tokens", "FLOPs", "seconds")} == {"not reached"}
    assert cells(table, "ours")["steps, tokens to random"].text == "0.111"
    assert cells(table, "random")["steps, tokens to random"] == Cell("–", "itself", "muted")
    assert cells(table, "ours")["after"].tone == "best"


def test_an_arm_without_a_finished_run_is_listed_as_such() -> None:
    results = small(rows=small().rows[:1], complete=False)
    row = summary(results).rows[1]
    assert (row[0].text, row[1].text, len(row)) == ("ours", "no finished run", len(summary(results).columns))


def test_the_sources_training_is_counted_where_it_is_known() -> None:
    known = cells(summary(looking_real()), "subspace")
    assert "with the source" in known["FLOPs to random"].below
    assert "with the source" in known["seconds to random"].below
    assert "with the source" not in cells(summary(small()), "ours")["seconds to random"].below


def test_seeds_that_diverged_and_rises_are_told() -> None:
    results = changed(small(), "ours", num_diverged=2, rise=0.1234, after_of_seeds=(3.5, 3.6))
    found = cells(summary(results), "ours")
    assert (found["of each seed"].text, found["of each seed"].below) == ("3.500  3.600", "2 diverged")
    assert found["rise"].text == "0.123"
    assert "3.500 3.600 2 diverged" in lines(summary(results))[1][1]


def test_rates_show_what_was_chosen_tried_and_diverged() -> None:
    table = rates(looking_real())
    row = next(row for row in table.rows if row[0].text == "subspace + distillation")
    by_rate = dict(zip(table.columns, row, strict=True))
    assert by_rate["0.001"].below.startswith("trial of ")
    assert (by_rate["0.002"].tone, by_rate["0.002"].below) == ("best", "3 seeds")
    assert (by_rate["0.008"].text, by_rate["0.008"].tone) == ("diverged", "lost")
    assert {row[0].text for row in table.rows} == {arm.name for arm in looking_real().arms}


def test_costs_add_up() -> None:
    found = cells(costs(looking_real()), "subspace + distillation")
    assert found["calibration"].text == "11 s"
    assert found["in all"].text == f"{11.1 + 8.3 + 165:,.0f} s"
    assert found["of it teacher"].text == "35 s"
    assert found["training FLOPs"].text == f"{800 * 2048 * (5.1e6 + 5.6e6):.3g}"
    assert cells(costs(looking_real()), "random")["of it teacher"].text == "–"


def test_images_are_not_called_tokens() -> None:
    results = small(modality="image")
    assert "steps, images to random" in lines(summary(results))[0]
    assert "64 images" in card_table(results)


def test_a_card_is_a_small_table_with_the_picture() -> None:
    card = card_table(looking_real())
    assert card.startswith("subspace reaches the final loss of random in 1/")
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(looking_real().arms)
    assert {line.count("|") for line in table} == {7}
    assert card.rstrip().endswith("![Held-out loss of every arm](figures/curves.png)")
    assert "![" not in card_table(looking_real(), picture="")


def test_a_card_says_not_reached_and_not_complete() -> None:
    card = card_table(small(after={"ours": 5.0}, complete=False))
    assert "| not reached | not reached |" in card
    assert "The comparison is not complete." in card


def test_a_card_without_goals_or_rows_is_still_a_card() -> None:
    assert "| two | 0.01 | 7.500 | 3.500 |" in card_table(small("one", "two", goal=None))
    assert "No run has finished." in card_table(small(rows=(), runs=(), complete=False))


def test_names_cannot_break_out_of_a_card() -> None:
    card = card_table(small("random", HOSTILE, after={HOSTILE: 1.0}))
    assert not re.search(r"(?<!\\)[<>`$]", card.replace("&lt;", "").replace("&gt;", ""))
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {7}


def test_a_card_says_how_many_seeds_its_medians_are_over() -> None:
    results = small()
    assert "Medians over 1 seed; " in card_table(results)
    assert "Medians over 1 to 3 seeds; " in card_table(changed(results, "ours", num_seeds=3))
    both = changed(changed(results, "ours", num_seeds=2), "random", num_seeds=2)
    assert "Medians over 2 seeds; " in card_table(both)
    assert "Medians over 0 seeds; " in card_table(small(rows=(), runs=(), complete=False))


def test_a_card_names_the_steps_of_the_run_that_shares_are_of() -> None:
    results = small("random", "one", "two")
    said = "shares of random's run of 90 steps, with calibration"
    assert "90 steps of 64 tokens; " in card_table(results)
    assert said in card_table(results)
    # The comparison's own number is that of no arm but those that have none of their own.
    runs = tuple(run.model_copy(update={"steps": 180}) if run.arm == "two" else run for run in results.runs)
    card = card_table(results.model_copy(update={"runs": runs, "steps": 40}))
    assert "90 to 180 steps of 64 tokens; " in card
    assert said in card


def test_shares_of_any_size_are_readable() -> None:
    assert [share(value) for value in (0, 0.0184, 9.9996, 1234.5)] == ["0.000", "0.018", "10.000", "1,234.5"]


def test_a_card_says_what_the_results_hold_back() -> None:
    results = looking_real()
    lost, *rows = results.rows[::-1]
    rows[0] = rows[0].model_copy(update={"num_diverged": 1})
    runs = tuple(run for run in results.runs if run.arm != lost.arm)
    note = "this comparison shows nothing about growing"
    card = card_table(results.model_copy(update={"rows": tuple(rows[::-1]), "runs": runs, "notes": (note,)}))
    assert f"- {note}" in card
    assert "(1 diverged" in card.replace("\\", "")
    assert "| no finished run |" in card


def test_speed_is_told_beside_the_peak_of_the_accelerator_where_it_is_known() -> None:
    results = looking_real()
    assert {cell["model FLOPs a second"].text for arm in results.arms if (cell := cells(costs(results), arm.name))} == {
        "–"
    }
    timed = tuple(run.model_copy(update={"flops_per_s": 4e14}) for run in results.runs)
    on_gpu = results.model_copy(update={"runs": timed, "machine": {"peak_flops_per_s": 989e12}})
    assert cells(costs(on_gpu), "random")["model FLOPs a second"] == Cell("400 TFLOP/s", "40.4% of its peak")
    elsewhere = on_gpu.model_copy(update={"machine": {}})
    assert cells(costs(elsewhere), "random")["model FLOPs a second"] == Cell("400 TFLOP/s")
