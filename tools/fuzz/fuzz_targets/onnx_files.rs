#![no_main]

kvw_fuzz::target!("onnx_files");
