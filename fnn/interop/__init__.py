"""Exchange with the outside: torch modules as layers, and weights in files."""

from fnn.interop import _module_rules as _module_rules
from fnn.interop import _random_rules as _random_rules
from fnn.interop._export import export as export
from fnn.interop._export import export_onnx as export_onnx
from fnn.interop._module import from_module as from_module
from fnn.interop._module import to_module as to_module
from fnn.interop._pth import load_pth as load_pth
from fnn.interop._pth import save_pth as save_pth
from fnn.interop._safetensors import load_safetensors as load_safetensors
from fnn.interop._safetensors import save_safetensors as save_safetensors
from fnn.interop._state_dict import StateDictError as StateDictError
from fnn.interop._state_dict import StateDictWarning as StateDictWarning
from fnn.interop._state_dict import from_state_dict as from_state_dict
from fnn.interop._state_dict import to_state_dict as to_state_dict
