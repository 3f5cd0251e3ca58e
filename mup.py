"""μP: the kinds of weights, how each is initialised, and by what it is multiplied.

    python mup.py        shows the rules on an MLP of two widths, and a coordinate check of Adam (20 s)

Every weight tensor of an inner network is declared once, where it is used, as a `Weight` of one of four
*kinds*, told apart by how its fan-in and its fan-out grow with the width n of the network:

    kind    fan_in  fan_out  init in μP            init in SP        forward multiplier  update multiplier
    input   Θ(1)    Θ(n)     N(0, 1/fan_in)*       as in μP          input_mult          1
    hidden  Θ(n)    Θ(n)     N(0, 1/fan_in)*       as in μP          1                   hidden_lr_mult / fan_in
    output  Θ(n)    Θ(1)     0                     N(0, 1/fan_in)*   output_mult/fan_in  1
    vector  -       Θ(n)     bias N(0, 1),         bias 0,           1                   1
                             gain 1, shift 0       gain 1, shift 0

    * cut at two standard deviations σ and not rescaled for the cut, so its standard deviation is 0.88 σ.

Everything else follows from the declarations: `init` draws the weights, `linear` applies a layer with its
forward multiplier, `attention_scale` and `update_multipliers` give the rest. In the standard parametrization
(SP) the same calls give the SP column, and every multiplier is 1. One thing goes beyond μLO, and is off unless a base
width is given: `gradient_multiplier`.

Sources: TP5 (arXiv 2203.03466, its Table 8: μP for Adam) and μLO (arXiv 2406.00153), where the multiplier 1/fan_in
of Adam's learning rate becomes the multiplier of a learned optimizer's update. For ε: arXiv 2407.05872.

Dimensions: B batch, D fan_in of a layer, W fan_out of a layer.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any  # a pytree; here nested dicts whose leaves are arrays, floats or Weights

KINDS = ("input", "hidden", "output", "vector")


class Parametrization(NamedTuple):
    """"mup" or "sp", with the three multipliers that μP leaves to be tuned (SP has none: they stay 1).

    base_width: that of `gradient_multiplier`, 0 for none.
    """
    name: str = "mup"
    input_mult: float | Array = 1.0
    output_mult: float | Array = 1.0
    hidden_lr_mult: float | Array = 1.0
    base_width: int = 0

    @property
    def is_mup(self) -> bool:
        if self.name not in ("mup", "sp"):
            raise ValueError(f"unknown parametrization {self.name!r}: use 'mup' or 'sp'")
        return self.name == "mup"


MUP, SP = Parametrization("mup"), Parametrization("sp")


def parametrization_of(metadata: dict[str, Any]) -> Parametrization:
    """The parametrization, with its multipliers, that θ was meta-trained in, from the metadata of its file."""
    given = {name: metadata[name] for name in Parametrization._fields[1:] if name in metadata}
    return Parametrization(metadata["parametrization"], **given)


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one weight tensor: a leaf of a task's tree of weights.

    kind: one of KINDS. shape: of the tensor. fan_in: how many inputs one of its outputs sums over.
    std, constant: an initialisation that depends neither on the width nor on the parametrization and
    replaces the kind's own: N(0, std²), not truncated, or a constant.
    """
    kind: str
    shape: tuple[int, ...]
    fan_in: int = 1
    std: float | None = None
    constant: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of weight {self.kind!r}: use one of {', '.join(KINDS)}")
        if min((*self.shape, self.fan_in)) < 1:
            raise ValueError(f"a weight needs a positive shape and fan_in, got {self.shape} and {self.fan_in}")


def matrix(kind: str, fan_in: int, fan_out: int) -> dict[str, Weight]:
    """Declares a linear layer of that kind: w [fan_in, fan_out] and its bias b [fan_out]."""
    return {"w": Weight(kind, (fan_in, fan_out), fan_in), "b": Weight("vector", (fan_out,))}


def norm(width: int) -> dict[str, Weight]:
    """Declares a LayerNorm's gain (1) and shift (0), both vectors [width]."""
    return {"gain": Weight("vector", (width,), constant=1.0), "shift": Weight("vector", (width,), constant=0.0)}


