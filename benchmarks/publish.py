"""Write measured numbers into README.md and docs/, between markers, from the results files alone.

python -m benchmarks.publish
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from anysize.demo.material import source_config
from anysize.report.schema import Results, Row
from anysize.training.config import train_config
from anysize.training.config_file import read_yaml
from anysize.training.run import foreseen
from benchmarks.checkpoints import SMOLLM2, hollow_checkpoint
from benchmarks.conversion.run import ASKED
from benchmarks.measure import anysize

ROOT = Path(__file__).parent.parent


# What a suite's results on an accelerator are called.
_ON_GPU = "accelerator"


def results(suite: str, name: str = "latest") -> dict[str, Any]:
    """Return the record that a suite's last run wrote."""
    return json.loads((ROOT / "benchmarks" / suite / "results" / f"{name}.json").read_text(encoding="utf-8"))


def replaced(text: str, section: str, body: str) -> str:
    """Return the text with what stands between a section's markers replaced."""
    pattern = re.compile(rf"(<!-- begin {section} -->\n).*?(<!-- end {section} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no markers for the section '{section}'")
    return pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verdict(good: bool) -> str:
    return "yes" if good else "**no**"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _exactness_rows() -> list[list[str]]:
    found = results("exactness")["results"]["summary"]
    rows = f"{found['num_rows'] - found['num_refused']} rows: family x preset x ratio x tying"
    error, ratio = found["worst_error"], found["least_control_ratio"]
    return [
        [f"worst max abs logit difference / std, float32, {rows}", f"{error:.1e}", f"≤ {found['error_asked']:.0e}",
         _verdict(error <= found["error_asked"])],
        ["a wrong answer measures at least so many times more", f"{ratio:.1e}", f"≥ {found['control_ratio_asked']:.0e}",
         _verdict(ratio >= found["control_ratio_asked"])],
    ]  # fmt: skip


def _conversion_rows() -> list[list[str]]:
    found = results("conversion")["results"]
    speed = found["speed"]
    start = speed["startup_s"]["median"]
    asked = speed["startup_asked_s"]
    rows = [["start-up of a conversion: imports, proof", f"{start:.1f} s", f"≤ {asked:g} s", _verdict(start <= asked)]]
    for preset in ASKED:
        timed = speed[preset]
        ratio = timed["ratio_beyond_startup"]
        sizes = f"{_gb(speed['source_bytes'])} to {_gb(timed['output_bytes'])}"
        label = f"{sizes} with `{preset}`, beyond start-up, against `cp -r`"
        asked = ASKED[preset]
        reached = "" if asked is None else _verdict(ratio["median"] <= asked)
        shown = f"{ratio['median']:.1f}x ({ratio['min']:.1f} to {ratio['max']:.1f})"
        rows.append([label, shown, "" if asked is None else f"≤ {asked:g}x", reached])
    peaks = {label: run["peak_bytes"] for label, run in found["memory"].items()}
    shown = ", ".join(f"{_gb(peak)} at {label}" for label, peak in peaks.items())
    rows.append(
        ["peak resident memory, by size of the output", shown, "≤ 0.7 GB, flat", _verdict(max(peaks.values()) <= 0.7e9)]
    )
    return rows


def _planning_rows() -> list[list[str]]:
    found = results("planning")["results"]
    wall, peak = found["wall_s"]["median"], found["peak_bytes"]
    return [
        [
            "plan of a 405 B-shaped model",
            f"{wall:.1f} s, {_gb(peak)}",
            "≤ 5 s, 1 GB",
            _verdict(wall <= 5 and peak <= 1e9),
        ]
    ]


def _calibration_rows() -> list[list[str]]:
    ratios = results("calibration")["results"]["ratios"]
    return [
        [
            f"calibration {way}, against a plain forward pass",
            f"{found['median']:.2f}x ({found['min']:.2f} to {found['max']:.2f})",
            f"≤ {found['asked']:g}x",
            _verdict(found["median"] <= found["asked"]),
        ]
        for way, found in ratios.items()
    ]


