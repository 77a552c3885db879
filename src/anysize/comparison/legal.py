"""What a config file asks of a comparison that cannot be had, told before anything is made, calibrated or trained."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from anysize.comparison.config import CompareConfig
from anysize.comparison.job import takes_scores
from anysize.config import SourceConfig, understand
from anysize.errors import InputError
from anysize.io.hub import open_checkpoint
from anysize.io.image_processor import image_processor_of, require_same_images
from anysize.progress import quiet
from anysize.target import public_sizes
from anysize.training.arguments import fixed_arguments, require_buildable, training_arguments, with_defaults
from anysize.training.config import Resize
from anysize.training.optimizer_state import require_growth, require_recipe, require_state
from anysize.training.start import folder_of, plan_of, require_same_vocabulary, tokenizer_bytes

if TYPE_CHECKING:
    from anysize.calibration.scores import Scores
    from anysize.io.reader import TensorSource


def models_of_arms(config: CompareConfig, source: TensorSource) -> dict[str, TensorSource]:
    """Return sources and teachers of single arms by name; raise InputError for those that would see other tokens."""
    mine, understood = tokenizer_bytes(folder_of(source)), understand(source.config)
    others: dict[str, TensorSource] = {}
    for name in config.arms:
        for other in config.models_of(name):
            others[other] = tensors = others.get(other) or open_checkpoint(other)
            with named(name):
                require_same_vocabulary(understood, understand(tensors.config), other)
            if tokenizer_bytes(folder_of(tensors)) != mine:
                raise InputError(
                    f"arm '{name}': the tokenizer of '{other}' is not that of '{config.source}', so the arms would not "
                    "see the same tokens"
                )
            if understood.architecture.modality == "image":
                ours, theirs = (image_processor_of(folder_of(t), understand(t.config)) for t in (source, tensors))
                require_same_images(ours, theirs, f"'{config.source}' and '{other}' of arm '{name}'")
    return others


def target_of(config: CompareConfig, source: SourceConfig) -> SourceConfig:
    """Return the config that all arms have, that of a plan which needs no data; raise SizeError where it is none."""
    if config.target.vocab_size not in (None, source.sizes.get("vocab")):
        raise InputError("target.vocab_size: all arms and the teacher share the source's vocabulary")

    def made_of(source: str, layers: str, stream_scale: float = 1.0, *, untie: bool = False) -> SourceConfig:
        sizes = config.target.model_dump()
        resize = Resize(source=source, **sizes, layers=layers, stream_scale=stream_scale, untie=untie)
        return understand(plan_of(resize.sizes_alone(), None, quiet).target_config)

    first = next(iter(config.arms.values()))
    target = made_of(config.source, first.layers)
    for name, arm in config.arms.items():
        own = (arm.source or config.source, arm.layers, arm.stream_scale)
        if arm.random or (own, arm.untie) == ((config.source, first.layers, 1.0), False):
            continue
        with named(name):
            made = made_of(*own, untie=arm.untie)
        if made.sizes != target.sizes:
            listed = "" if arm.layers == "auto" else f" with layers '{arm.layers}'"
            raise InputError(
                f"arm '{name}': target makes {_told(made)} of '{own[0]}'{listed} and {_told(target)} of "
                f"'{config.source}', and all arms have the same sizes: name each size"
            )
    return target


@contextmanager
def named(arm: str) -> Generator[None]:
    """While active, what is refused says of which arm it is."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"arm '{arm}': {error}") from error


def _told(config: SourceConfig) -> str:
    return ", ".join(f"{name} {size}" for name, size in public_sizes(config).items())


def require_trainable(config: CompareConfig) -> None:
    """Refuse arguments that no run could have, and optimizers that are to go on with what no source has left."""
    from anysize.training.loop import require_shards  # noqa: PLC0415 - it needs transformers' trainer

    for name, arm in config.arms.items():
        given = with_defaults(config.training_of(name))
        given |= {**fixed_arguments(""), "eval_strategy": "steps", "eval_steps": 1}
        made = [training_arguments({**given, "learning_rate": r}, f"arm {name}") for r in config.rates_of(name)]
        for args in made:
            require_buildable(args, f"arm {name}")
        with named(name):
            for args in made:
                require_recipe(arm.recipe, args)
                require_shards(args)
            if arm.distill is not None:
                arm.distill.require_room(config.steps_of(name))
                arm.distill.require_prompts(config.data.sequence_length)
            if arm.recipe.optimizer_state == "carried":
                require_state(Path(folder_of(open_checkpoint(arm.source or config.source))), made[0], arm.recipe)


class _ScoresMissingError(Exception):
    """A plan came as far as its scores: nothing but these is missing."""


def _no_scores_yet() -> Scores:
    raise _ScoresMissingError


def require_plannable(config: CompareConfig, target: SourceConfig) -> None:
    """Refuse arms whose plan cannot be made, as far as that is known before any calibration."""
    for name, arm in config.arms.items():
        if arm.random:
            continue
        scores = _no_scores_yet if takes_scores(config, name, target) else None
        with named(name):
            source = understand(open_checkpoint(arm.source or config.source).config)
            require_growth(arm.recipe, source, target, untie=arm.untie)
        with suppress(_ScoresMissingError), named(name):
            plan_of(config.resize_of(name, config.seeds[0]), scores, quiet)
