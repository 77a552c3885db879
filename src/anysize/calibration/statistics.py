"""What is kept of the activations at each site: sums in double precision that add up over batches and processes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import torch

from anysize.errors import InputError

COUNT = "count"
# Sums over tokens of |x|, x^2, x and x x^T; over sequences of (mean over tokens |x|)^2.
_PER_TOKEN = ("abs", "square", "mean", "second")
_PER_SEQUENCE = ("minitron",)


def _edges(size: int) -> list[int]:
    """Return where strips of a symmetric matrix begin and end: narrow ones save more, wide ones multiply faster."""
    strips = min(8, max(1, size // 256))
    return [size * i // strips for i in range(strips + 1)]


class SiteSums:
    """Running sums of one site's activations."""

    def __init__(self, size: int, *, second: bool) -> None:
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name in ("abs", "square", "mean", "minitron")}
        if second:
            self.sums["second"] = torch.zeros(size, size, dtype=torch.float64)
        self.tokens = self.second_tokens = self.sequences = 0

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> SiteSums:
        """Return the sums that `as_tensors` told, to go on with."""
        made = cls(0, second=False)
        made.sums = {name: values for name, values in tensors.items() if name != COUNT}
        made.tokens, made.second_tokens, made.sequences = map(int, tensors[COUNT].tolist())
        return made

    @torch.no_grad()
    def add(self, values: torch.Tensor, stride: int = 1) -> None:
        """Add a batch [..., tokens, size]; second moments see every `stride`-th token only.

        Which ones shifts from one sequence of a batch to the next, so that no position is left out, or always seen: the
        first one is like no other.
        """
        values = values.detach().float()
        rows = values.reshape(-1, values.shape[-1])
        absolute = rows.abs()
        per_sequence = absolute.reshape(-1, values.shape[-2] if values.dim() > 2 else 1, rows.shape[-1]).mean(1)
        self.sums["abs"] += absolute.sum(0).cpu()
        self.sums["square"] += torch.linalg.vector_norm(rows, dim=0).cpu().double().square()
        self.sums["mean"] += rows.sum(0).cpu()
        self.sums["minitron"] += per_sequence.double().square().sum(0).cpu()
        self.tokens += len(rows)
        self.sequences += len(per_sequence)
        if "second" in self.sums:
            number, length = torch.arange(len(rows)), max(1, values.shape[-2])
            seen = rows if stride == 1 else rows[((number // length + number % length) % stride == 0).to(rows.device)]
            # x x^T is symmetric: little more than half of it has to be computed. The rest is filled in at the end.
            for begin, end in itertools.pairwise(_edges(rows.shape[-1])):
                self.sums["second"][begin:end, begin:] += (seen[:, begin:end].T @ seen[:, begin:]).cpu()
            self.second_tokens += len(seen)

    def as_tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums and the counts they were made of."""
        counts = torch.tensor([self.tokens, self.second_tokens, self.sequences], dtype=torch.float64)
        if "second" in self.sums:
            second = self.sums["second"]
            for begin, end in itertools.pairwise(_edges(len(second))):
                second[end:, begin:end] = second[begin:end, end:].T
        return {**self.sums, COUNT: counts}


# Each average, and the sum that it is made of.
MADE_OF = {
    "abs": "abs", "rms": "square", "mean": "mean", "minitron": "minitron", "second": "second", "samples": COUNT
}  # fmt: skip


def require_finite(sites: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Raise InputError where the sums of a site are no numbers, which would be sorted, and fitted, like some."""
    for site, sums in sites.items():
        if not all(bool(values.isfinite().all()) for values in sums.values()):
            raise InputError(
                f"what the source computes at '{site}' holds NaN or infinity on these data, so it scores nothing: mend "
                "the weights there or before it, or take other data"
            )


def kinds_of(sums: Collection[str]) -> list[str]:
    """Return which averages there are of a site with these sums."""
    return [kind for kind in MADE_OF if kind not in ("second", "samples") or "second" in sums]


def average(kind: str, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return one average from the sums of a site, in their place: second moments are most of what a run holds.

    abs, mean, second: means over tokens. rms: root of the mean square. minitron:
    sqrt(sum over sequences of (mean over tokens |x|)^2), as in 2407.14679. samples [1]: tokens in the second moment.
    """
    values = sums[MADE_OF[kind]]
    if kind == "samples":
        return values[1:2]
    if kind == "minitron":
        return values.sqrt()
    # No token may have reached an expert: then its sums are zero, and so are its averages.
    tokens, second_tokens = (max(1.0, count) for count in sums[COUNT].tolist()[:2])
    if kind == "second":
        return values.div_(second_tokens)
    return (values / tokens).sqrt() if kind == "rms" else values / tokens


def averages(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return all averages from the sums of one site, in their place; see `average`."""
    return {kind: average(kind, sums) for kind in kinds_of(sums.keys())}


def ends(hidden: torch.Tensor) -> torch.Tensor:
    """Return the directions [sequences, hidden] of the last token of each sequence [sequences, tokens, hidden]."""
    return torch.nn.functional.normalize(hidden[:, -1].float(), dim=-1)


class BlockSums:
    """Running sums over tokens of how much each layer does to the residual stream.

    influence: 1 - cos(in, out) (ShortGPT, 2403.03853). magnitude: |out - in| / |out| (2312.09299, section 3).
    angular [L + 1, L + 1]: arccos(cos(h_i, h_j)) / pi on the last token of each sequence (2403.17887).
    """

    def __init__(self, num_layers: int) -> None:
        self.influence = torch.zeros(num_layers, dtype=torch.float64)
        self.magnitude = torch.zeros(num_layers, dtype=torch.float64)
        self.angular = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64)
        self.tokens = self.sequences = 0

    def add(self, stream: list[torch.Tensor]) -> None:
        """Add one batch: the residual stream [sequences, tokens, hidden] before the first and after every layer."""
        for layer, (before, after) in enumerate(itertools.pairwise(stream)):
            self.add_layer(layer, before, after)
        self.add_ends(torch.stack([ends(h) for h in stream], 1), stream[0].shape[1])

    @torch.no_grad()
    def add_layer(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add what one layer does to the stream [sequences, tokens, hidden] of a batch."""
        # The stream of a model in memory may be in half precision, in which small changes and long sums are lost.
        before, after = before.float(), after.float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self.influence[layer] += (1 - cosine).cpu().double().sum()
        size = after.norm(dim=-1).clamp(min=1e-12)
        self.magnitude[layer] += ((after - before).norm(dim=-1) / size).cpu().double().sum()

    @torch.no_grad()
    def add_ends(self, last: torch.Tensor, tokens: int) -> None:
        """Add the `ends` [sequences, L + 1, hidden] of a batch with so many tokens a sequence, and count them."""
        cosines = (last @ last.transpose(1, 2)).clamp(-1, 1)
        self.angular += (cosines.arccos() / torch.pi).cpu().double().sum(0)
        self.tokens += len(last) * tokens
        self.sequences += len(last)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> BlockSums:
        """Return the sums that `as_tensors` told, to go on with."""
        made = cls(len(tensors["influence"]))
        made.influence, made.magnitude, made.angular = (tensors[n] for n in ("influence", "magnitude", "angular"))
        made.tokens, made.sequences = map(int, tensors[COUNT].tolist())
        return made

    def as_tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums and the counts they were made of."""
        counts = torch.tensor([self.tokens, self.sequences], dtype=torch.float64)
        return {"influence": self.influence, "magnitude": self.magnitude, "angular": self.angular, COUNT: counts}


def block_averages(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the means of the block scores."""
    tokens, sequences = sums[COUNT].tolist()
    return {
        "influence": sums["influence"] / tokens,
        "magnitude": sums["magnitude"] / tokens,
        "angular": sums["angular"] / sequences,
    }
