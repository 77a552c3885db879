"""Compare two stock transformers models as their users would run them: logits, padding, cache, generation, reload.

Both are loaded in float32 whatever they are stored in, so that what is measured is the weights. Every figure stands
beside the same figure for a deliberately wrong target (its embedding turned by one row).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anysize.config import read_config
from anysize.io.models import building, config_of, model_class, quiet_transformers
from anysize.io.whole import scratch_folder
from anysize.proof.distance import kl_nats, logit_error
from anysize.proof.precision import DoubleThroughout
from anysize.proof.verdict import Check, Verification

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_KL_FLOOR = 1e-12
_UNIT = "of the logits' std"
_LENGTH = 64
_NEW_TOKENS = 24


def text_inputs(vocab_size: int, length: int) -> torch.Tensor:
    """Return int64 [3, length] seeded token ids; the lowest (special) and highest ids are among them."""
    ids = torch.randint(0, vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    ids[0, :4] = torch.arange(4) % vocab_size
    ids[1, -4:] = vocab_size - 1 - torch.arange(4) % vocab_size
    return ids


def _text_length(config: Any) -> int:
    window = getattr(config, "sliding_window", None) or 0
    # Past the window's edge where that is cheap: a mask that is off by one shows only there.
    return min(_longest(config), window + 16 if 0 < window <= 512 else _LENGTH)


def _longest(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or 10**9


def turned(inputs: Mapping[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """Return the inputs of every check's control: token ids one further, or images turned by one row.

    A target that reads them gives what a target whose embedding has its rows turned by one would give.
    """
    return {
        name: (values + 1) % vocab_size if name == "input_ids" else values.roll(1, dims=-2)
        for name, values in inputs.items()
    }


Inputs = Mapping[str, torch.Tensor]
Logits = Callable[["PreTrainedModel", Inputs], torch.Tensor]


def _plain(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**inputs).logits


def _padded(side: str) -> Logits:
    def logits(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
        ids = inputs["input_ids"]
        pad = ids.shape[1] // 3
        mask = torch.ones_like(ids)
        (mask[1:, :pad] if side == "left" else mask[1:, -pad:]).zero_()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]

    return logits


def _cached(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """Feed one token at a time through the KV cache, the same tokens to both models."""
    ids = inputs["input_ids"]
    first = ids.shape[1] - 8
    out = model(input_ids=ids[:, :first], use_cache=True)
    steps, cache = [out.logits[:, -1]], out.past_key_values
    for position in range(first, ids.shape[1]):
        out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits[:, -1])
        cache = out.past_key_values
    return torch.stack(steps, 1)


def _generated(model: PreTrainedModel, prompt: torch.Tensor, vocab: int) -> torch.Tensor:
    from transformers import GenerationConfig  # noqa: PLC0415

    # Only the source's tokens may be chosen: rows added to the vocabulary take part in no comparison.
    added = list(range(vocab, model.config.vocab_size)) or None
    new_tokens = min(_NEW_TOKENS, _longest(model.config) - prompt.shape[1])
    # Both generate alike and to the end, whatever stands in a generation_config: penalties, lists of end tokens.
    before, plain = model.generation_config, GenerationConfig(pad_token_id=0)
    generate: Any = model.generate
    model.generation_config = plain
    try:
        return generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
            suppress_tokens=added,
        )  # fmt: skip
    finally:
        model.generation_config = before


@contextmanager
def rounded_once(model: PreTrainedModel, stored: torch.dtype) -> Generator[None]:
    """While active, every weight carries one rounding to `stored`, as scaling it by 1.25 and storing it leaves it."""
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    for parameter, weight in kept:
        parameter.data = (weight * 1.25).to(stored).to(weight.dtype) / 1.25
    try:
        yield
    finally:
        for parameter, weight in kept:
            parameter.data = weight


class Comparison:
    """Two loaded models, the tolerance that their stored precision allows, and how many tokens both speak."""

    def __init__(
        self,
        source: PreTrainedModel,
        target: PreTrainedModel,
        stored: torch.dtype,
        *,
        exact: bool = True,
        num_tokens: int | None = None,
    ) -> None:
        self.source, self.target, self.exact = source, target, exact
        self.stored, self.tolerance = stored, TOLERANCE[stored]
        self.vocab_size: int = num_tokens or getattr(source.config, "vocab_size", 0)
        self.is_text = hasattr(source.config, "vocab_size") and source.get_output_embeddings() is not None

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return seeded inputs that both models accept."""
        if self.is_text:
            return {"input_ids": text_inputs(self.vocab_size, _text_length(self.source.config))}
        size, channels = self.source.config.image_size, self.source.config.num_channels
        return {"pixel_values": torch.randn((3, channels, size, size), generator=torch.Generator().manual_seed(0))}

    def check(self, name: str, what: str, logits: Logits) -> list[Check]:
        """Return the logit check (and the KL check) of one way of running both models, each with its control."""
        inputs = self.inputs()
        wanted, got = logits(self.source, inputs), logits(self.target, inputs)
        wrong = logits(self.target, turned(inputs, self.vocab_size))
        # Logits that differ by d have a KL of about d^2 / 2: the same allowance, in nats.
        kl_tolerance = max(_KL_FLOOR, (self.tolerance * float(wanted.double().std())) ** 2)
        return [
            Check(name=name, what=what, unit=_UNIT, measured=logit_error(wanted, got), tolerance=self.tolerance,
                  control=logit_error(wanted, wrong), required=self.exact),
            Check(name=f"{name} KL", what=what, unit="nats/token" if self.is_text else "nats/image",
                  measured=kl_nats(wanted, got), tolerance=kl_tolerance, control=kl_nats(wanted, wrong),
                  required=self.exact),
        ]  # fmt: skip

    @torch.no_grad()
    def run(self, *, full: bool) -> Verification:
        """Return the checks: logits, cache and greedy text, and when `full` padding, reload and bfloat16 as well."""
        inputs = self.inputs()
        self.allow_for_rounding(inputs)
        checks = self.check("logits", "plain forward", _plain)
        if self.stored is torch.float32 and checks[0].measured > self.tolerance:
            self.tolerance = max(self.tolerance, 2 * self.single_precision(inputs))
            checks = self.check("logits", "plain forward", _plain)
        if self.is_text:
            checks += self.check("cache", "one token at a time through the KV cache", _cached)[:1]
            checks.append(self.greedy(inputs["input_ids"][:1, :8]))
        if full and self.is_text:
            for side in ("left", "right"):
                checks += self.check(f"{side} padding", f"two of three rows padded on the {side}", _padded(side))[:1]
        if full:
            checks += [self.reloaded(inputs), self.half(inputs)]
        return Verification(checks=tuple(checks))

    def allow_for_rounding(self, inputs: Inputs) -> None:
        """Raise the tolerance to twice what one rounding of every weight does to the source itself.

        How far half precision moves logits depends on the model, so a fixed figure would refuse sensitive ones.
        """
        if self.stored in (torch.float16, torch.bfloat16):
            wanted = _plain(self.source, inputs)
            with rounded_once(self.source, self.stored):
                self.tolerance = max(self.tolerance, 2 * logit_error(wanted, _plain(self.source, inputs)))

    def single_precision(self, inputs: Inputs) -> float:
        """Return how far the source's logits are from those that it computes in double precision."""
        single = _plain(self.source, inputs)
        try:
            with DoubleThroughout():
                return logit_error(_plain(self.source.double(), inputs), single)
        finally:
            # Single precision, once doubled, comes back as it was.
            self.source.float()

    @torch.no_grad()
    def run_streamed(self) -> Verification:
        """Return the checks that read each weight once a model: what models larger than the memory can afford."""
        return Verification(checks=tuple(self.check("logits", "plain forward, weights streamed from disk", _plain)))

    def greedy(self, prompt: torch.Tensor) -> Check:
        """Return how many greedy tokens differ; the control goes on from the turned prompt."""
        vocab = self.vocab_size
        with quiet_transformers():
            wanted, got = _generated(self.source, prompt, vocab), _generated(self.target, prompt, vocab)
            wrong = _generated(self.target, turned({"input_ids": prompt}, vocab)["input_ids"], vocab)
        wanted, got, wrong = (ids[:, prompt.shape[1] :] for ids in (wanted, got, wrong))
        allowed = 0.0 if self.tolerance <= 1e-5 else float(_NEW_TOKENS)
        return Check(
            name="greedy", what=f"{wanted.shape[1]} greedy tokens", unit="tokens that differ",
            measured=float((wanted != got).sum()), tolerance=allowed,
            control=float((wanted != wrong).sum()) or None, required=self.exact and allowed == 0,
        )  # fmt: skip

    def reloaded(self, inputs: Mapping[str, torch.Tensor]) -> Check:
        """Return whether save_pretrained and from_pretrained give the target back bit by bit."""
        before = self.target(**inputs).logits
        with scratch_folder() as folder, quiet_transformers():
            self.target.save_pretrained(folder)
            again = load(folder, type(self.target).__name__)
        after = again(**inputs).logits
        wrong = again(**turned(inputs, self.vocab_size)).logits
        return Check(
            name="reload",
            what="logits after save and reload",
            unit=_UNIT,
            measured=logit_error(before, after),
            tolerance=0.0,
            control=logit_error(before, wrong),
        )

    def half(self, inputs: Mapping[str, torch.Tensor]) -> Check:
        """Return how far the two drift apart when both run in bfloat16; told, not required."""
        cast = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
        # On copies: going there and back would leave both models rounded for whoever looks at them next.
        wanted, got = (copy.deepcopy(model).bfloat16()(**cast).logits for model in (self.source, self.target))
        return Check(name="bfloat16", what="both run in bfloat16", unit=_UNIT, measured=logit_error(wanted, got),
                     tolerance=0.15, required=False)  # fmt: skip


def load(
    folder: Path, class_name: str, *, scratch: Path | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a checkpoint folder as a plain transformers model in float32 (or another dtype), on the CPU.

    Raises ArchitectureError where transformers cannot build it.

    With `scratch`, weights stay on disk and each module's are read when it runs: memory is bounded by one module.
    """
    placed: dict[str, Any] = {} if scratch is None else {"device_map": {"": "disk"}, "offload_folder": str(scratch)}
    config = config_of(read_config(folder))
    with quiet_transformers(), building(class_name):
        model = model_class(class_name).from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, **placed
        )
    return model.eval()
