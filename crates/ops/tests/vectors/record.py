"""Records what torch gives: the reference that this crate's tests compare with.

    uv venv /tmp/vectors && uv pip install --python /tmp/vectors/bin/python torch==2.15.0 numpy
    /tmp/vectors/bin/python crates/ops/tests/vectors/record.py

writes vectors.bin beside this file. Its format: the length of the header as u64 (little-endian), the header (JSON), and the bytes of
all tensors, one after the other. A tensor in the header is {"d": dtype, "s": shape, "at": first byte}, with "t": strides and
"o": offset, in elements, and "n": elements of its storage, if it is a view. The planes of exhaustive casts are [first byte, length] of
pairs of a count (u16) and a value (u8).
"""

import itertools
import json
import math
import pathlib
import random
import struct

import torch

torch.manual_seed(0)
random.seed(0)

DTYPES = {
    "bool": torch.bool, "u8": torch.uint8, "i8": torch.int8, "u16": torch.uint16, "i16": torch.int16, "u32": torch.uint32,
    "i32": torch.int32, "u64": torch.uint64, "i64": torch.int64, "f16": torch.float16, "bf16": torch.bfloat16,
    "f32": torch.float32, "f64": torch.float64, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "c64": torch.complex64, "c128": torch.complex128,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INTEGERS = ["u8", "i8", "i16", "i32", "i64"]
REALS = ["f16", "bf16", "f32", "f64"]

blob = bytearray()


def put(data):
    at = len(blob)
    blob.extend(data)
    return at


def raw(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def tensor(value):
    """A tensor, as a view of its storage if it is one."""
    entry = {"d": NAMES[value.dtype], "s": list(value.shape)}
    if value.is_contiguous():
        return entry | {"at": put(raw(value))}
    span = value.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    base = torch.as_strided(value, (span,), (1,), 0)
    return entry | {"t": list(value.stride()), "o": value.storage_offset(), "n": span, "at": put(raw(base))}


def runs(data):
    """Bytes as counts and values: steps of a function that is constant over ranges."""
    out = bytearray()
    for value, group in itertools.groupby(data):
        count = len(list(group))
        while count:
            part = min(count, 65535)
            out += struct.pack("<HB", part, value)
            count -= part
    return [put(out), len(out)]


def arg(value):
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, torch.dtype):
        return {"dtype": NAMES[value]}
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return {"tensors": [tensor(item) for item in value]}
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, str):
        return {"text": value}
    return list(value) if isinstance(value, tuple) else value


# ---- casts ------------------------------------------------------------------------------------------------------------------------

def bits(dtype, width):
    whole = torch.arange(1 << width, dtype=torch.int32)
    return whole.to({8: torch.uint8, 16: torch.int16}[width]).view(dtype)


def planes(value):
    """The bytes of elements, those of one place together: so runs are long."""
    size = value.element_size()
    data = raw(value)
    return [runs(data[place::size]) for place in range(size)]


def boundaries(target, width):
    """f32 beside every point where the code changes: the middle of two neighbours, the next numbers, and the codes."""
    codes = bits(target, width).to(torch.float32)
    codes = codes[torch.isfinite(codes)].unique()
    middles = (codes[1:].double() + codes[:-1].double()).div(2).float()
    points = torch.cat([codes, middles, torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])])
    if width == 16:
        points = points[torch.randperm(len(points))[:1500]]
    up, down = torch.full_like(points, math.inf), torch.full_like(points, -math.inf)
    return torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down)])


