"""μP: the kinds of weights, how each is initialised, and what multiplies it.

    python mup.py        print the rules for an MLP in μP

Each weight tensor of an inner network is declared once, as a `Weight` of one of four *kinds*. The
kind says how its fan-in and its fan-out grow with the width n of the network:

    kind    fan_in  fan_out  examples
    input   Θ(1)    Θ(n)     first layer, embeddings
    hidden  Θ(n)    Θ(n)     inner layers, attention, both matrices of a transformer's MLP
    output  Θ(n)    Θ(1)     read-out
    vector  -       Θ(n)     biases, gains and shifts of norms (an input weight of fan_in 1)

The table `rules` gives the initialisation and the multipliers of each kind. In the standard
parametrization (SP) all multipliers are 1.

Sources: TP5 = "Tensor Programs V" (arXiv 2203.03466), Table 8; μLO (arXiv 2406.00153), which
multiplies a learned optimizer's update as TP5 multiplies Adam's learning rate.

Dimensions: D fan_in of a layer, W fan_out of a layer.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any  # a pytree


class Parametrization(NamedTuple):
    """name: mup or sp. *_mult: what μP leaves free. base_width: see `gradient_multiplier`."""
    name: str = "mup"
    input_mult: float | Array = 1.0
    output_mult: float | Array = 1.0
    hidden_lr_mult: float | Array = 1.0
    base_width: int = 0

    @property
    def is_mup(self) -> bool:
        """True in μP, False in SP. Raises KeyError for any other name."""
        return {"mup": True, "sp": False}[self.name]


MUP, SP = Parametrization("mup"), Parametrization("sp")


class Rule(NamedTuple):
    """A row of the table: the initial σ, the forward multiplier and the update multiplier."""
    std: float
    forward: float | Array
    update: float | Array


def rules(parametrization: Parametrization, fan_in: int) -> dict[str, Rule]:
    """The table for a weight with this fan_in: {kind: `Rule`} (TP5, Table 8; μLO)."""
    p, σ = parametrization, 1 / math.sqrt(fan_in)
    if not p.is_mup:
        return dict(input=Rule(σ, 1.0, 1.0), hidden=Rule(σ, 1.0, 1.0),
                    output=Rule(σ, 1.0, 1.0), vector=Rule(0.0, 1.0, 1.0))
    return dict(
        #           initial σ  forward                 update
        input=Rule(σ,          p.input_mult,           1.0),
        hidden=Rule(σ,         1.0,                    p.hidden_lr_mult / fan_in),
        output=Rule(0.0,       p.output_mult / fan_in, 1.0),
        vector=Rule(1.0,       1.0,                    1.0))


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one weight tensor: a leaf of a network's tree of weights.

    kind: input, hidden, output or vector. fan_in: the inputs summed in one output. std, constant:
    an initialisation in place of the table's, N(0, std²) or one number.
    """
    kind: str
    shape: tuple[int, ...]
    fan_in: int
    std: float | None = None
    constant: float | None = None

    def rule(self, parametrization: Parametrization) -> Rule:
        """This weight's row of `rules`."""
        return rules(parametrization, self.fan_in)[self.kind]


def matrix(kind: str, fan_in: int, fan_out: int) -> dict[str, Weight]:
    """Declare a linear layer: a matrix w [fan_in, fan_out] of this kind and a bias b [fan_out]."""
    return {"w": Weight(kind, (fan_in, fan_out), fan_in), "b": Weight("vector", (fan_out,), 1)}


def norm(width: int) -> dict[str, Weight]:
    """Declare the gain (1) and the shift (0) of a LayerNorm, both vectors [width]."""
    return {"gain": Weight("vector", (width,), 1, constant=1.0),
            "shift": Weight("vector", (width,), 1, constant=0.0)}


def init(weights: Tree, key: Array, parametrization: Parametrization) -> Tree:
    """Draw all weights of a network: a tree of `Weight`s → the same tree of float32 arrays.

    Each is N(0, σ²) with its own std or the σ of `rules`. Matrices are cut at ±2σ and not rescaled:
    their standard deviation is 0.88σ. Vectors are not cut, nor are weights with their own std.
    """
    declared, treedef = jax.tree.flatten(weights)
    cut = [w.kind != "vector" and w.std is None for w in declared]
    stds = [w.rule(parametrization).std if w.std is None else w.std for w in declared]
    drawn = [bool(std) and w.constant is None for w, std in zip(declared, stds)]
    normals = standard_normals(key, [w.shape if d else None for w, d in zip(declared, drawn)], cut)
    return treedef.unflatten(
        [jnp.full(w.shape, w.constant or 0.0, jnp.float32) if z is None else std * z
         for w, std, z in zip(declared, stds, normals)])


def update_multipliers(weights: Tree, parametrization: Parametrization) -> Tree:
    """The multiplier of each weight's update: a tree of `Weight`s → the same tree of numbers.

    It is absolute, not relative to a base width. lopt.py multiplies each update by it.
    """
    return jax.tree.map(lambda w: w.rule(parametrization).update if w else 1.0, weights,
                        is_leaf=lambda w: w is None)


def linear(weights: dict[str, Weight], params: dict[str, Array], x: Array,
           parametrization: Parametrization) -> Array:
    """A linear layer with its forward multiplier c: x [..., D] → [..., W].

    c·(x w) + b, but c·(x w + b) for a read-out: μP scales the logits *with* their bias.
    """
    c = weights["w"].rule(parametrization).forward
    if weights["w"].kind == "output":
        return c * (x @ params["w"] + params["b"])
    return c * (x @ params["w"]) + params["b"]