def _throughput_rows() -> list[list[str]]:
    found = results("throughput")["results"]
    share = found["share_of_bare"]
    label = "tokens a second of `anysize train`, share of a bare PyTorch loop's"
    shown = f"{share['median']:.3f} ({share['min']:.2f} to {share['max']:.2f})"
    rows = [[label, shown, f"≥ {found['asked']:g}", _verdict(share["median"] >= found["asked"])]]
    if not (ROOT / "benchmarks" / "throughput" / "results" / f"{_ON_GPU}.json").is_file():
        return rows
    fast = results("throughput", _ON_GPU)["results"]
    share = fast["share_of_bare"]
    shown = f"{share['median']:.3f} ({share['min']:.2f} to {share['max']:.2f})"
    rows.append([f"the same on one {fast['device']}, bfloat16, compiled", shown, f"≥ {fast['asked']:g}",
                 _verdict(share["median"] >= fast["asked"])])  # fmt: skip
    if (used := fast["utilization"]) is not None:
        label = f"model FLOPs utilization of `anysize train` on it (bare loop: {used['bare']:.0%})"
        rows.append([label, f"{used['ours']:.0%}", "≥ 40%", _verdict(used["ours"] >= 0.4)])
    return rows


def _startup_rows() -> list[list[str]]:
    found = results("startup")["results"]
    rows: list[list[str]] = []
    for name, label in (("import", "`import anysize`, beyond an empty interpreter"), ("help", "`anysize --help`")):
        measured = found["import_anysize_s" if name == "import" else "help_s"]["median"]
        asked = found[f"{name}_asked_s"]
        rows.append([label, f"{measured * 1000:.0f} ms", f"≤ {asked * 1000:.0f} ms", _verdict(measured <= asked)])
    return rows


def _share(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.3f}"


# The comparisons of benchmarks/train: a config each.
COMPARISONS = sorted(place.stem for place in (ROOT / "benchmarks" / "train").glob("*.yaml"))
# The pages that tell of them.
_ABLATIONS = "shrink-ablations"
PAGES = {suite: "docs/shrinking.md" if suite == _ABLATIONS else "docs/training.md" for suite in COMPARISONS}
# Suite, arm, goal, what is counted, the share that is asked for.
_COMPARED: tuple[tuple[str, str, str, str, float], ...] = (
    (_ABLATIONS, "subspace", "random", "steps", 1 / 8),
    (_ABLATIONS, "subspace", "subcloning", "steps", 1 / 2),
    (_ABLATIONS, "subspace, least squares, stream x2, half the steps", "subcloning", "steps", 1 / 2),
    ("shrink-depth", "subspace", "random", "steps", 1 / 8),
    ("shrink-depth", "subspace", "subcloning", "steps", 1 / 2),
    ("shrink-depth", "subspace, least squares, stream x2, half the steps", "subcloning", "steps", 1 / 2),
    ("shrink-vision", "subspace", "random", "steps", 1 / 8),
    ("shrink-vision", "subspace", "subcloning", "steps", 1 / 2),
    ("shrink", "subspace + distillation", "random", "steps", 1 / 18),
    ("shrink", "subspace + distillation", "random", "seconds", 1 / 9),
    ("shrink", "subspace + distillation, 3/10 of the steps", "subcloning", "steps", 3 / 10),
    ("grow", "fresh, half the steps", "random", "steps", 1 / 2),
    ("grow", "fresh, eased in, half the steps", "random", "steps", 1 / 2),
    ("grow", "fresh", "hypercloning", "steps", 2 / 5),
    ("grow", "fresh, recipes, half the steps", "hypercloning", "steps", 2 / 5),
    ("grow-by-half", "fresh, half the steps", "random", "steps", 1 / 2),
    ("grow-by-half", "fresh", "hypercloning", "steps", 2 / 5),
    ("shrink-vision", "subspace + distillation, 1/5 of the steps", "random", "steps", 1 / 5),
)
# The arms of growing that are to lose nothing on the way, and to end below the random start.
_NO_DIP = (
    ("grow", "fresh"),
    ("grow", "fresh, eased in"),
    ("grow", "fresh, eased in, half the steps"),
    ("grow-by-half", "fresh"),
    ("grow-by-half", "fresh, eased in"),
)
_COUNTED = {
    "steps": "the steps", "seconds": "the seconds, calibration, conversion and teacher included,"
}  # fmt: skip


