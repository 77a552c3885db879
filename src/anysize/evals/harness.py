"""lm-eval's tasks on local files: the adapter between it and anysize.

What is asked stands in `tasks/`, one file a task, with the prompts of lm-eval's own tasks of these names, so that
figures compare; only the data come from a folder. lm-eval scores; nothing of it is imported before tasks are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysize.errors import InputError, did_you_mean, joined
from anysize.evals.evaluation import TaskScore
from anysize.evals.measure import finite
from anysize.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from anysize.evals.subject import Subject

FOLDER = Path(__file__).with_name("tasks")
# Metrics that are means of zeros and ones, whose standard error follows from the number of examples.
_SHARES = ("acc", "acc_norm")


def known_tasks() -> list[str]:
    """Return the names of the tasks that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def check_tasks(names: Sequence[str], task_data: str) -> None:
    """Raise InputError where a task is unknown or named twice, its file is not there, or lm-eval is not installed."""
    known = known_tasks()
    problems = [f"unknown task '{name}'{did_you_mean(name, known)}" for name in names if name not in known]
    problems += [f"known are {', '.join(known)}"] if problems else []
    problems += [f"task '{n}' is named twice" for n in dict.fromkeys(names) if names.count(n) > 1]
    folder = Path(task_data).expanduser()
    if not problems and not folder.is_dir():
        problems.append(f"the task data '{task_data}' are not a folder: wanted one with {names[0]}.parquet")
    elif not problems:
        missing = [f"{name}.parquet" for name in names if not (folder / f"{name}.parquet").is_file()]
        problems += [f"the task data folder '{task_data}' has no {joined(missing)}"] if missing else []
    if problems:
        raise InputError(joined(problems))
    if find_spec("lm_eval") is None:
        raise InputError("tasks are run by lm-eval, which is not installed: install anysize with its extra 'eval'")


def _part(name: str) -> Any:
    """Return a module of lm-eval, which is an extra: where it is not installed, this file still reads and checks."""
    return import_module(f"lm_eval.{name}")


def _barless(items: Iterable[Any], *, total: int) -> Iterable[Any]:
    del total
    return items


@contextmanager
def _quiet() -> Generator[None]:
    """Keep lm-eval's notes and bars off the screen while ours are on it."""
    building = _part("api.task")
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, building.tqdm
    logger.setLevel(logging.ERROR)
    building.tqdm = _barless
    try:
        yield
    finally:
        logger.setLevel(level)
        building.tqdm = bar


def _language_model(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, length: int, batch_size: int, progress: Progress
) -> Any:
    """Return the model as lm-eval's; it reports how many sequences it has run."""
    base: Any = _part("models.huggingface").HFLM

    class Reporting(base):
        done = total = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002
            self.done, self.total = 0, len(requests)
            progress("tasks", 0, self.total)
            found = super().loglikelihood(requests, disable_tqdm=True)
            # The largest of NaNs is the first of them, which is the right answer of some tasks.
            for value, _greedy in found:
                finite(value, "the model's log-likelihood")
            return found

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            found = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
            # Requests that share their context are run once.
            self.done = min(self.total, self.done + len(inps))
            progress("tasks", self.done, self.total)
            return found

    return Reporting(pretrained=subject.model, tokenizer=tokenizer, max_length=length, batch_size=batch_size)


def load_tasks(names: Sequence[str], task_data: str) -> Any:
    """Return tasks as lm-eval holds them, their data read. Raises InputError as `read` in `questions` does."""
    with _quiet():
        folder = str(Path(task_data).expanduser().absolute())
        manager = _part("tasks").TaskManager(
            include_path=str(FOLDER), include_defaults=False, metadata={"task_data": folder}
        )
        return manager.load(list(names))


def run_tasks(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    loaded: Any,
    *,
    length: int,
    batch_size: int,
    limit: int | None,
    progress: Progress,
) -> tuple[TaskScore, ...]:
    """Run loaded tasks, without examples in the prompt, and return their scores in the order of `names`.

    Prompts longer than `length` tokens lose their beginning. Raises InputError where a log-likelihood is not finite.
    """
    with _quiet():
        lm = _language_model(subject, tokenizer, length, batch_size, progress)
        found: Any = _part("evaluator").evaluate(
            lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return tuple(_score(name, found) for name in names)


def _score(name: str, found: Any) -> TaskScore:
    """Return what lm-eval found for a task; for a group the mean of its parts, each counted alike."""
    short = name.rpartition("::")[2]
    parts = tuple(_score(part, found) for part in found.get("group_subtasks", {}).get(name, ()))
    told = found["groups" if parts else "results"][name]
    metrics = {key.removesuffix(",none"): float(value) for key, value in sorted(told.items()) if _is_metric(key, value)}
    if parts:
        count = sum(part.num_examples for part in parts)
        errors = {m: sqrt(sum(p.standard_errors[m] ** 2 for p in parts)) / len(parts) for m in metrics if m in _SHARES
                  and all(m in p.standard_errors for p in parts)}  # fmt: skip
    else:
        count = int(found["n-samples"][name]["effective"])
        errors = {m: sqrt(v * (1 - v) / (count - 1)) for m, v in metrics.items() if m in _SHARES and count > 1}
    return TaskScore(task=short, num_examples=count, metrics=metrics, standard_errors=errors, parts=parts)


def _is_metric(key: str, value: object) -> bool:
    return key.endswith(",none") and "_stderr" not in key and isinstance(value, int | float)
