"""What rounding costs: bits a code of held-out pictures in fp32, in bf16 and with 8-bit weights.

    python benchmarks/eight_bit_weights.py runs/demo/stage2 runs/demo/codes [--split validation]

MODEL is a trained pipeline, DATA what `taming ar eval` takes. Weights are rounded as for sampling. "read as
8 bits" is the kernel of up to four rows, "widened" is what more rows use.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import print_table
from stage2_ar import ARPipeline
from stage2_ar.evaluate import evaluate_pipeline, open_data
from stage2_ar.sampling.inference import Weights, for_inference

CONTENDERS: dict[str, tuple[torch.dtype, int, Weights]] = {
    "fp32": (torch.float32, 1, "full"),
    "bf16": (torch.bfloat16, 8, "full"),
    "8 bits, widened": (torch.float32, 8, "int8"),
    "8 bits, read as 8 bits": (torch.float32, 1, "int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--split", default="validation")
    arguments = parser.parse_args()
    pipe = ARPipeline.from_pretrained(arguments.model)
    dataset = open_data(pipe, arguments.data, arguments.split)
    whole = pipe.model.transformer
    rows, exact = [], None
    for name, (dtype, count, weights) in CONTENDERS.items():
        pipe.model.transformer = for_inference(whole, dtype, count, weights)
        bits = evaluate_pipeline(pipe, dataset)["bits_per_code"]
        exact = bits if exact is None else exact
        rows.append([name, f"{bits:.4f}", f"{bits - exact:+.4f}", f"{100 * (bits / exact - 1):+.2f} %"])
    parameters = sum(parameter.numel() for parameter in whole.parameters()) / 1e6
    title = f"{arguments.model}, {parameters:.1f} M parameters, {len(dataset)} pictures"
    print_table(title, ["", "bits a code", "change", ""], rows)


if __name__ == "__main__":
    main()
