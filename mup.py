"""μP: the kinds of weights, how each is initialised, and what multiplies it.

    python mup.py        prints the rules on an MLP at two widths, in SP and in μP

Every weight tensor of an inner network is declared once, where it is used, as a `Weight` of one of four *kinds*. Its
kind says how its fan-in and its fan-out grow with the width n of the network:

    kind    fan_in  fan_out  examples
    input   Θ(1)    Θ(n)     first layer, embeddings
    hidden  Θ(n)    Θ(n)     inner layers, attention, both matrices of a transformer's MLP
    output  Θ(n)    Θ(1)     read-out
    vector  -       Θ(n)     biases, gains and shifts of norms (an input weight of fan_in 1)

All else follows from the kind by one table, `rules`: the initial standard deviation, the forward multiplier, and the
multiplier of the optimizer's update. In the standard parametrization (SP) the multipliers are 1.

Sources: TP5 = "Tensor Programs V" (arXiv 2203.03466), whose Table 8 gives μP for Adam; μLO (arXiv 2406.00153), which
multiplies a learned optimizer's update by what multiplies Adam's learning rate there.

Dimensions: D fan_in of a layer, W fan_out of a layer.
"""

import dataclasses
import math
import signal
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any  # a pytree; here nested dicts whose leaves are arrays, numbers or Weights

KINDS = ("input", "hidden", "output", "vector")


class Parametrization(NamedTuple):
    """How a network and its updates depend on the width: "mup" or "sp".

    The three multipliers are those that μP leaves to be tuned; SP has none of them. base_width belongs to
    `gradient_multiplier`, which is ours; 0 turns it off.
    """
    name: str = "mup"
    input_mult: float | Array = 1.0
    output_mult: float | Array = 1.0
    hidden_lr_mult: float | Array = 1.0
    base_width: int = 0

    @property
    def is_mup(self) -> bool:
        """True in μP, False in SP. Raises ValueError for any other name."""
        if self.name not in ("mup", "sp"):
            raise ValueError(f"unknown parametrization {self.name!r}: use 'mup' or 'sp'")
        return self.name == "mup"


MUP, SP = Parametrization("mup"), Parametrization("sp")


class Rule(NamedTuple):
    """One row of μP's table. std: initial standard deviation σ. forward: multiplier of the layer's output.
    update: multiplier of the optimizer's update."""
    std: float
    forward: float | Array
    update: float | Array


def rules(parametrization: Parametrization, fan_in: int) -> dict[str, Rule]:
    """μP's table, for a weight with that fan_in: its `Rule` by its kind (TP5, Table 8; μLO)."""
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
    """The declaration of one weight tensor: a leaf of a task's tree of weights.

    kind: one of KINDS. shape: the tensor's. fan_in: how many inputs are summed in one output, 1 if not given,
    which hidden and output weights must. std, constant: an initialisation that replaces the table's and depends
    neither on the width nor on the parametrization: N(0, std²), or a constant, not both. Raises ValueError for
    an unknown kind, a missing fan_in, a size below 1, and for both.
    """
    kind: str
    shape: tuple[int, ...]
    fan_in: int | None = None
    std: float | None = None
    constant: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of weight {self.kind!r}: use one of {', '.join(KINDS)}")
        if self.fan_in is None and self.kind in ("hidden", "output"):
            raise ValueError(f"a weight of kind {self.kind!r} needs a fan_in: its multipliers depend on it")
        if self.std is not None and self.constant is not None:
            raise ValueError(f"a weight begins as N(0, std²) or as a constant, not as both: std {self.std}, "
                             f"constant {self.constant}")
        object.__setattr__(self, "fan_in", 1 if self.fan_in is None else self.fan_in)
        if min((*self.shape, self.fan_in)) < 1:
            raise ValueError("a weight needs a positive shape and fan_in, "
                             f"got {self.shape} and {self.fan_in}")


def matrix(kind: str, fan_in: int, fan_out: int) -> dict[str, Weight]:
    """Declares a linear layer whose matrix has that kind: w [fan_in, fan_out] and its bias b [fan_out]."""
    return {"w": Weight(kind, (fan_in, fan_out), fan_in), "b": Weight("vector", (fan_out,))}


def norm(width: int) -> dict[str, Weight]:
    """Declares the gain (1) and the shift (0) of a LayerNorm, both vectors [width]."""
    return {"gain": Weight("vector", (width,), constant=1.0),
            "shift": Weight("vector", (width,), constant=0.0)}