def casts():
    exhaustive = []
    for source, width in [("f8e4m3", 8), ("f8e5m2", 8), ("bf16", 16), ("f16", 16)]:
        for target in ["f8e4m3", "f8e5m2", "f16", "bf16", "f32", "bool"]:
            # Of 16 bits those casts that round: to f32 they are exact, and long to record.
            if source != target and (width == 8 or target not in ("f32", "bool")):
                value = bits(DTYPES[source], width).to(DTYPES[target])
                exhaustive.append({"from": source, "to": target, "planes": planes(value)})
    edges = []
    for target, width in [("f8e4m3", 8), ("f8e5m2", 8), ("bf16", 16), ("f16", 16)]:
        points = boundaries(DTYPES[target], width)
        edges.append({"source": tensor(points), "result": tensor(points.to(DTYPES[target]))})
    pairs = []
    for source, target in itertools.product(DTYPES, DTYPES):
        # Numbers that every target holds the integer part of; out of range, torch's result depends on the machine.
        values = torch.tensor([0, 1, 2, 3.5, 7.25, 20, 100, 112] if target != "bool" else [0, 1, 2, 0.25, -0.0, 5, 100, 0])
        if source == "bool":
            values = values != 0
        elif DTYPES[source].is_complex:
            values = torch.complex(values, values.flip(0))
        value = values.to(DTYPES[source])
        pairs.append({"source": tensor(value), "result": tensor(value.to(DTYPES[target]))})
    wrap = torch.tensor([-1, 255, 256, -129, 65537, 2**40 + 7, -(2**33)])
    for target in INTEGERS + ["u16", "u32", "u64", "f16", "bf16", "f32"]:
        pairs.append({"source": tensor(wrap), "result": tensor(wrap.to(DTYPES[target]))})
    return {"exhaustive": exhaustive, "edges": edges, "pairs": pairs}


# ---- promotion --------------------------------------------------------------------------------------------------------------------

def result_type(*operands):
    try:
        # farcall has no complex number of two f16: the next wider one stands for it.
        return NAMES.get(torch.result_type(*operands), "c64")
    except RuntimeError:
        return None


def promotions():
    rows = []
    for first, second in itertools.product(DTYPES, DTYPES):
        a, b = torch.ones(2, dtype=DTYPES[first]), torch.ones(2, dtype=DTYPES[second])
        rows.append([first, second, result_type(a, b), result_type(a, b[0])])
    numbers = [[name, *(result_type(torch.ones(2, dtype=dtype), number) for number in (True, 1, 1.0))]
               for name, dtype in DTYPES.items()]
    return {"tensors": rows, "numbers": numbers}


# ---- operators --------------------------------------------------------------------------------------------------------------------

def draw(shape, dtype, low=-3.0, high=3.0):
    dtype = DTYPES.get(dtype, dtype)
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point:
        return (torch.rand(shape) * (high - low) + low).to(dtype)
    if dtype == torch.uint8 or not dtype.is_signed:
        low = max(low, 0)
    return torch.randint(int(low), int(high) + 1, shape).to(dtype)


def view(value):
    """The same elements, now and then as a view: transposed, every second, or repeated."""
    way = random.randrange(5)
    if way == 0 and value.dim() >= 2:
        order = random.sample(range(value.dim()), value.dim())
        back = [order.index(dim) for dim in range(value.dim())]
        return value.permute(order).contiguous().permute(back)
    if way == 1 and value.dim() >= 1 and value.shape[-1] > 0:
        wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1] + 1, dtype=value.dtype)
        wide[..., 1::2] = value
        return wide[..., 1::2]
    if way == 2 and value.dim() >= 1 and value.shape[0] > 1:
        return value[:1].expand(value.shape)
    return value


def shapes(count=2):
    """Shapes that broadcast to each other."""
    full = [random.choice([1, 2, 3, 4, 5]) for _ in range(random.randrange(0, 4))]
    if random.random() < 0.06 and full:
        full[random.randrange(len(full))] = 0
    out = []
    for _ in range(count):
        shape = [1 if random.random() < 0.25 else size for size in full]
        out.append(shape[random.randrange(len(shape) + 1) if random.random() < 0.25 else 0:])
    return out


def shape(low=0, high=3):
    return [random.choice([1, 2, 3, 4, 5, 7]) for _ in range(random.randrange(low, high + 1))]


cases = []


def record(name, *args, tolerance=None):
    """Runs one overload; its error counts as a result too."""
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, base), overload or "default")
    entry = {"op": str(op._schema).split("(")[0]}
    names = [argument.name for argument in op._schema.arguments]
    keywords = {argument.name for argument in op._schema.arguments if argument.kwarg_only}
    filled = [args[index] if index < len(args) else argument.default_value
              for index, argument in enumerate(op._schema.arguments)]
    # Before the call: a result may be a view.
    entry["args"] = [arg(value) for value in filled]
    try:
        positional = [value for name, value in zip(names, filled) if name not in keywords]
        keyword = {name: value for name, value in zip(names, filled) if name in keywords}
        result = op(*positional, **keyword)
    except (RuntimeError, IndexError, ZeroDivisionError, NotImplementedError) as error:
        entry["error"] = str(error).split("\n")[0][:80]
    else:
        results = result if isinstance(result, (list, tuple)) else [result]
        entry["results"] = [tensor(item.contiguous()) for item in results]
    if tolerance is not None:
        entry["tolerance"] = tolerance
    schemas[entry["op"]] = str(op._schema)
    cases.append(entry)


