"""Gives a ComfyUI the built-in model as a checkpoint, with what lets ComfyUI load it, and the built-in LoRAs.

``python tests/comfyui/prepare_small_sdxl.py BASE_DIR COMFYUI_PATH``: writes below ``BASE_DIR`` alone. ComfyUI's own
nodes then draw real pictures without any download, and *Load LoRA, exact* has something to be seen on.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
CHECKPOINT = "sd_xl_base_1.0.safetensors"  # as the example workflows call it


def main() -> None:
    """Write the files."""
    base = Path(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    from impasto.models.catalog import BUILTIN_FOLDER, find_model
    from impasto.models.networks import Dtypes, load_networks
    from tests.parity.lora.adapters import ALPHAS
    from tests.parity.lora.files import write_case
    from tests.parity.lora.networks import networks_of
    from tests.single_file import base_layout

    found = load_networks(find_model("builtin"), Dtypes.all(torch.float32))
    tensors = base_layout(found.unet, found.vae, *found.text_encoders)
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    for folder in ("checkpoints", "loras"):
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, base / "models" / "checkpoints" / CHECKPOINT)
    shutil.copy(ROOT / "tests" / "comfyui" / "small_sdxl.py", base / "custom_nodes" / "impasto_small_sdxl.py")
    for file in (BUILTIN_FOLDER / "loras").glob("*.safetensors"):
        shutil.copy(file, base / "models" / "loras")
    first, second = found.text_encoders
    networks = networks_of({"unet": found.unet, "text_encoder": first, "text_encoder_2": second})
    write_case(networks, base / "models" / "loras" / "ia3.safetensors", "IA3, outputs", "PEFT, no prefix", ALPHAS[0])


if __name__ == "__main__":
    main()
