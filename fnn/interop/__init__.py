"""Exchange with the outside: weights in files."""

from fnn.interop._safetensors import load_safetensors, save_safetensors

__all__ = ["load_safetensors", "save_safetensors"]
