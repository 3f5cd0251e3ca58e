"""What one meta-step costs on an H100, without having one: run by hand, in an environment with `jax[cuda12]`.

    python tests/aot.py                                     paper-s and paper-m, 30 s each
    python tests/aot.py --settings paper-m --matmul-precision tensorfloat32     any setting, by meta_train.py's flags

The meta-step is compiled ahead of time for the device that H100 describes, and the compiled program is read: nothing is
run, and no figure is a measurement. Of each kernel there is counted how often the loops run it, the bytes that it reads
and writes, and the FLOP of its matrix products. The branch that draws fresh weights, taken when a run begins anew, is
not counted. The roofline time of a kernel is the longer of its bytes at 2.8 TB/s and its FLOP at 50 TFLOP/s (float32;
300 for TF32, a third of that for three products), and 3 µs.
"""

import argparse
import collections
import math
import os
import re
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from benchmark import SETTINGS, meta_step_of, noise  # which also finds our modules
from jax.experimental import topologies
from jax.sharding import Mesh

import meta_train
import tasks

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BANDWIDTH, LAUNCH = 2.8e12, 3e-6  # bytes per second, seconds
FLOP_RATE = {"highest": 50e12, "TF32_TF32_F32_X3": 100e12, "tensorfloat32": 300e12, "bfloat16": 600e12}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
             "replica-id", "opt-barrier", "copy-done", "async-done"}


class Instruction(NamedTuple):
    """A line of a compiled program. shape: its text. operands: names. rest: what follows the operands."""
    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str
    is_root: bool

    def called(self, key: str) -> str | None:
        """The computation that it calls as `key=%name`."""
        found = re.search(key + r"=\{?%?([\w.\-]+)", self.rest)
        return found and found[1]


class Kernel(NamedTuple):
    """times: how often it runs in a meta-step. size: the bytes that it moves. flop: of its matrix products."""
    times: int
    size: int
    flop: int


def dimensions(shape: str) -> list[int]:
    """The axes of the first array of a shape's text, such as "f32[3,4]{1,0}"."""
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def size_of(shape: str) -> int:
    """The bytes of all arrays of a shape's text."""
    return sum(BYTES.get(kind, 0) * math.prod(int(n) for n in axes.split(",") if n)
               for kind, axes in re.findall(r"(\w+)\[([\d,]*)\]", shape))


def up_to_closing(text: str) -> int:
    """Where the bracket that text begins with is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return i
    raise ValueError("a bracket is not closed")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a compiled program, each by the names of its instructions, and the name of the first."""
    computations, entry, body = {}, "", {}
    for line in text.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            body = computations[begins[2]] = {}
            entry = begins[2] if begins[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line):
            rest = found[3]
            end = up_to_closing(rest) + 1 if rest[0] == "(" else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            if called := re.match(r"([\w\-]+)(?=\()", rest):
                rest = rest[called.end():]
                end = up_to_closing(rest)
                operands = re.findall(r"%([\w.\-]+)", rest[:end])
                number = re.match(r"\((\d+)\)", rest)  # of a parameter
                body[found[2]] = Instruction(found[2], shape, called[1], operands or ([number[1]] if number else []),
                                             rest[end + 1:], bool(found[1]))
    return computations, entry


