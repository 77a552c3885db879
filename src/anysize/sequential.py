"""Sequential readers: fit each layer of the target to the activations that the target itself produces.

Layer by layer, what reads a norm is fitted so that it reads what the source's norm gave, and what writes the residual
stream so that the target's stream lands on the source's, turned or selected like everything else. Each fit thereby also
takes out the error made so far, and the last kept layer before a gap takes over what the dropped layers did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from anysize.arch.schema import is_per_layer
from anysize.axis import AxesAt, AxisMap
from anysize.calibration.data import (
    Batch,
    DataOptions,
    batches_again,
    num_places,
    token_batches,
    tokenizer_of,
    tokenizer_place,
)  # fmt: skip
from anysize.calibration.replay import Layers
from anysize.calibration.scores import Record
from anysize.calibration.sites import widest_site
from anysize.config import SourceConfig, understand
from anysize.dense import Fitted
from anysize.devices import device_with
from anysize.dims import compose
from anysize.executor import DimMaps, target_tensor
from anysize.fit import Fit, least_squares
from anysize.io.reader import TensorSource
from anysize.progress import Progress
from anysize.recipe import Plan
from anysize.removal import RIDGE
from anysize.tensors import Expected, expected_tensors, num_parameters
from anysize.vocabulary.tokenizer_file import cut_tokenizer

# What the fits are made on; more changes little once every site has seen several times its width.
TOKENS, TOKENS_A_COORDINATE = 32_768, 8
IMAGES = 512


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1]).double()


@dataclass
class _Sums:
    """E[y z^T] and E[z z^T], added up over batches on whatever device these are."""

    cross: torch.Tensor | float = 0.0
    moments: torch.Tensor | float = 0.0
    count: int = 0

    def add(self, y: torch.Tensor, z: torch.Tensor) -> None:
        self.cross = self.cross + y.T @ z
        self.moments = self.moments + z.T @ z
        self.count += len(z)

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E[y z^T] and E[z z^T] on the CPU."""
        assert isinstance(self.cross, torch.Tensor)
        assert isinstance(self.moments, torch.Tensor)
        return (self.cross / self.count).cpu(), (self.moments / self.count).cpu()

    def towards(self, prior: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return the least-squares map on the CPU, pulled towards a prior instead of towards zero."""
        cross, moments = self.means()
        return prior + least_squares(cross - prior @ moments, moments, ridge)


class Sequential:
    """Refits the readers and writers of every layer of a target that was fitted from scores."""

    def __init__(
        self,
        source: Layers,
        made: Layers,
        fit: Fit,
        *,
        ridge: float = RIDGE,
    ) -> None:
        self.config, self.fit, self.fitted, self.write = fit.config, fit, fit.made, fit.write
        self.scores, self.steps, self.axes = fit.scores, fit.steps, fit.axes
        self.source, self.made = source, made
        self.expected, self.ridge = made.expected, ridge

    def run(self, batches: list[Batch], progress: Progress) -> Fitted:
        """Return the fit with everything refitted that layers read and write; `batches` are in the target's ids."""
        self.source.start([in_source_ids(batch, self.axes) for batch in batches])
        self.made.start(batches)
        self.source.skip(range(self.steps[0].source))
        for layer, step in enumerate(self.steps):
            self._layer(layer, step.source)
            progress("fit", layer + 1, len(self.steps))
        self._final()
        return self.fitted

    @torch.no_grad()
    def _final(self) -> None:
        """Refit what reads the last norm to the stream that the target ends with."""
        module = self.config.architecture.final_norm
        key = f"{module}:read"
        if module not in self.source.paths:
            return
        sums = _Sums()
        norms = self.source.module(module), self.made.module(module)
        with self.source.holding(self._of(self.source, module)), self.made.holding(self._of(self.made, module)):
            for before, after in zip(self.source.stream, self.made.stream, strict=True):
                sums.add(_rows(norms[0](before)) - self._shift(key), _rows(norms[1](after)))
        if key in self.fitted.dense:
            reader = sums.towards(torch.from_numpy(self.fitted.dense[key]).double(), self.ridge)
            self.fitted.store(key, reader.numpy())
        elif self.config.tied:
            self._tied(module, sums)

    def _shift(self, key: str) -> torch.Tensor | float:
        """Return what biases give in the place of a reader, so that it is not fitted to give that as well."""
        shift = self.fit.shifts.get(key)
        return 0.0 if shift is None else shift.to(self.made.device)

    @staticmethod
    def _of(layers: Layers, module: str) -> list[Expected]:
        """Return the tensors of one module."""
        return [e for e in layers.expected.values() if e.name.rpartition(".")[0] == module]

    def _tied(self, module: str, sums: _Sums) -> None:
        """Fit the gain before a tied head to the target's own stream; a bias stays as it was fitted."""
        name = f"{module}.weight"
        norm = self.config.architecture.norms[module]
        if f"{module}.bias" in self.expected or f"{name}:value" not in self.fitted.dense:
            return
        gain = torch.from_numpy(self.fitted.dense[f"{name}:value"]).double() + (1.0 if norm.gain == "1+w" else 0.0)
        cross, moments = sums.means()
        unit = moments / gain[:, None] / gain
        reader = least_squares(cross / gain, unit, self.ridge)
        fitted, _ = self.fit.tied_gain(reader, unit, torch.zeros(len(reader), dtype=reader.dtype))
        self.fitted.store(f"{name}:value", (fitted - 1 if norm.gain == "1+w" else fitted).numpy())

    def _stages(self, layer: int) -> list[tuple[str, list[str]]]:
        """Return the stages of a layer in the order they run: ("reads", modules) or ("writes", [module])."""
        stages: list[tuple[str, list[str]]] = []
        by_norm: dict[str, list[str]] = {}
        for name, expected in self.expected.items():
            if expected.layer != layer or not name.endswith(".weight") or len(expected.arrow.reads) != 1:
                continue
            module = name.removesuffix(".weight")
            if str(expected.arrow.writes[0]) == "hidden":
                stages.append(("writes", [module]))
                continue
            if str(expected.arrow.reads[0]) != "norm(hidden)":
                continue
            site = f"{self._at_source(module, layer)}:in"
            norm = self.scores.record.feeds.get(self.scores.record.aliases.get(site, site), site)
            if norm not in by_norm:
                by_norm[norm] = []
                stages.append(("reads", by_norm[norm]))
            by_norm[norm].append(module)
        return stages

    def _at_source(self, name: str, layer: int) -> str:
        return name.replace(f".{layer}.", f".{self.steps[layer].source}.", 1)

    def _layer(self, layer: int, source: int) -> None:
        stages = self._stages(layer)
        old = {module: self._at_source(module, layer) for _, modules in stages for module in modules}
        writers = [modules[0] for kind, modules in stages if kind == "writes"]
        with self.source.layer(source):
            # What the source does in this layer, once for all stages.
            reads_at: list[dict[str, torch.Tensor]] = []
            wrote_at: list[dict[str, torch.Tensor]] = []
            after: list[torch.Tensor] = []
            with (
                self.source.tapped(list(old.values()), "in") as read,
                self.source.tapped([old[w] for w in writers], "out") as wrote,
            ):
                for batch in range(len(self.source.calls)):
                    after.append(self.source.replay(source, batch))
                    reads_at.append({m: read[old[m]] for m in old if m not in writers})
                    wrote_at.append({w: wrote[old[w]] for w in writers})
            goal = self._before_next(layer, source, after)
            with self.made.layer(layer):
                for kind, modules in stages:
                    if kind == "reads":
                        self._fit_readers(layer, modules, reads_at)
                    else:
                        self._fit_writer(layer, modules[0], writers, wrote_at, goal)
                for batch in range(len(self.made.calls)):
                    self.made.stream[batch] = self.made.replay(layer, batch)
        self.source.stream = goal

    def _before_next(self, layer: int, source: int, after: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the source's stream where the next kept layer reads it: past the layers that are dropped."""
        last = len(self.source.layers) if layer + 1 == len(self.steps) else self.steps[layer + 1].source
        kept, self.source.stream = self.source.stream, after
        self.source.skip(range(source + 1, last))
        found, self.source.stream = self.source.stream, kept
        return found

    def _fit_readers(self, layer: int, modules: list[str], reads_at: list[dict[str, torch.Tensor]]) -> None:
        key = self.fitted.fields.get(f"{modules[0]}.weight", {}).get("reader")
        if not key:
            return
        sums = _Sums()
        with self.made.tapped(modules[:1], "in") as seen:
            for batch, reads in enumerate(reads_at):
                self.made.replay(layer, batch)
                sums.add(_rows(reads[modules[0]]) - self._shift(key), _rows(seen[modules[0]]))
        reader = sums.towards(torch.from_numpy(self.fitted.dense[key]).double(), self.ridge)
        self.fitted.store(key, reader.numpy())
        for module in modules:
            name = f"{module}.weight"
            expected = self.expected[name]
            rows = compose(expected.arrow.writes[0], AxesAt(self.axes, layer), writes=True)
            weight = self.source.module(self._at_source(module, layer)).weight.detach().double().cpu()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            weight = weight.T if expected.arrow.reads_first else weight
            self._set(module, weight[torch.from_numpy(rows.index)] @ reader, transposed=expected.arrow.reads_first)

    def _set(self, module: str, weight: torch.Tensor, *, transposed: bool) -> None:
        parameter: Any = self.made.module(module).weight
        with torch.no_grad():
            parameter.copy_((weight.T if transposed else weight).to(parameter))

    def _fit_writer(
        self,
        layer: int,
        module: str,
        writers: list[str],
        wrote_at: list[dict[str, torch.Tensor]],
        goal: list[torch.Tensor],
    ) -> None:
        """Fit one writer so that the stream after it lands on the source's there, or, for the last, on the goal."""
        number, write = writers.index(module), self.write.to(self.made.device)
        sums = _Sums()
        with self.made.tapped([module], "in") as seen, self.made.tapped(writers[:number], "out") as wrote:
            for batch, source_wrote in enumerate(wrote_at):
                self.made.replay(layer, batch)
                aim = goal[batch]
                if number + 1 < len(writers):
                    aim = self.source.stream[batch] + sum(source_wrote[w] for w in writers[: number + 1])
                here = self.made.stream[batch] + sum(wrote[w] for w in writers[:number])
                read = _rows(seen[module])
                ones = read.new_ones(len(read), 1)
                sums.add(_rows(aim) @ write.T - _rows(here), torch.cat([read, ones], 1) if self._bias(module) else read)
        parameter: Any = self.made.module(module)
        transposed = self.expected[f"{module}.weight"].arrow.reads_first
        prior = parameter.weight.detach().double().cpu()
        prior = prior.T if transposed else prior
        if self._bias(module):
            prior = torch.cat([prior, parameter.bias.detach().double().cpu()[:, None]], 1)
        fitted = sums.towards(prior, self.ridge)
        weight = fitted[:, :-1] if self._bias(module) else fitted
        self._set(module, weight, transposed=transposed)
        self._keep(f"{module}.weight", weight.T if transposed else weight)
        if self._bias(module):
            with torch.no_grad():
                parameter.bias.copy_(fitted[:, -1].to(parameter.bias))
            self._keep(f"{module}.bias", fitted[:, -1])

    def _bias(self, module: str) -> bool:
        return f"{module}.bias" in self.expected

    def _keep(self, name: str, values: torch.Tensor) -> None:
        # The whole tensor is fitted now; what its columns were fitted by is of no use any more.
        self.fitted.dense.pop(f"{name}:read", None)
        stored = self.fitted.store(f"{name}:value", values.contiguous().numpy())
        self.fitted.fields[name] = {"value": stored, "factor": 1.0}


def in_source_ids(batch: Batch, axes: Mapping[str, AxisMap]) -> Batch:
    """Return a batch of the target as the source has to read it: tokens under their old ids."""
    if "input_ids" not in batch or axes["vocab"].target_size >= axes["vocab"].source_size:
        return batch
    return {**batch, "input_ids": torch.from_numpy(axes["vocab"].index)[batch["input_ids"]]}


def most_items(config: SourceConfig) -> int:
    """Return how many tokens (or images) a source is run on at most."""
    images = config.architecture.modality == "image"
    return IMAGES if images else max(TOKENS, TOKENS_A_COORDINATE * widest_site(config.sizes))


def target_passes(target: SourceConfig) -> int:
    """Return how often each layer of a target is run while it is followed.

    Once for each norm that is read from, once for each matrix that writes, and at last to go on.
    """
    norms = [pattern for pattern, norm in target.architecture.norms.items()
             if norm.writes == "norm(hidden)" and is_per_layer(pattern) and target.holds(norm.when)]  # fmt: skip
    writers = [
        expected for name, expected in expected_tensors(target).items()
        if expected.layer == 0 and name.endswith(".weight") and len(expected.arrow.reads) == 1
        and str(expected.arrow.writes[0]) == "hidden"
    ]  # fmt: skip
    return len(norms) + len(writers) + 1


def working_bytes(config: SourceConfig, target: SourceConfig, record: Record) -> int:
    """Return about how many bytes a fit holds: the streams of the batches, a layer of each model at work, and its sums.

    Of a layer that is: its input, its output, what its norms give and its writers write in the source; its input and
    output in the target. While it runs on a batch: gate, up and their product, and twice the rows that a sum is made
    of, which like sums are in double precision. `record` is that of the scores, whose batches are read again.
    """
    count, sizes, made = most_items(config), config.sizes, target.sizes
    if config.architecture.modality == "image":
        count *= num_places(config, 0)
    streams = 4 * count * (6 * sizes["hidden"] + 2 * made["hidden"])
    layers = 4 * sum(num_parameters(c) // max(1, c.sizes["layer"]) for c in (config, target))
    widest, widest_made = widest_site(sizes), widest_site(made)
    batch = min(count, record.batch_size * num_places(config, record.sequence_length))
    working = batch * (4 * 3 * (sizes["ffn"] + made["ffn"]) + 8 * 2 * max(widest, widest_made))
    return streams + layers + working + 3 * 8 * widest_made**2


def batches_of(plan: Plan, tensors: TensorSource, fit: Fit) -> Iterator[Batch]:
    """Yield what both models read; where tokens are cut, text as the target's own tokenizer spells it."""
    record, limit = fit.scores.record, most_items(fit.config)
    if plan.kept_tokens is None:
        return batches_again(record, fit.config, tensors, limit=limit)
    # Whether the data are still those of the scores can be told from what the source makes of them, before it is cut.
    next(batches_again(record, fit.config, tensors, limit=limit))
    spoken = cut_tokenizer(tokenizer_of(tokenizer_place(tensors)), plan.kept_tokens)
    options = DataOptions(max(limit, record.sequence_length), record.sequence_length, record.batch_size, record.column)
    return token_batches(record.data, spoken, plan.kept_tokens.target_size, options)


def refit(plan: Plan, tensors: TensorSource, fit: Fit, progress: Progress) -> Fitted:
    """Return the fit of a plan, refitted layer by layer on the data that its scores were made of.

    In memory, of the accelerator where there is room on one, are one layer of each model in single precision, and the
    activations of the batches.
    """
    target = understand(plan.target_config)
    device = device_with(working_bytes(fit.config, target, fit.scores.record))
    maps, recipes = DimMaps(plan.axes, plan.dense), {recipe.name: recipe for recipe in plan.recipes}
    source = Layers(fit.config, lambda name: tensors.read(fit.names[name]), device)
    made = Layers(target, lambda name: target_tensor(recipes[name], tensors, maps, plan.seed), device)
    return Sequential(source, made, fit).run(list(batches_of(plan, tensors, fit)), progress)
