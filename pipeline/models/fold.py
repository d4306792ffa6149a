"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

import copy
from collections import Counter

from torch import nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(network: nn.Module) -> GraphModule:
    """A copy of `network` in inference mode, without the batch norms whose input is one convolution's output alone.

    With w, b of the convolution and mean m, variance v, scale g, shift s of the norm, k = g / sqrt(v + eps): the
    convolution with weight k * w and bias k * (b - m) + s gives what both gave. A batch norm elsewhere stays.
    """
    traced = symbolic_trace(copy.deepcopy(network).eval())
    uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        norm = _layer(traced, node)
        before = node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, Node):
            continue
        convolution = _layer(traced, before)
        if isinstance(convolution, nn.Conv2d) and len(before.users) == 1 and uses[before.target] == 1:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _layer(traced: GraphModule, node: Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None