def attention_scale(d_head: int, parametrization: Parametrization) -> float:
    """The multiplier of the attention logits q·k: 1/d_head in μP, 1/√d_head in SP."""
    return 1.0 / d_head if parametrization.is_mup else 1.0 / math.sqrt(d_head)


# ~~~~~~~~ waterline: the paper above, the machine and what is ours below ~~~~~~~~


def gradient_multiplier(weights: Tree, parametrization: Parametrization) -> float:
    """Ours: learned optimizers see gradients · width/base_width in μP. With base_width 0: · 1.

    The width is the largest fan_in of a read-out. In μP gradients shrink as 1/width, and the
    absolute ε of the features dominates small gradients (arXiv 2407.05872: Adam's ε does so, too).
    """
    if not (parametrization.is_mup and parametrization.base_width):
        return 1.0
    read_outs = [w.fan_in for w in jax.tree.leaves(weights) if w.kind == "output"]
    return max(read_outs) / parametrization.base_width


def standard_normals(key: Array, shapes: list[tuple[int, ...] | None],
                     cut: list[bool]) -> list[Array | None]:
    """One array of standard normals for each shape, cut at ±2 where `cut` is true; None for None.

    All are slices of two draws, which compile several times faster than one draw for each.
    """
    sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
    keys = jax.random.split(key)
    cut_size = sum(n for n, c in zip(sizes, cut) if c)
    draws = {True: jax.random.truncated_normal(keys[0], -2.0, 2.0, (cut_size,)),
             False: jax.random.normal(keys[1], (sum(sizes) - cut_size,))}
    arrays = []
    for shape, size, c in zip(shapes, sizes, cut):
        values, draws[c] = jnp.split(draws[c], [size])
        arrays.append(None if shape is None else values.reshape(shape))
    return arrays


def infer(narrow: Tree, wide: Tree, stacked: dict[str, int] = {}, transposed=False) -> Tree:
    """Declare a network by its shapes at two widths. Returns a tree of `Weight`s like `wide`.

    narrow, wide: the params of one network at two widths, arrays or jax.ShapeDtypeStructs. An axis
    that differs is Θ(n). The last axis counts the outputs, the others the inputs; with transposed,
    the first axis counts the outputs (PyTorch, Equinox: put `Weight`s for embeddings). Attention's
    [n, heads, size] and [heads, size, n] are split where fan_in = fan_out. stacked: {name: k}: all
    tensors below this name have k leading axes of layers. A vector filled with one number keeps it.
    `Weight`s stay; leaves of integers become None. Raises ValueError: ambiguous shapes.
    """
    def name_of(path: tuple) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    small = {name_of(path): x for path, x in jax.tree.leaves_with_path(narrow)}
    growing: list[int] = []

    def declare(path: tuple, x: Any) -> Weight | None:
        if isinstance(x, Weight):
            return x
        if not (hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)):
            return None
        name = name_of(path)
        shape = getattr(small.get(name), "shape", ())
        layers = next((n for key, n in stacked.items() if key in name.split("/")), 0)
        axes = list(zip(shape, x.shape))[layers:]
        axes = axes[1:] + axes[:1] if transposed else axes
        grows = [i for i, (n, w) in enumerate(axes) if n != w]
        growing.extend(grows)
        last = len(axes) - 1
        splits = [last]  # where the axes of the outputs may begin
        if not transposed and grows not in ([], [last], [last - 1], [last - 1, last]):
            splits = [i for i in range(grows[0] + 1, grows[-1] + 1)
                      if all(math.prod(size[:i]) == math.prod(size[i:]) for size in zip(*axes))]
        if len(shape) != x.ndim or len(grows) > 2 or len(splits) != 1:
            raise ValueError(f"{name}: the shapes {shape} and {x.shape} are ambiguous: put a "
                             "mup.Weight(kind, shape, fan_in) in its place in `wide`")
        fan_in = math.prod(w for _, w in axes[:splits[0]])
        if last < 1 or not grows:
            filled = hasattr(x, "min") and x.size and bool(x.min() == x.max())
            std = fan_in ** -0.5 if last > 0 and not filled else None
            return Weight("vector", x.shape, 1, std, float(x.min()) if filled else None)
        kind = "hidden" if len(grows) == 2 else "input" if grows[0] >= splits[0] else "output"
        return Weight(kind, x.shape, fan_in)

    weights = jax.tree.map_with_path(declare, wide)
    if not growing:
        raise ValueError("no tensor grows from `narrow` to `wide`: give two different widths")
    return weights


def main() -> None:
    """Print the rules for an MLP of width 512 in μP."""
    weights = {"layer_0": matrix("input", 24, 512), "layer_1": matrix("hidden", 512, 512),
               "logits": matrix("output", 512, 10)}
    print(f"{'weight':12}{'kind':8}{'shape':12}{'initial σ':>12}{'forward':>12}{'update':>12}")
    for path, weight in jax.tree.leaves_with_path(weights):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        std, forward, update = weight.rule(MUP)
        print(f"{name:12}{weight.kind:8}{' × '.join(map(str, weight.shape)):12}"
              f"{std:12.4f}{forward:12.6f}{update:12.6f}")


if __name__ == "__main__":
    main()
