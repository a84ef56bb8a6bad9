"""Quantizes the demo's decoder to 4 bits, as transformers.js' `q4` files are: MatMulNBits, blocks of 32, symmetric.

Reads MODEL/onnx/decoder_model_merged.onnx, writes OUTPUT/decoder_model_merged_q4.onnx.
"""

import argparse
from pathlib import Path

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

BLOCK_SIZE = 32


def quantize(source, target):
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=BLOCK_SIZE, is_symmetric=True)
    quantizer.process()
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(quantizer.model.model, target)
    quantized = sum(node.op_type == "MatMulNBits" for node in onnx.load(target).graph.node)
    print(f"{target.name}: {target.stat().st_size:,} bytes, {quantized} MatMulNBits nodes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("fixtures/demo/model"))
    parser.add_argument("--output", type=Path, default=Path("fixtures/demo/q4"))
    arguments = parser.parse_args()
    name = "decoder_model_merged"
    quantize(arguments.model / "onnx" / f"{name}.onnx", arguments.output / f"{name}_q4.onnx")


if __name__ == "__main__":
    main()
