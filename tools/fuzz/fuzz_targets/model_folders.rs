#![no_main]

kvw_fuzz::target!("model_folders");
