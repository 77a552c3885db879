"""What a plan costs at the size of the largest open models: a 405 B-shaped config, headers only, no weights.

python -m benchmarks.planning.run
"""

from __future__ import annotations

import shutil

from benchmarks.checkpoints import hollow_checkpoint, llama_config
from benchmarks.measure import anysize, run, scratch_folder, spread, write_results

_REPEATS = 3


def main() -> None:
    """Plan a doubling of a 405 B-shaped Llama and write what it took."""
    folder = scratch_folder() / "planning"
    config = llama_config(hidden=16384, ffn=53248, layers=126, heads=128, kv_heads=8, vocab=128256)
    apparent = hollow_checkpoint(folder, config, num_files=191)
    sizes = ["--hidden-size", "20480", "--intermediate-size", "65536", "--num-hidden-layers", "140"]
    plan = folder / "plan.json"
    runs = [run(anysize("plan", str(folder), *sizes, "-o", str(plan))) for _ in range(_REPEATS)]
    results = {
        "source_bytes": apparent,
        "plan_json_bytes": plan.stat().st_size,
        "wall_s": spread([r.wall_s for r in runs]),
        "wall_asked_s": 5.0,
        "peak_bytes": max(r.peak_bytes for r in runs),
        "peak_asked_bytes": 1_000_000_000,
    }
    print(results)
    print(write_results(__file__, results))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