def distribution(weight: Weight, parametrization: Parametrization) -> tuple[str, float]:
    """How a tensor is drawn, as the table in this module's docstring says (μP init, SP init).

    ("truncated", σ): N(0, σ²) cut at ±2σ; ("normal", σ): N(0, σ²); ("constant", its value).
    """
    if weight.constant is not None:
        return "constant", weight.constant
    if weight.std is not None:
        return "normal", weight.std
    if weight.kind == "vector":  # a bias: an input weight of fan_in 1
        return ("normal", 1.0) if parametrization.is_mup else ("constant", 0.0)
    if weight.kind == "output" and parametrization.is_mup:
        return "constant", 0.0
    return "truncated", 1.0 / math.sqrt(weight.fan_in)


def init(weights: Tree, key: Array, parametrization: Parametrization) -> Tree:
    """Draws all of a network's weights: a tree of `Weight`s → the same tree of float32 arrays.

    All tensors of one distribution are cut from one draw, which compiles several times faster than one for each.
    """
    declared, treedef = jax.tree.flatten(weights)
    drawn = [distribution(weight, parametrization) for weight in declared]
    sizes = {name: sum(math.prod(w.shape) for w, (n, _) in zip(declared, drawn) if n == name)
             for name in ("truncated", "normal")}
    keys = jax.random.split(key)
    rest = {"truncated": jax.random.truncated_normal(keys[0], -2.0, 2.0, (sizes["truncated"],)),
            "normal": jax.random.normal(keys[1], (sizes["normal"],))}
    params = []
    for weight, (name, scale) in zip(declared, drawn):
        if name == "constant":
            params.append(jnp.full(weight.shape, scale, jnp.float32))
        else:
            flat, rest[name] = jnp.split(rest[name], [math.prod(weight.shape)])
            params.append(scale * flat.reshape(weight.shape))
    return treedef.unflatten(params)


def forward_multiplier(weight: Weight, parametrization: Parametrization) -> float | Array:
    """μP forward multiplier: input_mult for input weights, output_mult/fan_in for output weights, else 1."""
    if not parametrization.is_mup:
        return 1.0
    return {"input": parametrization.input_mult,
            "output": parametrization.output_mult / weight.fan_in}.get(weight.kind, 1.0)


def update_multiplier(weight: Weight, parametrization: Parametrization) -> float | Array:
    """μP update multiplier: hidden_lr_mult/fan_in for hidden weights, else 1. Absolute: no base width."""
    if parametrization.is_mup and weight.kind == "hidden":
        return parametrization.hidden_lr_mult / weight.fan_in
    return 1.0


def update_multipliers(weights: Tree, parametrization: Parametrization) -> Tree:
    """The update multiplier of every weight: a tree of `Weight`s → the same tree of numbers."""
    return jax.tree.map(lambda w: update_multiplier(w, parametrization), weights)


def gradient_multiplier(weights: Tree, parametrization: Parametrization) -> float:
    """By what a learned optimizer's gradients are multiplied: fan_in of the read-out / base_width; 1 without one, or in SP.

    In μP every gradient falls as 1/width, since the logits are multiplied by output_mult/fan_in. The update should not
    change with that, but small_fc_lopt's features have absolute ε, which rule where gradients are small. With this
    multiplier a θ sees in a network of any width gradients as large as at the base width. It is ours, not μLO's; that
    Adam's ε must be scaled with the width, too, is from Everett et al. (arXiv 2407.05872).
    """
    if not (parametrization.is_mup and parametrization.base_width):
        return 1.0
    return max(w.fan_in for w in jax.tree.leaves(weights) if w.kind == "output") / parametrization.base_width


def linear(weights: dict[str, Weight], params: dict[str, Array], x: Array,
           parametrization: Parametrization) -> Array:
    """A linear layer with its forward multiplier c: x [..., D] → [..., W].

    input, hidden: c·(x w) + b;  output: c·(x w + b), since μP scales the logits *with* their bias.
    """
    c = forward_multiplier(weights["w"], parametrization)
    if weights["w"].kind == "output":
        return c * (x @ params["w"] + params["b"])
    return c * (x @ params["w"]) + params["b"]


def attention_scale(d_head: int, parametrization: Parametrization) -> float:
    """By what attention logits q·k are multiplied: 1/d_head in μP, 1/√d_head in SP."""
    return 1.0 / d_head if parametrization.is_mup else 1.0 / math.sqrt(d_head)


# ---------------------------------------------------------------------------------------------------------
# Demonstration

DEPTH, INPUTS, CLASSES, BATCH = 3, 24, 10, 64


def mlp(width: int) -> dict[str, dict[str, Weight]]:
    """An MLP of DEPTH hidden layers, declared."""
    return {"layer_0": matrix("input", INPUTS, width),
            **{f"layer_{i}": matrix("hidden", width, width) for i in range(1, DEPTH)},
            "logits": matrix("output", width, CLASSES)}


