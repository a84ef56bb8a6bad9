#![no_main]

kvw_fuzz::target!("jsonl");
