"""Adapters of every kind for one module: random tensors as a trainer would save them, and what they mean.

Knows the parts of each kind by kohya's and LyCORIS' words and the formulas. Knows no names of modules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.parity.lora import formulas as f

Shape = tuple[int, ...]
Formula = Callable[[Tensor, float], Tensor]  # (weight, strength) -> new weight, float64
RANK = 3
CONV = ("1x1", "3x3")
MATRIX = ("linear", *CONV, "te1", "te2")


@dataclass(frozen=True)
class Made:
    """One module's adapter: its tensors by part, and the formulas for its weight and bias."""

    parts: dict[str, Tensor]
    weight: Formula | None = None
    bias: Formula | None = None


@dataclass(frozen=True)
class Alpha:
    """A case of alpha: the tensor that is saved for a rank (``None``: none is), and what it scales by."""

    name: str
    tensor: Callable[[int], Tensor | None]

    def scale(self, rank: int) -> float:
        """``alpha / rank``, 1 without alpha."""
        alpha = self.tensor(rank)
        return 1.0 if alpha is None else alpha.double().item() / rank


ALPHAS = (
    Alpha("rank", lambda rank: torch.tensor(float(rank))),
    Alpha("absent", lambda rank: None),
    Alpha("one", lambda rank: torch.tensor(1.0)),
    Alpha("zero", lambda rank: torch.tensor(0.0)),
    Alpha("negative", lambda rank: torch.tensor(-1.5)),
    Alpha("integer", lambda rank: torch.tensor(2 * rank)),
    Alpha("one element", lambda rank: torch.tensor([1.7])),
    Alpha("bfloat16", lambda rank: torch.tensor(1.7, dtype=torch.bfloat16)),
    Alpha("float8", lambda rank: torch.tensor(1.7).to(torch.float8_e4m3fn)),
    Alpha("1x1 float16", lambda rank: torch.tensor([[0.3]], dtype=torch.float16)),
)