schemas = {}
SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, 0.5, 2.5, -2.5, 3e38])


def elementwise():
    arithmetic = INTEGERS + REALS + ["bool"]
    for name in ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum", "minimum"]:
        for dtype in arithmetic:
            a, b = shapes()
            record(name, view(draw(a, dtype)), view(draw(b, dtype)))
        for _ in range(8):
            a, b = shapes()
            record(name, view(draw(a, random.choice(arithmetic))), view(draw(b, random.choice(arithmetic))))
        record(name, SPECIAL.unsqueeze(0), SPECIAL.unsqueeze(1))
        record(name, draw([2, 3], "f32"), draw([4], "f32"))
    top = torch.tensor([127, -128, 100, -1], dtype=torch.int8)
    for name in ["add.Tensor", "sub.Tensor", "mul.Tensor"]:
        record(name, top, top.flip(0))
    for name in ["add.Tensor", "sub.Tensor"]:
        for dtype, alpha in [("f32", 0.5), ("i32", 3), ("i32", 0.5), ("bf16", 2), ("f64", -1.5)]:
            record(name, draw([3, 2], dtype), draw([2], dtype), alpha)
    for name in ["add.Scalar", "sub.Scalar", "rsub.Scalar", "mul.Scalar", "div.Scalar"]:
        for dtype, number in itertools.product(["u8", "i64", "f16", "bf16", "f32", "f64", "bool"], [3, 0.7]):
            record(name, view(draw(shape(), dtype)), number)
    for mode in ["trunc", "floor", None]:
        for dtype in INTEGERS + REALS:
            b = draw([4, 5], dtype, -4, 4)
            b[b == 0] = 3
            record("div.Tensor_mode", draw([4, 5], dtype, -9, 9), b, mode)
            record("div.Scalar_mode", draw([6], dtype, -9, 9), 2, mode)
        record("div.Tensor_mode", SPECIAL.unsqueeze(0), SPECIAL.unsqueeze(1), mode)
        record("div.Tensor_mode", torch.tensor([1, 2]), torch.tensor([1, 0]), mode)
    for dtype in ["u8", "i32", "i64", "f16", "f32", "f64"]:
        a, b = shapes()
        record("pow.Tensor_Tensor", view(draw(a, dtype, 0, 4)), view(draw(b, dtype, -2 if dtype[0] == "f" else 0, 3)))
        for exponent in [0, 1, 2, 3, 0.5, 2.0, -1.0, 1.7]:
            record("pow.Tensor_Scalar", draw([5], dtype, 0, 4), exponent)
        record("pow.Scalar", 2, view(draw(shape(), dtype, 0, 4)))
        record("pow.Scalar", 1.5, view(draw(shape(), dtype, 0, 4)))
    record("pow.Tensor_Tensor", torch.tensor([1, -1, 2, -1, 0]), torch.tensor([-3, -3, -1, -2, 0]))
    record("pow.Tensor_Scalar", torch.tensor([1, 2]), -1)
    for name in ["neg", "abs", "sign", "exp", "log", "sqrt", "tanh", "sigmoid", "relu"]:
        for dtype in INTEGERS + REALS + ["bool"]:
            record(name, view(draw(shape(), dtype, 0.1 if name in ("log", "sqrt") else -3, 3)))
        record(name, SPECIAL)
    for approximate in ["none", "tanh"]:
        for dtype in REALS:
            record("gelu", view(draw(shape(), dtype)), approximate)
        # torch's error function is an approximation, and its gelu of infinity is NaN.
        record("gelu", torch.tensor([0.0, 5.0, -5.0, 30.0, -30.0, math.nan]), approximate)
    for name in ["eq", "ne", "lt", "le", "gt", "ge"]:
        for _ in range(6):
            a, b = shapes()
            first, second = random.choice(arithmetic), random.choice(arithmetic)
            record(name + ".Tensor", view(draw(a, first, -1, 1)), view(draw(b, second, -1, 1)))
        record(name + ".Tensor", SPECIAL.unsqueeze(0), SPECIAL.unsqueeze(1))
        for dtype, number in [("i64", 0.5), ("f32", 0), ("bf16", 1.0), ("bool", True), ("u8", 2)]:
            record(name + ".Scalar", view(draw(shape(), dtype, -2, 2)), number)
    for _ in range(10):
        c, a, b = shapes(3)
        first, second = random.choice(arithmetic), random.choice(arithmetic)
        record("where.self", view(draw(c, "bool")), view(draw(a, first)), view(draw(b, second)))
        record("where.ScalarOther", view(draw(c, "bool")), view(draw(a, first)), 1.5)
        record("where.ScalarSelf", view(draw(c, "bool")), 2, view(draw(a, second)))
    record("where.Scalar", draw([4], "bool"), 1.5, 0.5)