class Program:
    """A compiled program, of which the kernels are counted."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.kernels: list[Kernel] = []
        self.count(self.entry, 1)

    def count(self, name: str, times: int) -> None:
        """Adds the kernels of a computation that runs so many times, with those of the loops in it."""
        body = self.computations[name]
        for x in body.values():
            if x.op in NO_KERNEL or x.op == "conditional":
                continue
            if x.op == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', x.rest)
                self.count(x.called("body"), times * int(trips[1] if trips else 1))
            elif x.op in ("call", "async-start"):
                self.count(x.called("to_apply") or x.called("calls"), times)
            else:
                self.kernels.append(Kernel(times, self.moved(body, x), self.flop_of(body, x)))

    def moved(self, body: dict[str, Instruction], x: Instruction) -> int:
        """The bytes that a kernel reads and writes; of an array that it only takes or changes slices of, those."""
        if x.op == "dynamic-update-slice":
            return 2 * size_of(body[x.operands[1]].shape)
        if x.op in ("dynamic-slice", "slice"):
            return 2 * size_of(x.shape)
        if x.op != "fusion":
            return size_of(x.shape) + sum(size_of(body[o].shape) for o in x.operands if o in body)
        inside = self.computations[x.called("calls")]
        users = collections.defaultdict(list)
        for y in inside.values():
            for o in y.operands:
                users[o].append(y)
        root = next(y for y in inside.values() if y.is_root)
        total, in_place = 0, set()
        for result in [inside[o] for o in root.operands] if root.op == "tuple" else [root]:
            y = result
            while y.op in ("bitcast", "copy", "convert") and y.operands[0] in inside:
                y = inside[y.operands[0]]
            if y.op == "dynamic-update-slice":
                total += size_of(inside[y.operands[1]].shape)
                in_place.add(y.operands[0])
            else:
                total += size_of(result.shape)

        def read(name: str) -> int:
            parts = 0
            for y in users[name]:
                if y.op in ("dynamic-slice", "slice", "gather") and y.operands[0] == name:
                    parts += size_of(y.shape)
                elif y.op == "bitcast":
                    parts += read(y.name)
                elif not (y.op == "dynamic-update-slice" and y.operands[0] == name and name in in_place):
                    return size_of(inside[name].shape)
            return min(parts, size_of(inside[name].shape))

        return total + sum(read(y.name) for y in inside.values() if y.op == "parameter")

    def flop_of(self, body: dict[str, Instruction], x: Instruction) -> int:
        """The FLOP of the matrix products of a kernel, those inside a fusion included."""
        if x.op == "fusion":
            inside = self.computations[x.called("calls")]
            return sum(self.flop_of(inside, y) for y in inside.values())
        contracted = re.search(r"lhs_contracting_dim(?:ension)?s\"?[=:][\{\[]\"?([\d,]*)", x.rest)
        if x.op not in ("dot", "custom-call") or not contracted or x.operands[0] not in body:
            return 0
        left = dimensions(body[x.operands[0]].shape)
        inner = math.prod(left[int(i)] for i in contracted[1].split(",") if i)
        return 2 * inner * math.prod(dimensions(x.shape))


def compiled_meta_step(settings: meta_train.Settings) -> jax.stages.Compiled:
    """The meta-step of these settings on noise of ImageNet's 1,000 classes, compiled for one H100."""
    jax.default_backend = lambda: "gpu"  # what our code asks to choose its fast paths; here JAX runs on the CPU
    device = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]
    tasks.set_up_precision(settings.matmul_precision)
    dataset = noise(settings.image_size or 32, 1000)
    init, meta_step, inner = meta_step_of(settings, dataset, Mesh(np.array([device]), ("pairs",)))
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                             (jax.eval_shape(init), [dataset.train] * len(inner)))
    return meta_step.lower(*arguments).compile()


def report(name: str, settings: meta_train.Settings) -> None:
    """Prints what one meta-step of these settings costs."""
    compiled = compiled_meta_step(settings)
    memory, kernels = compiled.memory_analysis(), Program(compiled.as_text()).kernels
    number = sum(k.times for k in kernels)
    size, flop = sum(k.times * k.size for k in kernels), sum(k.times * k.flop for k in kernels)
    rate = FLOP_RATE[settings.matmul_precision]
    seconds = sum(k.times * (max(k.size / BANDWIDTH, k.flop / rate) + LAUNCH) for k in kernels)
    for what, value in (
            ("temporary memory (arguments)", f"{memory.temp_size_in_bytes / 1e9:.1f} GB "
                                             f"({memory.argument_size_in_bytes / 1e9:.1f})"),
            ("bytes moved", f"{size / 1e9:,.0f} GB"), ("kernels in one inner step", f"{number / settings.truncation:,.0f}"),
            ("FLOP of matrix products", f"{flop / 1e12:.1f} T"), ("roofline time", f"{seconds:.2f} s"),
            (f"{settings.meta_steps:,} meta-steps", f"{settings.meta_steps * seconds / 3600:.1f} h")):
        print(f"{name:>10}, {settings.matmul_precision}  {what:30}{value:>18}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=("paper-s", "paper-m"), default=("paper-s", "paper-m"))
    args, rest = parser.parse_known_args()
    given = tasks.given_flags(meta_train.make_parser().parse_args(rest), meta_train.Settings)
    for name in args.settings:
        report(name, meta_train.Settings(**{"meta_steps": 5000} | SETTINGS[name] | given))


if __name__ == "__main__":
    main()