class Draw:
    """Random tensors in a file's dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def tensor(self, *shape: int, size: float = 0.5) -> Tensor:
        """Normal numbers of that size."""
        return (torch.randn(shape, generator=self._generator) * size).to(self._dtype)

    def choice(self, count: int) -> int:
        """A number from 0 on."""
        return int(torch.randint(count, (1,), generator=self._generator))


Maker = Callable[[Shape, Draw, Alpha], Made]


def _with_alpha(parts: dict[str, Tensor], alpha: Alpha, rank: int) -> dict[str, Tensor]:
    tensor = alpha.tensor(rank)
    return parts if tensor is None else {**parts, "alpha": tensor}


def _delta_lora(shape: Shape, draw: Draw, alpha: Alpha) -> tuple[dict[str, Tensor], Tensor]:
    out, inputs, *window = shape
    down, up = draw.tensor(RANK, inputs, *window), draw.tensor(out, RANK, *(1 for _ in window))
    return (
        _with_alpha({"down": down, "up": up}, alpha, RANK),
        alpha.scale(RANK) * f.low_rank(down.double(), up.double()),
    )


def _delta_loha(shape: Shape, draw: Draw, alpha: Alpha) -> tuple[dict[str, Tensor], Tensor]:
    out, inputs = shape[0], math.prod(shape[1:])
    parts = {
        "hada_w1_a": draw.tensor(out, RANK), "hada_w1_b": draw.tensor(RANK, inputs),
        "hada_w2_a": draw.tensor(out, RANK), "hada_w2_b": draw.tensor(RANK, inputs),
    }  # fmt: skip
    a, b, c, d = (tensor.double() for tensor in parts.values())
    return _with_alpha(parts, alpha, RANK), alpha.scale(RANK) * ((a @ b) * (c @ d)).reshape(shape)


def _delta_lokr(shape: Shape, draw: Draw, alpha: Alpha) -> tuple[dict[str, Tensor], Tensor]:
    parts, small, large = _factors(shape, draw, small_whole=True, large_whole=False)
    return _with_alpha(parts, alpha, RANK), alpha.scale(RANK) * f.kronecker(small, large)


def _additive(delta: Callable[[Shape, Draw, Alpha], tuple[dict[str, Tensor], Tensor]]) -> Maker:
    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        parts, change = delta(shape, draw, alpha)
        return Made(parts, lambda w, s: f.added(w, s, change))

    return make


def _dora(delta: Callable[[Shape, Draw, Alpha], tuple[dict[str, Tensor], Tensor]], axis: int, part: str) -> Maker:
    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        parts, change = delta(shape, draw, alpha)
        magnitude = (draw.tensor(shape[axis]).float().abs() + 0.5).to(next(iter(parts.values())).dtype)
        sides = [1] * len(shape)
        sides[axis] = -1
        if part == "magnitude":  # PEFT's: a vector for a linear, (1, out, 1, 1) for a convolution
            sides = [-1] if len(shape) == 2 else [1, -1, 1, 1]
        return Made(
            {**parts, part: magnitude.reshape(sides)},
            lambda w, s: f.decomposed(w, s, change, magnitude.double(), axis),
        )

    return make


def _locon_tucker(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    out, inputs, *window = shape
    down, mid, up = draw.tensor(RANK, inputs, 1, 1), draw.tensor(RANK, RANK, *window), draw.tensor(out, RANK, 1, 1)
    delta = f.tucker(mid.double(), up.double().flatten(1).T, down.double().flatten(1))
    parts = _with_alpha({"down": down, "mid": mid, "up": up}, alpha, RANK)
    return Made(parts, lambda w, s: f.added(w, s, alpha.scale(RANK) * delta))


def _other_rank_of_axes(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    """4-D tensors for a linear, 2-D ones for a 1x1 convolution."""
    flat = (shape[0], shape[1])
    made = _additive(_delta_lora)(flat, draw, alpha)
    if len(shape) == 2:
        made.parts.update({part: made.parts[part][:, :, None, None].contiguous() for part in ("down", "up")})
    return made


def _loha_tucker(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    out, inputs, *window = shape
    parts = {}
    halves = []
    for half in ("1", "2"):
        core, left, right = draw.tensor(RANK, RANK, *window), draw.tensor(RANK, out), draw.tensor(RANK, inputs)
        parts |= {f"hada_t{half}": core, f"hada_w{half}_a": left, f"hada_w{half}_b": right}
        halves.append(f.tucker(core.double(), left.double(), right.double()))
    delta = alpha.scale(RANK) * halves[0] * halves[1]
    return Made(_with_alpha(parts, alpha, RANK), lambda w, s: f.added(w, s, delta))


def _divided(number: int) -> tuple[int, int]:
    small = next(d for d in (4, 3, 2, 1) if number % d == 0)
    return small, number // small


def _factors(
    shape: Shape, draw: Draw, *, small_whole: bool, large_whole: bool, core: bool = False
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    (a, c), (b, d), window = _divided(shape[0]), _divided(shape[1]), shape[2:]
    parts: dict[str, Tensor] = {}
    if small_whole:
        parts["lokr_w1"] = draw.tensor(a, b)
        small = parts["lokr_w1"].double()
    else:
        parts |= {"lokr_w1_a": draw.tensor(a, RANK), "lokr_w1_b": draw.tensor(RANK, b)}
        small = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
    if large_whole:
        parts["lokr_w2"] = draw.tensor(c, d, *window)
        large = parts["lokr_w2"].double()
    elif core:
        parts |= {
            "lokr_t2": draw.tensor(RANK, RANK, *window),
            "lokr_w2_a": draw.tensor(RANK, c),
            "lokr_w2_b": draw.tensor(RANK, d),
        }
        large = f.tucker(*(parts[part].double() for part in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")))
    else:
        parts |= {"lokr_w2_a": draw.tensor(c, RANK), "lokr_w2_b": draw.tensor(RANK, d * math.prod(window))}
        large = (parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()).reshape(c, d, *window)
    return parts, small, large


def _lokr(**form: bool) -> Maker:
    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        parts, small, large = _factors(shape, draw, **form)
        # With both factors whole LyCORIS' alpha means nothing; it saves the rank or even 1e10 there.
        scale = 1.0 if form["small_whole"] and form["large_whole"] else alpha.scale(RANK)
        delta = scale * f.kronecker(small, large)
        return Made(_with_alpha(parts, alpha, RANK), lambda w, s: f.added(w, s, delta))

    return make


def _glora(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    out, inputs, *window = shape
    ones = [1 for _ in window]
    parts = {
        "a1": draw.tensor(inputs, RANK, *ones), "a2": draw.tensor(RANK, inputs, *ones),
        "b1": draw.tensor(out, RANK, *ones), "b2": draw.tensor(RANK, inputs, *window),
    }  # fmt: skip
    a1, a2, b1 = (parts[part].double().flatten(1) for part in ("a1", "a2", "b1"))
    beside = f.low_rank(parts["b2"].double(), b1)
    scale = alpha.scale(RANK)
    return Made(_with_alpha(parts, alpha, RANK), lambda w, s: f.generalized(w, s, a1, a2, beside, scale))


def _glora_old(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    """LyCORIS 1's layout: every pair the other way round."""
    out, inputs = shape[:2]
    ones = [1 for _ in shape[2:]]
    parts = {
        "a1": draw.tensor(RANK, inputs, *ones), "a2": draw.tensor(inputs, RANK, *ones),
        "b1": draw.tensor(RANK, inputs, *ones), "b2": draw.tensor(out, RANK, *ones),
    }  # fmt: skip
    a1, a2, b1, b2 = (tensor.double().flatten(1) for tensor in parts.values())
    scale = alpha.scale(RANK)
    return Made(_with_alpha(parts, alpha, RANK), lambda w, s: f.generalized(w, s, a2, a1, b2 @ b1, scale))