def pre_activations(weights: Tree, params: Tree, x: Array, parametrization: Parametrization) -> dict[str, Array]:
    """What each layer puts out before its ReLU: x [B, D] → [B, W] by layer, the last being the logits."""
    out = {}
    for name in weights:
        out[name] = x = linear(weights[name], params[name], x, parametrization)  # (B, W)
        x = jax.nn.relu(x)
    return out


def coordinate_check(width: int, parametrization: Parametrization, learning_rate: float, steps: int,
                     seeds: int) -> dict[str, Array]:
    """RMS, over examples, units and seeds, of the change of each layer's pre-activations in so many Adam steps."""
    weights = mlp(width)
    multipliers = update_multipliers(weights, parametrization)
    teacher = jax.random.normal(jax.random.key(1), (INPUTS, CLASSES))
    probe = jax.random.normal(jax.random.key(2), (BATCH, INPUTS))

    def loss(params, x):
        logits = pre_activations(weights, params, x, parametrization)["logits"]
        at_label = jnp.take_along_axis(logits, jnp.argmax(x @ teacher, axis=1)[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - at_label)

    def adam_step(carry, step_and_key):
        params, m, v = carry
        t, key = step_and_key
        grads = jax.grad(loss)(params, jax.random.normal(key, (BATCH, INPUTS)))
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)

        def move(p, m, v, multiplier):
            return p - learning_rate * multiplier * m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

        return (jax.tree.map(move, params, m, v, multipliers), m, v), None

    @jax.jit
    def run(params, key):
        zeros = jax.tree.map(jnp.zeros_like, params)
        scanned = (1.0 + jnp.arange(steps), jax.random.split(key, steps))
        (trained, _, _), _ = jax.lax.scan(adam_step, (params, zeros, zeros), scanned)
        before, after = (pre_activations(weights, p, probe, parametrization) for p in (params, trained))
        return {name: jnp.mean((after[name] - before[name]) ** 2) for name in weights}

    keys = jax.random.split(jax.random.key(0), seeds)
    squares = [run(init(weights, key, parametrization), key) for key in keys]
    return {name: jnp.sqrt(sum(s[name] for s in squares) / seeds) for name in weights}


def main() -> None:
    """Prints the rules on an MLP at two widths, then a coordinate check of Adam in SP and in μP."""
    for width in (32, 512):
        weights = mlp(width)
        print(f"An MLP of width {width}, as it is initialised (standard deviation) and multiplied:")
        print(f"  {'weight':12}{'kind':8}{'shape':13}{'init SP':>9}{'init μP':>9}{'forward μP':>13}"
              f"{'update μP':>13}")
        in_sp, in_mup = (init(weights, jax.random.key(0), p) for p in (SP, MUP))
        for layer in weights:
            for name, weight in weights[layer].items():
                std_sp, std_mup = (float(jnp.std(params[layer][name])) for params in (in_sp, in_mup))
                shape = " × ".join(map(str, weight.shape))
                print(f"  {layer + '/' + name:12}{weight.kind:8}{shape:13}{std_sp:9.4f}{std_mup:9.4f}"
                      f"{forward_multiplier(weight, MUP):13.6f}{update_multiplier(weight, MUP):13.6f}")
        print()
    print("In SP every multiplier is 1. A read-out's forward multiplier is also applied to its bias.\n")
    widths, steps = (32, 128, 512), 5
    print(f"Coordinate check: RMS change of pre-activations in {steps} steps of Adam, by width; slope in log-log.")
    print("In μP all layers change by as much at any width; in SP, behind the first layer, the wider the more.")
    for parametrization, learning_rate in ((SP, 1e-3), (MUP, 1e-2)):
        checks = [coordinate_check(w, parametrization, learning_rate, steps, seeds=8) for w in widths]
        label = f"{'μP' if parametrization.is_mup else 'SP'}, learning rate {learning_rate:g}"
        print(f"  {label:24}" + "".join(f"{w:9}" for w in widths) + f"{'slope':>9}")
        log_width = jnp.log(jnp.asarray(widths)) - jnp.mean(jnp.log(jnp.asarray(widths)))
        for name in checks[0]:
            change = jnp.stack([check[name] for check in checks])
            slope = jnp.sum(log_width * jnp.log(change)) / jnp.sum(log_width**2)
            print(f"  {name:24}" + "".join(f"{c:9.4f}" for c in change) + f"{slope:+9.2f}")


if __name__ == "__main__":
    main()