def rule_of(weight: Weight, parametrization: Parametrization) -> Rule:
    """The row of μP's table that holds for a weight."""
    return rules(parametrization, weight.fan_in)[weight.kind]


def init(weights: Tree, key: Array, parametrization: Parametrization) -> Tree:
    """Draws all weights of a network: a tree of `Weight`s → the same tree of float32 arrays.

    Each is N(0, σ²) with the σ of `rules`. Matrices are cut at ±2σ and not rescaled for the cut, so that their standard
    deviation is 0.88σ; vectors, and weights that declare a std of their own, are not cut.
    """
    declared, treedef = jax.tree.flatten(weights)
    cut = [w.kind != "vector" and w.std is None for w in declared]
    stds = [rule_of(w, parametrization).std if w.std is None else w.std for w in declared]
    stds = [std if w.constant is None else 0.0 for w, std in zip(declared, stds)]
    normals = standard_normals(key, [w.shape if std else None for w, std in zip(declared, stds)], cut)
    return treedef.unflatten(
        [jnp.full(w.shape, w.constant or 0.0, jnp.float32) if z is None else std * z
         for w, std, z in zip(declared, stds, normals)])


def forward_multiplier(weight: Weight, parametrization: Parametrization) -> float | Array:
    """The multiplier of what a weight puts out: input_mult (input), output_mult/fan_in (output), else 1."""
    return rule_of(weight, parametrization).forward


def update_multipliers(weights: Tree, parametrization: Parametrization) -> Tree:
    """The multiplier of every weight's update: a tree of `Weight`s → the same tree of numbers.

    It is hidden_lr_mult/fan_in for hidden weights and 1 for all others: absolute, not relative to a base width.
    `lopt.learned_optimizer` and `lopt.adamw` multiply their updates by it.
    """
    return jax.tree.map(lambda w: rule_of(w, parametrization).update, weights)


def linear(weights: dict[str, Weight], params: dict[str, Array], x: Array,
           parametrization: Parametrization) -> Array:
    """A linear layer with its forward multiplier c: x [..., D] → [..., W].

    c·(x w) + b, but c·(x w + b) for a read-out, since μP scales the logits *with* their bias.
    """
    c = forward_multiplier(weights["w"], parametrization)
    if weights["w"].kind == "output":
        return c * (x @ params["w"] + params["b"])
    return c * (x @ params["w"]) + params["b"]


def attention_scale(d_head: int, parametrization: Parametrization) -> float:
    """The multiplier of the attention logits q·k: 1/d_head in μP, 1/√d_head in SP."""
    return 1.0 / d_head if parametrization.is_mup else 1.0 / math.sqrt(d_head)


# Beyond μLO: ours, and off unless a base width is given -------------------------------------------------


def gradient_multiplier(weights: Tree, parametrization: Parametrization) -> float:
    """The multiplier of the gradients that a learned optimizer sees: width/base_width, 1 by default and in SP.

    The width is the fan_in of the read-out. In μP every gradient falls as 1/width, since the logits are multiplied by
    output_mult/fan_in. The learned optimizer's features have absolute ε, which rule where gradients are that small;
    with this multiplier its gradients are as large at any width as at the base width. That Adam's ε, too, must shrink
    with the width is from Everett et al. (arXiv 2407.05872).
    """
    if not (parametrization.is_mup and parametrization.base_width):
        return 1.0
    read_outs = [w.fan_in for w in jax.tree.leaves(weights) if w.kind == "output"]
    if not read_outs:
        raise ValueError("a base width needs the width of a read-out, and there is no weight of kind 'output': "
                         "declare one, or give the learned optimizer the multiplier width/base_width yourself, as "
                         "where embeddings are read out, too: see mup.infer")
    return max(read_outs) / parametrization.base_width


# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~


def standard_normals(key: Array, shapes: list[tuple[int, ...] | None], cut: list[bool]) -> list[Array | None]:
    """One array of standard normals for each shape, cut at ±2 where `cut` says so; None for a shape of None.

    All arrays are taken from two draws, which compile several times faster than one for each.
    """
    sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
    keys = jax.random.split(key)
    is_cut = {True: jax.random.truncated_normal(
                  keys[0], -2.0, 2.0, (sum(n for n, c in zip(sizes, cut) if c),)),
              False: jax.random.normal(keys[1], (sum(n for n, c in zip(sizes, cut) if not c),))}
    arrays = []
    for shape, size, c in zip(shapes, sizes, cut):
        values, is_cut[c] = jnp.split(is_cut[c], [size])
        arrays.append(None if shape is None else values.reshape(shape))
    return arrays


