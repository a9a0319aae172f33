"""Files of models and of training state: safetensors with checked contents, written whole or not at all, no pickle."""

from tinygrad_bn.checkpoint.files import CheckpointError, Contents, read
from tinygrad_bn.checkpoint.folder import Folder
from tinygrad_bn.checkpoint.state import apply, load, load_model, save, save_model

__all__ = ["CheckpointError", "Contents", "Folder", "apply", "load", "load_model", "read", "save", "save_model"]
