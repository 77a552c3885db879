"""Between loaded models and named tensors, in the names of the disk: transformers renames some of them in memory."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anysize.arch import table
from anysize.errors import ArchitectureError, InputError
from anysize.io.dtypes import SAFETENSORS
from anysize.io.reader import TensorInfo, headers_sha256, sha256_json
from anysize.vocabulary.tokenizer_file import TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How a config may say that attention is run. The rest is for speed alone, in half precision: transformers chooses then.
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_ATTENTION = (None, "eager", "sdpa")
_OTHER_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# What a config that makes no sense makes transformers raise once a model is built of it.
_UNBUILT = (
    KeyError, TypeError, ValueError, RuntimeError, AssertionError, IndexError, AttributeError, ImportError
)  # fmt: skip


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence transformers' loading bars and notes while our own output is on the screen."""
    from transformers.utils import logging  # noqa: PLC0415

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def tokenizer_of(source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside a checkpoint; raise InputError where there is none."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        with quiet_transformers():
            # Told, because where nothing is told, transformers asks on the terminal, and runs code after a "y".
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer makes transformers raise
        why = " ".join(str(error).split())[:200]
        if "custom code" in str(error):
            raise InputError(
                f"the tokenizer of '{source}' is a class of its own, whose code is never run: delete auto_map and "
                "tokenizer_class from its tokenizer_config.json, and tokenizer.json alone is read"
            ) from error
        raise InputError(
            f"'{source}' has no tokenizer that transformers can read, and text needs one: {why}"
        ) from error


def other_ids(one: str, other: str) -> str:
    """Return, for a sentence, which words have other ids in the tokenizer of another folder; "" where none has.

    Words that only one of them has do not count. Raises InputError where one has no tokenizer.
    """
    places = [Path(folder) / TOKENIZER for folder in (one, other)]
    if all(place.is_file() for place in places) and places[0].read_bytes() == places[1].read_bytes():
        return ""
    known, heard = tokenizer_of(one).get_vocab(), tokenizer_of(other).get_vocab()
    wrong = [word for word, token in sorted(known.items(), key=itemgetter(1)) if heard.get(word, token) != token]
    if not wrong:
        return ""
    first = f"{wrong[0]!r} is {heard[wrong[0]]} instead of {known[wrong[0]]}"
    return f"{len(wrong):,} tokens have other ids there ({first})"


def model_class(name: str) -> type[PreTrainedModel]:
    """Return a model class of transformers by name."""
    import transformers  # noqa: PLC0415

    return getattr(transformers, name)


def _without_attention(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config that names no way to run attention but those of torch: kernels come from a hub.

    Raises ArchitectureError for a way that transformers does not have, above all one named after a repository.
    """
    found = copy.deepcopy(dict(raw))
    for key in _ATTENTION_KEYS:
        named = found.get(key)
        if named in _ATTENTION:
            continue
        if named not in _OTHER_ATTENTION:
            raise ArchitectureError(
                f"the config's {key} is {named!r}, wanted one of {', '.join((*_ATTENTION[1:], *_OTHER_ATTENTION))}: "
                "remove it there"
            )
        del found[key]
    return found


@contextmanager
def building(class_name: str) -> Generator[None]:
    """While active, whatever transformers raises of a config that it cannot build is an ArchitectureError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _UNBUILT as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ArchitectureError(f"transformers cannot build a {class_name} of this config: {why}") from error


def config_of(raw: Mapping[str, Any]) -> Any:
    """Return the config object that transformers makes of a config dict; raise ArchitectureError where it refuses."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415
    from transformers import CONFIG_MAPPING  # noqa: PLC0415

    raw = _without_attention(raw)
    if "expert" in table(raw["model_type"]).axes:
        # Experts one by one, in any precision and at any size; the fused kernels want rows of a multiple of 16 bytes.
        raw["_experts_implementation"] = "eager"
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ArchitectureError(f"transformers refuses the config: {' '.join(str(error).split())}") from error


def new_model(class_name: str, raw: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Return a freshly initialized model of a config; raise ArchitectureError where transformers cannot build one."""
    config = config_of(raw)
    with quiet_transformers(), building(class_name):
        return model_class(class_name)._from_config(config, dtype=dtype)


def empty_model(class_name: str, raw: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model of a config whose parameters are on no device; what it computes for itself is there.

    Raises ArchitectureError where transformers cannot build one.
    """
    from accelerate import init_empty_weights  # noqa: PLC0415

    with init_empty_weights():
        return new_model(class_name, raw, torch.float32).eval()


def build_model(
    class_name: str, raw: Mapping[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """Return a plain transformers model with these weights, named as on disk; missing or extra tensors are our bug."""
    with quiet_transformers():
        loaded: Any = model_class(class_name).from_pretrained(
            None, config=config_of(raw), state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    model, info = loaded
    problems = {k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not problems, f"transformers and the table disagree about the tensors of {class_name}: {problems}"
    return model.eval()


def disk_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's weights under the names that save_pretrained would write, tied copies left out."""
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, state).items()}


def paths_by_disk_name(model: PreTrainedModel) -> dict[str, str]:
    """Return the path in memory of every module, under the path that its parameters have on disk."""
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    found = {path: path for path, _ in model.named_modules()}
    # Stand-ins without data, so that this works for weights that are left on disk: a rename hands the same one on.
    stand_ins = {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters()}
    owner = {id(stand_in): name.rpartition(".")[0] for name, stand_in in stand_ins.items()}
    for name, stand_in in revert_weight_conversion(model, dict(stand_ins)).items():
        if id(stand_in) in owner:
            found[name.rpartition(".")[0]] = owner[id(stand_in)]
            owner.pop(id(stand_in))
    # What is left is fused in memory (experts): the modules it is apart on disk all stand for the one that holds it.
    for name, stand_in in stand_ins.items():
        if id(stand_in) in owner:
            for apart in revert_weight_conversion(model, {name: stand_in}):
                found[apart.rpartition(".")[0]] = owner[id(stand_in)]
    return found


@dataclass(frozen=True)
class Fused:
    """Where a tensor on disk lies in a parameter that memory fuses of several: an expert, and which part of it."""

    parameter: str
    expert: int
    part: int
    num_parts: int

    def within(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the place itself, of a parameter [experts, rows, columns]."""
        return whole[self.expert].chunk(self.num_parts)[self.part]


def fused_by_disk_name(model: PreTrainedModel) -> dict[str, Fused]:
    """Return where every tensor on disk lies that is one of several in a parameter (experts), by its name on disk."""
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    found: dict[str, Fused] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() != 3:
            continue
        apart = list(revert_weight_conversion(model, {name: torch.empty(parameter.shape, device="meta")}))
        num_parts, rest = divmod(len(apart), len(parameter))
        assert not rest, f"{name} is fused of {len(apart)} tensors of {len(parameter)} experts"
        # All experts' first parts come first, as they are concatenated.
        found |= {
            disk: Fused(name.rpartition(".")[2], number % len(parameter), number // len(parameter), num_parts)
            for number, disk in enumerate(apart)
        }
    return found


class LoadedModel:
    """A model in memory as a source of tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.location = model.name_or_path or type(model).__name__
        raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        # As a file would have it: a plan that was saved has names of labels under strings.
        self.config: Mapping[str, Any] = json.loads(json.dumps(raw))
        self._state = disk_tensors(model)
        self.identity = uuid.uuid4().hex
        self.tensors = {
            name: TensorInfo(SAFETENSORS[tensor.dtype], tuple(tensor.shape)) for name, tensor in self._state.items()
        }

    @property
    def config_sha256(self) -> str:
        return sha256_json(self.config)

    @property
    def headers_sha256(self) -> str:
        return headers_sha256(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].cpu()


class NamedTensors:
    """A config and tensors in a dict as a source; what the miniature is made of."""

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
        self.location = "tensors in memory"
        self.config: Mapping[str, Any] = config
        self._state = state
        self.identity = uuid.uuid4().hex
        self.tensors = {name: TensorInfo(SAFETENSORS[t.dtype], tuple(t.shape)) for name, t in state.items()}

    @property
    def config_sha256(self) -> str:
        return sha256_json(self.config)

    @property
    def headers_sha256(self) -> str:
        return headers_sha256(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._state[name]