# A network of one's own: its weights declared from their shapes at two widths ---------------------------


class Tensor(NamedTuple):
    """What `infer` sees of a weight tensor.

    axes: the (narrow, wide) lengths of each axis that is not stacked. value: the number that all its entries
    are, if they are one. layer: the class of its layer, if that is one of Equinox's own.
    """
    name: str
    axes: tuple[tuple[int, int], ...]
    value: float | None
    layer: str | None

    @property
    def is_flat(self) -> bool:
        """True if at most one axis is longer than 1."""
        return sum(w > 1 for _, w in self.axes) < 2

    @property
    def may_be_gain(self) -> bool:
        """True for a tensor that is one number other than 0, or has the name of a gain."""
        return (bool(self.value) or any(x in self.name for x in ("scale", "gain", "gamma"))
                or len(self.axes) == 1 and self.name == "weight")

    @property
    def is_gain(self) -> bool:
        """True for a flat tensor that may be a gain."""
        return self.is_flat and self.may_be_gain

    @property
    def is_shift(self) -> bool:
        """True for a flat tensor that has the name of a shift."""
        return self.is_flat and any(x in self.name for x in ("shift", "offset", "beta"))


def infer(narrow: Tree, wide: Tree, stacked: Tree = False) -> Tree:
    """Declares a network by its shapes at two widths: two trees of tensors → a tree of `Weight`s like `wide`.

    Tensors are arrays or jax.ShapeDtypeStructs. A matrix is [inputs, outputs] but for Equinox's layers, and where
    the bias beside it tells otherwise: flat dicts of PyTorch's [out, in] matrices are to be declared by hand.
    `kind_of` says how kind and fan_in follow from the axes that grow, `start_of` which tensors begin as
    constants: position embeddings and class tokens are drawn as any input weight. That an embedding is read
    out, too, no shape tells: multiply such logits by rules(parametrization, width)["output"].forward.
    stacked: how many leading axes count layers: a number, or a tree of numbers at the nodes that hold such
    layers, as {"blocks": 1}. Without it a constant leading axis is a convolution's. A Weight in `wide` stands
    for itself. Leaves that are no floating-point tensors, such as functions, counters and random keys, become
    None, as if they had been filtered out.

    Raises ValueError, in one line that names the tensor, for what the shapes leave open.
    """
    def name(path: tuple) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/") or "params"

    def names(path: tuple) -> tuple[str, ...]:  # the same for a dict's keys and a module's fields
        return tuple(name((key,)) for key in path)

    def lies_at(path: tuple, at: tuple[str, ...]) -> bool:
        return names(path)[:len(at)] == at

    def is_weight(x: Any) -> bool:
        return isinstance(x, Weight) or hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.inexact)

    def from_equinox(x: Any) -> bool:
        return type(x).__module__.startswith("equinox.nn") and any(key[:6] == "weight" for key in vars(x))

    flat = jax.tree_util.tree_leaves_with_path
    old, new = ({path: x for path, x in flat(tree) if is_weight(x)} for tree in (narrow, wide))
    stacks = {names(path): k for path, k in flat(stacked)}
    layers = {path: type(x).__name__ for path, x in flat(wide, is_leaf=from_equinox) if from_equinox(x)}
    for at, k in stacks.items():
        if not isinstance(k, int):
            raise ValueError(f'stacked: {k!r} is no number of axes, as in stacked={{"blocks": 1}}')
        if k and not any(lies_at(path, at) for path in new):
            raise ValueError(f"stacked: there are no tensors at {'/'.join(at)}")
    for path in sorted(old.keys() ^ new.keys(), key=name):
        raise ValueError(f"{name(path)}: is not in both networks, which must differ in width alone")
    nodes = {}  # the path of a node of the tree → the tensors right below it, by their paths
    for path, x in new.items():
        a, b = old[path].shape, x.shape
        k = next((k for at, k in stacks.items() if lies_at(path, at)), 0)
        if len(a) != len(b) or not 0 <= k <= len(b) or 0 in a + b or any(n > w for n, w in zip(a[k:], b[k:])):
            raise ValueError(f"{name(path)}: shape {a} cannot grow to {b} with {k:d} stacked axes; give the "
                             "narrow network first, and as `stacked` how many leading axes count layers")
        axes = tuple(zip(a, b))[k:]
        at = path[:-1] if path and getattr(path[-1], "name", "") == "value" else path  # NNX boxes arrays
        nodes.setdefault(at[:-1], {})[path] = Tensor(name(at[-1:]).lower(), axes, common_value(old[path], x),
                                                     layers.get(at[:-1]))
    for at, k in stacks.items():
        if len({x.shape[:k] for path, x in new.items() if lies_at(path, at)}) > 1:
            raise ValueError(f"stacked: the first {k:d} axes of the tensors at {'/'.join(at) or 'the root'} differ; "
                             'name the nodes that hold stacked layers, as in stacked={"blocks": 1}')
    if all(n == w for node in nodes.values() for tensor in node.values() for n, w in tensor.axes):
        raise ValueError("nothing grows from the narrow network to the wide one: give two different widths")
    weights = {path: x for path, x in new.items() if isinstance(x, Weight)}
    for path, tensor, node in [(path, x, node) for node in nodes.values() for path, x in node.items()]:
        beside = [x for at, x in node.items() if at != path]
        try:
            kind, fan_in = ("vector", 1) if path in weights else kind_of(tensor, beside)
        except ValueError as error:
            raise ValueError(f"{name(path)}: {old[path].shape} grows to {new[path].shape}, {error}; declare "
                             "it as a mup.Weight(kind, shape, fan_in) in its place in `wide`") from None
        weights.setdefault(path, Weight(kind, new[path].shape, fan_in, **start_of(tensor, beside)))
    return jax.tree_util.tree_map_with_path(lambda path, _: weights.get(path), wide)


