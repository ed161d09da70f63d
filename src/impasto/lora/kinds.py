"""Kinds: the tensors of one module's adapter, to the patches that they mean.

Knows which parts make which kind and what shapes belong together. Knows no names of modules and no files. Whatever is
left over, missing or at odds is an error, never passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from impasto.lora.keys import Parameter
from impasto.lora.patch import LowRank, Patch, interchangeable
from impasto.lora.patches.decomposed import Decomposed
from impasto.lora.patches.full import BiasDifference, Difference, NormDifference, Replacement
from impasto.lora.patches.generalized import Generalized
from impasto.lora.patches.joined import Joined
from impasto.lora.patches.products import Hadamard, Half, Kronecker, tucker
from impasto.lora.patches.rotations import Butterfly, InputRotated, OutputRotated, block_size, cayley, cayley_of_upper
from impasto.lora.patches.scaled import Scaled

_LARGEST = 37.0  # decimal digits of float32's largest number, less a little


class MalformedError(ValueError):
    """The tensors of a module make no sense together; the message says why."""


class WrongSizeError(Exception):
    """The adapter is for a weight of another shape; found before a product of its tensors takes any memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.shape = shape


@dataclass(frozen=True, slots=True)
class Adapter:
    """One module's tensors, and what else decides their meaning.

    Attributes:
        parts: Part -> tensor, as ``tensors`` names them.
        shape: Of the model's weight.
        scale: ``(rank, alpha) -> factor`` of the module.
        peft_rank: The rank that PEFT's configuration gives the module, if there is one.
        peft_kind: PEFT's word for the kind (``LOKR``), if the file has a configuration or PEFT's names.
        neumann_terms: Of OFTv2's series; ``None`` is the exact inverse.
    """

    parts: dict[str, Tensor]
    shape: tuple[int, ...]
    scale: Callable[[int, float | None], float]
    peft_rank: int | None = None
    peft_kind: str | None = None
    neumann_terms: int | None = 5


def read_patches(adapter: Adapter) -> dict[Parameter, Patch]:
    """Return the patches of a module's weight and bias.

    Raises:
        MalformedError: Tensors are missing, left over, at odds, or not finite.
        WrongSizeError: They are for a weight of another shape. Not always: a patch may turn out not to fit.
    """
    return _Reader(adapter).read()


