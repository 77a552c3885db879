"""The page: everything of the results is on it, and nothing of the results can act."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from math import inf, nan
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anysize.report.card import card_table
from anysize.report.page import page_data, render
from anysize.report.schema import Arm, Kept, Metric, PlanRecord, Results, Row, Run
from anysize.report.tables import costs, lines, rates, summary
from tests.report.samples import HOSTILE, looking_real, reached, small


class Reader(HTMLParser):
    """What a browser would see: the elements, their attributes, the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open = ""
        # The packed charts are two megabytes of base64, which no parser need look at.
        self.feed(re.sub(r'(<script type="text/plain" id="plotly">)[A-Za-z0-9+/=]+', r"\1", page))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += f" {data}"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return render(looking_real())


def test_everything_of_the_results_is_on_the_page(page: str) -> None:
    text = " ".join(Reader(page).text.split())
    results = looking_real()
    for table in (summary(results), rates(results), costs(results)):
        for row in table.rows:
            for cell in row:
                assert " ".join(cell.text.split()) in text
    wanted = [results.title, results.date, results.command, "seeds: [0, 1, 2]", "x86_64", "2.13.0+cpu", *results.notes]
    for arm in results.arms:
        wanted += [arm.name, arm.start, arm.command]
        wanted += [value for tensor in (arm.plan.tensors if arm.plan else ()) for value in tensor[:5]]
    for value in wanted:
        assert " ".join(value.split()) in text, value