def compared(suite: str) -> Results | None:
    """Return what a suite of comparisons found last, None where it has not been run."""
    place = ROOT / "benchmarks" / "train" / "results" / f"{suite}.json"
    return Results.load(place) if place.is_file() else None


def _before_rows() -> list[list[str]]:
    """Return what directions and readers are worth before training, beside neurons that are only taken."""
    found = compared(_ABLATIONS)
    if found is None:
        return []
    before = {row.arm: row.before for row in found.rows}
    if not {"subcloning, factor off", "subspace"} <= before.keys():
        return []
    gain = before["subcloning, factor off"] - before["subspace"]
    label = f"{found.title}: how far `subspace` starts below a selection without factor, nats/token"
    return [[label, f"{gain:.2f}", "≥ 1.5", _verdict(gain >= 1.5)]]


def _compared_rows() -> list[list[str]]:
    rows: list[list[str]] = []
    for suite, arm, goal, kind, asked in _COMPARED:
        found = compared(suite)
        if found is None:
            continue
        # An arm of which every run diverged has no row, and is not there either.
        row = next((row for row in found.rows if row.arm == arm), None)
        reached = row.reached.get(goal) if row else None
        share = getattr(reached, f"{kind}_share") if reached else None
        label = f"{found.title}, {arm}: share of {_COUNTED[kind]} of {goal} to its final {found.metric.name}"
        edge = any(f"'{name}' is the" in note for note in found.notes for name in (arm, goal))
        how = "best rate at an end of the grid" if edge else "rates tuned"
        shown = _share(share)
        if reached is not None and reached.seconds_share_with_source is not None:
            shown += f" (of the seconds, with the source's own training: {reached.seconds_share_with_source:.3g})"
        label += f" ({len(found.seeds)} seeds, {how})"
        rows.append([label, shown, f"≤ {asked:.3g}", _verdict(share is not None and share <= asked)])
    for suite, arm in _NO_DIP:
        grown = compared(suite)
        row = next((row for row in grown.rows if row.arm == arm), None) if grown else None
        if grown is None or row is None:
            continue
        label = f"{grown.title}, {row.arm}: most that the loss stands above where it started, nats/token"
        rows.append([label, f"{row.rise:.3f}", "≤ 0.02", _verdict(row.rise <= 0.02)])
        random = next((row.after for row in grown.rows if row.arm == "random"), None)
        if random is None:
            continue
        gain = random - row.after
        label = f"{grown.title}, {row.arm}: how far it ends below random, nats/token"
        rows.append([label, f"{gain:.3f}", "> 0", _verdict(gain > 0)])
    return rows


def _shares_of(row: Row, goal: str, kinds: tuple[str, ...]) -> list[str]:
    if row.arm == goal:
        return ["1"] * len(kinds)
    reached = row.reached.get(goal)
    return [_share(getattr(reached, kind) if reached else None) for kind in kinds]


def _machine_of(found: Results) -> str:
    """Say what a comparison ran on, and on an accelerator how much of it the arms used, least to most."""
    gpus, cores = found.machine.get("gpus") or [], f"{found.machine['num_cores']} cores"
    if not gpus:
        return cores
    told = f"{len(gpus)} x {gpus[0]}, torch {found.versions['torch']}"
    peak = found.machine.get("peak_flops_per_s")
    speeds = [run.flops_per_s / peak for run in found.runs if peak and run.flops_per_s and run.status == "finished"]
    return f"{told}, model FLOPs utilization {min(speeds):.0%} to {max(speeds):.0%}" if speeds else told