def reductions():
    def dims(rank):
        chosen = random.sample(range(rank), random.randrange(0, rank + 1)) if rank else []
        return [dim - rank if random.random() < 0.3 else dim for dim in chosen]

    for dtype in INTEGERS + REALS + ["bool"]:
        for name in ["sum.dim_IntList", "mean.dim", "amax", "amin"]:
            for _ in range(3):
                value = view(draw(shape(), dtype))
                record(name, value, dims(value.dim()), random.random() < 0.5)
        for name in ["sum", "mean", "max", "min"]:
            record(name, view(draw(shape(), dtype)))
        for name in ["max.dim", "min.dim"]:
            value = view(draw(shape(1, 3), dtype))
            record(name, value, random.randrange(-value.dim(), value.dim()), random.random() < 0.5)
        for name in ["argmax", "argmin"]:
            value = view(draw(shape(1, 3), dtype))
            record(name, value, random.choice([None, *range(value.dim())]), random.random() < 0.5)
    for size in [(3000,), (40, 130), (130, 40), (5, 200, 3)]:
        value = draw(size, "f32")
        record("sum", value, tolerance=1e-5)
        record("sum.dim_IntList", value, [0], tolerance=1e-5)
        record("mean.dim", value, [-1], tolerance=1e-5)
        record("argmax", value, 0)
        record("amin", value, [0])
    for dtype in ["i32", "f32"]:
        empty = torch.zeros(0, 3, dtype=DTYPES[dtype])
        for name in ["sum.dim_IntList", "mean.dim", "amax"]:
            record(name, empty, [0])
            record(name, empty, [1])
        record("argmax", empty, 0)
        record("max.dim", empty, 0)
        record("sum", empty)
        record("max", empty)
    for name in ["max.dim", "min.dim", "argmax"]:
        record(name, torch.tensor([[1.0, math.nan, 3.0, math.nan], [2.0, 2.0, -1.0, -1.0]]), 1)
        record(name, torch.tensor(3.0), 0)
    record("amax", torch.tensor([1.0, math.nan]), [])
    record("sum.dim_IntList", draw([2, 2], "f32"), [0, 0])
    record("sum.dim_IntList", draw([2, 2], "f32"), [2])
    record("sum.dim_IntList", draw([2, 2], "f32"), None)
    record("sum", draw([7], "f16"), torch.float32)
    record("sum", draw([7], "i8"), torch.float64)
    record("mean", draw([7], "i8"), torch.float32)
    for dtype in REALS:
        for order in [2, 1, 0, math.inf, -math.inf, 3, 0.5, 2.5]:
            value = view(draw(shape(1, 3), dtype))
            record("linalg_vector_norm", value, float(order), [random.randrange(value.dim())], random.random() < 0.5)
        record("norm.Scalar", view(draw(shape(), dtype)))
    for name in ["softmax.int", "log_softmax.int"]:
        for dtype in REALS:
            for _ in range(3):
                value = view(draw(shape(1, 3), dtype, -8, 8))
                record(name, value, random.randrange(-value.dim(), value.dim()))
        record(name, torch.tensor(3.0), 0)
        record(name, torch.tensor([[1e4, 0.0, -1e4], [88.0, 89.0, 90.0]]), 1)
        record(name, draw([2, 3], "f16"), 1, torch.float32)
        record(name, draw([2, 3], "i64"), 1)
        record(name, draw([2, 3], "i64"), 1, torch.float32)
        record(name, torch.zeros(0, 3), 0)
    for dtype, reduction in itertools.product(["f32", "f64"], [0, 1, 2]):
        scores = torch.log_softmax(draw([6, 5], dtype), 1)
        target = torch.tensor([0, 4, 2, 2, 1, 3])
        record("nll_loss", view(scores), target, None, reduction)
        record("nll_loss", scores, target, draw([5], dtype, 0.5, 2), reduction)
        record("nll_loss", scores, target, draw([5], dtype, 0.5, 2), reduction, 2)
    record("nll_loss", scores[0], torch.tensor(3), None, 1)
    record("nll_loss", scores, torch.tensor([0, 5, 2, 2, 1, 3]), None, 1)
    record("nll_loss", scores, torch.tensor([0, 2]), None, 1)


