"""What a family's table may say, and the checks that every table passes before it is used.

A table is data: one `ARCHITECTURE = Architecture(...)` in a module named after the `model_type`. It never mentions
presets or operators; the planner derives those from the arrows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from anysize.arch.expression import names
from anysize.notation import Arrow, parse

AXES = ("vocab", "hidden", "ffn", "kv", "group", "head", "expert", "layer")

# Keys that every family may hold with any value: none of them changes the function that the weights compute.
COMMON_KEPT: Mapping[str, str] = {
    "_name_or_path": "where the config came from",
    "_num_labels": "read by heads of other classes only",
    "architectures": "checked against the table's classes",
    "model_type": "chooses the table",
    "transformers_version": "provenance",
    "dtype": "storage only; the target's follows its tensors",
    "torch_dtype": "old name of dtype",
    "use_cache": "speed only",
    "bos_token_id": "tokenizer",
    "eos_token_id": "tokenizer",
    "pad_token_id": "tokenizer",
    "sep_token_id": "tokenizer",
    "decoder_start_token_id": "tokenizer",
    "output_attentions": "what forward returns",
    "output_hidden_states": "what forward returns",
    "return_dict": "what forward returns",
    "use_return_dict": "what forward returns",
    "is_encoder_decoder": "fixed by the class",
    "problem_type": "loss only",
    "id2label": "label names",
    "label2id": "label names",
    "num_labels": "label count, unchanged",
    "chunk_size_feed_forward": "memory only",
    "initializer_range": "initialization only; also the scale of fresh capacity",
    "attention_dropout": "training only",
    "attn_implementation": "speed only",
    "_attn_implementation": "speed only",
    "_attn_implementation_autoset": "speed only",
    "auto_map": "remote code, which is never run",
    "task_specific_params": "generation defaults",
    "_from_model_config": "provenance",
    "tokenizer_class": "tokenizer",
    "prefix": "generation defaults",
    "max_length": "generation defaults",
    "min_length": "generation defaults",
    "do_sample": "generation defaults",
    "temperature": "generation defaults",
    "top_k": "generation defaults",
    "top_p": "generation defaults",
    "gradient_checkpointing": "memory only",
    "unsloth_fixed": "provenance",
    "unsloth_version": "provenance",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter pattern: its arrow, the config condition under which it exists, and its run-time multiplier.

    `times` is an axis whose square root multiplies the output at run time (Gemma's embeddings).
    """

    arrow: str
    when: str = "True"
    times: str = ""

    @property
    def parsed(self) -> Arrow:
        return parse(self.arrow)


@dataclass(frozen=True)
class Norm:
    """One normalization: which dim its statistics span, and how its gain is stored.

    `kind`: "rms" or "layer". `reads`/`writes`: dims in arrow notation; `norm(hidden)` on the right for a norm that
    opens a branch, `hidden` for one that ends it. `gain`: "w" or "1+w", stored where `stored` holds; the bias
    exists where `bias` holds too. `after_sum`: the norm stands on the residual stream itself (post-norm).
    """

    kind: str
    reads: str
    writes: str
    gain: str = "w"
    bias: str = "False"
    when: str = "True"
    stored: str = "True"
    after_sum: str = "False"


@dataclass(frozen=True)
class Rule:
    """A size rule of the family: an expression over the target's config that must hold, and the family's reason."""

    holds: str
    reason: str


@dataclass(frozen=True)
class Architecture:
    """One family, data only.

    classes: model classes of transformers whose checkpoints fit. axes: axis -> its size over config keys. keys: axis
    (or "heads", the product kv * group) -> the config key that holds it. parameters and norms: on-disk name
    patterns with `{layer}` and, of experts, `{expert}`. base: the prefix that headless checkpoints lack.
    final_norm: the norm that the head reads. tied: head -> embedding, under `tied_when`. follows: key -> key that
    it stays equal to where it was. kept: config keys that resizing cannot disturb, with the reason. defaults:
    transformers' values for keys that the table reads and a config may omit. per_layer: config lists with one
    entry a layer. dropped: tensors that may be present and are not weights, with the reason. depth_locked:
    condition -> why depth cannot change exactly. fixed_score_scale: condition under which attention's scale does
    not follow the head width. stream_eps: the config key of the eps of the norms. renamed: older spelling of a
    config key -> the one that transformers writes today.
    """

    model_type: str
    classes: tuple[str, ...]
    axes: Mapping[str, str]
    keys: Mapping[str, str]
    parameters: Mapping[str, Parameter]
    norms: Mapping[str, Norm]
    kept: Mapping[str, str]
    base: str
    final_norm: str
    rotary: bool = True
    tied: Mapping[str, str] = field(default_factory=dict)
    tied_when: str = "tie_word_embeddings"
    rules: tuple[Rule, ...] = ()
    refused: tuple[Rule, ...] = ()
    follows: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    per_layer: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    depth_locked: Mapping[str, str] = field(default_factory=dict)
    fixed_score_scale: str = "False"
    init_std: str = "initializer_range"
    stream_eps: str = ""
    modality: str = "text"
    renamed: Mapping[str, str] = field(default_factory=dict)

    def derive(self, model_type: str, classes: tuple[str, ...], **changes: Any) -> Architecture:
        """Return a table for a family that differs from this one in the named fields only."""
        return replace(self, model_type=model_type, classes=classes, **changes)

    @property
    def counts(self) -> str:
        """What examples are counted in: "tokens" or "images"."""
        return "images" if self.modality == "image" else "tokens"

    @property
    def handled_keys(self) -> frozenset[str]:
        """Config keys that the table's expressions read: resizing takes them into account."""
        texts = [*self.axes.values(), *(p.when for p in self.parameters.values()), self.tied_when, self.init_std]
        texts += [text for norm in self.norms.values() for text in (norm.when, norm.bias, norm.stored, norm.after_sum)]
        texts += [rule.holds for rule in (*self.rules, *self.refused)]
        texts += [*self.depth_locked, self.fixed_score_scale]
        found = {name for text in texts for name in names(text)}
        return frozenset(found | set(self.keys.values()) | set(self.follows) | set(self.per_layer))


def tensor_name(pattern: str, layer: int | None, expert: int | None = None) -> str:
    """Return the tensor name that a pattern has in one layer and for one expert; other patterns stay as they are."""
    return pattern.replace("{layer}", str(layer)).replace("{expert}", str(expert))


def is_per_layer(pattern: str) -> bool:
    """Whether a pattern names one tensor a layer."""
    return "{layer}" in pattern


def is_per_expert(pattern: str) -> bool:
    """Whether a pattern names one tensor for each expert of a layer."""
    return "{expert}" in pattern