class _Reader:
    """Takes the parts out one by one, so that what is left over is seen."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._parts = dict(adapter.parts)
        alpha = self._parts.pop("alpha", None)
        self._alpha = None if alpha is None else _one_number(alpha, "alpha")
        self._digits = sum(
            _digits(part, tensor)
            for part, tensor in self._parts.items()
            if part not in ("on_input", "scaled_oft", "reshape_weight")
        )

    def read(self) -> dict[Parameter, Patch]:
        weights = [patch for patch in (self._adapted(), self._whole()) if patch is not None]
        found: dict[Parameter, Patch] = {}
        if weights:
            found["weight"] = weights[0] if len(weights) == 1 else Joined(tuple(weights))
        if (bias := self._bias()) is not None:
            found["bias"] = bias
        self._parts.pop("reshape_weight", None)  # the shape is the weight's or it will not fit
        if self._parts:
            self._incomplete()
        if "weight" in found:
            self._check_product(found["weight"])
        return found

    def _check_product(self, patch: Patch) -> None:
        """Refuse finite tensors whose product is not; it is worked out only where the numbers are so large."""
        shape = self._adapter.shape
        if self._digits < _LARGEST or not patch.fits(torch.Size(shape)):
            return
        if not bool(torch.isfinite(patch.patched(torch.ones(shape), 1.0)).all()):
            raise MalformedError("the product of its tensors is not finite")

    def _adapted(self) -> Patch | None:
        """Return what the small matrices mean for the weight."""
        for part, read in _KINDS.items():
            if part in self._parts:
                patch = read(self)
                return self._decomposed(patch)
        return None

    def _whole(self) -> Patch | None:
        if (diff := self._parts.pop("diff", None)) is not None:
            return Difference(diff)
        if (norm := self._parts.pop("w_norm", None)) is not None:
            return NormDifference(norm)
        weight = self._parts.pop("set_weight", None)
        return None if weight is None else Replacement(weight)

    def _bias(self) -> Patch | None:
        if (norm := self._parts.pop("b_norm", None)) is not None:
            return NormDifference(norm)
        if (diff := self._parts.pop("diff_b", None)) is not None:
            return BiasDifference(diff)
        return None

    def low_rank(self) -> Patch:
        down, up = self._take("down", "up")
        mid = self._parts.pop("mid", None)
        _check_matrix("down", down)
        _check_matrix("up", up)
        if mid is not None:
            if mid.ndim != 4 or mid.shape[:2] != (up.shape[1], down.shape[0]):
                self._at_odds("mid", mid, "down", down)
            self._sized((up.shape[0], down.shape[1], *mid.shape[2:]))
            down = torch.einsum("ij...,jk->ik...", mid.float(), down.float().flatten(1))
        if up.flatten(1).shape[1] != down.shape[0]:
            self._at_odds("up", up, "down", down)
        scale = self._scale(down.shape[0])
        if (bias := self._parts.pop("up_bias", None)) is not None:
            self._parts["diff_b"] = bias.float() * scale
        return LowRank(down, up, scale)

    def hadamard(self) -> Patch:
        first_left, first_right, second_left, second_right = self._take(
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
        )
        cores: list[Tensor | None] = [None, None]
        if "hada_t1" in self._parts or "hada_t2" in self._parts:
            cores = list(self._take("hada_t1", "hada_t2"))
        halves = []
        for left, right, core in ((first_left, first_right, cores[0]), (second_left, second_right, cores[1])):
            _check_matrix("left", left)
            _check_matrix("right", right)
            fits = left.shape[1] == right.shape[0] if core is None else (
                core.ndim > 2 and core.shape[:2] == (left.shape[0], right.shape[0])
            )  # fmt: skip
            if not fits:
                self._at_odds("left", left, "right", right)
            halves.append(Half(left, right, core))
        if halves[0].shape != halves[1].shape:
            self._at_odds("hada_w1_a", first_left, "hada_w2_a", second_left)
        return Hadamard(halves[0], halves[1], self._scale(halves[0].rank))

    def kronecker(self) -> Patch:
        small, small_rank = self._factor("lokr_w1")
        large, large_rank = self._factor("lokr_w2")
        if small.ndim != 2:
            raise MalformedError(f"its lokr_w1 has the shape {tuple(small.shape)} where a matrix belongs")
        rank = large_rank or small_rank
        if rank is not None:
            scale = self._scale(rank)
        elif self._adapter.peft_kind == "LOKR" and self._adapter.peft_rank:  # PEFT scales whole factors too
            scale = self._scale(self._adapter.peft_rank)
        else:
            scale = 1.0
        return Kronecker(small, large, scale, rank)

    def _factor(self, name: str) -> tuple[Tensor, int | None]:
        """Return one of LoKr's factors whole, and its rank if it was in two."""
        if (whole := self._parts.pop(name, None)) is not None:
            _check_matrix(name, whole)
            return whole, None
        left, right = self._take(f"{name}_a", f"{name}_b")
        _check_matrix(name, left)
        _check_matrix(name, right)
        core = self._parts.pop("lokr_t2", None) if name == "lokr_w2" else None
        if core is not None:
            if core.ndim < 3 or core.shape[:2] != (left.shape[0], right.shape[0]):
                self._at_odds("lokr_t2", core, f"{name}_b", right)
            self._no_larger((left.shape[1], right.shape[1], *core.shape[2:]))
            return tucker(core, left, right), right.shape[0]
        if left.shape[1] != right.shape[0]:
            self._at_odds(f"{name}_a", left, f"{name}_b", right)
        self._no_larger((left.shape[0], *right.shape[1:]))
        product = left.float() @ right.float().flatten(1)
        return product.reshape(left.shape[0], *right.shape[1:]), right.shape[0]

    def generalized(self) -> Patch:
        a1, a2, b1, b2 = (_matrix(part) for part in self._take("a1", "a2", "b1", "b2"))
        window = self._adapter.parts["b2"]
        core = self._parts.pop("bm", None)
        new = a1.shape[1] == a2.shape[0] == b1.shape[1] == len(b2)
        old = len(a1) == a2.shape[1] == len(b1) == b2.shape[1]
        if new and not (old and a1.shape[1] == self._adapter.shape[1] != len(a1)):  # LyCORIS 2 and later
            before, after, up, down = a1, a2, b1, window
        elif old:  # LyCORIS 1: every pair the other way round
            before, after, up, down = a2, a1, b2, self._adapter.parts["b1"]
        else:
            self._at_odds("a1", a1, "a2", a2)
        if core is not None:
            if core.ndim != 4 or core.shape[:2] != (up.shape[1], len(down)):
                self._at_odds("bm", core, "b2", down)
            self._sized((up.shape[0], down.shape[1], *core.shape[2:]))
            down = torch.einsum("ij...,jk->ik...", core.float(), _matrix(down).float())
        return Generalized(before, after, up, down, self._scale(len(after)))

    def rotated(self) -> Patch:
        (blocks,) = self._take("oft_blocks")
        rescale = self._parts.pop("rescale", None)
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise MalformedError(f"its oft_blocks have the shape {tuple(blocks.shape)} where square blocks belong")
        # The alpha of these kinds is no scale but the constraint, in units of the outputs.
        outputs = blocks.shape[-3] * blocks.shape[-1]
        if outputs != self._adapter.shape[0]:
            raise WrongSizeError((outputs,))
        turn = cayley(blocks, (self._alpha or 0.0) * outputs)
        _digits("oft_blocks", turn)
        return OutputRotated(turn, rescale) if blocks.ndim == 3 else Butterfly(turn, rescale)

    def input_rotated(self) -> Patch:
        (upper,) = self._take("oft_R")
        if upper.ndim != 2 or not block_size(upper.shape[1]):
            raise MalformedError(f"its oft_R has the shape {tuple(upper.shape)}, which are no triangles of blocks")
        if math.prod(self._adapter.shape[1:]) % block_size(upper.shape[1]):
            raise WrongSizeError((len(upper) * block_size(upper.shape[1]),))
        if (scaled := self._parts.pop("scaled_oft", None)) is not None and bool(scaled.any()):
            upper = upper.double() / math.sqrt(upper.shape[1])
        turn = cayley_of_upper(upper, self._adapter.neumann_terms)
        _digits("oft_R", turn)
        # OneTrainer turns a linear's inputs and a convolution's weight, which is the other way round; PEFT the inputs.
        by_weight = len(self._adapter.shape) == 4 and self._adapter.peft_kind is None
        return InputRotated(turn.mT.contiguous() if by_weight else turn)

    def scaled(self) -> Patch:
        change, on_input = self._take("weight", "on_input")
        return Scaled(change.flatten(), bool(_one_number(on_input, "on_input")))

    def peft_scaled(self) -> Patch:
        (factor,) = self._take("ia3_l")
        # PEFT makes (1, in) for feed-forward linears and (out, 1) for others; for convolutions (1, n, 1, 1) in both.
        row = factor.ndim > 1 and factor.shape[0] == 1
        on_input = row and (factor.ndim == 2 or factor.numel() != self._adapter.shape[0])
        return Scaled(factor.flatten().float() - 1, on_input)

    def _decomposed(self, patch: Patch) -> Patch:
        for part in ("magnitude", "dora_scale"):
            magnitude = self._parts.pop(part, None)
            if magnitude is None:
                continue
            if not patch.additive:
                raise MalformedError(f"it has a {part} on a {patch.kind}, which no trainer makes")
            # A row (1, in) is the inputs'; PEFT's magnitudes are always the outputs'.
            row = part == "dora_scale" and magnitude.ndim > 1 and magnitude.shape[0] == 1
            if row and magnitude.numel() == 1 and self._adapter.shape[0] == 1:
                row = False
            patch = Decomposed(patch, magnitude.flatten(), 1 if row else 0)
        return patch

    def _scale(self, rank: int) -> float:
        scale = self._adapter.scale(rank, self._alpha)
        if not math.isfinite(scale):
            raise MalformedError("its alpha is not finite")
        return scale

    def _take(self, *parts: str) -> tuple[Tensor, ...]:
        if any(part not in self._parts for part in parts):
            self._incomplete()
        return tuple(self._parts.pop(part) for part in parts)

    def _sized(self, shape: tuple[int, ...]) -> None:
        if not interchangeable(shape, self._adapter.shape):
            raise WrongSizeError(shape)

    def _no_larger(self, shape: tuple[int, ...]) -> None:
        """Check a factor of the whole."""
        if math.prod(shape) > math.prod(self._adapter.shape):
            raise WrongSizeError(shape)

    def _incomplete(self) -> NoReturn:
        raise MalformedError(f"it is incomplete: it has only {', '.join(sorted(self._adapter.parts))}")

    def _at_odds(self, one: str, first: Tensor, other: str, second: Tensor) -> NoReturn:
        raise MalformedError(
            f"its ranks disagree: {one} has the shape {tuple(first.shape)} and {other} {tuple(second.shape)}"
        )