def compared_section(suite: str) -> str:
    """Return what a comparison found, arm by arm, with everything that it cost."""
    found = compared(suite)
    if found is None:
        return f"Not measured yet: `python -m benchmarks.train.run {suite}`."
    first, *others = found.goals
    kinds = ("steps_share", "seconds_share", "flops_share", "seconds_share_with_source", "flops_share_with_source")
    columns = ["arm", "rate", "steps", "before", "after", "of each seed", "rise"]
    columns += [f"{what} to {first}'s" for what in ("steps", "seconds", "FLOPs")]
    columns += [f"{what} with the source's" for what in ("seconds", "FLOPs")]
    columns += [f"steps to {goal}'s" for goal in others]
    lines = [
        [
            row.arm, f"{row.learning_rate:g}", f"{found.steps_of(row.arm):,}", f"{row.before:.3f}", f"{row.after:.3f}",
            ", ".join(f"{loss:.3f}" for loss in row.after_of_seeds), f"{row.rise:.3f}",
            *_shares_of(row, first, kinds), *(_shares_of(row, goal, ("steps_share",))[0] for goal in others),
        ]
        for row in found.rows
    ]  # fmt: skip
    source = found.source
    unit = "images" if found.modality == "image" else "tokens"
    about = (
        f"Source: {source.num_parameters:,} parameters, test {found.metric.name} {source.test:.3f}" if source else ""
    )
    if source is not None and source.train_s is not None:
        about += f", its own training {source.train_s:,.0f} s ({source.train_tokens or 0:,.0f} {unit})"
    rates = ", ".join(f"{rate:g}" for rate in found.learning_rates)
    own = [
        f"'{arm.name}' tried {', '.join(f'{rate:g}' for rate in arm.settings['learning_rates'])}"
        for arm in found.arms if "learning_rates" in arm.settings
    ]  # fmt: skip
    rates += f" ({'; '.join(own)})" if own else ""
    halved = "halved by short runs and " if any(run.status == "trial" for run in found.runs) else ""
    notes = " ".join(f"{note[0].upper()}{note[1:]}." for note in found.notes)
    same = "the same for every arm"
    if len({found.steps_of(row.arm) for row in found.rows}) > 1:
        same = f"at each step {same}; each arm ends its own schedule with its last step"
    where = (
        f"{found.lengths} steps of {found.tokens_a_step:,} {unit}, {same}. Rates {rates}, "
        f"{halved}chosen on validation data with the first of {len(found.seeds)} seeds; test data, medians over "
        f"seeds. Before, after: {found.metric.name} in {found.metric.unit}. Shares are of the "
        f"named arm's whole run, to its final {found.metric.name}; seconds ({found.machine['seconds']}) "
        "and FLOPs count calibration, conversion and teacher. Rise: the most that a seed stood above "
        f"its step 0. {notes} {found.date}, {_machine_of(found)}, written by `python -m "
        f"benchmarks.publish` from the results of `{found.command}`."
    )
    return f"**{found.title}.** {about}.\n\n{_table(columns, lines)}\n\n{where}"


def memory_section() -> str:
    """Return what fitting readers holds beside a model of two layers, for few layers and for many."""
    record = results("fitting")
    found = record["results"]
    runs = found["runs"][1:]
    growth = found["growth_over_two_layers_bytes"]
    rows = [
        [str(run["layers"]), _gb(run["float32_bytes"]), *(_gb(ways[str(run["layers"])]) for ways in growth.values())]
        for run in runs
    ]
    columns = ["layers", "source in single precision", *(f"peak beyond that of two layers, {way}" for way in growth)]
    where = (
        f"Half of `hidden`, sequential readers, scores of {found['tokens']} tokens; a layer of the source is "
        f"{found['layer_bytes'] / 1e6:.1f} MB. {record['date']}, written by `python -m benchmarks.publish` from the "
        "results of `python -m benchmarks.fitting.run`."
    )
    return f"{_table(columns, rows)}\n\n{where}"