def kind_of(tensor: Tensor, beside: list[Tensor]) -> tuple[str, int]:
    """(kind, fan_in) of a tensor, by its axes that grow and the tensors beside it in the tree's same node.

    An axis that grows is infinite. None, a single axis in all, or the gain or shift of `start_of`: vector. One:
    input if it is an axis of the outputs, output if of the inputs. Two: hidden. The last axis is the outputs',
    all others are the inputs': [in, out], [h, w, in, out], [heads, size, W]. The outputs have several, as in
    [W, heads, size], if a bias [heads, size] stands beside, which is a vector; without one, and unless the last
    two axes are the infinite ones, it must hold for one division of the axes, at both widths, that fan_in =
    fan_out. The outputs come first, [out, in, …], in Equinox's layers, and where the one tensor beside is a
    bias that has the length of the first axis and not of the last. Raises ValueError for what is still open,
    and for what may be a gain of several axes or, by its bias, a stack of layers.
    """
    axes, infinite = tensor.axes, [i for i, (n, w) in enumerate(tensor.axes) if n != w]

    def size(axes: tuple) -> tuple[int, ...]:
        return tuple(math.prod(lengths) for lengths in zip(*axes))

    def called_bias(x: Tensor) -> bool:
        return not x.is_shift and (x.name[0] == "b" or x.name.endswith("_b") or "bias" in x.name
                                   or x.name.isdigit() and len(beside) == 1)

    def is_bias_of(x: Tensor) -> bool:
        first = len(x.axes) - len(axes)
        return first > 0 and x.axes[first:] == axes and (
            called_bias(tensor) or size(x.axes[:first]) == size(axes))

    if axes[1:] == ((1, 1),) and infinite and (tensor.is_gain or tensor.is_shift):
        raise ValueError("which leaves open whether it is a read-out or a gain or shift")
    if (len(axes) < 2 or not infinite or tensor.is_gain or tensor.is_shift
            or tensor.layer and (tensor.name == "bias" or "Norm" in tensor.layer)
            or len(infinite) == 1 and any(map(is_bias_of, beside))):
        return "vector", 1
    if tensor.may_be_gain:
        raise ValueError("which leaves open whether it is a gain of several axes (a vector with constant=1.0)")
    if len(infinite) > 2:
        raise ValueError("which are more than two infinite axes")
    biases = [x.axes for x in beside if called_bias(x)]
    if len(axes) > 2 and 0 not in infinite and axes[0] != (1, 1) and axes[:1] + axes[-1:] in biases:
        raise ValueError("with a bias for each place of its first axis: give `stacked`, if that counts layers")
    if (tensor.layer not in (None, "Embedding")
            or len(beside) == 1 and biases == [axes[:1]] and axes[0] != axes[-1]):
        return ("hidden" if len(infinite) == 2 else "output" if infinite[0] else "input"), size(axes[1:])[1]
    # The inputs' axes are axes[:i], the outputs' axes[i:].
    last = len(axes) - 1
    possible = range(1, last + 1) if len(infinite) == 1 else range(infinite[0] + 1, infinite[1] + 1)
    divisions = ([i for i in possible if axes[i:] in biases] or [last] * (infinite[0] >= last - 1)
                 or [i for i in possible if size(axes[:i]) == size(axes[i:])])
    found = {("hidden" if len(infinite) == 2 else "output" if infinite[0] < i else "input", size(axes[:i])[1])
             for i in divisions}
    if len(found) != 1:
        raise ValueError("which leaves open which axes are the outputs' (of stacked layers: give `stacked`)")
    return found.pop()