def test_the_page_is_one_file_of_moderate_size(page: str) -> None:
    assert len(page.encode()) < 3_000_000
    reader = Reader(page)
    for name, attributes in reader.elements:
        for key in ("src", "href", "srcset", "action", "poster", "data"):
            value = attributes.get(key) or ""
            assert value.startswith(("#", "data:")) or not value, (name, key, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "@media (prefers-color-scheme: dark)" in style


def test_only_the_pages_own_scripts_may_run(page: str) -> None:
    policy = next(a["content"] for a in Reader(page).of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    scripts = policy.split(";")[1]
    assert scripts.count("sha256-") == 3
    assert "unsafe" not in scripts
    assert not any(key.startswith("on") for _, attributes in Reader(page).elements for key in attributes)


def test_the_same_results_give_the_same_page(page: str) -> None:
    assert render(looking_real()) == page
    assert render(looking_real().model_copy(update={"title": "other"})) != page


def test_hostile_text_is_harmless() -> None:
    results = small("random", HOSTILE, title=HOSTILE, command=HOSTILE, config=HOSTILE, notes=(HOSTILE,), date=HOSTILE,
                    machine={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE},
                    metric=Metric(name=HOSTILE, unit=HOSTILE))  # fmt: skip
    kept = (Kept(axis=HOSTILE, source_size=2, rows={HOSTILE: (0,)}),)
    record = PlanRecord(tensors=((HOSTILE,) * 5 + (1,),), exact=False, notes=(HOSTILE,), kept=kept)
    arm = results.arms[1].model_copy(
        update={
            "plan": record,
            "start": HOSTILE,
            "command": HOSTILE,
            "settings": {HOSTILE: HOSTILE},
            "sizes": {HOSTILE: 1},
        }
    )
    results = results.model_copy(update={"arms": (results.arms[0], arm)})
    clean, dirty = Reader(render(small())), Reader(render(results))
    assert len(dirty.of("script")) == len(clean.of("script")) == 4
    assert dirty.of("img") == []
    assert dirty.text.count("window.hurt=1") > 10
    assert "\x00" not in render(results)
    assert json.loads(dirty.scripts[1])["arms"][1]["name"] == HOSTILE


def test_an_incomplete_comparison_says_so(page: str) -> None:
    text = Reader(render(small(rows=small().rows[:1], complete=False))).text
    assert "This comparison is not complete." in text
    assert "No run has finished of: ours" in text
    assert "not complete" not in Reader(page).text


def test_without_any_run_there_is_still_a_page() -> None:
    text = Reader(render(small(rows=(), runs=(), complete=False))).text
    assert "No run has finished." in text
    assert "there is no curve to draw" in text


def test_images_have_no_bits_and_no_tokens() -> None:
    page = render(small(modality="image", metric=Metric(name="error rate", unit="share of images")))
    assert 'name="unit"' not in page
    assert ">images</span>" in page
    assert "64 images" in Reader(page).text
    assert 'value="bits"' in render(looking_real())


def test_data_never_hold_what_json_cannot() -> None:
    results = small()
    run = results.runs[1].model_copy(update={"test": (7.0, inf, nan, 3.0), "validation": (1.0, 1.0, 1.0, nan)})
    data = page_data(results.model_copy(update={"runs": (results.runs[0], run)}))
    json.dumps(data, allow_nan=False)
    assert data["curves"][1]["steps"] == (0, 90)
    assert data["trials"][1]["value"] is None


def test_still_figures_stand_in_where_scripts_do_not_run() -> None:
    page = render(small(), pictures={"curves.svg": b"<svg/>"})
    (image,) = Reader(page).of("img")
    assert image["src"] == "data:image/svg+xml;base64,PHN2Zy8+"
    assert re.search(r'<figure class="still">', page)


texts = st.text(max_size=20)
numbers = st.floats(-1e6, 1e6)
positive = st.floats(0, 1e9)


@st.composite
def plans(draw: st.DrawFn) -> PlanRecord:
    size = draw(st.integers(1, 40))
    index = st.lists(st.integers(0, size - 1), max_size=40).map(tuple)
    kept = st.builds(Kept, axis=texts, source_size=st.just(size), rows=st.dictionaries(texts, index, max_size=3))
    shares = st.lists(st.floats(0, 1), min_size=2, max_size=2).map(tuple)
    return PlanRecord(
        tensors=tuple(draw(st.lists(st.tuples(texts, texts, texts, texts, texts, st.integers()), max_size=2))),
        exact=draw(st.booleans()),
        layers=draw(index),
        num_source_layers=draw(st.integers(0, 40)),
        kept=tuple(draw(st.lists(kept, max_size=2))),
        directions=tuple(draw(st.lists(shares, max_size=3))),
    )


@st.composite
def comparisons(draw: st.DrawFn) -> Results:
    names = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    goals = tuple(draw(st.lists(st.sampled_from(names), max_size=2, unique=True)))
    there = st.none() | st.builds(
        reached, st.integers(0, 200), st.integers(1, 90), seconds_share=st.none() | st.floats(0, 1e6)
    )

    def run(name: str) -> Run:
        at = sorted(draw(st.sets(st.integers(0, 90), max_size=4)))
        values = st.lists(st.floats(), min_size=len(at), max_size=len(at)).map(tuple)
        return Run(
            arm=name, seed=draw(st.integers(0, 3)), learning_rate=draw(st.sampled_from((0.0, 0.01, 0.1))),
            status=draw(st.sampled_from(("finished", "trial", "diverged"))), steps=draw(st.integers(0, 90)),
            at=tuple(at), validation=draw(values), test=draw(values), train_s=draw(positive),
        )  # fmt: skip

    def row(name: str) -> Row:
        return Row(
            arm=name, learning_rate=0.01, num_seeds=1, num_diverged=draw(st.integers(0, 2)), before=draw(numbers),
            after=draw(numbers), after_of_seeds=tuple(draw(st.lists(numbers, max_size=3))), rise=draw(numbers),
            train_s=draw(positive), reached={goal: draw(there) for goal in goals if draw(st.booleans())},
        )  # fmt: skip

    arms = [
        Arm(
            name=name, start=draw(texts), command=draw(texts), num_parameters=draw(st.integers(0)), sizes={},
            settings=draw(st.dictionaries(texts, st.none() | texts | st.floats() | st.booleans(), max_size=2)),
            flops_a_token=draw(positive), teacher_flops_a_token=draw(positive), plan=draw(st.none() | plans()),
        )
        for name in names
    ]  # fmt: skip
    changes: dict[str, Any] = {
        "arms": tuple(arms),
        "goals": goals,
        "runs": tuple(run(draw(st.sampled_from(names))) for _ in range(draw(st.integers(0, 5)))),
        "rows": tuple(row(name) for name in names if draw(st.booleans())),
        "complete": draw(st.booleans()),
        "modality": draw(st.sampled_from(("text", "image"))),
        "metric": Metric(name=draw(texts), unit=draw(texts), bits_per_byte=draw(st.none() | positive)),
        "title": draw(texts),
    }
    return small(**changes)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(comparisons())
def test_every_valid_comparison_has_a_page_a_table_and_a_card(results: Results) -> None:
    reader = Reader(render(results))
    assert len(reader.of("script")) == 4
    json.loads(reader.scripts[1])
    headings, rows = lines(summary(results))
    assert {len(row) for row in rows} == {len(headings)}
    assert len(rows) == len(results.arms)
    assert "| --- |" in card_table(results)
