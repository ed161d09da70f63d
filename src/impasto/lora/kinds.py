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

from impasto.lora.checks import LARGEST, MalformedError, WrongSizeError, check_matrix, digits, matrix, one_number
from impasto.lora.keys import Parameter
from impasto.lora.patch import LowRank, Patch, interchangeable
from impasto.lora.patches.decomposed import Decomposed
from impasto.lora.patches.full import BiasDifference, Difference, NormDifference, Replacement
from impasto.lora.patches.generalized import Generalized
from impasto.lora.patches.input_butterfly import InputButterfly, half_cayley
from impasto.lora.patches.joined import Joined
from impasto.lora.patches.products import Hadamard, Half, Kronecker, tucker
from impasto.lora.patches.rotations import Butterfly, InputRotated, OutputRotated, block_size, cayley, cayley_of_upper
from impasto.lora.patches.scaled import Scaled, ScaledBias
from impasto.lora.patches.variants import Vera, adalora

# Parts that are no weights, and those that modules share, of which each looks at its own part alone.
_NOT_SUMMED = ("on_input", "scaled_oft", "reshape_weight", "vera_A", "vera_B")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One module's tensors, and what else decides their meaning.

    Attributes:
        parts: Part -> tensor, as ``tensors`` names them.
        shape: Of the model's weight.
        scale: ``(rank, alpha) -> factor`` of the module.
        peft_rank: Gives the rank that PEFT's configuration has for the module, if there is one.
        peft_kind: PEFT's word for the kind (``LOKR``), if the file has a configuration or PEFT's names.
        neumann_terms: Of OFTv2's series; ``None`` is the exact inverse.
        largest_turn: Of all OFTv2's blocks together, as a norm; ``None``: any.
        on_input: Whether PEFT's IA3 scales the module's inputs, where its configuration says.
        has_bias: Whether the model's module has one.
        by_root: Whether LyCORIS divided by the root of the rank.
    """

    parts: dict[str, Tensor]
    shape: tuple[int, ...]
    scale: Callable[[int, float | None], float]
    peft_rank: Callable[[], int | None] = lambda: None
    peft_kind: str | None = None
    neumann_terms: int | None = 5
    largest_turn: float | None = None
    on_input: bool | None = None
    has_bias: bool = False
    by_root: bool = False


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
        self._bias_patch: Patch | None = None  # what the weight's adapter means for the bias
        self._alpha = None if alpha is None else one_number(alpha, "alpha")
        self._digits = sum(digits(part, tensor) for part, tensor in self._parts.items() if part not in _NOT_SUMMED)

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
        if self._digits < LARGEST or not patch.fits(torch.Size(shape)):
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
        bias = self._parts.pop("set_bias", None)
        return self._bias_patch if bias is None else Replacement(bias)

    def low_rank(self) -> Patch:
        down, up = self._take("down", "up")
        mid = self._parts.pop("mid", None)
        check_matrix("down", down)
        check_matrix("up", up)
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
        if (values := self._parts.pop("values", None)) is not None:
            if values.numel() != down.shape[0]:
                self._at_odds("lora_E", values, "lora_A", down)
            return adalora(down, up, values, scale)
        return LowRank(down, up, scale)

    def embedded(self) -> Patch:
        """PEFT's LoRA of a table of embeddings ``[words, width]``, whose halves stand the other way round."""
        words, width = self._take("embedding_A", "embedding_B")
        check_matrix("lora_embedding_A", words)
        check_matrix("lora_embedding_B", width)
        if words.shape[0] != width.shape[1]:
            self._at_odds("lora_embedding_A", words, "lora_embedding_B", width)
        return LowRank(width.mT, words.mT, self._scale(words.shape[0]))

    def vera(self) -> Patch:
        if not {"vera_A", "vera_B"} <= self._parts.keys():
            raise MalformedError("it is a VeRA without its shared matrices (save it with save_projection)")
        shared_a, shared_b, by_output, by_rank = self._take("vera_A", "vera_B", "vera_b", "vera_d")
        check_matrix("vera_A", shared_a)
        check_matrix("vera_B", shared_b)
        if not shared_a.shape[0] == shared_b.shape[1] == by_rank.numel():
            self._at_odds("vera_A", shared_a, "vera_lambda_d", by_rank)
        out, inputs = by_output.numel(), math.prod(self._adapter.shape[1:])
        if out > shared_b.shape[0] or inputs > shared_a.shape[1]:
            raise WrongSizeError((shared_b.shape[0], shared_a.shape[1]))
        down, up = shared_a[:, :inputs], shared_b[:out]
        self._digits += digits("vera_A", down) + digits("vera_B", up)
        return Vera(down, up, by_rank.flatten(), by_output.flatten())

    def hadamard(self) -> Patch:
        first_left, first_right, second_left, second_right = self._take(
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
        )
        cores: list[Tensor | None] = [None, None]
        if "hada_t1" in self._parts or "hada_t2" in self._parts:
            cores = list(self._take("hada_t1", "hada_t2"))
        halves = []
        for left, right, core in ((first_left, first_right, cores[0]), (second_left, second_right, cores[1])):
            check_matrix("left", left)
            check_matrix("right", right)
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
        elif self._adapter.peft_kind == "LOKR" and (configured := self._adapter.peft_rank()):
            scale = self._scale(configured)  # PEFT scales whole factors too
        elif self._adapter.by_root and self._alpha is not None and self._alpha > 0:
            scale = self._alpha ** (1 / 3)  # the root of the rank; the alpha saved is rank times that
        else:
            scale = 1.0
        return Kronecker(small, large, scale, rank)

    def _factor(self, name: str) -> tuple[Tensor, int | None]:
        """Return one of LoKr's factors whole, and its rank if it was in two."""
        if (whole := self._parts.pop(name, None)) is not None:
            check_matrix(name, whole)
            return whole, None
        left, right = self._take(f"{name}_a", f"{name}_b")
        check_matrix(name, left)
        check_matrix(name, right)
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
        a1, a2, b1, b2 = (matrix(part) for part in self._take("a1", "a2", "b1", "b2"))
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
            down = torch.einsum("ij...,jk->ik...", core.float(), matrix(down).float())
        scale = self._scale(len(after))
        if self._adapter.by_root and self._alpha is not None:
            scale *= math.sqrt(len(after))  # of all kinds the one whose saved alpha is as it was given
        return Generalized(before, after, up, down, scale)

    def rotated(self) -> Patch:
        blocks, rescale, outputs = self._blocks_of_outputs("oft_blocks")
        # The alpha of these kinds is no scale but the constraint, in units of the outputs.
        turn = cayley(blocks, (self._alpha or 0.0) * outputs)
        digits("oft_blocks", turn)
        return OutputRotated(turn, rescale) if blocks.ndim == 3 else Butterfly(turn, rescale)

    def rotated_already(self) -> Patch:
        """The rotations themselves, as the first LyCORIS with diag-OFT and BOFT saved them; its alpha is unused."""
        rotations, rescale, _ = self._blocks_of_outputs("oft_diag")
        turn = (rotations.double() - torch.eye(rotations.shape[-1], dtype=torch.float64)).float()
        return OutputRotated(turn, rescale) if rotations.ndim == 3 else Butterfly(turn, rescale)

    def _square_blocks(self, part: str, axes: tuple[int, ...]) -> Tensor:
        (blocks,) = self._take(part)
        if blocks.ndim not in axes or blocks.shape[-1] != blocks.shape[-2]:
            raise MalformedError(f"its {part} have the shape {tuple(blocks.shape)} where square blocks belong")
        return blocks

    def _blocks_of_outputs(self, part: str) -> tuple[Tensor, Tensor | None, int]:
        """Return the blocks, the rescale and how many outputs they are for."""
        blocks, rescale = self._square_blocks(part, (3, 4)), self._parts.pop("rescale", None)
        outputs = blocks.shape[-3] * blocks.shape[-1]
        if rescale is not None and rescale.numel() != outputs:
            raise MalformedError(f"its rescale has {rescale.numel()} numbers for {outputs} outputs")
        if outputs != self._adapter.shape[0]:
            raise WrongSizeError((outputs,))
        if blocks.ndim == 4:
            self._check_stages(part, len(blocks), outputs)
        return blocks, rescale, outputs

    def _check_stages(self, part: str, stages: int, places: int) -> None:
        """Refuse more stages than the widest one needs, before they are turned in float64."""
        if stages > places.bit_length():
            raise MalformedError(f"its {part} have {stages} stages where {places} need {places.bit_length()} at most")

    def input_butterfly(self) -> Patch:
        blocks = self._square_blocks("boft_R", (4,))
        scale = self._parts.pop("boft_s", None)
        outputs, inputs = self._adapter.shape[0], blocks.shape[1] * blocks.shape[-1]
        shape = (outputs if scale is None else scale.numel(), inputs)
        if shape != (outputs, math.prod(self._adapter.shape[1:])):
            raise WrongSizeError(shape)
        self._check_stages("boft_R", len(blocks), inputs)
        return InputButterfly(half_cayley(blocks), scale)

    def input_rotated(self) -> Patch:
        (upper,) = self._take("oft_R")
        if upper.ndim != 2 or not block_size(upper.shape[1]):
            raise MalformedError(f"its oft_R has the shape {tuple(upper.shape)}, which are no triangles of blocks")
        size, inputs = block_size(upper.shape[1]), math.prod(self._adapter.shape[1:])
        if inputs % size or len(upper) not in (1, inputs // size):
            raise WrongSizeError((len(upper) * size,))
        if (scaled := self._parts.pop("scaled_oft", None)) is not None and bool(scaled.any()):
            upper = upper.double() / math.sqrt(upper.shape[1])
        turn = cayley_of_upper(upper, self._adapter.neumann_terms, self._adapter.largest_turn)
        digits("oft_R", turn)
        # OneTrainer turns a linear's inputs and a convolution's weight, which is the other way round; PEFT the inputs.
        by_weight = len(self._adapter.shape) == 4 and self._adapter.peft_kind is None
        return InputRotated(turn.mT.contiguous() if by_weight else turn)

    def scaled(self) -> Patch:
        change, on_input = self._take("weight", "on_input")
        return Scaled(change.flatten(), bool(one_number(on_input, "on_input")))

    def peft_scaled(self) -> Patch:
        (factor,) = self._take("ia3_l")
        # PEFT makes (1, in) for feed-forward linears and (out, 1) for others; for convolutions (1, n, 1, 1) in both.
        row = factor.ndim > 1 and factor.shape[0] == 1
        on_input = row and (factor.ndim == 2 or factor.numel() != self._adapter.shape[0])
        if factor.ndim == 4 and self._adapter.on_input is not None:
            on_input = self._adapter.on_input
        change = factor.flatten().float() - 1
        if not on_input and self._adapter.has_bias:  # it scales what the layer answers, bias and all
            self._bias_patch = ScaledBias(change, on_input=False)
        return Scaled(change, on_input)

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
            lengths = self._adapter.shape
            if patch.fits(torch.Size(lengths)) and magnitude.numel() != lengths[1 if row else 0]:
                raise MalformedError(f"its {part} has {magnitude.numel()} numbers for a weight of {list(lengths)}")
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
    "oft_diag": _Reader.rotated_already,
    **dict.fromkeys(("oft_blocks", "rescale"), _Reader.rotated),
    **dict.fromkeys(("boft_R", "boft_s"), _Reader.input_butterfly),
    **dict.fromkeys(("vera_b", "vera_d"), _Reader.vera),
    **dict.fromkeys(("embedding_A", "embedding_B"), _Reader.embedded),
    "oft_R": _Reader.input_rotated,
    "on_input": _Reader.scaled,
    "ia3_l": _Reader.peft_scaled,
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _Reader.hadamard),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), _Reader.kronecker),
    **dict.fromkeys(("a1", "a2", "b1", "b2"), _Reader.generalized),
    **dict.fromkeys(("up", "down", "mid", "values"), _Reader.low_rank),
}
