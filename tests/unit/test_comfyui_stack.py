"""LORA_STACK, as other packs write it, and the node that makes one."""

import math

import pytest

from impasto.comfyui.stack import StackedLora, read_stack
from impasto.errors import InvalidInput
from tests.comfyui.inside import SETTING, comfyui_folder, enter_comfyui

inside_comfyui = pytest.mark.skipif(
    comfyui_folder() is None, reason=f"set {SETTING} to a folder of ComfyUI and run with its Python"
)


def test_other_packs_stacks_are_read():
    """Tuples and lists, whole numbers, and the empty slots that some packs leave."""
    stack = [("a.safetensors", 0.8, 0.5), ["sub/b.safetensors", 1, 0], ("None", 1.0, 1.0), (None, 1.0, 1.0), ("", 1, 1)]
    assert read_stack(stack) == [("a.safetensors", 0.8, 0.5), ("sub/b.safetensors", 1.0, 0.0)]
    assert read_stack(None) == read_stack([]) == []
    assert read_stack(stack)[0].strength_clip == 0.5


@pytest.mark.parametrize(
    "stack",
    ["a.safetensors", {"a": 1}, [("a", 1.0)], [("a", "1", 1.0)], [("a", math.nan, 1.0)], [("a", 1.0, math.inf)], [7]],
)
def test_what_is_no_stack_is_named(stack):
    """The error says which input, and what it takes."""
    with pytest.raises(InvalidInput, match=r"^lora_stack .*strength"):
        read_stack(stack)


@pytest.fixture(scope="module")
def rows():
    """The node, in ComfyUI's own types."""
    enter_comfyui()
    from impasto.comfyui.rows import LoraStackRows

    return LoraStackRows


@inside_comfyui
def test_rows_become_a_stack_after_the_one_before(rows):
    """Named rows with a scale, in their order, as plain tuples with one scale for both."""
    fields = {"lora_1": " a ", "scale_1": 0.5, "lora_2": "", "scale_2": 1.0, "lora_3": "owner/b", "scale_3": -1.0}
    made = rows.execute(lora_stack=[("z", 1.0, 0.2)], lora_4="off", scale_4=0.0, **fields)
    assert made[0] == [("z", 1.0, 0.2), ("a", 0.5, 0.5), ("owner/b", -1.0, -1.0)]
    assert {type(item) for item in made[0]} == {tuple}
    assert read_stack(made[0])[1] == StackedLora("a", 0.5, 0.5)


@inside_comfyui
def test_the_node_has_five_rows_and_is_no_surprise_to_other_packs(rows):
    """One row must be there, the others may; the socket is called as theirs."""
    told = rows.GET_NODE_INFO_V1()
    assert list(told["input"]["required"]) == ["lora_1", "scale_1"]
    assert len(told["input"]["optional"]) == 2 * 4 + 1 and told["input"]["optional"]["lora_stack"][0] == "LORA_STACK"
    assert told["output"] == ["LORA_STACK"]