def products():
    for dtype in INTEGERS + REALS:
        for a, b in [([3, 4], [4, 5]), ([4], [4]), ([2, 3], [3]), ([3], [3, 2]), ([2, 3, 4], [4, 5]), ([2, 3, 4], [2, 4, 5]),
                     ([3, 4], [2, 4, 5]), ([2, 1, 3, 4], [3, 4, 2]), ([4], [2, 4, 3]), ([2, 3, 4], [4]), ([0, 3], [3, 2]),
                     ([2, 0], [0, 3])]:
            if dtype in ("f32", "f64", "i64") or random.random() < 0.3:
                record("matmul", view(draw(a, dtype)), view(draw(b, dtype)))
        record("mm", view(draw([2, 3], dtype)), view(draw([3, 4], dtype)))
    record("bmm", view(draw([2, 3, 4], "f32")), view(draw([2, 4, 3], "f32")))
    record("bmm", draw([1, 3, 4], "f32"), draw([2, 4, 3], "f32"))
    record("mv", view(draw([3, 4], "f64")), view(draw([4], "f64")))
    record("dot", view(draw([5], "f32")), view(draw([5], "f32")))
    record("addmm", draw([4], "f32"), draw([3, 2], "f32"), draw([2, 4], "f32"), 0.5, 2)
    record("addmm", draw([3, 1], "f64"), draw([3, 2], "f64"), draw([2, 4], "f64"))
    record("mm", draw([2, 3], "f32"), draw([2, 3], "f32"))
    record("mm", draw([2, 3], "f32"), draw([3, 2], "f64"))
    record("matmul", torch.tensor(1.0), draw([2], "f32"))
    record("matmul", draw([40, 70], "f32"), draw([70, 50], "f32"), tolerance=1e-5)


