#![no_main]

kvw_fuzz::target!("ready_made_inputs");
