#![no_main]

kvw_fuzz::target!("signatures_sums_and_keys");
