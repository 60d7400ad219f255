"""Freezing a pretrained network inside a model that mmengine trains."""

from collections.abc import Collection, Iterable

from torch import Tensor, nn


def freeze(module: nn.Module, trainable: Collection[str] = ()) -> None:
    """Turn parameters into buffers that are not saved, and mark every buffer as not saved.

    Such a tensor follows `.to()` and autocast as before, but nothing that deals with parameters meets it: no optimizer
    (mmengine's are given parameters that need no gradient as well), weight average, gradient reduction or state dict.

    Args:
        module: the network; changed in place.
        trainable: names of the parameters that stay what they are.
    """
    for path, child in module.named_modules():
        tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if (f'{path}.{name}' if path else name) not in trainable:
                delattr(child, name)
                child.register_buffer(name, tensor.detach(), persistent=False)


def reached(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The leaves that the outputs' gradients would reach, found by walking the graph without computing a gradient."""
    leaves, seen = set(), set()
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, 'variable'):
                leaves.add(node.variable)
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return leaves
