"""
Arithmetic rate of our prefill of 8 images, tower excluded, against the rate of `torch.mm` at the same shapes. The matrix
products of one prefill are counted as they are dispatched, by the rows really computed. Attention's own products are not
counted, though their time is. The rate of `torch.mm` is that of all these products one after another: each shape is timed
alone, and weighted by how often it occurs.

    python -m benchmarks.arithmetic_rate
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import compare, interleave
from benchmarks.report import draw_ratios, write_results
from benchmarks.sides import build_sides, leave_out_tower, make_inputs, prefill


IMAGES, REPEATS, TARGET = 8, 7, 0.8


class CountProducts(TorchDispatchMode):
    """Counts matrix products by their shape: rows, inner size, columns."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            left, right = args[-2:]
            self.shapes[(*left.shape[-2:], right.shape[-1])] += len(left) if left.dim() == 3 else 1
        return function(*args, **(kwargs or {}))


def compare_rates(ours, images: int = IMAGES, repeats: int = REPEATS) -> list[dict]:
    inputs = leave_out_tower(ours, make_inputs(ours, images))
    with CountProducts() as counted:
        prefill(ours, inputs)
    flops = sum(2 * rows * inner * columns * count for (rows, inner, columns), count in counted.shapes.items())
    sides = {"prefill": lambda: prefill(ours, inputs)}
    for rows, inner, columns in counted.shapes:
        # As in nn.Linear: the weight is stored with a row for each column of the result
        left, right = torch.randn(rows, inner), torch.randn(columns, inner).t()
        sides[rows, inner, columns] = lambda left=left, right=right: torch.mm(left, right)
    seconds = interleave(sides, repeats, warmups=2)
    of_products = [
        sum(seconds[shape][repeat] * count for shape, count in counted.shapes.items()) for repeat in range(repeats)
    ]
    print("| rows × inner × columns | times | GFLOP/s of torch.mm |\n|---|---|---|")
    for (rows, inner, columns), count in counted.shapes.items():
        rate = 2e-9 * rows * inner * columns / sorted(seconds[rows, inner, columns])[repeats // 2]
        print(f"| {rows} × {inner} × {columns} | {count} | {rate:.0f} |")
    rates = ([1e-9 * flops / one for one in times] for times in (seconds["prefill"], of_products))
    claim = f"arithmetic rate of the prefill of {images} images, against torch.mm at its shapes"
    return [compare(claim, *rates, TARGET, "GFLOP/s")]


def main():
    ours, _ = build_sides()
    results = compare_rates(ours)
    write_results("arithmetic_rate", results)
    draw_ratios("arithmetic_rate", results)


if __name__ == "__main__":
    main()
