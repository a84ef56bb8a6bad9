"""Makes fixtures/edits: one model in every precision, and a decoder that was quantized statically.

    python tools/edits/make_fixtures.py MODELS

MODELS holds the exports that tools/exports/README.md describes. The files of tjs-qwen2_vl are copied; the others are made from
its float32 decoder by ONNX Runtime's quantizers (versions: requirements.txt).
"""

import logging
import shutil
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from evidence import feeds, session

logging.disable(logging.WARNING)
ort.set_default_logger_severity(4)
OUT = Path(__file__).resolve().parents[2] / "fixtures/edits"
DECODER = "decoder_model_merged"


class Reader(CalibrationDataReader):
    def __init__(self, source):
        run = session(source)
        self.rows = iter([feeds(run, seed) for seed in range(4)])

    def get_next(self):
        return next(self.rows, None)


def main():
    models = Path(sys.argv[1])
    source = models / "tjs-qwen2_vl"
    shutil.rmtree(OUT, ignore_errors=True)
    siblings = OUT / "qwen2_vl/onnx"
    siblings.mkdir(parents=True)
    shutil.copy(source / "config.json", siblings.parent)
    shutil.copy(source / "onnx/embed_tokens.onnx", siblings)
    for suffix in ("", "_fp16", "_bnb4", "_int8", "_q4", "_q4f16", "_uint8"):
        shutil.copy(source / f"onnx/{DECODER}{suffix}.onnx", siblings)

    # Other ways to quantize the same weights, as single files: no layout has names for them.
    single = OUT / "single"
    single.mkdir()
    full = source / f"onnx/{DECODER}.onnx"
    for name, options in {
        "static_qdq": dict(quant_format=QuantFormat.QDQ),
        "static_qoperator": dict(quant_format=QuantFormat.QOperator),
    }.items():
        quantize_static(
            str(full), str(single / f"{name}.onnx"), Reader(full), op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8, **options,
        )  # fmt: skip
    model = onnx.version_converter.convert_version(onnx.load(str(full)), 21)
    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=False, quant_format=QuantFormat.QDQ)
    quantizer.process()
    onnx.save(quantizer.model.model, str(single / "int4_qdq.onnx"))
    fused = models / "genai-qwen2-int4-fusedgateup"
    (single / "fused").mkdir()
    shutil.copy(fused / "model.onnx", single / "fused")
    shutil.copy(fused / "model.onnx.data", single / "fused")
    for path in OUT.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
