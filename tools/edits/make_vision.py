"""Makes fixtures/edits/vision: vision encoders of fixtures/families in other precisions, by the tools that published folders
were made with (versions: requirements.txt).

    python tools/edits/make_vision.py

  NAME/vision_encoder_fp16.onnx   onnxruntime.transformers' float16 conversion, inputs and outputs kept
  NAME/vision_encoder_int8.onnx   onnxruntime's dynamic quantization, one scale for each matrix
  llava/vision_encoder_q4.onnx    onnxruntime's MatMulNBits, blocks of 16 (which leaves qwen2_5_vl's `Gemm` as they are)
"""

import logging
import shutil
from pathlib import Path

import onnx
import onnxruntime as ort
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

logging.disable(logging.WARNING)
ort.set_default_logger_severity(4)
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
OUT = FIXTURES / "edits/vision"


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for name in ("llava", "qwen2_5_vl"):
        source = FIXTURES / f"families/{name}/model/onnx/vision_encoder.onnx"
        path = lambda variant: OUT / name / f"vision_encoder_{variant}.onnx"  # noqa: E731
        path("fp16").parent.mkdir(parents=True)
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path("fp16"))
        quantize_dynamic(source, path("int8"), op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
        if name == "llava":
            quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=16, is_symmetric=True)
            quantizer.process()
            onnx.save(quantizer.model.model, path("q4"))


if __name__ == "__main__":
    main()