def layouts():
    for dtype in DTYPES:
        value = draw([3, 4, 5], "f32").to(torch.complex64).to(DTYPES[dtype]) if dtype in ("c64", "c128") else \
            draw([3, 4, 5], "f32", 0, 3).to(DTYPES[dtype])
        record("clone", view(value))
        record("transpose.int", value, 0, -1)
        if dtype not in ("u16", "u32", "u64"):
            record("cat", [value, view(value)], random.randrange(-3, 3))
        record("index_select", view(value), 1, torch.tensor([3, 0, 3]))
    for _ in range(25):
        value = view(draw(shape(1, 3), "f32"))
        dim = random.randrange(-value.dim(), value.dim())
        bound = lambda: random.choice([None, *range(-9, 10)])
        record("slice.Tensor", value, dim, bound(), bound(), random.choice([1, 1, 2, 3, 100]))
        record("select.int", value, dim, random.randrange(-4, 4))
        record("unsqueeze", value, random.randrange(-value.dim() - 1, value.dim() + 1))
        record("squeeze.dim", value, dim)
        order = random.sample(range(value.dim()), value.dim())
        record("permute", value, order)
        record("reshape", value, random.choice([[-1], [value.numel()], [1, -1], [*value.shape[::-1]], [value.numel() + 1]]))
        record("expand", value, [2, *value.shape])
        record("flatten.using_ints", value)
        record("index_select", value, dim, torch.tensor([0, 0, value.shape[dim] - 1], dtype=random.choice([torch.int64, torch.int32])))
        record("stack", [value, value * 2], random.randrange(-value.dim() - 1, value.dim() + 1))
    record("slice.Tensor", draw([4], "f32"), 0, 0, 4, 0)
    record("view", draw([2, 3], "f32").t(), [6])
    record("view", draw([2, 3], "f32"), [3, -1])
    record("t", draw([2, 3], "f32"))
    record("t", draw([2, 3, 1], "f32"))
    record("expand", draw([3], "f32"), [2, -1])
    record("expand", draw([3], "f32"), [2])
    record("permute", draw([2, 3], "f32"), [0, 0])
    record("cat", [draw([2, 3], "f32"), torch.zeros(0), draw([1, 3], "f64")], 0)
    record("cat", [draw([2], "i8"), draw([3], "u8"), draw([1], "bool")], 0)
    record("cat", [draw([2, 3], "f32"), draw([2, 4], "f32")], 0)
    record("cat", [torch.tensor(1.0), torch.tensor(2.0)], 0)
    record("stack", [torch.tensor(1.0), torch.tensor(2.0)], 0)
    record("stack", [draw([2], "f32"), draw([3], "f32")], 0)
    record("index_select", draw([3, 2], "f32"), 0, torch.tensor([3]))
    record("index_select", draw([3, 2], "f32"), 0, torch.tensor([-1]))
    record("index_select", torch.tensor(2.0), 0, torch.tensor([0]))
    for dtype in DTYPES.values():
        record("full", [2, 3], 2.5 if not dtype == torch.bool else True, dtype)
        record("zeros", [2], dtype)
        record("ones", [2], dtype)
        if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            record("fill.Scalar", torch.zeros(3, dtype=dtype), 3)
    record("full", [2], 7)
    record("full", [2], True)
    record("full", [], 0.1)
    record("full", [-1], 0.1)
    record("to.dtype", draw([2, 3], "f32"), torch.bfloat16)
    record("to.dtype", draw([2, 3], "f32"), torch.float32, False, True)


# ---- optimisers -------------------------------------------------------------------------------------------------------------------

def optimisers():
    out = []
    ways = [
        ("sgd", {"lr": 0.1}), ("sgd", {"lr": 0.1, "weight_decay": 0.05}), ("sgd", {"lr": 0.1, "momentum": 0.9}),
        ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
        ("sgd", {"lr": 0.1, "momentum": 0.8, "nesterov": True}), ("adam", {"lr": 0.01}),
        ("adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}), ("adamw", {"lr": 0.01}),
        ("adamw", {"lr": 0.05, "weight_decay": 0.2}),
    ]
    for (kind, options), dtype in itertools.product(ways, ["f32", "f64"]):
        params = [torch.nn.Parameter(draw(size, dtype)) for size in [(5, 3), (7,), ()]]
        entry = {"kind": kind, "options": {key: str(value) for key, value in options.items()},
                 "params": [tensor(param.detach()) for param in params], "steps": []}
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
        optimiser = make(params, foreach=False, **options)
        for step in range(5):
            grads = [None if step == 1 and index == 1 else draw(param.shape, dtype) for index, param in enumerate(params)]
            for param, grad in zip(params, grads):
                param.grad = grad
            optimiser.step()
            entry["steps"].append({"grads": [None if grad is None else tensor(grad) for grad in grads],
                                   "params": [tensor(param.detach().clone()) for param in params]})
        out.append(entry)
    return out


def main():
    header = {"torch": torch.__version__.split("+")[0], "casts": casts(), "promotion": promotions()}
    elementwise()
    reductions()
    products()
    layouts()
    header |= {"cases": cases, "schemas": schemas, "optimisers": optimisers()}
    text = json.dumps(header, separators=(",", ":")).encode()
    path = pathlib.Path(__file__).with_name("vectors.bin")
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)
    errors = sum("error" in case for case in cases)
    print(f"{len(cases)} cases, {errors} of them errors, {len(text)} bytes of header, {len(blob)} bytes of tensors")


main()