def examples_section() -> str:
    """Return what each example trains and what a device needs for it, as `--plan-only` counts it."""
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        for path in sorted((ROOT / "examples").glob("*/*.yaml")):
            raw = read_yaml(path)
            if "resize" not in raw:
                continue
            source = Path(place) / Path(raw["resize"]["source"]).name
            hollow_checkpoint(source, SMOLLM2[raw["resize"]["source"]], num_files=1, storage="BF16")
            found = foreseen(train_config({**raw, "resize": {**raw["resize"], "source": str(source)}}, path.name), "")
            sharded = raw["training"].get("fsdp", False)
            for devices, taken in found["memory_bytes"].items():
                if ("FSDP" in devices) is not bool(sharded) or devices.split()[0] in ("2", "4", "16"):
                    continue
                parts = [_gb(taken[kind]) for kind in ("states", "teacher", "activations", "logits", "total")]
                name = f"[{path.parent.name}/{path.name}]({path.parent.name}/{path.name})"
                size = f"{found['num_parameters'] / 1e6:,.0f} M"
                lines.append([name, size, f"{found['tokens_a_step_each']:,}", devices, *parts])
    columns = ["file", "parameters", "tokens a step on each", "devices", "states", "teacher", "activations", "logits",
               "in all"]  # fmt: skip
    return (
        f"{_table(columns, lines)}\n\nBytes on each device; activations are an estimate. Written by `python -m "
        "benchmarks.publish` from what `--plan-only` counts."
    )


def _dates() -> list[str]:
    found = (compared(suite) for suite in COMPARISONS)
    return [results("conversion")["date"], *(one.date for one in found if one is not None)]


def measured_section() -> str:
    """Return the README's measured table and the line that says where it was measured."""
    record = results("conversion")
    machine, versions = record["machine"], record["versions"]
    rows = [
        *_exactness_rows(),
        *_before_rows(),
        *_compared_rows(),
        *_calibration_rows(),
        *_throughput_rows(),
        *_conversion_rows(),
        *_planning_rows(),
        *_startup_rows(),
    ]
    where = (
        f"To {max(_dates())}, {machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, no GPU, torch "
        f"{versions['torch']}, transformers {versions['transformers']}. Written by `python -m benchmarks.publish` from "
        "the results of [benchmarks/](benchmarks/README.md), which names each command; medians, with the range where "
        "runs differ."
    )
    return f"{_table(['what', 'measured', 'asked', 'reached'], rows)}\n\n{where}"


def exactness_section() -> str:
    """Return the table of every family, tying and ratio: the worst of its presets, and what is refused."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results("exactness")["results"]["rows"]:
        tied = "tied" if row["tied"] else "untied"
        groups.setdefault((row["family"], tied, row["ratio"]), []).append(row)
    lines: list[list[str]] = []
    for (family, tied, ratio), rows in groups.items():
        exact = [row for row in rows if row["error"] is not None]
        refused = sorted({row["refused"] for row in rows if row["refused"]})
        worst = f"{max(row['error'] for row in exact):.1e}" if exact else "refused"
        control = f"{min(row['control'] for row in exact):.1f}" if exact else ""
        grown = ", ".join(exact[0]["grown"]) if exact else ""
        lines.append([family, tied, ratio, grown, f"{len(exact)} of {len(rows)}", worst, control, " / ".join(refused)])
    columns = ["family", "head", "ratio", "grown", "presets", "worst error", "least control", "what is refused"]
    return _table(columns, lines)


def plan_section() -> str:
    """Return what `anysize plan demo-output/source --scale 1.5` prints."""
    arguments = ("plan", "demo-output/source", "--scale", "1.5")
    with tempfile.TemporaryDirectory() as place:
        hollow_checkpoint(Path(place) / "demo-output" / "source", source_config(), num_files=1, storage="F32")
        done = subprocess.run(anysize(*arguments), cwd=place, capture_output=True, text=True, check=True)
        # What a reader sees in a folder of their own, not where this script happened to run.
        shown = done.stdout.replace(f"{Path(place).resolve()}/", "").strip()
    return f"`anysize {' '.join(arguments)}` prints:\n\n```text\n{shown}\n```"


def main() -> None:
    """Rewrite the measured sections."""
    for name, section, body in (
        ("README.md", "plan", plan_section()),
        ("README.md", "measured", measured_section()),
        ("examples/README.md", "memory", examples_section()),
        ("docs/exactness.md", "exactness", exactness_section()),
        ("docs/shrinking.md", "memory", memory_section()),
        *((page, f"compared {suite}", compared_section(suite)) for suite, page in PAGES.items()),
    ):
        path = ROOT / name
        path.write_text(replaced(path.read_text(encoding="utf-8"), section, body), encoding="utf-8")
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