def start_of(tensor: Tensor, beside: list[Tensor]) -> dict[str, float]:
    """The std or constant of a tensor's `Weight` where the table's initialisation is not meant.

    Shapes do not tell a gain (1) and a shift (0) from a bias (N(0, 1) in μP). A gain is a vector whose
    entries are one number other than 0, which it keeps, or whose name is "weight" or holds "scale", "gain" or
    "gamma". A shift has a name with "shift", "offset" or "beta", or stands beside a gain of its shape and no
    matrix. Without entries only names tell. Scalars and matrices that do not grow keep a common value, too;
    without one such matrices are N(0, 1/fan_in), and scalars are as biases.
    """
    if tensor.is_gain:
        return {"constant": 1.0 if tensor.value is None else tensor.value}
    if tensor.is_shift or (tensor.is_flat and all(x.is_flat for x in beside)
                           and any(x.is_gain and x.axes == tensor.axes for x in beside)):
        return {"constant": 0.0}
    if len(tensor.axes) == 1 or "bias" in tensor.name or any(n != w for n, w in tensor.axes):
        return {}
    if tensor.value is None and tensor.axes:
        inputs = tensor.axes[:-1] if tensor.layer in (None, "Embedding") else tensor.axes[1:]
        return {"std": math.prod(w for _, w in inputs) ** -0.5}
    return {} if tensor.value is None else {"constant": tensor.value}


def common_value(*tensors: Any) -> float | None:
    """The number that all entries of these tensors are; None if there are several, or none is known."""
    values = set()
    for x in tensors:
        is_known = hasattr(x, "min") and not isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
        if is_known and len(values) < 2:  # a large one is not fetched where a small one has told
            x = jax.device_get(x)
            values |= {float(x.min()), float(x.max())}
    return values.pop() if len(values) == 1 else None


def main() -> None:
    """Prints the rules on an MLP at two widths."""
    for width in (32, 512):
        weights = {"layer_0": matrix("input", 24, width), "layer_1": matrix("hidden", width, width),
                   "logits": matrix("output", width, 10)}
        print(f"An MLP of width {width}: standard deviations as drawn, and multipliers in μP")
        print(f"  {'weight':12}{'kind':8}{'shape':12}{'init SP':>9}{'init μP':>9}{'forward':>10}{'update':>10}")
        in_sp, in_mup = (init(weights, jax.random.key(0), p) for p in (SP, MUP))
        for layer in weights:
            for name, weight in weights[layer].items():
                _, forward, update = rule_of(weight, MUP)
                shape = " × ".join(map(str, weight.shape))
                print(f"  {layer + '/' + name:12}{weight.kind:8}{shape:12}{jnp.std(in_sp[layer][name]):9.4f}"
                      f"{jnp.std(in_mup[layer][name]):9.4f}{forward:10.6f}{update:10.6f}")
        print()
    print("In SP every multiplier is 1. A read-out's forward multiplier applies to its bias, too.")
    print("What μP is for, no layer moving more in a wider network: python tasks.py")


def replace_unprintable() -> None:
    """Lets stdout and stderr print "?" for what they cannot encode, such as θ in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have no such method, and no need of it
            stream.reconfigure(errors="replace")


def prepare_to_print() -> None:
    """For a demonstration: a terminal without Greek letters shows ? for them, and `| head` ends it quietly."""
    replace_unprintable()
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if __name__ == "__main__":
    prepare_to_print()
    main()