# The part that tells a kind -> its reader, the first that is there; a kind's other half tells it too, so that a lone
# half is called incomplete.
_KINDS: dict[str, Callable[[_Reader], Patch]] = {
    **dict.fromkeys(("oft_blocks", "rescale"), _Reader.rotated),
    "oft_R": _Reader.input_rotated,
    "on_input": _Reader.scaled,
    "ia3_l": _Reader.peft_scaled,
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _Reader.hadamard),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), _Reader.kronecker),
    **dict.fromkeys(("a1", "a2", "b1", "b2"), _Reader.generalized),
    **dict.fromkeys(("up", "down", "mid"), _Reader.low_rank),
}


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[None]


def _check_matrix(part: str, tensor: Tensor) -> None:
    if tensor.ndim < 2 or 0 in tensor.shape:
        raise MalformedError(f"its {part} has the shape {tuple(tensor.shape)} where a matrix belongs")


def _digits(part: str, tensor: Tensor) -> float:
    """Check the numbers; return how many decimal digits a sum over the largest of them can have."""
    if not tensor.is_floating_point():
        raise MalformedError(f"its {part} holds {str(tensor.dtype).removeprefix('torch.')} numbers, not fractions")
    if tensor.numel() == 0:
        raise MalformedError(f"its {part} is empty")
    least, most = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    largest = max(-float(least), float(most))
    if not math.isfinite(float(least) + float(most)):
        raise MalformedError(f"its {part} has numbers that are not finite")
    return math.log10(max(largest * max(tensor.shape, default=1), 1.0))


def _one_number(tensor: Tensor, part: str) -> float:
    if tensor.numel() != 1:
        raise MalformedError(f"its {part} is not one number")
    value = float(tensor.float())
    if not math.isfinite(value):
        raise MalformedError(f"its {part} is not finite")
    return value
