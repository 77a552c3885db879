"""Fit readers to what is kept: least-squares readers for selections and for principal directions, gains and biases.

With x what a reader of the source sees and z what the target offers in its place, S = E[x z^T](E[z z^T] + ridge)^-1.
For `hidden`, x = gain * n + bias with n the normalized stream, and z = R n / rms(R n): the target's own norm, gain 1
(or the kept gains), so that every gain of the source is folded into S. One R serves the whole model, because the
residual stream is shared. Under LayerNorm directions also take out the mean and land where the mean is zero, so that
the target's LayerNorm does nothing but divide (the mean is removed by the writers, as in 2401.15024); of a selection it
takes the mean of what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from anysize.arch.schema import Norm, Parameter, tensor_name
from anysize.axis import AxesAt, AxisMap
from anysize.calibration.scores import Scores
from anysize.calibration.sites import branch_ends, norm_sites, sites
from anysize.config import SourceConfig
from anysize.dense import Fitted
from anysize.devices import device_for_algebra, device_with
from anysize.dims import compose
from anysize.directions import directions, reading_metric
from anysize.io.reader import TensorSource
from anysize.layers import LayerStep
from anysize.notation import Dim, parse
from anysize.presets import has_norm_after_sum
from anysize.removal import RIDGE
from anysize.samples import require_samples
from anysize.shrink import ShrinkPreset
from anysize.stored import ScratchArrays
from anysize.tensors import Expected, expected_tensors, made_from, stored_source

WRITE_HIDDEN = "hidden"


def least_squares(cross: torch.Tensor, moments: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """Return S = cross (moments + ridge * mean diagonal)^-1, float64 [n, m], from E[x z^T] and E[z z^T].

    Where z is always zero, nothing can be read from it: S is zero.
    """
    level = moments.diagonal().mean()
    damping = torch.where(level > 0, ridge * level, torch.ones_like(level))
    damped = moments + damping * torch.eye(len(moments), dtype=moments.dtype)
    there = device_for_algebra(len(moments))
    return torch.linalg.solve(damped.to(there), cross.T.to(there)).T.to(moments.device)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """Return W^T W, float64 [n, n] on the CPU, of rows [..., n]."""
    there = device_with(3 * 8 * rows.numel())
    rows = rows.to(there, torch.float64)
    return (rows.T @ rows).cpu()


class Fit:
    """The fit of one plan: what is read at every cut site of every target layer.

    `turns` turns the residual stream even where none of it is cut, which proves that turning loses nothing. `on_disk`
    keeps what is fitted in a file, so that what is in memory does not grow with the number of layers.
    """

    def __init__(
        self,
        config: SourceConfig,
        target: SourceConfig,
        tensors: TensorSource,
        names: Mapping[str, str],
        scores: Scores,
        preset: ShrinkPreset,
        steps: tuple[LayerStep, ...],
        axes: Mapping[str, AxisMap],
        *,
        turns: bool = False,
        ridge: float = RIDGE,
        on_disk: bool = False,
    ) -> None:
        self.config, self.target, self.tensors, self.names = config, target, tensors, names
        self.scores, self.preset, self.steps, self.axes = scores, preset, steps, axes
        self.made = Fitted(dense=ScratchArrays()) if on_disk else Fitted()
        self.expected = expected_tensors(target)
        self.centred = any(n.kind == "layer" for n in config.architecture.norms.values() if n.writes == "norm(hidden)")
        hidden = axes["hidden"]
        self.ridge = ridge
        self.cuts_hidden = turns or hidden.target_size < hidden.source_size
        self.turns = turns or (self.cuts_hidden and preset.select == "principal")
        self.measures = preset.readers == "measured"
        require_samples(scores, config, target, preset, turned=turns)
        self.write = self._write()
        # What the target's norms divide by their RMS: a LayerNorm takes the mean of the kept coordinates out first.
        self.offered = self.write - self.write.mean(0) if self.centred else self.write
        # What biases took over of what a reader should give, by the reader's name.
        self.shifts: dict[str, torch.Tensor] = {}

    def _write(self) -> torch.Tensor:
        """Return R of `hidden`, float64 [m, n]."""
        hidden = self.axes["hidden"]
        if not self.turns:
            return torch.from_numpy(hidden.write_matrix())
        norms, total = norm_sites(self.config), 0.0
        for site in norms:
            total = total + self.scores.of(site.name, "second")
        assert isinstance(total, torch.Tensor)
        metric = reading_metric(self._read_at_norms(), self.config.architecture.final_norm)
        return directions(total / len(norms), hidden.target_size, centred=self.centred, metric=metric)

    def _read_at_norms(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield, norm by norm of the source: its module, W^T W, float64 [n, n], of all that reads it, with its gain
        folded in, and the second moment of what it gives before its gain."""
        readers: dict[str, list[Expected]] = {}
        final, record = self.config.architecture.final_norm, self.scores.record
        for expected in expected_tensors(self.config).values():
            if isinstance(expected.origin, Norm) or [str(dim) for dim in expected.arrow.reads] != ["norm(hidden)"]:
                continue
            site = f"{expected.name.removesuffix('.weight')}:in"
            module = final if expected.layer is None else record.feeds.get(record.aliases.get(site, site))
            if module is not None:
                readers.setdefault(module, []).append(expected)
        if self.config.tied:
            readers.setdefault(final, [])
        for module, read in readers.items():
            gram = self._gram(read)
            gain, _ = self._norm(module, self._origin(module))
            yield module, gain[:, None] * gram * gain, self.scores.of(f"{module}:norm", "second")

    def _gram(self, readers: list[Expected]) -> torch.Tensor:
        """Return W^T W, float64 [n, n], of tensors of the source that read `hidden`; of the tied head where none do."""
        if not readers:
            return _gram(self._tied_head())
        size = self.config.sizes["hidden"]
        found = torch.zeros(size, size, dtype=torch.float64)
        for expected in readers:
            weight = self.tensors.read(self.names[expected.name])
            found += _gram((weight if expected.arrow.reads_first else weight.T).reshape(size, -1).T)
        return found

    @property
    def embedding_scale(self) -> float:
        """What the target's embedding, which is its head as well, is multiplied by (see `Recipes.embedding_scale`)."""
        origin = self.expected[next(iter(self.config.architecture.tied.values()))].origin
        hidden = self.axes["hidden"]
        scaled = isinstance(origin, Parameter) and origin.times
        return (hidden.source_size / hidden.target_size) ** 0.5 if scaled else 1.0

    def run(self) -> Fitted:
        """Return the dense maps and what they change."""
        if self.turns:
            self.made.store(WRITE_HIDDEN, self.write.numpy())
            for name, expected in self.expected.items():
                if isinstance(expected.origin, Parameter) and any(str(d) == "hidden" for d in expected.arrow.writes):
                    self.made.put(name, writer=WRITE_HIDDEN)
        if self.cuts_hidden and not has_norm_after_sum(self.config):
            for layer, step in enumerate(self.steps):
                self._norms_of(layer, step.source)
            self._final()
        if self.cuts_hidden and not self.turns:
            self._branch_ends()
        for layer, step in enumerate(self.steps):
            self._norms_over_heads(layer, step.source)
        for name, expected in self.expected.items():
            if expected.layer is not None and len(expected.arrow.reads) == 1 and isinstance(expected.origin, Parameter):
                self._inner(name, expected, expected.arrow.reads[0])
        return self.made

    def _source_values(self, module: str, part: str) -> torch.Tensor | None:
        name = self.names.get(f"{module}.{part}")
        return None if name is None else self.tensors.read(name).double()

    def _norm(self, module: str, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (gain, bias) of a norm of the source, float64 [n]; 1 and 0 where none is stored."""
        size = self.config.sizes["hidden"]
        gain, bias = self._source_values(module, "weight"), self._source_values(module, "bias")
        if gain is None:
            gain = torch.ones(size, dtype=torch.float64)
        elif norm.gain == "1+w":
            gain = gain + 1
        return gain, torch.zeros(size, dtype=torch.float64) if bias is None else bias

    def _read_norm(
        self, site: str, norm: Norm, *, with_bias: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (S, gain, bias, E[z z^T]) for what reads one norm: x ~ S (gain * z + bias), z of unit RMS."""
        gain, bias = self._norm(site, norm)
        moments = self.scores.of(f"{site}:norm", "second")
        kept = self.offered @ moments @ self.offered.T
        # What is kept is smaller than the whole, and the target's norm makes up for it; all of it is as large.
        scale = float(kept.diagonal().mean().sqrt()) or 1.0 if len(kept) < len(moments) else 1.0
        unit = kept / scale**2
        size = len(self.write)
        one, zero = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        cross = gain[:, None] * (moments @ self.offered.T) / scale
        if self.turns:
            reader = least_squares(cross, unit, self.ridge)
            if not bias.any() or not with_bias:
                return reader, one, zero, unit
            # What a LayerNorm gives adds up to zero, so the readers are free along the ones: the bias goes there.
            reader = reader - reader.mean(1, keepdim=True)
            return reader + bias[:, None] / size, one, one, unit
        index = torch.from_numpy(self.axes["hidden"].index)
        own = gain[index] * scale
        # z carries the kept gains, so the reader that keeps everything kept would be a plain selection.
        reader = least_squares(cross * own, unit * own[:, None] * own, self.ridge)
        return reader, own, bias[index], unit

    def _norms_of(self, layer: int, source: int) -> None:
        """Fit every norm of one layer and what reads it."""
        for site in norm_sites(self.config):
            if site.layer != source:
                continue
            here = site.module.replace(f".{source}.", f".{layer}.", 1)
            norm = self._origin(here)
            reader, gain, bias, unit = self._read_norm(site.module, norm)
            readers = [
                name
                for name, e in self.expected.items()
                if e.layer == layer and self.scores.record.feeds.get(self._site_of(e)) == site.module
            ]
            self._store_norm(here, norm, gain, bias)
            if self.measures:
                for name in readers:
                    self._measure_norm(name, site.module, norm, unit * gain[:, None] * gain)
            else:
                self._put_reader(f"{here}:read", readers, reader, self._norm(site.module, norm)[1] - reader @ bias)

    def _put_reader(self, key: str, readers: list[str], reader: torch.Tensor, constant: torch.Tensor) -> None:
        """Let tensors read a norm through a matrix; `constant` is what their biases have to make up for."""
        for name in readers:
            self.made.put(name, reader=self.made.store(key, reader.numpy()))
        took = [self._shift_bias(name, constant) for name in readers]
        if took and all(took):
            self.shifts[key] = constant

    def _measure_norm(self, name: str, site: str, norm: Norm, kept: torch.Tensor) -> None:
        """Scale a reader of one norm (see `_measure`), whose target gives E[z z^T] = `kept`."""
        gain, _ = self._norm(site, norm)
        moments = self.scores.of(f"{site}:norm", "second") * gain[:, None] * gain
        self._measure(name, moments, kept, torch.from_numpy(self.axes["hidden"].index))

    def _measure(self, name: str, moments: torch.Tensor, kept: torch.Tensor, index: torch.Tensor) -> None:
        """Scale a reader so that what it gives is as large as before: the root of E|W x|^2 over E|W_K z|^2."""
        expected = self.expected[name]
        weight = self._weight_of(expected)
        weight = weight.T if expected.arrow.reads_first else weight
        before = float((weight @ moments * weight).sum())
        reads = weight[:, index]
        after = float((reads @ kept * reads).sum())
        self.made.put(name, factor=(before / max(after, 1e-30)) ** 0.5)

    def _weight_of(self, expected: Expected) -> torch.Tensor:
        """Return the source tensor that a target tensor is made of, in double precision."""
        return self.tensors.read(stored_source(expected, self.steps, self.axes, self.names, self.config)).double()

    def _shift_bias(self, name: str, constant: torch.Tensor) -> bool:
        """Let the bias of a reader take what its weights made of the norm's bias and the new readers do not.

        Return whether it did: there may be none.
        """
        bias = self.expected.get(f"{name.removesuffix('.weight')}.bias")
        if bias is None or not constant.any():
            return False
        weight, before = self._weight_of(self.expected[name]), self._weight_of(bias)
        weight = weight.T if self.expected[name].arrow.reads_first else weight
        kept = compose(bias.arrow.writes[0], AxesAt(self.axes, bias.layer, bias.expert), writes=True)
        if (kept.index < 0).any():
            return False
        values = (before + weight @ constant)[torch.from_numpy(kept.index)]
        self.made.put(bias.name, value=self.made.store(f"{bias.name}:value", values.numpy()), factor=1.0)
        return True

    def _site_of(self, expected: Expected) -> str:
        """Return where the source read what a target tensor reads."""
        site = f"{made_from(expected, self.steps, self.axes).removesuffix('.weight')}:in"
        return self.scores.record.aliases.get(site, site)

    def _origin(self, module: str) -> Norm:
        layers = range(max(len(self.steps), self.config.sizes["layer"]))
        for pattern, norm in self.config.architecture.norms.items():
            if pattern == module or any(pattern.replace("{layer}", str(layer)) == module for layer in layers):
                return norm
        raise AssertionError(f"{module} is no norm of the table")

    def _store_norm(self, module: str, norm: Norm, gain: torch.Tensor, bias: torch.Tensor) -> None:
        stored = gain - 1 if norm.gain == "1+w" else gain
        for part, values in (("weight", stored), ("bias", bias)):
            name = f"{module}.{part}"
            if name in self.expected:
                self.made.put(name, value=self.made.store(f"{name}:value", values.numpy()), factor=1.0)

    def _final(self) -> None:
        """Fit the norm before the head: its reader where the head has a matrix of its own, else its gain."""
        module = self.config.architecture.final_norm
        norm = self.config.architecture.norms.get(module)
        if norm is None or not self.config.holds(norm.when):
            return
        heads = [
            name
            for name, e in self.expected.items()
            if e.layer is None and any(str(dim) == "norm(hidden)" for dim in e.arrow.reads)
        ]
        tied = not heads and self.config.tied
        reader, gain, bias, unit = self._read_norm(module, norm, with_bias=not tied)
        if tied:
            gain, bias = self.tied_gain(reader * gain, unit, self._norm(module, norm)[1])
        if self.measures:
            for name in heads:
                self._measure_norm(name, module, norm, unit * gain[:, None] * gain)
        else:
            self._put_reader(f"{module}:read", heads, reader, self._norm(module, norm)[1] - reader @ bias)
        self._store_norm(module, norm, gain, bias)

    def _branch_ends(self) -> None:
        """Let norms that end a branch write as much as before, though they divide by the RMS of what is kept of it.

        The source writes g o / rms(o), the target g_K o_K / rms(o_K), and what is kept was chosen for being large.
        """
        ends = branch_ends(self.config)
        if not ends:
            return
        writers: dict[int | None, dict[str, None]] = {}
        for site in sites(self.config).values():
            if site.side == "branch":
                # Experts write together, as one.
                own = self.scores.record.aliases.get(site.name, site.name)
                writers.setdefault(site.layer, {})[own] = None
        index = torch.from_numpy(self.axes["hidden"].index)
        for layer, step in enumerate(self.steps):
            # Branches come in the order in which they are run, and so do the norms that end them.
            for pattern, writer in zip(ends, writers[step.source], strict=True):
                self._as_large(f"{tensor_name(pattern, layer)}.weight", self.scores.of(writer, "rms").square(), index)

    def _norms_over_heads(self, layer: int, source: int) -> None:
        """Let norms that span all heads of one layer give each as much as before, where some heads are cut."""
        for pattern, norm in self.config.architecture.norms.items():
            dim = parse(f"-> {norm.writes}").writes[0]
            kept = compose(dim, AxesAt(self.axes, layer), writes=True)
            cut = kept.target_size < kept.source_size and not (kept.index < 0).any()
            if "hidden" in dim.axes or norm.gain != "w" or not cut or not self.config.holds(norm.when):
                continue
            squares = self._squares_written(dim, source)
            self._as_large(f"{tensor_name(pattern, layer)}.weight", squares, torch.from_numpy(kept.index))

    def _squares_written(self, dim: Dim, source: int) -> torch.Tensor:
        """Return E[q^2] by coordinate of the queries or keys of one layer of the source, W x + b of what it reads."""
        (expected,) = (
            e
            for e in expected_tensors(self.config).values()
            if e.layer == source and len(e.arrow.reads) == 1 and e.arrow.writes[0].axes == dim.axes
            and any(f.role in ("query", "key") for block in e.arrow.writes[0].blocks for f in block.factors)
        )  # fmt: skip
        module = expected.name.removesuffix(".weight")
        site, record = f"{module}:in", self.scores.record
        norm = record.feeds.get(record.aliases.get(site, site))
        if norm is None:
            moments = self.scores.of(site, "second")
        else:
            # No family has a bias in a norm before one that spans heads.
            gain, _ = self._norm(norm, self._origin(norm))
            moments = self.scores.of(f"{norm}:norm", "second") * gain[:, None] * gain
        weight, bias = self.tensors.read(self.names[expected.name]).double(), self._source_values(module, "bias")
        squares = (weight @ moments * weight).sum(1)
        return squares if bias is None else squares + bias * (2 * (weight @ self.scores.of(site, "mean")) + bias)

    def _as_large(self, name: str, squares: torch.Tensor, index: torch.Tensor) -> None:
        """Multiply the gain of a norm that reads some coordinates of many, whose mean squares are given."""
        kept, whole = float(squares[index].mean()), float(squares.mean())
        if name in self.expected and kept > 0:
            self.made.put(name, factor=(kept / whole) ** 0.5)

    def _tied_head(self) -> torch.Tensor:
        """Return the embedding's rows of the tokens that are kept, float64, without their mean: logits that move
        together change nothing."""
        embedding = self.tensors.read(self.names[next(iter(self.config.architecture.tied.values()))]).double()
        tokens = self.axes["vocab"]
        if tokens.target_size < tokens.source_size:
            embedding = embedding[torch.from_numpy(tokens.index)]
        return embedding - embedding.mean(0)

    def tied_gain(
        self, reader: torch.Tensor, unit: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the final gain and bias under which the tied head E R^T comes nearest to the source's logits.

        With A = E S and B = E R^T, the gain d minimizes E |A z - B (d * z)|^2:
        (B^T B * E[z z^T]) d = diag(B^T A E[z z^T]).
        The bias is fitted alike. What the target's embedding is multiplied by, both are divided by.
        """
        gram = _gram(self._tied_head())
        kept = self.write @ gram @ self.write.T
        right = (self.write @ gram @ reader @ unit).diagonal()
        shift = least_squares((self.write @ gram @ bias)[None, :], kept, self.ridge)[0]
        gain = least_squares(right[None, :], kept * unit, self.ridge)[0]
        return gain / self.embedding_scale, shift / self.embedding_scale

    def _inner(self, name: str, expected: Expected, dim: Dim) -> None:
        """Fit what reads heads or neurons, where some of them are cut."""
        kept = compose(dim, AxesAt(self.axes, expected.layer, expected.expert), writes=False)
        # What reads the stream through a norm is fitted with the norm.
        if str(dim) == "norm(hidden)" or kept.target_size >= kept.source_size or (kept.index < 0).any():
            return
        site = self._site_of(expected)
        moments, samples = self.scores.of(site, "second"), float(self.scores.of(site, "samples"))
        index = torch.from_numpy(kept.index)
        if not moments.any():
            # Nothing ever came there: nothing is known, so what is kept is read as it was.
            return
        if self.measures and samples:
            self._measure(name, moments, moments[index][:, index], index)
            return
        if samples <= len(index):
            # An expert that too few tokens were routed to: any fit would be perfect, and wrong. The plan says so.
            return
        reader = least_squares(moments[:, index], moments[index][:, index], self.ridge)
        self.made.put(name, reader=self.made.store(f"{name}:read", reader.numpy()))