def _glora_tucker(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    out, inputs, *window = shape
    parts = {
        "a1": draw.tensor(inputs, RANK, 1, 1), "a2": draw.tensor(RANK, inputs, 1, 1),
        "b1": draw.tensor(out, RANK, 1, 1), "b2": draw.tensor(RANK, inputs, 1, 1),
        "bm": draw.tensor(RANK, RANK, *window),
    }  # fmt: skip
    a1, a2, b1, b2, _ = (tensor.double().flatten(1) for tensor in parts.values())
    beside = f.tucker(parts["bm"].double(), b1.T, b2)
    scale = alpha.scale(RANK)
    return Made(_with_alpha(parts, alpha, RANK), lambda w, s: f.generalized(w, s, a1, a2, beside, scale))


def _constraint(alpha: Alpha, outputs: int) -> tuple[dict[str, Tensor], float]:
    """The alpha of rotations is the constraint, small enough here to bind in some cases."""
    tensor = alpha.tensor(1)
    if tensor is None:
        return {}, 0.0
    tensor = (tensor.float() * 0.05).to(tensor.dtype)
    return {"alpha": tensor}, max(tensor.double().item(), 0.0) * outputs


def _diag_oft(rescaled: bool) -> Maker:
    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        size = 4 if shape[0] % 4 == 0 else 3
        blocks = draw.tensor(shape[0] // size, size, size, size=0.3)
        saved, constraint = _constraint(alpha, shape[0])
        rotation = f.cayley(blocks.double(), constraint)
        parts = {"oft_blocks": blocks, **saved}
        if rescaled:
            parts["rescale"] = draw.tensor(shape[0], *(1 for _ in shape[1:]))
        rescale = parts["rescale"].double() if rescaled else None
        return Made(parts, lambda w, s: f.output_rotated(w, s, rotation, rescale))

    return make


def _boft(rescaled: bool) -> Maker:
    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        forms = ((4, 3), (6, 3), (4, 2), (2, 2), (4, 1))
        size, stages = next((b, m) for b, m in forms if shape[0] % (b * 2 ** (m - 1)) == 0)
        blocks = draw.tensor(stages, shape[0] // size, size, size, size=0.3)
        saved, constraint = _constraint(alpha, shape[0])
        rotation = f.cayley(blocks.double(), constraint)
        parts = {"oft_blocks": blocks, **saved}
        if rescaled:
            parts["rescale"] = draw.tensor(shape[0], *(1 for _ in shape[1:]))
        rescale = parts["rescale"].double() if rescaled else None
        return Made(parts, lambda w, s: f.butterfly(w, s, rotation, rescale))

    return make


def _oft_diag(stages: bool) -> Maker:
    """The first LyCORIS' files: the rotations themselves."""

    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        size = 2 if shape[0] % 4 == 0 else 1 if stages else 3
        count = (2, shape[0] // size) if stages else (shape[0] // size,)
        if stages and size == 1:
            count, size = (1, shape[0] // 2), 2
        blocks = draw.tensor(*count, size, size, size=0.3)
        parts = {"oft_diag": f.cayley(blocks.double(), 0.0).to(blocks.dtype)}
        if stages:
            return Made(parts, lambda w, s: f.butterfly(w, s, parts["oft_diag"].double(), None))
        return Made(parts, lambda w, s: f.output_rotated(w, s, parts["oft_diag"].double(), None))

    return make


def _boft_of_inputs(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    """PEFT's BOFT: the inputs turned in stages, the outputs scaled."""
    inputs = math.prod(shape[1:])
    forms = ((4, 3), (4, 2), (2, 2), (4, 1), (3, 1), (1, 1))
    size, stages = next((b, m) for b, m in forms if inputs % (b * 2 ** (m - 1)) == 0)
    blocks = draw.tensor(stages, inputs // size, size, size, size=0.3)
    scale = draw.tensor(shape[0], 1)
    return Made(
        {"boft_R": blocks, "boft_s": scale},
        lambda w, s: f.butterfly_of_inputs(w, s, blocks.double(), scale.double()),
    )


def _adalora(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    out, inputs = shape[0], math.prod(shape[1:])
    down, up, values = draw.tensor(RANK, inputs), draw.tensor(out, RANK), draw.tensor(RANK, 1)
    delta = alpha.scale(RANK) * RANK / (RANK + 1e-5) * (up.double() @ (values.double() * down.double()))
    parts = _with_alpha({"down": down, "up": up, "values": values}, alpha, RANK)
    return Made(parts, lambda w, s: f.added(w, s, delta))


def _oft_v2(shared: bool, scaled: bool = False) -> Maker:
    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        inputs, size = math.prod(shape[1:]), 4
        upper = draw.tensor(1 if shared else inputs // size, size * (size - 1) // 2, size=0.3)
        parts = {"oft_R": upper}
        numbers = upper.double()
        if scaled:
            parts["scaled_oft"] = torch.tensor(1)
            numbers = numbers / math.sqrt(upper.shape[1])
        rotation = f.neumann(numbers, size)
        return Made(parts, lambda w, s: f.input_rotated(w, s, rotation, by_weight=len(shape) == 4))

    return make


def _ia3(axis: int) -> Maker:
    def make(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
        change = draw.tensor(shape[axis])
        saved = change if len(shape) == 2 else change.reshape(1, -1, 1, 1)
        parts = {"weight": saved, "on_input": torch.tensor(axis)}
        return Made(parts, lambda w, s: f.scaled(w, s, change.double(), axis))

    return make


def _full(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    diff, bias = draw.tensor(*shape), draw.tensor(shape[0])
    return Made(
        {"diff": diff, "diff_b": bias},
        lambda w, s: f.added(w, s, diff.double()),
        lambda b, s: f.added(b, s, bias.double()),
    )


def _norm(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    weight, bias = draw.tensor(*shape), draw.tensor(*shape)
    return Made(
        {"w_norm": weight, "b_norm": bias},
        lambda w, s: f.added(w, s, weight.double()),
        lambda b, s: f.added(b, s, bias.double()),
    )


def _lora_with_bias(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    made = _additive(_delta_lora)(shape, draw, alpha)
    bias = draw.tensor(shape[0])
    return Made({**made.parts, "diff_b": bias}, made.weight, lambda b, s: f.added(b, s, bias.double()))


def _lora_and_diff(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    parts, delta = _delta_lora(shape, draw, alpha)
    diff = draw.tensor(*shape)
    return Made({**parts, "diff": diff}, lambda w, s: f.added(w, s, delta + diff.double()))


def _replacement(shape: Shape, draw: Draw, alpha: Alpha) -> Made:
    other = draw.tensor(*shape)
    return Made({"set_weight": other}, lambda w, s: f.towards(w, s, other.double()))


# Kind -> (maker, layer types, its name in the report).
KINDS: dict[str, tuple[Maker, tuple[str, ...], str]] = {
    "LoRA": (_additive(_delta_lora), MATRIX, "LoRA"),
    "LoRA, 4-D on linears, 2-D on 1x1": (_other_rank_of_axes, ("linear", "1x1", "te1", "te2"), "LoRA"),
    "LoCon, Tucker": (_locon_tucker, ("3x3",), "LoRA"),
    "LoRA with bias difference": (_lora_with_bias, MATRIX, "LoRA"),
    "LoRA and full difference": (_lora_and_diff, MATRIX, "joined"),
    "DoRA, outputs": (_dora(_delta_lora, 0, "dora_scale"), MATRIX, "DoRA"),
    "DoRA, inputs": (_dora(_delta_lora, 1, "dora_scale"), MATRIX, "DoRA"),
    "DoRA, PEFT's magnitude": (_dora(_delta_lora, 0, "magnitude"), MATRIX, "DoRA"),
    "DoRA on LoHa": (_dora(_delta_loha, 0, "dora_scale"), MATRIX, "DoRA"),
    "DoRA on LoKr": (_dora(_delta_lokr, 1, "dora_scale"), MATRIX, "DoRA"),
    "LoHa": (_additive(_delta_loha), MATRIX, "LoHa"),
    "LoHa, Tucker": (_loha_tucker, ("3x3",), "LoHa"),
    "LoKr, both whole": (_lokr(small_whole=True, large_whole=True), MATRIX, "LoKr"),
    "LoKr, second factored": (_lokr(small_whole=True, large_whole=False), MATRIX, "LoKr"),
    "LoKr, first factored": (_lokr(small_whole=False, large_whole=True), MATRIX, "LoKr"),
    "LoKr, both factored": (_lokr(small_whole=False, large_whole=False), MATRIX, "LoKr"),
    "LoKr, Tucker": (_lokr(small_whole=True, large_whole=False, core=True), ("3x3",), "LoKr"),
    "GLoRA": (_glora, MATRIX, "GLoRA"),
    "GLoRA, old": (_glora_old, ("linear", "1x1", "te1", "te2"), "GLoRA"),
    "GLoRA, Tucker": (_glora_tucker, ("3x3",), "GLoRA"),
    "diag-OFT": (_diag_oft(rescaled=False), MATRIX, "diag-OFT"),
    "diag-OFT, rescaled": (_diag_oft(rescaled=True), MATRIX, "diag-OFT"),
    "BOFT": (_boft(rescaled=False), MATRIX, "BOFT"),
    "BOFT, rescaled": (_boft(rescaled=True), MATRIX, "BOFT"),
    "diag-OFT, rotations saved": (_oft_diag(stages=False), MATRIX, "diag-OFT"),
    "BOFT, rotations saved": (_oft_diag(stages=True), MATRIX, "BOFT"),
    "BOFT, PEFT's": (_boft_of_inputs, MATRIX, "BOFT"),
    "AdaLoRA": (_adalora, MATRIX, "AdaLoRA"),
    "OFTv2": (_oft_v2(shared=False), MATRIX, "OFTv2"),
    "OFTv2, one block for all": (_oft_v2(shared=True), MATRIX, "OFTv2"),
    "OFTv2, scaled": (_oft_v2(shared=False, scaled=True), MATRIX, "OFTv2"),
    "IA3, outputs": (_ia3(0), MATRIX, "IA3"),
    "IA3, inputs": (_ia3(1), MATRIX, "IA3"),
    "full difference": (_full, MATRIX, "full"),
    "replacement": (_replacement, MATRIX, "replacement"),
    "norm": (_norm, ("norm",), "norm"),
}
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
    "float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip
