#![no_main]

kvw_fuzz::target!("evaluations_sweeps_and_receipts");
