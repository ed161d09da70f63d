"""Impasto's nodes, as ComfyUI finds them in ``custom_nodes``: they are in the package ``impasto``."""

import sys

try:
    from impasto.comfyui import comfy_entrypoint
except ImportError as error:
    raise ImportError(
        f"the Impasto nodes need the package impasto in the Python that runs ComfyUI ({error}); "
        f"install it with: {sys.executable} -m pip install impasto"
    ) from error

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
