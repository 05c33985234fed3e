"""A module made of a function, its buffers and its submodules."""

import torch


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(self, *args)


def module_of(function, *, persistent=True, **parts):
    """A module that calls ``function(module, *inputs)``.

    Args:
        function: the function to call.
        persistent: whether buffers are part of the state dict.
        parts: buffers (tensors), parameters and submodules, by name.
    """
    module = _Module(function)
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, torch.nn.Parameter):
            module.register_buffer(name, part, persistent=persistent)
        else:
            setattr(module, name, part)
    return module.eval()
