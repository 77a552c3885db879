"""The demo: pretrain a model, shrink it, grow a young one, train both against random starts, write the reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anysize import api
from anysize.cli.progress import progress_bars
from anysize.cli.show import console, show_plan, show_proof
from anysize.cli.show_training import show_comparison
from anysize.comparison.compare import compare
from anysize.comparison.config import compare_config
from anysize.demo.material import BATCH, CONTEXT, load_plainly, make_blank, make_room, steps_in, text_of, write_texts
from anysize.report.headline import headline
from anysize.report.schema import Results
from anysize.report.write import write_report
from anysize.training.config import train_config
from anysize.training.config_file import spelled
from anysize.training.run import train

_RATE = 3e-3
_GROWN = {"hidden_size": 192, "intermediate_size": 448, "num_attention_heads": 6, "num_key_value_heads": 3}
_SHRUNK = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 2, "num_key_value_heads": 1}
# A grown model shows something once a random start of its size has come below its source: so its source is young, by
# this share of the steps of pretraining, and both train for long, by this share of its time.
_YOUNG, _AFTER_GROWING = 0.35, 1.8


def _say(line: str) -> None:
    console().print(line)


def _data(place: Path) -> dict[str, Any]:
    texts = place / "text"
    return {**{name: str(texts / f"{name}.txt") for name in ("train", "validation", "test")},
            "sequence_length": CONTEXT, "evaluation_tokens": 8_192}  # fmt: skip


def _training(steps: int) -> dict[str, Any]:
    return {"max_steps": steps, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 64}


def _pretrain(place: Path, name: str, steps: int) -> Mapping[str, Any]:
    """Train the blank model for so many steps into the folder `name`; return the record of the run."""
    asked = {
        "output": str(place / name), "random": str(place / "blank"), "data": _data(place),
        "training": {**_training(steps), "learning_rate": _RATE, "eval_steps": max(1, steps // 4),
                     "save_strategy": "no"},
    }  # fmt: skip
    (place / f"{name}.yaml").write_text(spelled(asked), encoding="utf-8")
    with progress_bars(enabled=True) as progress:
        found = train(train_config(asked, name), command=f"anysize train {name}.yaml", origin=name, progress=progress)
    _say(f"   {found['steps']} steps, {found['tokens']:,} tokens, held-out loss {_last(found):.3f} nats/token")
    return found


def _last(found: Mapping[str, Any]) -> float:
    return list(found["curve"].values())[-1]["test"]


def _compare(place: Path, name: str, source: str, sizes: Mapping[str, int], steps: int, arms: Mapping[str, Any],
             title: str) -> tuple[Results, Path]:  # fmt: skip
    """Train every arm, write the report, and return the results and the page."""
    asked = {
        "title": title, "output": str(place / name), "source": str(place / source), "target": dict(sizes),
        "data": _data(place), "calibration": {"tokens": 65_536, "sequence_length": CONTEXT}, "evaluations": 12,
        "training": _training(steps), "learning_rates": [_RATE], "seeds": [0], "arms": dict(arms),
    }  # fmt: skip
    path = place / f"{name}.yaml"
    path.write_text(spelled(asked), encoding="utf-8")
    with progress_bars(enabled=True) as progress:
        config = compare_config(asked, name)
        results = compare(config, text=spelled(asked), command=f"anysize compare {path}", progress=progress)
    show_comparison(results, place / name / "results.json", as_json=False)
    return results, write_report(results, place / name).page


def run_demo(output: Path, seconds: float) -> dict[str, Any]:
    """Carry out the whole story; `seconds` is how long the source is pretrained, the rest follows.

    Returns the source's and the grown model's folder, parameters, held-out loss in nats/token and text, whether every
    proof passed, and of both comparisons what the arms came to and where the report lies.
    """
    names = ("text", "blank", "source", "young", "grown", "shrink", "grow")
    make_room(output, tuple(output / name for name in names))
    characters = write_texts(output / "text")
    _say(f"1. read {sum(characters.values()):,} characters of the standard library's sources")
    count = make_blank(output / "blank", output / "text" / "train.txt")
    steps = steps_in(seconds, output / "blank")
    _say(f"2. pretrain {count:,} parameters for about {seconds:g} s")
    _pretrain(output, "source", steps)
    found: dict[str, Any] = {"shrunk": _shrink(output, steps)}
    _say("4. a young source, pretrained for a moment")
    _pretrain(output, "young", max(8, int(steps * _YOUNG)))
    grown = _prove(output)
    arms = {"random": {"random": True}, "fresh": {"preset": "fresh"}}
    _say(f"6. train the grown model and a random one of its size for about {seconds * _AFTER_GROWING:.0f} s each")
    steps = steps_in(seconds * _AFTER_GROWING, output / "grown", threads=1)
    results, page = _compare(output, "grow", "young", _GROWN, steps, arms, "A young model, twice as large")
    found |= grown | {"grown_up": _told(results, page)}
    for name in ("shrunk", "grown_up"):
        _say(f"{found[name]['headline']}  ->  {found[name]['report']}")
    return found


def _told(results: Results, page: Path) -> dict[str, Any]:
    return {"report": str(page), "headline": headline(results).sentence,
            "after": {row.arm: row.after for row in results.rows}}  # fmt: skip


def _shrink(output: Path, steps: int) -> dict[str, Any]:
    # Not more than the source had: a random start of the target's size would end below the source, which teaches.
    _say(f"3. shrink it to half its width and train that and a random one for {steps} steps each")
    arms = {"random": {"random": True}, "subspace + distillation": {"preset": "subspace", "distill": {"weight": 0.9}}}
    results, page = _compare(output, "shrink", "source", _SHRUNK, steps, arms, "Half the width")
    return _told(results, page)


def _prove(output: Path) -> dict[str, Any]:
    """Grow the young source, print plan and proof, and load both models as any user would."""
    _say(f"5. grow it: {', '.join(f'{name} {size}' for name, size in _GROWN.items())}")
    plan = api.plan(output / "young", **_GROWN)  # pyright: ignore[reportArgumentType]
    show_plan(plan, as_json=False)
    with progress_bars(enabled=True) as progress:
        _, proof = api.apply_with_proof(plan, output / "grown", command="anysize demo", progress=progress)
    show_proof(proof)
    found: dict[str, Any] = {"exact": plan.exact, "proof_passed": proof.passed}
    for name in ("young", "grown"):
        model, tokenizer = load_plainly(output / name)
        text, count = text_of(model, tokenizer), model.num_parameters()
        _say(f"   {name}: {count:,} parameters, loaded with plain transformers, goes on")
        for line in text.splitlines():
            console().print(f"   | {line}", highlight=False, markup=False)
        found[name] = {"folder": str(output / name), "num_parameters": count, "text": text}
    return found
